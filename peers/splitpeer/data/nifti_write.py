"""NIfTI-1 files as bytes: the same voxels give the same bytes, and nothing in them names a person or a time."""

from __future__ import annotations

import gzip
from typing import Literal

import numpy as np

DESCRIP = 79
"""Characters of the header's description, one less than its bytes."""


def nifti(
    voxels: np.ndarray,
    affine: np.ndarray,
    code: Literal["aligned", "scanner"],
    *,
    quaternion: bool = True,
    descrip: str = "",
    slope: float | None = None,
) -> bytes:
    """A file, not packed.

    Args:
        voxels: [x, y, z] or [x, y, z, volumes], of the dtype that is stored.
        affine: float64 4x4, voxel to RAS millimetres.
        code: whose space that is.
        quaternion: whether the qform says the same, as programs differ in which they read; it cannot of a sheared grid.
        descrip: the header's description, at most `DESCRIP` characters of ASCII.
        slope: a voxel's value is what is stored times this; None: is what is stored.
    """
    # It takes a fifth of a second to import, and daemons write when a run is complete.
    import nibabel as nib

    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, code=code)
    image.set_qform(affine if quaternion else None, code=code if quaternion else "unknown")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = descrip
    if slope is not None:
        image.header.set_slope_inter(slope, 0.0)
    data: bytes = image.to_bytes()
    return data


def packed(data: bytes, level: int = 9) -> bytes:
    """As .nii.gz, without the time of day."""
    return gzip.compress(data, compresslevel=level, mtime=0)
