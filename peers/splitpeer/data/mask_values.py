"""What a folder of masks holds, value by value, and whether that fits the task, or the convention of glioma masks.

Values alone cannot tell MSD from BraTS 2023, but where they lie can: the necrotic core is enclosed by other tumour,
edema borders on healthy tissue. This needs no image, so the coordinator can judge its masks without any site's T1Gd.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from splitpeer.data.files import examples
from splitpeer.data.labels import shown, task_of, whole
from splitpeer.data.task import BACKGROUND, CONVENTIONS, Convention, Task

MANY_VALUES = 20
"""A file with more values is not counted value by value: it is an image."""


class MaskCensus:
    """Counts voxels over all masks of a folder.

    Args:
        meaning: the task, or the convention of glioma masks, that they follow; None: unknown.
    """

    def __init__(self, meaning: Task | str | None) -> None:
        self._task = task_of(meaning) if meaning is not None else None
        self._name = self._task.convention if self._task else ""
        self._rule = CONVENTIONS.get(self._name)
        self.masks = 0
        self.voxels: Counter[float] = Counter()
        self.holders: Counter[float] = Counter()
        """Value -> masks that hold it."""
        self._known: set[Path] = set()
        self._rounded: list[str] = []
        self._furthest = 0.0
        self._judged = self._inside_out = 0

    def add(self, path: Path, voxels: np.ndarray) -> None:
        """Count one mask, once."""
        if path in self._known:
            return
        self._known.add(path)
        settled, off = whole(voxels)
        if off:
            self._rounded.append(path.name)
            self._furthest = max(self._furthest, off)
        values, counts = np.unique(settled, return_counts=True)
        self.masks += 1
        if len(values) > MANY_VALUES:
            return
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            self.voxels[value] += count
            self.holders[value] += 1
        if self._rule and {self._rule.necrosis, self._rule.edema} <= set(values.tolist()):
            self._judged += 1
            self._inside_out += _inside_out(settled, self._rule)

    def lines(self) -> list[str]:
        """One for each value: its name, its voxels, and in how many masks it occurs."""
        return [
            f"value {shown(value)}{self._tissue(value)}: {count} voxels in {self.holders[value]} of {self.masks} masks"
            for value, count in sorted(self.voxels.items())
        ]

    def warnings(self) -> list[str]:
        """Findings that contradict the convention, or a mask in general."""
        found = []
        if self._rounded:
            found.append(
                f"{len(self._rounded)} masks hold values up to {self._furthest:.2g} away from whole numbers, "
                f"which are rounded ({examples(self._rounded)}): save masks as integers"
            )
        held = {value for value in self.voxels if value}
        if len(held) == 1 and self._several:
            (only,) = held
            found.append(
                f"all masks hold only 0 and {shown(only)} ({self.voxels[only]} voxels in {self.holders[only]} of "
                f"{self.masks} masks): a binary mask, not {self._wanted}"
            )
        elif self._task and held and (missing := sorted(set(self._task.values) - held - {BACKGROUND})):
            tissues = ", ".join(f"{shown(value)}{self._tissue(value)}" for value in missing)
            doubt = (
                f"is {self._name!r} the convention of these masks?"
                if self._rule
                else "is [task] that of these masks?"
            )
            found.append(f"no mask holds {tissues}, but {self._counts(held)}: {doubt}")
        if self._rule and 2 * self._inside_out > self._judged:
            found.append(self._swapped(self._rule))
        return found

    @property
    def _several(self) -> bool:
        """Whether more than one value is looked for."""
        return self._task is None or len(self._task.names) > 1

    @property
    def _wanted(self) -> str:
        if self._task is None or self._rule:
            return "the three tissues of a tumour convention"
        return f"the {len(self._task.names)} values of [task]"

    def _swapped(self, rule: Convention) -> str:
        other = next(
            (
                name
                for name, one in CONVENTIONS.items()
                if (one.necrosis, one.edema, one.enhancing) == (rule.edema, rule.necrosis, rule.enhancing)
            ),
            None,
        )
        return (
            f"under {self._name!r}, {rule.edema} is edema and {rule.necrosis} the necrotic core, but in "
            f"{self._inside_out} of {self._judged} masks {rule.necrosis} borders on healthy tissue more than "
            f"{rule.edema} does ({self._counts({rule.edema, rule.necrosis})}): "
            + (f"is the convention {other!r}?" if other else "are the two exchanged?")
        )

    def _counts(self, values: set[float] | set[int]) -> str:
        return ", ".join(f"{shown(value)}: {self.voxels[value]} voxels" for value in sorted(values))

    def _tissue(self, value: float) -> str:
        if self._task is None:
            return ""
        names: dict[float, str] = {BACKGROUND: "background"}
        names.update((number, name) for number, name in self._task.names.items())
        return f" ({names.get(value, 'not in ' + (repr(self._name) if self._rule else '[task]'))})"


def _inside_out(labels: np.ndarray, rule: Convention) -> bool:
    """Whether what should be enclosed by tumour borders on background more than what should surround it."""
    box = tuple(slice(max(int(hits.min()) - 1, 0), int(hits.max()) + 2) for hits in np.nonzero(labels))
    tumour = np.pad(labels[box], 1)
    return _outside(tumour, rule.necrosis) > _outside(tumour, rule.edema)


def _outside(labels: np.ndarray, value: int) -> float:
    """The share of the voxel faces between `value` and anything else that border on background."""
    faces = open_faces = 0
    for axis in range(labels.ndim):
        moved = np.moveaxis(labels, axis, 0)
        one, other = moved[:-1], moved[1:]
        borders = (one == value) != (other == value)
        faces += int(borders.sum())
        open_faces += int((borders & ((one == 0) | (other == 0))).sum())
    return open_faces / faces if faces else 0.0
