"""From the numbers of a mask to the regions of a task. What the numbers mean is named by the user, never guessed."""

from __future__ import annotations

import numpy as np

from splitpeer.data.task import CONVENTIONS, Task, glioma
from splitpeer.errors import DataError

ROUNDING = 1e-3
"""A value this close to a whole number is meant to be it."""


def task_of(meaning: Task | str) -> Task:
    """A task as it is, or glioma with the convention named. Raises DataError for a name that is not in the table."""
    return glioma(meaning) if isinstance(meaning, str) else meaning


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


def regions(labels: np.ndarray, meaning: Task | str) -> np.ndarray:
    """The regions of a mask.

    `labels`: whole numbers, or nearly (see `whole`), of any numeric dtype and shape. `meaning`: a task, or a convention
    of glioma masks. Returns uint8 [regions, *shape] of 0 and 1. Raises DataError where a value is not a whole number
    or has no name.
    """
    task = task_of(meaning)
    labels, _ = whole(labels)
    strange = np.setdiff1d(np.unique(labels), task.values)
    if strange.size:
        named = ", ".join(map(shown, strange[:5].tolist())) + (", ..." if strange.size > 5 else "")
        raise DataError(
            f"label value(s) {named} are not in convention {task.convention!r} ({task}): "
            f"name the convention these masks follow ({', '.join(CONVENTIONS)}) or correct the mask"
            if task.convention
            else f"label value(s) {named} are not in the job's [task] ({task}): name them there or correct the mask"
        )
    return task.masks(labels)
