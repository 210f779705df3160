"""Synthetic prostates: T2 at one hospital, ADC at another, masks of gland and lesion at the coordinator.

    python examples/prostate/phantom.py FOLDER --patients 24 --seed 0

writes FOLDER/t2, FOLDER/adc and FOLDER/labels, one ID.nii.gz per patient in each.

A lesion is dark in T2 *and* restricts diffusion. Each patient also has spots that are dark in T2 alone (scars) and
spots that restrict diffusion alone (stromal nodules), so neither hospital can tell a lesion without the other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from splitpeer.data.phantom.drawing import Volume, inside, places, save, scanner_grid, script

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
    place = places(SHAPE, SPACING)
    middle, radii = rng.uniform(-2, 2, 3), np.array([22, 18, 20]) * rng.uniform(0.85, 1.15, 3)
    gland = inside(place, middle, radii)
    transition = inside(place, middle + np.array([0, 4, 0]), radii * 0.6)
    body = inside(place, np.zeros(3), (36, 34, 60))
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
        spot = inside(place, middle + rng.uniform(-0.6, 0.6, 3) * radii, rng.uniform(4.5, 8, 3)) & gland
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


def _ring(place: list[Volume]) -> np.ndarray:
    """Muscle left and right of the gland, bool [x, y, z]."""
    distance: Volume = ((abs(place[0]) - 30) / 5) ** 2 + (place[1] / 18) ** 2 + 0 * place[2]
    return distance < 1


def affine(seed: int, number: int) -> np.ndarray:
    """Voxel to millimetres (RAS), 4x4: slices tilted to the gland."""
    rng = np.random.default_rng([seed, number, 1])
    tilt, turn = rng.uniform(5, 20), rng.uniform(-4, 4)
    return scanner_grid(SHAPE, SPACING, rng.uniform(-10, 10, 3), tilt=tilt, turn=turn)


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
    script("Write prostates of nobody", "t2, adc, labels", write)
