"""Prostates of nobody: T2 at one hospital, ADC at another, masks of gland and lesion at the coordinator.

    python examples/prostate/phantom.py FOLDER --patients 24 --seed 0

writes FOLDER/t2, FOLDER/adc and FOLDER/labels, one ID.nii.gz per patient in each.

A lesion is dark in T2 *and* restricts diffusion. Each patient also has spots that are dark in T2 alone (scars) and
spots that restrict diffusion alone (stromal nodules), so neither hospital can tell a lesion without the other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE, SPACING = (64, 64, 16), (1.25, 1.25, 3.6)
"""Voxels; millimetres."""
BACKGROUND, GLAND, LESION = 0, 1, 2
"""Values of a mask."""
TISSUES = {"fat": (400, 350), "muscle": (150, 1300), "transition": (260, 1300), "peripheral": (420, 1700)}
"""Signal in T2 (arbitrary units), ADC in 1e-6 mm2/s."""
T2_DARK, ADC_LOW = 170, 750
T2_NOISE, ADC_NOISE = 22, 90


def patient(seed: int, number: int) -> dict[str, np.ndarray]:
    """`t2` and `adc`, int16 [x, y, z]; `labels`, uint8: `GLAND` without `LESION`, which is inside it."""
    rng = np.random.default_rng([seed, number])
    place = [
        (np.arange(n) - (n - 1) / 2).reshape([-1 if a == axis else 1 for a in range(3)]) * mm
        for axis, (n, mm) in enumerate(zip(SHAPE, SPACING, strict=True))
    ]

    def inside(centre: np.ndarray, radii: np.ndarray | float) -> np.ndarray:
        radii = np.broadcast_to(radii, 3)
        return sum(((x - c) / r) ** 2 for x, c, r in zip(place, centre, radii, strict=True)) < 1

    middle, radii = rng.uniform(-2, 2, 3), np.array([22, 18, 20]) * rng.uniform(0.85, 1.15, 3)
    gland = inside(middle, radii)
    transition = inside(middle + np.array([0, 4, 0]), radii * 0.6)
    body = inside(np.zeros(3), (36, 34, 60))
    t2, adc = np.full((2, *SHAPE), 0.0)
    for name, where in (
        ("fat", body),
        ("muscle", _ring(place)),
        ("peripheral", gland),
        ("transition", transition),
    ):
        t2[where], adc[where] = TISSUES[name]
    lesion = np.zeros(SHAPE, bool)
    for kind in ("both", "t2", "adc") * 2:
        spot = inside(middle + rng.uniform(-0.6, 0.6, 3) * radii, rng.uniform(4.5, 8, 3)) & gland
        lesion = lesion | spot if kind == "both" else lesion & ~spot
        # A later spot takes the place of an earlier one, in both images and in the mask.
        normal = np.where(transition[..., None], TISSUES["transition"], TISSUES["peripheral"])[spot]
        t2[spot] = normal[:, 0] if kind == "adc" else T2_DARK
        adc[spot] = normal[:, 1] if kind == "t2" else ADC_LOW
    gain = rng.uniform(0.7, 1.4) * (1 + 0.1 * np.tanh(place[1] / 40))
    t2 = (t2 + rng.normal(0, T2_NOISE, SHAPE)) * gain
    adc = adc + rng.normal(0, ADC_NOISE, SHAPE) * body
    return {
        "t2": np.clip(np.rint(t2), 1, 4095).astype(np.int16),
        "adc": np.clip(np.rint(adc), 0, 4095).astype(np.int16),
        "labels": np.where(lesion, LESION, np.where(gland, GLAND, BACKGROUND)).astype(np.uint8),
    }


def _ring(place: list[np.ndarray]) -> np.ndarray:
    """Muscle left and right of the gland, bool [x, y, z]."""
    return ((abs(place[0]) - 30) / 5) ** 2 + (place[1] / 18) ** 2 + 0 * place[2] < 1


def affine(seed: int, number: int) -> np.ndarray:
    """Voxel to millimetres (RAS), 4x4: stored as a scanner does (towards left and back), slices tilted to the gland."""
    rng = np.random.default_rng([seed, number, 1])
    tilt, turn = np.deg2rad(rng.uniform(5, 20)), np.deg2rad(rng.uniform(-4, 4))
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    out = np.eye(4)
    out[:3, :3] = about_z @ about_x @ np.diag([-SPACING[0], -SPACING[1], SPACING[2]])
    out[:3, 3] = rng.uniform(-10, 10, 3) - out[:3, :3] @ (np.array(SHAPE) - 1) / 2
    return out


def save(path: Path, voxels: np.ndarray, grid: np.ndarray, description: str) -> None:
    """One NIfTI-1 file in scanner coordinates, millimetres."""
    image = nib.Nifti1Image(voxels, grid)
    image.set_sform(grid, code="scanner")
    image.set_qform(grid, code="scanner")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def write(folder: Path, patients: int = 24, seed: int = 0) -> list[str]:
    """Write the cohort; returns the ids."""
    ids = [f"PROST-{number:03d}" for number in range(1, patients + 1)]
    told = {"t2": "T2 TSE", "adc": "ADC 1e-6 mm2/s", "labels": "1 gland 2 lesion"}
    for number, one in enumerate(ids):
        grid = affine(seed, number)
        for kind, voxels in patient(seed, number).items():
            save(folder / kind / f"{one}.nii.gz", voxels, grid, told[kind])
    return ids


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write prostates of nobody: t2, adc, labels.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--patients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(
        f"{len(write(given.folder, given.patients, given.seed))} patients in {given.folder}: t2, adc, labels"
    )
