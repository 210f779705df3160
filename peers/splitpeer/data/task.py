"""What is segmented: the values of the masks with their names, and the regions made of them.

A task is a value: it knows no file and no torch. The preset `glioma` gets its values from one of the conventions
that tumour masks follow, since the same regions are written in different numbers; any other task names its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from splitpeer.errors import DataError

BACKGROUND = 0
MAX_VALUE = 65535
MAX_REGIONS = 32
THRESHOLD = 0.5
"""An overlapping region holds the voxels whose probability is above this."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,23}", re.ASCII)
"""Longest name of a region: it heads columns, and names figures on the wire."""
VALUE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _-]{0,23}", re.ASCII)
RESERVED = frozenset({"background", "level", "mean", "missing", "modalities", "step", "unit", "volumes"})
"""Names that tables and logs use next to those of regions."""


@dataclass(frozen=True)
class Region:
    """A part of the patient: a name and the mask values that make it up."""

    name: str
    values: tuple[int, ...]
    title: str = ""
    """A title for people, if it is more than the name."""

    def __str__(self) -> str:
        return self.title or self.name


@dataclass(frozen=True)
class Task:
    """What a network learns to find.

    Args:
        names: each value a mask may hold besides 0, the background, and its name.
        regions: in the order of the channels everywhere; in an exclusive task, no value is in two of them.
        exclusive: one class per voxel (softmax), the background being one; otherwise each region on its own (sigmoid).
        convention: the convention of tumour masks that the values come from; "": the task's own.

    Raises:
        ValueError: it makes no task; one line.
    """

    names: Mapping[int, str]
    regions: tuple[Region, ...]
    exclusive: bool = False
    convention: str = ""

    def __post_init__(self) -> None:
        if problem := _problem(self):
            raise ValueError(problem)

    @property
    def values(self) -> tuple[int, ...]:
        """Every value a mask may hold, ascending."""
        return tuple(sorted((BACKGROUND, *self.names)))

    @property
    def region_names(self) -> tuple[str, ...]:
        """Names of the regions, in the order of the channels."""
        return tuple(region.name for region in self.regions)

    @property
    def channels(self) -> int:
        """Channels of the network's output: the regions; in an exclusive task the background comes first."""
        return len(self.regions) + self.exclusive

    def __str__(self) -> str:
        return ", ".join(["0 background", *(f"{value} {name}" for value, name in self.names.items())])

    def masks(self, labels: np.ndarray) -> np.ndarray:
        """The regions of a mask, whole numbers of any shape that are all among `values`: uint8 [regions, *shape]."""
        out = np.empty((len(self.regions), *labels.shape), np.uint8)
        for channel, region in enumerate(self.regions):
            out[channel] = np.isin(labels, region.values)
        return out

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """A network's output as regions: float [channels, *shape] to bool [regions, *shape]."""
        if not self.exclusive:
            return probabilities > THRESHOLD
        chosen = probabilities.argmax(axis=0)
        return np.stack([chosen == number for number in range(1, self.channels)])

    def labels(self, masks: np.ndarray) -> np.ndarray:
        """A mask with the task's own values, uint8 or uint16 [*shape], from regions bool [regions, *shape].

        A voxel gets the value that lies in exactly the regions which hold it. Where there is none, because the
        regions were not predicted inside one another, the smallest region decides (of two as small, the later).
        """
        out = np.zeros(masks.shape[1:], np.uint8 if max(self.names) < 256 else np.uint16)
        held = Counter(value for region in self.regions for value in region.values)
        by_size = sorted(zip(self.regions, masks, strict=True), key=lambda pair: -len(pair[0].values))
        for region, mask in by_size:
            # The value in the fewest regions; of several the first named.
            out[mask] = min(region.values, key=lambda value: held[value])
        for value in reversed(list(self.names)):
            inside = np.array([value in region.values for region in self.regions])
            if inside.any():
                exact = (masks == inside.reshape(-1, *(1,) * (masks.ndim - 1))).all(axis=0)
                out[exact] = value
        return out


def _problem(task: Task) -> str:
    """Why this is not a valid task; empty if it is."""
    if not task.names or not 1 <= len(task.regions) <= MAX_REGIONS:
        return f"a task has values, and 1 to {MAX_REGIONS} regions made of them"
    for value, name in task.names.items():
        if not 1 <= value <= MAX_VALUE:
            return f"{name} is {value}: values are 1 to {MAX_VALUE}, 0 is the background"
    for name, grammar in (
        *((name, VALUE_NAME) for name in task.names.values()),
        *((name, NAME) for name in task.region_names),
    ):
        if not grammar.fullmatch(name):
            return f"{name[:40]!r} is not a valid name: write letters, digits, - and _, at most 24"
    if twice := [name for name, count in Counter(task.names.values()).items() if count > 1]:
        return f"{twice[0]} names two values: a name has one value"
    if twice := [name for name, count in Counter(task.region_names).items() if count > 1]:
        return f"{twice[0]} names two regions: name each once"
    seen: dict[frozenset[int], str] = {}
    taken: dict[int, str] = {}
    for region in task.regions:
        if region.name in RESERVED:
            return f"a region cannot be called {region.name}: tables use the name for something else"
        if not region.values:
            return f"region {region.name} holds no value: name at least one"
        if len(set(region.values)) < len(region.values):
            return f"region {region.name} names a value twice"
        if strange := [value for value in region.values if value not in task.names]:
            return f"region {region.name} holds {strange[0]}, which has no name"
        if (same := seen.setdefault(frozenset(region.values), region.name)) != region.name:
            return f"regions {same} and {region.name} are the same: remove one"
        for value in region.values if task.exclusive else ():
            if (other := taken.setdefault(value, region.name)) != region.name:
                return (
                    f"{task.names[value]} is in {other} and in {region.name}, but classes exclude each other"
                )
    return ""


# --- the preset -----------------------------------------------------------------------------------------

GLIOMA_REGIONS = ("WT", "TC", "ET")
"""Whole tumour, tumour core, enhancing tumour."""


@dataclass(frozen=True)
class Convention:
    """The mask value of each tissue of a glioma; 0 is background in all conventions."""

    necrosis: int
    edema: int
    enhancing: int


CONVENTIONS = {
    "msd": Convention(edema=1, necrosis=2, enhancing=3),
    "brats": Convention(necrosis=1, edema=2, enhancing=4),  # 2017 to 2021; 3 is unused
    "brats2023": Convention(necrosis=1, edema=2, enhancing=3),  # GLI, 2023 and later
    "nnunet": Convention(edema=1, necrosis=2, enhancing=3),  # nnU-Net's conversion of BraTS: 1->2, 2->1, 4->3
}
"""The values alone cannot tell them apart: MSD and BraTS 2023 both use 0 to 3 with 1 and 2 swapped in meaning, and a
wrong guess silently corrupts the tumour core. Sources: `dataset.json` of MSD Task01 and the BraTS data
descriptions."""


def glioma(name: str) -> Task:
    """The preset, with masks of the convention called `name`. Raises DataError for a name that is not in the table."""
    try:
        rule = CONVENTIONS[name]
    except KeyError:
        raise DataError(f"unknown label convention {name!r}: name one of {', '.join(CONVENTIONS)}") from None
    core = (rule.necrosis, rule.enhancing)
    return Task(
        names={rule.edema: "edema", rule.necrosis: "necrotic core", rule.enhancing: "enhancing"},
        regions=(
            Region("WT", (*core, rule.edema), "whole tumour (WT)"),
            Region("TC", core, "tumour core (TC)"),
            Region("ET", (rule.enhancing,), "enhancing tumour (ET)"),
        ),
        convention=name,
    )
