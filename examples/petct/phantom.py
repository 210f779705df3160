"""Synthetic chests: CT at one hospital, PET at another, masks of tumour at the coordinator.

    python examples/petct/phantom.py FOLDER --patients 24 --seed 0

writes FOLDER/ct, FOLDER/pet and FOLDER/labels, one ID.nii.gz per patient in each.

A tumour has the density of soft tissue *and* takes up tracer. Each patient also has spots that only take up tracer
(brown fat, inflamed lung) and nodules that only have the density, in the same places. So neither hospital can tell a
tumour without the other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from splitpeer.data.phantom.drawing import inside, places, save, scanner_grid, script

SHAPE, SPACING = (64, 64, 24), (5.0, 5.0, 5.0)
"""Voxels; millimetres."""
BACKGROUND, TUMOUR = 0, 1
"""Values of a mask."""
AIR, LUNG, FAT, SOFT, BONE = (-1000, 0.05), (-820, 0.4), (-100, 0.3), (45, 0.9), (650, 0.8)
"""Hounsfield units; SUV."""
INFLAMED = {"fat": -100, "lung": -450}
"""Hounsfield units of what takes up tracer and is no tumour, by the tissue around it."""
HU_NOISE, SUV_NOISE = 14, 0.12
BLUR = 4.0
"""Of PET, standard deviation in mm."""
RESCALE_INTERCEPT = -1024
"""CT is stored as a scanner does: unsigned, stored value - 1024 = HU."""


def patient(seed: int, number: int) -> dict[str, np.ndarray]:
    """`ct` in HU, int16 [x, y, z]; `pet` in SUV, float32; `labels`, uint8."""
    rng = np.random.default_rng([seed, number])
    place = places(SHAPE, SPACING)
    size, long = rng.uniform(0.92, 1.08), 1e6
    lungs = [inside(place, (side * 58 * size, 5, 0), (40 * size, 55 * size, 75)) for side in (-1, 1)]
    parts = [
        (FAT, inside(place, (0, 0, 0), (145 * size, 105 * size, long))),
        (SOFT, inside(place, (0, 0, 0), (122 * size, 84 * size, long))),
        (FAT, inside(place, (0, 10, 0), (25 * size, 45 * size, long))),  # the mediastinum
        (LUNG, lungs[0] | lungs[1]),
        (SOFT, inside(place, (10, 18, -25), (32, 28, 30))),  # the heart
        (BONE, inside(place, (0, -62 * size, 0), (14, 14, long))),  # the spine
    ]
    ct, pet = np.full((2, *SHAPE), 0.0)
    ct[:], pet[:] = AIR
    for (density, uptake), where in parts:
        ct[where], pet[where] = density, uptake
    tumour = np.zeros(SHAPE, bool)
    for kind in ("uptake", "density", "both") * 2:
        region, centre = _place(rng, size)
        spot = inside(place, centre, rng.uniform(11, 18, 3))
        # A later spot takes the place of an earlier one, in both images and in the mask.
        tumour = tumour | spot if kind == "both" else tumour & ~spot
        ct[spot] = INFLAMED[region] if kind == "uptake" else rng.uniform(35, 60)
        pet[spot] = SOFT[1] if kind == "density" else rng.uniform(5, 10)
    ct = ct + rng.normal(0, HU_NOISE, SHAPE)
    pet = _blurred(pet) * (1 + rng.normal(0, SUV_NOISE, SHAPE))
    return {
        "ct": np.clip(np.rint(ct), -1024, 3071).astype(np.int16),
        "pet": np.clip(pet, 0.001, None).astype(np.float32),
        "labels": np.where(tumour, TUMOUR, BACKGROUND).astype(np.uint8),
    }


def _place(rng: np.random.Generator, size: float) -> tuple[str, tuple[float, float, float]]:
    """Tissue and centre (mm) of a spot: below the skin, between the lungs, or in one of them."""
    side, height = rng.choice((-1, 1)), rng.uniform(-40, 40)
    where = rng.choice(("skin", "middle", "lung", "lung"))
    if where == "skin":
        angle = rng.uniform(0.15, 0.85) * np.pi
        return "fat", (side * 128 * size * np.sin(angle), 90 * size * np.cos(angle), height)
    if where == "middle":
        return "fat", (rng.uniform(-12, 12), rng.uniform(-15, 40) * size, height)
    return "lung", (side * rng.uniform(40, 75) * size, rng.uniform(-22, 30) * size, height)


def _blurred(voxels: np.ndarray) -> np.ndarray:
    """What a PET scanner makes of it: a Gaussian of `BLUR` mm, around the edges."""
    spectrum = np.fft.rfftn(voxels)
    waves = [np.fft.fftfreq(n, mm) for n, mm in zip(SHAPE, SPACING, strict=True)]
    waves[2] = np.fft.rfftfreq(SHAPE[2], SPACING[2])
    for axis, wave in enumerate(waves):
        gauss = np.exp(-2 * (np.pi * BLUR * wave) ** 2)
        spectrum = spectrum * gauss.reshape([-1 if a == axis else 1 for a in range(3)])
    return np.fft.irfftn(spectrum, SHAPE, axes=(0, 1, 2))


def affine(seed: int, number: int) -> np.ndarray:
    """Voxel to millimetres (RAS), 4x4: the patient lies a little turned."""
    rng = np.random.default_rng([seed, number, 1])
    turn = rng.uniform(-3, 3)
    return scanner_grid(SHAPE, SPACING, (0, 0, rng.uniform(-900, -300)), turn=turn)


def write(folder: Path, patients: int = 24, seed: int = 0) -> list[str]:
    """Write the cohort; returns the ids."""
    ids = [f"CHEST-{number:03d}" for number in range(1, patients + 1)]
    told = {"ct": "CT HU", "pet": "PET FDG SUVbw g/ml", "labels": "1 tumour"}
    for number, one in enumerate(ids):
        grid = affine(seed, number)
        for kind, voxels in patient(seed, number).items():
            save(
                folder / kind / f"{one}.nii.gz", voxels, grid, told[kind], RESCALE_INTERCEPT * (kind == "ct")
            )
    return ids


if __name__ == "__main__":
    script("Write chests of nobody", "ct, pet, labels", write)
