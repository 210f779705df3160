"""How well an image lies on the atlas, in figures, and which of them are suspicious."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from splitpeer.data.geometry import Triple
from splitpeer.data.regrid import onto, softened
from splitpeer.prepare.atlas import Atlas, corners
from splitpeer.prepare.bounds import QualityBounds

JUDGED_MM = 2.0
"""Of the grid on which figures are computed."""
AROUND_MM = 8.0
"""Figures are of the atlas's brain and so much around it: its edge is what misses first."""
BINS = 32
MOVED_MM, TURNED_DEG = 6.0, 8.0
"""How far an image is moved away from where it was put, to see whether it fits better there. 8 degrees are 10 mm at the
edge of a brain."""
STRIDE = 2
"""Of the voxels that are compared there, along each axis: one in eight is enough, as only differences count."""


@dataclass(frozen=True, eq=False)
class SeenBrain:
    """An image and the atlas on one coarse grid, for figures and pictures: [x, y, z] each."""

    image: NDArray[np.float32]
    atlas: NDArray[np.float32]
    brain: NDArray[np.bool_]
    inside: NDArray[np.bool_]
    """Where the scan shows anything at all."""


def seen_on(atlas: Atlas, volume: NDArray[np.float32], affine: NDArray[np.float64]) -> SeenBrain:
    """`volume`, placed by `affine` in the atlas's millimetres, beside the atlas."""
    x, y, z = atlas.voxels.shape
    ends = corners((x, y, z), atlas.affine)
    low, high = ends.min(axis=1), ends.max(axis=1)
    nx, ny, nz = (int(n) for n in np.ceil((high - low) / JUDGED_MM) + 1)
    shape: Triple = (nx, ny, nz)
    grid = np.diag([JUDGED_MM, JUDGED_MM, JUDGED_MM, 1.0])
    grid[:3, 3] = low
    return SeenBrain(
        _float(onto(softened(volume, affine, grid), affine, shape, grid, order=1)),
        _float(onto(softened(atlas.voxels, atlas.affine, grid), atlas.affine, shape, grid, order=1)),
        np.asarray(onto(atlas.brain, atlas.affine, shape, grid, order=0), bool),
        np.asarray(onto(np.ones(volume.shape, bool), affine, shape, grid, order=0), bool),
    )


def figures(seen: SeenBrain, transform: NDArray[np.float64]) -> dict[str, float]:
    """The figures of one image.

    nmi: normalised mutual information (H(A) + H(B)) / H(A, B) of image and atlas around the brain (Studholme et al.,
    Pattern Recognition 32, 1999): 1 unrelated, 2 determined by each other. peak: the share of nmi - 1 that is lost, at
    the least, when the image is shifted by `MOVED_MM` or turned by `TURNED_DEG`; below 0 it fits better elsewhere, and
    near 0 anywhere. overlap: Dice of what is bright in the image
    (Otsu) and the atlas's brain, around it. covered: the share of the atlas's brain that the scan shows at all.
    turned_deg, shifted_mm, scale_min, scale_max: what the transform does.
    """
    near = ndimage.binary_dilation(seen.brain, iterations=round(AROUND_MM / JUDGED_MM)) & seen.inside
    covered = float((seen.brain & seen.inside).sum() / seen.brain.sum())
    inside = seen.image[near]
    flat = not near.any() or float(inside.min()) == float(inside.max())
    bright = np.zeros(1, bool) if flat else inside > threshold_otsu(inside) / 2
    brain = seen.brain[near]
    overlap = 0.0 if flat else 2 * float((bright & brain).sum()) / float(bright.sum() + brain.sum())
    rotation, scales = _parts(transform)
    cosine = np.clip((np.trace(rotation) - 1) / 2, -1, 1)
    return {
        "nmi": 1.0 if flat else _nmi(inside, seen.atlas[near]),
        "peak": 0.0 if flat else _peak(seen),
        "overlap": overlap,
        "covered": covered,
        "turned_deg": float(np.degrees(np.arccos(cosine))),
        "shifted_mm": float(np.linalg.norm(transform[:3, 3])),
        "scale_min": float(scales.min()),
        "scale_max": float(scales.max()),
    }


def suspicious(figures: Mapping[str, float], bounds: QualityBounds) -> tuple[str, ...]:
    """What is suspicious about an image, a line each; () where nothing is."""
    lines = []
    for name, least in (
        ("nmi", bounds.least_nmi),
        ("peak", bounds.least_peak),
        ("overlap", bounds.least_overlap),
        ("covered", bounds.least_covered),
    ):
        if figures[name] < least:
            lines.append(f"{name} {figures[name]:.3f}, less than {least:g}")
    if figures["scale_max"] > bounds.most_scaled or figures["scale_min"] < 1 / bounds.most_scaled:
        shown = f"{figures['scale_min']:.2f} to {figures['scale_max']:.2f}"
        lines.append(f"stretched by {shown}, beyond a factor of {bounds.most_scaled:g}")
    if figures["turned_deg"] > bounds.most_turned:
        lines.append(f"turned by {figures['turned_deg']:.0f} degrees, more than {bounds.most_turned:g}")
    return tuple(lines)


# --- inside ------------------------------------------------------------------------------------------------


def _peak(seen: SeenBrain) -> float:
    around = ndimage.binary_dilation(seen.brain, iterations=round(AROUND_MM / JUDGED_MM))
    points = STRIDE * np.argwhere(around[::STRIDE, ::STRIDE, ::STRIDE]).T.astype(np.float64)
    atlas = seen.atlas[tuple(points.astype(np.intp))]
    there = seen.inside.astype(np.uint8)

    def fit(move: NDArray[np.float64]) -> float:
        moved = move[:3, :3] @ points + move[:3, 3:]
        shown = ndimage.map_coordinates(there, moved, order=0) > 0
        image = ndimage.map_coordinates(seen.image, moved, order=1)
        return _nmi(image[shown], atlas[shown]) if shown.any() else 1.0

    here = fit(np.eye(4))
    best = max(fit(move) for move in _moves(np.argwhere(seen.brain).mean(axis=0)))
    return max((here - best) / (here - 1), -1.0) if here > 1 else 0.0


def _moves(centre: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Along and about each axis, both ways, in voxels of the judged grid; 4x4."""
    for axis in range(3):
        for sign in (-1, 1):
            shift, turn = np.eye(4), np.eye(4)
            shift[axis, 3] = sign * MOVED_MM / JUDGED_MM
            yield shift
            one, other = (k for k in range(3) if k != axis)
            angle = sign * np.deg2rad(TURNED_DEG)
            turn[one, one] = turn[other, other] = np.cos(angle)
            turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
            turn[:3, 3] = centre - turn[:3, :3] @ centre
            yield turn


def _nmi(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    # The brightest thousandth would squeeze all others into few bins.
    clipped = [
        np.clip(values, *np.quantile(values, (0.001, 0.999))).astype(np.float64) for values in (one, other)
    ]
    joint = np.histogram2d(clipped[0], clipped[1], bins=BINS)[0]
    joint /= joint.sum()
    both = _entropy(joint.ravel())
    return (_entropy(joint.sum(axis=1)) + _entropy(joint.sum(axis=0))) / both if both else 1.0


def _entropy(shares: NDArray[np.float64]) -> float:
    found = shares[shares > 0]
    return float(-(found * np.log(found)).sum())


def _parts(transform: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The rotation nearest to a transform, and its factors along three directions."""
    u, scales, v = np.linalg.svd(transform[:3, :3])
    return np.asarray(u @ v, np.float64), np.asarray(scales, np.float64)


def _float(voxels: NDArray[np.generic]) -> NDArray[np.float32]:
    return voxels.astype(np.float32)
