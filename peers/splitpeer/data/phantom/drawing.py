"""What the small phantoms of `examples/` share: spots in millimetres, a scanner's grid, files, a command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence, Sized
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

Volume = NDArray[np.float64]
Place = list[Volume]
"""Millimetres from the middle of the image, one array per axis, which broadcast to its shape."""
Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]


def places(shape: Shape, spacing: Spacing) -> Place:
    """Where the voxels of an image are."""
    return [
        (np.arange(n, dtype=np.float64) - (n - 1) / 2).reshape([-1 if a == axis else 1 for a in range(3)])
        * mm
        for axis, (n, mm) in enumerate(zip(shape, spacing, strict=True))
    ]


def inside(
    place: Place, centre: Sequence[float] | Volume, radii: Sequence[float] | Volume | float
) -> NDArray[np.bool_]:
    """An ellipsoid, bool [x, y, z]; centre and radii in millimetres."""
    radii = np.broadcast_to(radii, 3)
    distance: Volume = sum(
        (((x - c) / r) ** 2 for x, c, r in zip(place, centre, radii, strict=True)), np.zeros(())
    )
    return distance < 1


def scanner_grid(
    shape: Shape, spacing: Spacing, middle: Sequence[float] | Volume, *, tilt: float = 0.0, turn: float = 0.0
) -> Volume:
    """Voxel to millimetres (RAS), 4x4: stored as a scanner does, towards left and back.

    Args:
        middle: of the image, in millimetres.
        tilt: of the slices about the axis from right to left, in degrees.
        turn: of the patient about the long axis, in degrees.
    """
    tilt, turn = np.deg2rad(tilt), np.deg2rad(turn)
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    out = np.eye(4)
    out[:3, :3] = about_z @ about_x @ np.diag([-spacing[0], -spacing[1], spacing[2]])
    out[:3, 3] = np.asarray(middle) - out[:3, :3] @ (np.array(shape) - 1) / 2
    return out


def save(path: Path, voxels: np.ndarray, grid: Volume, description: str, intercept: int = 0) -> None:
    """One NIfTI-1 file in scanner coordinates, millimetres.

    Args:
        voxels: [x, y, z]; with an intercept, int16.
        intercept: where it is not 0, stored value + intercept = voxel, and the stored ones are unsigned (as of CT).
    """
    image = nib.Nifti1Image((voxels - intercept).astype(np.uint16) if intercept else voxels, grid)
    image.set_sform(grid, code="scanner")
    image.set_qform(grid, code="scanner")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description
    if intercept:
        image.header.set_slope_inter(1, intercept)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def script(description: str, folders: str, write: Callable[[Path, int, int], Sized]) -> None:
    """The command line of a phantom: FOLDER, --patients, --seed."""
    parser = argparse.ArgumentParser(description=f"{description}: {folders}.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--patients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    written = write(given.folder, given.patients, given.seed)
    sys.stdout.write(f"{len(written)} patients in {given.folder}: {folders}\n")
