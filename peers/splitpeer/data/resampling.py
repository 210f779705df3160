"""A volume on a grid of another spacing: the same first voxel, the same directions (SP-11.12-6, SP-11.12-7)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from splitpeer.data.geometry import Geometry, Millimetres

FINENESS = 2.0**16
"""Positions between voxels count in steps of 1/65536: what float32 headers leave uncertain decides no tie."""


def resampled_grid(grid: Geometry, spacing: Millimetres) -> Geometry:
    """The grid that `resample` gives."""
    x, y, z = (
        int(np.rint(_fine((n - 1) * old / new))) + 1
        for n, old, new in zip(grid.shape, grid.spacing, spacing, strict=True)
    )
    return replace(grid, shape=(x, y, z), spacing=spacing)


def resample(voxels: np.ndarray, grid: Geometry, wanted: Geometry, *, nearest: bool) -> np.ndarray:
    """`voxels` float32 [x, y, z] of `grid` on `wanted`, its `resampled_grid`: trilinear, or the nearest voxel's value.

    Positions beyond the last voxel have its value. The axes are interpolated one after the other, x first, in
    float64; the result is float32.
    """
    out = voxels
    for axis, (length, old, new) in enumerate(zip(wanted.shape, grid.spacing, wanted.spacing, strict=True)):
        last = out.shape[axis] - 1
        places = np.minimum(_fine(np.arange(length) * (new / old)), last)
        if nearest:
            out = np.take(out, np.ceil(places - 0.5).astype(int), axis)  # ties: the lower voxel
            continue
        below = np.floor(places).astype(int)
        share = (places - below).reshape([-1 if a == axis else 1 for a in range(3)])
        low, high = (
            np.take(out, index, axis).astype(np.float64) for index in (below, np.minimum(below + 1, last))
        )
        # In place: at most three copies of a large volume exist.
        high -= low
        high *= share
        high += low
        out = high
    return out.astype(np.float32)


def _fine(position: float | np.ndarray) -> np.ndarray:
    return np.rint(np.asarray(position) * FINENESS) / FINENESS
