"""Label conventions: which integer in a mask means which tissue. Always named by the user, never guessed.

The values alone cannot tell: MSD and BraTS 2023 both use 0 to 3 with 1 and 2 swapped in meaning, and a wrong
guess silently corrupts the tumour core. Sources: `dataset.json` of MSD Task01 and the BraTS data
descriptions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitpeer.errors import DataError

REGIONS = ("WT", "TC", "ET")
"""Order of the channels everywhere: whole tumour, tumour core, enhancing tumour."""


ROUNDING = 1e-3
"""A value this close to a whole number is meant to be it."""


@dataclass(frozen=True)
class Convention:
    """The mask value of each tissue; 0 is background in all conventions."""

    necrosis: int
    edema: int
    enhancing: int

    @property
    def values(self) -> tuple[int, ...]:
        """Every value a mask of this convention may hold, ascending."""
        return tuple(sorted((0, self.necrosis, self.edema, self.enhancing)))

    @property
    def region_values(self) -> tuple[tuple[int, ...], ...]:
        """The values that make up WT, TC and ET, in that order."""
        core = (self.necrosis, self.enhancing)
        return ((*core, self.edema), core, (self.enhancing,))

    def __str__(self) -> str:
        return f"0 background, {self.edema} edema, {self.necrosis} necrotic core, {self.enhancing} enhancing"


CONVENTIONS = {
    "msd": Convention(edema=1, necrosis=2, enhancing=3),
    "brats": Convention(necrosis=1, edema=2, enhancing=4),  # 2017 to 2021; 3 is unused
    "brats2023": Convention(necrosis=1, edema=2, enhancing=3),  # GLI, 2023 and later
    "nnunet": Convention(edema=1, necrosis=2, enhancing=3),  # nnU-Net's conversion of BraTS: 1->2, 2->1, 4->3
}


def convention(name: str) -> Convention:
    """The convention called `name`. Raises DataError for a name that is not in the table."""
    try:
        return CONVENTIONS[name]
    except KeyError:
        raise DataError(f"unknown label convention {name!r}: name one of {', '.join(CONVENTIONS)}") from None


def whole(labels: np.ndarray) -> tuple[np.ndarray, float]:
    """The mask with values within `ROUNDING` of a whole number rounded, and how far the furthest of them was off.

    Resampling, and scaling by a header's slope, turn 3 into 2.9999998.
    """
    if labels.dtype.kind != "f":
        return labels, 0.0
    rounded = np.rint(labels)
    off = np.abs(labels - rounded)
    near = off <= ROUNDING
    return np.where(near, rounded, labels), float(off[near].max(initial=0.0))


def shown(value: float) -> str:
    """A mask value with all the digits that tell it from its neighbours: 3, 2.998."""
    return np.format_float_positional(np.float32(value), trim="-")


def regions(labels: np.ndarray, name: str) -> np.ndarray:
    """The overlapping regions of a mask.

    `labels`: whole numbers, or nearly (see `whole`), of any numeric dtype and shape. Returns uint8 [3, *shape] of 0
    and 1: WT, TC, ET. Raises DataError where a value is not a whole number or not in convention `name`.
    """
    rule = convention(name)
    labels, _ = whole(labels)
    strange = np.setdiff1d(np.unique(labels), rule.values)
    if strange.size:
        named = ", ".join(map(shown, strange[:5].tolist())) + (", ..." if strange.size > 5 else "")
        raise DataError(
            f"label value(s) {named} are not in convention {name!r} ({rule}): "
            f"name the convention these masks follow ({', '.join(CONVENTIONS)}) or correct the mask"
        )
    out = np.empty((3, *labels.shape), np.uint8)
    for channel, values in enumerate(rule.region_values):
        out[channel] = np.isin(labels, values)
    return out
