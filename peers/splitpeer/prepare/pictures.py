"""The overlay of one patient: slices of the image in three directions, with the atlas's outlines drawn over them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu

from splitpeer.prepare.quality import SeenBrain

SCALE = 2
"""Pixels per voxel: outlines are thin, and visible."""
SLICES = 6
"""In each direction, spread over the brain."""
BRAIN, TISSUE = (230, 159, 0), (86, 180, 233)
"""Outlines of the atlas's brain and of its white matter: orange and sky blue of Okabe and Ito, distinguishable for
colour-blind readers."""
_GAP = 4


def overlay(seen: SeenBrain) -> bytes:
    """A PNG: rows are axial, coronal and sagittal slices; the patient's left is on the right, as radiologists look."""
    values = seen.image[seen.inside] if seen.inside.any() else seen.image.ravel()
    low, high = np.quantile(values, (0.02, 0.995))
    grey = np.clip((seen.image - low) / max(float(high - low), 1e-6), 0, 1)
    brain = seen.atlas[seen.brain]
    bright = (seen.atlas > threshold_otsu(brain)) & seen.brain if brain.min() < brain.max() else seen.brain
    bright = ndimage.binary_opening(bright)
    rows = []
    for axis in (2, 1, 0):
        there = np.flatnonzero(seen.brain.any(axis=tuple(a for a in range(3) if a != axis)))
        levels = np.linspace(there[0], there[-1], SLICES + 2).round().astype(int)[1:-1]
        rows.append(
            _row([_slice(*(one.take(level, axis) for one in (grey, seen.brain, bright))) for level in levels])
        )
    width = max(row.shape[1] for row in rows)
    page = np.concatenate(
        [np.pad(row, ((0, _GAP), (0, width - row.shape[1]), (0, 0)), constant_values=24) for row in rows]
    )
    out = io.BytesIO()
    Image.fromarray(page).save(out, "PNG", optimize=True)
    return out.getvalue()


def _slice(
    grey: NDArray[np.float64], brain: NDArray[np.bool_], bright: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """[a, b] to a picture: b upwards, a to the left."""
    picture = _screen(np.repeat((255 * grey).astype(np.uint8)[..., None], 3, axis=2))
    for mask, colour in ((bright, TISSUE), (brain, BRAIN)):
        large = _screen(mask)
        picture[large & ~ndimage.binary_erosion(large)] = colour
    return picture


def _screen(slice_: NDArray[Any]) -> NDArray[Any]:
    turned = np.swapaxes(slice_, 0, 1)[::-1, ::-1]
    return np.repeat(np.repeat(turned, SCALE, axis=0), SCALE, axis=1)


def _row(pictures: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.concatenate(
        [np.pad(one, ((0, 0), (0, _GAP), (0, 0)), constant_values=24) for one in pictures], axis=1
    )
