"""The voxels of a grid, read from its files: float32, rescaled as each slice's header asks."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitpeer.dicom.stacks import SliceGrid
from splitpeer.errors import DataError, needs

try:
    import pydicom
    from pydicom.dataset import Dataset
    from pydicom.pixels.utils import pixel_array
except ModuleNotFoundError:
    raise needs("DICOM", "pydicom", "dicom") from None


def read_voxels(root: Path, grid: SliceGrid) -> NDArray[np.float32]:
    """The voxels of `grid`, [column, row, slice]. Raises DataError: a file that is cut, changed or not decodable."""
    out = np.empty(grid.shape, np.float32)
    opened: tuple[str, Dataset] | None = None
    for k, (header, frame) in enumerate(grid.slices):
        if opened is None or opened[0] != header.path:
            opened = header.path, _dataset(root / header.path)
        plane = _plane(opened[1], root / header.path, frame.index if len(header.frames) > 1 else None)
        if plane.shape != (header.rows, header.columns):
            raise DataError(f"{root / header.path}: has changed while it was read: start again")
        out[:, :, k] = plane.T.astype(np.float32) * np.float32(frame.slope) + np.float32(frame.intercept)
    if not np.isfinite(out).all():
        raise DataError("values that are not finite numbers: export it again", "not-finite")
    if out.min() == out.max():
        raise DataError(f"no contrast: every voxel is {float(out.min()):g}")
    return out


def _dataset(path: Path) -> Dataset:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pydicom.dcmread(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or 'it ends early'}): check the disk", "unreadable"
        ) from None
    except Exception:  # pydicom's parsers raise what they run into
        raise DataError(f"{path}: ends early: copy or export it again", "truncated") from None


def _plane(data: Dataset, path: Path, index: int | None) -> NDArray[np.generic]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pixel_array(data, index=index)
    except Exception:
        raise DataError(
            f"{path}: its voxels cannot be read (cut short, or packed in a way this installation lacks): export it "
            "again, uncompressed (Explicit VR Little Endian)",
            "truncated",
        ) from None
