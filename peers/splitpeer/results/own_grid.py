"""From the grid the network works on back to the patient's own: what `data.volumes.prepare` did, undone.

A volume is read in RAS order and, where the job names a spacing, resampled. Probabilities go the way back and are
decided there: a mask that was decided first would have the coarser grid's steps.
"""

from __future__ import annotations

import numpy as np

from splitpeer.data.geometry import Geometry, Triple, Turn
from splitpeer.data.nifti_header import NiftiHeader
from splitpeer.data.resampling import resample
from splitpeer.data.task import Task
from splitpeer.errors import DataError
from splitpeer.results.segmentation import Origin, Segmentation


def as_stored(values: np.ndarray, turn: Turn) -> np.ndarray:
    """[channels, x, y, z] in RAS order as a view in the order of the file's axes; the inverse of `Turn.voxels`."""
    reverse = tuple(slice(None, None, -1) if axis in turn.flipped else slice(None) for axis in range(3))
    back = [turn.order.index(source) + 1 for source in range(3)]
    return values[(slice(None), *reverse)].transpose(0, *back)


def stored_affine(shape: Triple, affine: np.ndarray, turn: Turn) -> np.ndarray:
    """The affine of the stored axes, from shape and affine in RAS order; the inverse of `Turn.grid`."""
    out = np.array(affine, np.float64)
    for axis, source in enumerate(turn.order):
        step = affine[:3, axis]
        if axis in turn.flipped:
            out[:3, 3] += step * (shape[axis] - 1)
            step = -step
        out[:3, source] = step
    return out + 0.0


def chances(task: Task, masks: np.ndarray) -> np.ndarray:
    """Masks [regions, *shape] as the probabilities 0 and 1 that they stand for, float32 [channels, *shape]."""
    held = masks.astype(np.float32)
    return np.concatenate([1 - held.max(axis=0, keepdims=True), held]) if task.exclusive else held


def on_file(values: np.ndarray, grid: Geometry, header: NiftiHeader) -> tuple[np.ndarray, np.ndarray]:
    """Values on the grid of training as the patient's file has its voxels, and the file's affine.

    Args:
        values: float32 [channels, x, y, z] on `grid`, RAS.
        grid: the job's grid of the file, `data.volumes.grid_of`.
        header: that of the file.

    Raises:
        DataError: the values are not on the grid.
    """
    if values.shape[1:] != grid.shape:
        raise DataError(
            f"the answer has {list(values.shape[1:])} voxels, not {list(grid.shape)}: "
            "is the file still the one that was sent?"
        )
    if grid != header.geometry:
        values = np.stack([resample(channel, grid, header.geometry, nearest=False) for channel in values])
    return as_stored(values, header.turn), stored_affine(header.shape, header.affine, header.turn)


def decided(
    patient: str, task: Task, values: np.ndarray, affine: np.ndarray, origin: Origin, *, keep: bool = False
) -> Segmentation:
    """Probabilities on the patient's own grid as a segmentation.

    Args:
        patient: the id at this hospital.
        task: what the channels mean.
        values: float32 [channels, i, j, k], the background first where the task is exclusive.
        affine: float64 4x4, from (i, j, k) to RAS millimetres.
        origin: what it was made by.
        keep: whether the probabilities are wanted as well.

    Raises:
        DataError: not the channels of the task.
    """
    if len(values) != task.channels:
        raise DataError(
            f"the answer has {len(values)} channels, the task {task.channels}: is it of another run?"
        )
    regions = values[1:] if task.exclusive else values
    return Segmentation(
        patient,
        task,
        np.ascontiguousarray(task.decide(values)),
        affine,
        origin,
        np.ascontiguousarray(regions, np.float32) if keep else None,
    )
