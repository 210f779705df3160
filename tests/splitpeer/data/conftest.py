"""Real NIfTI files for the data tests."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations

SALT = bytes(range(32))


@pytest.fixture
def files() -> SimpleNamespace:
    """The helpers below, for tests in this folder."""
    return SimpleNamespace(
        SALT=SALT, save=save, head=head, mask=mask, truncate=truncate, flip_a_voxel_bit=flip_a_voxel_bit
    )


def save(
    path: Path,
    voxels: np.ndarray,
    *,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    origin: tuple[float, float, float] = (-10.0, 20.0, 5.0),
    axes: str = "RAS",
) -> Path:
    """Write `voxels` (given in RAS order) as a file stored with `axes`."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    turn = orientations.ornt_transform(
        orientations.axcodes2ornt(("R", "A", "S")), orientations.axcodes2ornt(tuple(axes))
    )
    stored = orientations.apply_orientation(voxels, turn)
    affine = affine @ orientations.inv_ornt_aff(turn, voxels.shape[:3])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(stored, affine), path)
    return path


def head(shape: tuple[int, ...] = (12, 10, 8), seed: int = 0) -> np.ndarray:
    """A float32 volume with a border of zeros around positive noise."""
    voxels = np.zeros(shape, np.float32)
    inner = tuple(slice(2, n - 2) for n in shape[:3])
    voxels[inner] = np.random.default_rng(seed).uniform(50, 150, voxels[inner].shape)
    return voxels


def mask(shape: tuple[int, int, int] = (12, 10, 8), values: tuple[int, ...] = (1, 2, 3)) -> np.ndarray:
    """A uint8 mask with a column of every value from x = 4 on."""
    voxels = np.zeros(shape, np.uint8)
    for place, value in enumerate(values):
        voxels[4 + place, 3:6, 3:5] = value
    return voxels


@pytest.fixture
def msd(tmp_path: Path) -> Path:
    """Two MSD cases listed out of order, with the archive's AppleDouble junk next to them."""
    root = tmp_path / "Task01_BrainTumour"
    training = []
    for number in (2, 1):
        name = f"BRATS_{number:03d}.nii.gz"
        save(root / "imagesTr" / name, np.stack([head(seed=10 * number + c) for c in range(4)], -1))
        save(root / "labelsTr" / name, mask())
        for folder in ("imagesTr", "labelsTr"):
            (root / folder / f"._{name}").write_bytes(b"\x00\x05\x16\x07 AppleDouble")
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    training.append({"image": "./imagesTr/._BRATS_001.nii.gz", "label": "./labelsTr/._BRATS_001.nii.gz"})
    description = {
        "tensorImageSize": "4D",
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "training": training,
        "test": ["./imagesTs/BRATS_485.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


@pytest.fixture
def brats() -> Callable[..., Path]:
    """Makes one patient of a BraTS tree: brats(root, folder, patient, kinds, separator, suffix)."""

    def make(
        root: Path,
        patient: str,
        kinds: tuple[str, ...] = ("flair", "t1", "t1ce", "t2", "seg"),
        separator: str = "_",
        suffix: str = ".nii.gz",
        below: str = "",
    ) -> Path:
        for kind in kinds:
            voxels = mask(values=(1, 2, 4)) if kind == "seg" else head(seed=len(kind))
            save(root / below / patient / f"{patient}{separator}{kind}{suffix}", voxels)
        return root

    return make


def truncate(path: Path, keep: float = 0.5) -> None:
    """Cut a file short."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def flip_a_voxel_bit(path: Path) -> None:
    """Damage a gzip so that it still unpacks: stored (not deflated) blocks, one data bit flipped."""
    content = gzip.decompress(path.read_bytes())
    stored = bytearray(gzip.compress(content, compresslevel=0))
    stored[-100] ^= 1
    path.write_bytes(stored)
