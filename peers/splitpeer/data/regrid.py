"""A volume seen on another grid: any two affines, turned, sheared or shifted against each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from splitpeer.data.geometry import Triple, edges

FWHM_TO_SIGMA = 1 / 2.3548200450309493
"""Of a Gaussian: 1 / (2 sqrt(2 ln 2))."""


def onto(
    volume: NDArray[np.generic],
    affine: NDArray[np.float64],
    shape: Triple,
    target: NDArray[np.float64],
    *,
    order: int,
    fill: float = 0.0,
) -> NDArray[np.generic]:
    """`volume` at the voxels of a grid of `shape`.

    Args:
        volume: [x, y, z], any real dtype; the result has the same.
        affine: float64 4x4, voxel of `volume` to millimetres.
        target: float64 4x4, voxel of the result to the same millimetres.
        order: 0 nearest, for masks; 1 linear, for images and probabilities.
        fill: what lies beyond `volume`; the outermost voxels fade to it within one voxel.
    """
    matrix = np.linalg.solve(affine, target)
    # Noise of 1e-16 beside a whole number would make a tie of what is a voxel's centre.
    matrix = np.where(np.abs(matrix - np.rint(matrix)) < 1e-9, np.rint(matrix), matrix)
    out: NDArray[np.generic] = ndimage.affine_transform(
        volume, matrix[:3, :3], matrix[:3, 3], shape, order=order, mode="grid-constant", cval=fill
    )
    return out


def softened(
    volume: NDArray[np.float32], affine: NDArray[np.float64], target: NDArray[np.float64]
) -> NDArray[np.float32]:
    """`volume` as voxels of the coarser grid `target` average it, so that `onto` misses nothing between them.

    A Gaussian makes up what the point spread of the coarse voxel has more than that of the fine one (Cardoso et al.,
    MICCAI 2015). Equal where the new grid is as fine.
    """
    # How long a step of the new grid is along each axis of the old one, in mm.
    along = np.abs(np.linalg.solve(affine[:3, :3] / edges(affine), target[:3, :3]))
    old, new = edges(affine), along.max(axis=1)
    sigmas = FWHM_TO_SIGMA * np.sqrt(np.maximum(new**2 - old**2, 0)) / old
    if not (sigmas > 0.2).any():
        return volume
    out: NDArray[np.float32] = ndimage.gaussian_filter(volume, sigmas, truncate=3.0)
    return out
