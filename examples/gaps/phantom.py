"""Synthetic heads: T1 at two hospitals, FLAIR at a third, masks of lesions at the coordinator; some images are missing.

    python examples/gaps/phantom.py FOLDER --patients 24 --seed 0

writes FOLDER/north (T1 of one half of the patients), FOLDER/east (T1 of the other half, another scanner), FOLDER/south
(FLAIR) and FOLDER/labels, one ID.nii.gz per patient in each. Every `WITHOUT_FLAIR`th patient has no FLAIR, every
`WITHOUT_T1`th no T1.

A lesion is dark in T1 *and* bright in FLAIR. Each patient also has spots that are dark in T1 alone (spaces around
vessels) and spots that are bright in FLAIR alone (artefacts of flow), so no hospital can tell a lesion without another.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from splitpeer.data.phantom.drawing import inside, places, save, scanner_grid, script

SHAPE, SPACING = (64, 64, 20), (3.0, 3.0, 5.0)
"""Voxels; millimetres."""
BACKGROUND, LESION = 0, 1
"""Values of a mask."""
GREY, WHITE, FLUID = (300, 330), (480, 260), (110, 70)
"""Signal in T1 and FLAIR, arbitrary units."""
T1_DARK, FLAIR_BRIGHT = 240, 520
T1_NOISE, FLAIR_NOISE = 24, 24
WITHOUT_FLAIR, WITHOUT_T1 = 6, 11
SCANNERS = {"north": (1.0, 0.05, (8, 14)), "east": (2.6, 0.25, (-6, 0))}
"""Of T1: gain, how much brighter the front is than the back, tilt of the slices in degrees (from, to)."""


def hospital(number: int) -> str:
    """Who took the T1 image of a patient."""
    return ("north", "east")[number % 2]


def holders(number: int) -> tuple[str, ...]:
    """Which hospitals have an image of a patient; at least one."""
    lacks_flair, lacks_t1 = (number + 1) % WITHOUT_FLAIR == 0, (number + 1) % WITHOUT_T1 == 0
    return (() if lacks_t1 and not lacks_flair else (hospital(number),)) + (() if lacks_flair else ("south",))


def patient(seed: int, number: int) -> dict[str, np.ndarray]:
    """`t1` and `flair`, int16 [x, y, z], 0 outside the brain; `labels`, uint8. As if nothing were missing."""
    rng = np.random.default_rng([seed, number])
    place = places(SHAPE, SPACING)
    radii = np.array([66, 82, 46]) * rng.uniform(0.93, 1.07, 3)
    brain, white = inside(place, (0, 0, 0), radii), inside(place, (0, 0, 0), radii * 0.8)
    ventricles = inside(place, (-10, 0, 5), (7, 26, 14)) | inside(place, (10, 0, 5), (7, 26, 14))
    t1, flair = np.full((2, *SHAPE), 0.0)
    for (one, other), where in ((GREY, brain), (WHITE, white), (FLUID, ventricles)):
        t1[where], flair[where] = one, other
    lesion = np.zeros(SHAPE, bool)
    for kind in ("t1", "flair", "both") * 3:
        centre = rng.uniform(-0.55, 0.55, 3) * radii
        spot = inside(place, centre, rng.uniform(8, 14, 3)) & white & ~ventricles
        # A later spot takes the place of an earlier one, in both images and in the mask.
        lesion = lesion | spot if kind == "both" else lesion & ~spot
        t1[spot] = WHITE[0] if kind == "flair" else T1_DARK
        flair[spot] = WHITE[1] if kind == "t1" else FLAIR_BRIGHT
    gain, slope, _ = SCANNERS[hospital(number)]
    t1 = (t1 + rng.normal(0, T1_NOISE, SHAPE)) * gain * (1 + slope * place[1] / 100)
    flair = (flair + rng.normal(0, FLAIR_NOISE, SHAPE)) * rng.uniform(0.8, 1.3)
    return {
        "t1": (np.clip(np.rint(t1), 1, 4095) * brain).astype(np.int16),
        "flair": (np.clip(np.rint(flair), 1, 4095) * brain).astype(np.int16),
        "labels": np.where(lesion, LESION, BACKGROUND).astype(np.uint8),
    }


def affine(seed: int, number: int) -> np.ndarray:
    """Voxel to millimetres (RAS), 4x4: slices tilted to the base of the skull."""
    rng = np.random.default_rng([seed, number, 1])
    tilt = rng.uniform(*SCANNERS[hospital(number)][2])
    return scanner_grid(SHAPE, SPACING, rng.uniform(-8, 8, 3), tilt=tilt)


def write(folder: Path, patients: int = 24, seed: int = 0) -> dict[str, tuple[str, ...]]:
    """Write the cohort; returns who has an image of whom: id -> hospitals."""
    cohort: dict[str, tuple[str, ...]] = {}
    for number in range(patients):
        one, grid, images = f"HEAD-{number + 1:03d}", affine(seed, number), patient(seed, number)
        cohort[one] = holders(number)
        for site in cohort[one]:
            kind = "flair" if site == "south" else "t1"
            save(folder / site / f"{one}.nii.gz", images[kind], grid, f"{kind.upper()} of {site}")
        save(folder / "labels" / f"{one}.nii.gz", images["labels"], grid, "1 lesion")
    return cohort


if __name__ == "__main__":
    script("Write heads of nobody", "north, east, south, labels", write)
