"""NIfTI files that hold an image or a mask and nothing about a person."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitpeer.data.nifti_write import nifti, packed
from splitpeer.storage import durable

LEVEL = 4
"""Of packing: higher ones take twice the time for a few percent."""
_LARGEST = 32767


def write_image(path: Path, voxels: NDArray[np.float32], affine: NDArray[np.float64]) -> str:
    """Write float32 [x, y, z] as 16-bit integers with a slope; 0 stays 0, which normalisation takes for background.

    Whole or not at all. Returns the file's SHA-256. Raises OSError.
    """
    peak = float(np.abs(voxels).max())
    # Whole numbers that fit stay as they are.
    slope = 1.0 if peak <= _LARGEST and not np.any(voxels % 1) else peak / _LARGEST
    stored = np.rint(voxels / slope).astype(np.int16) if slope else np.zeros(voxels.shape, np.int16)
    return _write(path, stored, affine, slope or 1.0)


def write_mask(path: Path, voxels: NDArray[np.uint8], affine: NDArray[np.float64]) -> str:
    """Write uint8 [x, y, z], whole or not at all. Returns the file's SHA-256. Raises OSError."""
    return _write(path, voxels, affine, 1.0)


def _write(path: Path, stored: NDArray[np.generic], affine: NDArray[np.float64], slope: float) -> str:
    data = packed(nifti(stored, affine, "aligned", slope=slope), LEVEL)
    durable.replace(path, data)
    return hashlib.sha256(data).hexdigest()
