"""One phantom patient: four contrasts and a label, from (seed, index) alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from splitpeer.data.phantom_anatomy import (
    CENTRE_MM,
    Grid,
    Pose,
    Push,
    Shape,
    SmoothFields,
    Spacing,
    TissueMaps,
    Volume,
    load_tissue_maps,
    render_head,
)
from splitpeer.data.phantom_lesions import Canvas, Glioma, Textures, draw_lookalikes

MODALITIES = ("flair", "t1", "t1ce", "t2")
DEFAULT_SHAPE: Shape = (96, 96, 24)
DEFAULT_SPACING_MM: Spacing = (2.1, 2.1, 6.0)


@dataclass(frozen=True)
class Patient:
    """`images`: float32 (X, Y, Z) per modality, whole numbers >= 0, background 0, arbitrary scanner units.

    `labels`: uint8 (X, Y, Z), MSD convention (1 oedema, 2 non-enhancing core, 3 enhancing). `affine`: voxel to
    millimetre, RAS, (4, 4).
    """

    images: dict[str, Volume]
    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]


@lru_cache(maxsize=1)
def tissue_maps() -> TissueMaps:
    return load_tissue_maps()


@lru_cache(maxsize=1)
def _places(maps: TissueMaps) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where lesions may sit, as template millimetres relative to `CENTRE_MM`: for tumours and for look-alikes, (n, 3)."""
    step = 4
    brain = maps.brain[::step, ::step, ::step] > 127
    depth = step * ndimage.distance_transform_edt(np.pad(brain, 1))[1:-1, 1:-1, 1:-1]
    tissue = maps.white[::step, ::step, ::step].astype(int) + maps.grey[::step, ::step, ::step] > 200
    shift = np.asarray(maps.origin) - CENTRE_MM
    height = (np.arange(brain.shape[2]) * step + shift[2])[None, None, :]
    # Gliomas of adults are supratentorial.
    deep = tissue & (depth > 16) & (height > -12) & (maps.white[::step, ::step, ::step] > 127)
    anywhere = tissue & (depth > 5) & (height > -35)
    return np.argwhere(deep) * step + shift, np.argwhere(anywhere) * step + shift


def render_patient(
    seed: int,
    index: int,
    shape: Shape = DEFAULT_SHAPE,
    spacing_mm: Spacing = DEFAULT_SPACING_MM,
    *,
    maps: TissueMaps | None = None,
) -> Patient:
    """Renders patient `index` of the cohort `seed`; the same arguments give the same bits.

    The person, the tumour and the look-alikes are fixed in millimetres: another shape or spacing images the same
    patient (noise apart). About 0.2 s for 96 x 96 x 24, half a minute for 240 x 240 x 155.
    Raises DataError where nilearn's maps are missing.
    """
    maps = maps or tissue_maps()
    plan_rng, field_rng, noise_rng = (
        np.random.default_rng(np.random.SeedSequence([seed, index, stream])) for stream in range(3)
    )
    grid = Grid(tuple(shape), tuple(spacing_mm))
    fields = SmoothFields(field_rng, grid)

    pose = Pose.draw(plan_rng)
    tumour_places, places = _places(maps)
    centre = pose.to_person(tumour_places[plan_rng.integers(len(tumour_places))])
    glioma = Glioma.draw(plan_rng, centre)
    lookalikes = draw_lookalikes(plan_rng, places, pose)

    push = Push(centre, 1.5 * glioma.radius_mm, float(plan_rng.uniform(0.25, 0.5)))
    head = render_head(maps, grid, fields, pose, push)
    textures = Textures.draw(fields)

    canvas = Canvas(head, textures, plan_rng.normal(1, 0.03, (3, 4)))
    for lesion in lookalikes:
        canvas.add_lookalike(lesion, plan_rng.normal(1, 0.05, 4))
    canvas.add_glioma(glioma, plan_rng.normal(1, 0.05, (5, 4)))

    images = {}
    for modality, signal in zip(MODALITIES, canvas.signal, strict=True):
        bias = np.exp(np.float32(plan_rng.uniform(0.05, 0.12)) * fields.draw(90.0))
        images[modality] = _scan(signal * bias, head.brain, noise_rng, plan_rng)
    return Patient(images, canvas.label, grid.affine)


def _scan(
    signal: Volume, brain: NDArray[np.bool_], noise_rng: np.random.Generator, plan_rng: np.random.Generator
) -> Volume:
    """The magnitude image a scanner stores: Rician noise, arbitrary gain, whole numbers, skull stripped."""
    sigma = np.float32(plan_rng.uniform(0.025, 0.05))
    gain = np.float32(plan_rng.uniform(400, 1200))
    real = signal + sigma * noise_rng.standard_normal(signal.shape, dtype=np.float32)
    imaginary = sigma * noise_rng.standard_normal(signal.shape, dtype=np.float32)
    image = np.rint(gain * np.sqrt(real * real + imaginary * imaginary))
    image[~brain] = 0
    return image
