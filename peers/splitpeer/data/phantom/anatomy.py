"""A head for the phantom: MNI152 tissue maps, deformed smoothly, on any grid.

The maps (ICBM 2009a, non-linear, symmetric; Fonov et al., NeuroImage 54, 2011) come with nilearn's wheel; nothing is
downloaded. All randomness lives on lattices fixed in millimetres, so that one patient is the same person at every
resolution. Only elementwise arithmetic and scipy.ndimage are used, no BLAS: thread counts do not change a bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from splitpeer.errors import DataError, needs

Volume = NDArray[np.float32]
Spacing = tuple[float, float, float]
Shape = tuple[int, int, int]

# The middle of the brain in MNI millimetres, and half the edge of the cube in which random fields live.
CENTRE_MM = (0.0, -18.0, 6.0)
HALF_BOX_MM = 140.0


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: it keys a cache
class TissueMaps:
    """Fractions of tissue on the 1 mm template grid, as uint8 (255 = all): small enough to hand to worker processes."""

    grey: NDArray[np.uint8]
    white: NDArray[np.uint8]
    brain: NDArray[np.uint8]
    origin: tuple[float, float, float]  # millimetres of voxel (0, 0, 0)


def load_tissue_maps() -> TissueMaps:
    """Reads the maps from nilearn's wheel (extra `demo`). Raises ConfigError where nilearn is missing."""
    try:
        from nilearn import datasets
    except ImportError:
        raise needs("the phantom", "nilearn", "demo") from None
    images = [
        datasets.load_mni152_gm_template(resolution=1),
        datasets.load_mni152_wm_template(resolution=1),
        datasets.load_mni152_brain_mask(resolution=1),
    ]
    affine = np.asarray(images[0].affine)
    if not np.array_equal(affine[:3, :3], np.eye(3)):
        raise DataError(
            "nilearn's MNI152 maps are not on the 1 mm grid: install a nilearn between 0.11 and 0.14"
        )
    grey, white, brain = (np.rint(np.asarray(i.dataobj, np.float32) * 255).astype(np.uint8) for i in images)
    return TissueMaps(grey, white, brain, (float(affine[0, 3]), float(affine[1, 3]), float(affine[2, 3])))


@dataclass(frozen=True)
class Grid:
    """The voxel grid of an acquisition: RAS axes, its centre at the middle of the brain.

    `axes` are the millimetre coordinates of the voxel centres along x, y and z, relative to `CENTRE_MM`.
    """

    shape: Shape
    spacing_mm: Spacing

    @property
    def axes(self) -> tuple[Volume, Volume, Volume]:
        """Millimetres of the voxels along x, y and z, 0 in the middle: float32 [n] each."""
        x, y, z = (
            ((np.arange(n) - (n - 1) / 2) * step).astype(np.float32)
            for n, step in zip(self.shape, self.spacing_mm, strict=True)
        )
        return x, y, z

    @property
    def affine(self) -> NDArray[np.float64]:
        """Voxel to millimetre (RAS, MNI), shape (4, 4)."""
        affine = np.diag([*map(float, self.spacing_mm), 1.0])
        for k in range(3):
            affine[k, 3] = CENTRE_MM[k] - (self.shape[k] - 1) / 2 * self.spacing_mm[k]
        return affine

    def box(self, centre: NDArray[np.float64], radius_mm: float) -> tuple[slice, slice, slice]:
        """The part of the grid within `radius_mm` of a point, axis by axis; may be empty."""
        slices = []
        for axis, middle in zip(self.axes, centre, strict=True):
            low, high = np.searchsorted(axis, [middle - radius_mm, middle + radius_mm])
            slices.append(slice(int(low), int(high)))
        return slices[0], slices[1], slices[2]


class SmoothFields:
    """Draws smooth Gaussian random fields of mean 0 and variance 1, each with its own correlation length.

    White noise on a cubic lattice of the wanted spacing, interpolated by cubic B-splines whose weights are scaled to
    unit energy at every point, so unit variance everywhere.
    """

    def __init__(self, rng: np.random.Generator, grid: Grid) -> None:
        self._rng = rng
        self._axes = grid.axes

    def draw(self, scale_mm: float) -> Volume:
        """One field over the grid: float32, the grid's shape."""
        count = int(2 * HALF_BOX_MM / scale_mm) + 4
        values = self._rng.standard_normal((count, count, count), dtype=np.float32)
        # z first: thick slices make it the shortest axis, so that the later passes touch least.
        for k in (2, 1, 0):
            first, weights = _spline_weights(self._axes[k], scale_mm, count)
            weights = weights.reshape(4, *(-1 if axis == k else 1 for axis in range(3)))
            total = np.take(values, first, axis=k) * weights[0]
            for tap in (1, 2, 3):
                total += np.take(values, first + tap, axis=k) * weights[tap]
            values = total
        return values


def _spline_weights(axis: Volume, scale_mm: float, count: int) -> tuple[NDArray[np.int64], Volume]:
    position = np.clip((axis + HALF_BOX_MM) / scale_mm, 0, count - 4)
    first = np.minimum(np.floor(position).astype(np.int64), count - 4)
    t = position - first
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3])
    weights /= np.sqrt((weights**2).sum(axis=0))
    return first, weights.astype(np.float32)


@dataclass(frozen=True)
class Head:
    """One person's healthy anatomy on a grid; fractions are float32 in 0..1 and sum to 1 inside `brain`."""

    grid: Grid
    brain: NDArray[np.bool_]
    csf: Volume
    grey: Volume
    white: Volume


@dataclass(frozen=True)
class Push:
    """Mass effect: what lay near `centre_mm` (relative to the grid's middle) is pushed outwards, out to `radius_mm`."""

    centre_mm: NDArray[np.float64]
    radius_mm: float
    strength: float  # 0 none; below 1, or tissue would fold


@dataclass(frozen=True)
class HeadPose:
    """How a person's head differs from the template in size and tilt: template = matrix @ person, millimetres."""

    matrix: NDArray[np.float64]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> HeadPose:
        """Turned by a few degrees, and stretched by a few percent along each axis."""
        pitch, roll, yaw = np.deg2rad(rng.normal(0, (4.0, 2.5, 3.0)))
        matrix = np.diag(rng.normal(1.0, 0.035, 3))
        for angle, (i, j) in ((pitch, (1, 2)), (roll, (0, 2)), (yaw, (0, 1))):
            turn = np.eye(3)
            turn[i, i] = turn[j, j] = np.cos(angle)
            turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
            matrix = np.einsum("ij,jk->ik", turn, matrix)
        return cls(matrix)

    def to_person(self, template_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """A template position (relative to `CENTRE_MM`) in the person's millimetres."""
        return np.linalg.solve(self.matrix, template_mm).astype(np.float64, copy=False)


@lru_cache(maxsize=2)
def _blurred(maps: TissueMaps, spacing_mm: Spacing) -> tuple[Volume, Volume, Volume]:
    """Grey, white and brain as a voxel of that size averages them (partial volume of thick slices)."""
    sigma = [0.38 * step if step > 1 else 0.0 for step in spacing_mm]
    grey, white, brain = (
        ndimage.gaussian_filter(part.astype(np.float32) / 255, sigma, truncate=2.5)
        for part in (maps.grey, maps.white, maps.brain)
    )
    return grey, white, brain


def render_head(maps: TissueMaps, grid: Grid, fields: SmoothFields, pose: HeadPose, push: Push) -> Head:
    """The template's tissues, deformed into one person.

    Two bands of smooth displacement make the person; a finer field of CSF gives sulci that the template, an average of
    152 people, has lost.
    """
    x, y, z = np.meshgrid(*grid.axes, indexing="ij", sparse=True)
    dx, dy, dz = (axis - np.float32(middle) for axis, middle in zip((x, y, z), push.centre_mm, strict=True))
    squared = (dx * dx + dy * dy + dz * dz) / np.float32(push.radius_mm**2)
    pull = np.float32(push.strength) * np.exp(-squared)
    person = [x - dx * pull, y - dy * pull, z - dz * pull]

    coordinates = []
    for row, centre, origin in zip(pose.matrix.astype(np.float32), CENTRE_MM, maps.origin, strict=True):
        where = row[0] * person[0] + row[1] * person[1] + row[2] * person[2] + np.float32(centre - origin)
        where += 3.5 * fields.draw(45.0)
        where += 1.3 * fields.draw(18.0)
        coordinates.append(where)
    grey_map, white_map, brain_map = _blurred(maps, grid.spacing_mm)
    brain = ndimage.map_coordinates(brain_map, coordinates, order=1) > 0.5
    # The rest only where there is brain: a third of the voxels.
    inside = [where[brain] for where in coordinates]
    grey, white = (ndimage.map_coordinates(part, inside, order=1) for part in (grey_map, white_map))
    csf = np.clip(1 - grey - white, 0.02, 1) * np.exp(0.9 * fields.draw(7.0)[brain])
    # An average of many people is blurred; raising to a power and normalising makes it one person again.
    parts = [np.power(np.clip(part, 0, 1), np.float32(1.8)) for part in (csf, grey, white)]
    total = parts[0] + parts[1] + parts[2]
    volumes = np.zeros((3, *grid.shape), np.float32)
    for volume, part in zip(volumes, parts, strict=True):
        volume[brain] = part / total
    csf, grey, white = volumes
    return Head(grid, brain, csf, grey, white)
