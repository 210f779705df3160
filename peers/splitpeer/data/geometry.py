"""The grid of a volume: where each voxel is, its RAS orientation, and whether two grids agree (SP-11.12)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from splitpeer.errors import DataError
from splitpeer.logs import handle

Triple = tuple[int, int, int]
Millimetres = tuple[float, float, float]

GRID_TOLERANCE = 0.25
"""How far apart equal voxels of two grids may lie, as a fraction of the shortest voxel edge, at the corner where they
are farthest apart. Rounding in float32 headers causes up to 0.2 mm there (a quaternion near a half turn); half a
voxel would be visible."""

SPACING_TOLERANCE = 1e-3
"""A volume whose spacing differs from the job's by no more than this, in mm, along every axis is not resampled."""

_CODES = ("LR", "PA", "IS")


@dataclass(frozen=True)
class Geometry:
    """The grid that windows are cut from, after reorientation to RAS and resampling.

    Voxel (i, j, k) is centred at `affine` @ (i, j, k, 1), in millimetres: to the right, to anterior, to superior.
    """

    shape: Triple
    spacing: Millimetres
    """Millimetres along x, y, z."""
    directions: tuple[float, ...]
    """Nine direction cosines: the unit vector of the x axis, then that of y, then that of z."""
    origin: Millimetres
    """Centre of voxel (0, 0, 0)."""
    stored: Millimetres
    """Spacing before resampling; equal to `spacing` where the volume was not resampled."""

    @classmethod
    def of(cls, shape: Triple, affine: np.ndarray, stored: Millimetres | None = None) -> Geometry:
        """The grid of `shape` voxels placed by a 4x4 affine."""
        spacing = edges(affine)
        cosines = affine[:3, :3] / spacing
        return cls(
            shape=shape,
            spacing=(sizes := _three(spacing)),
            directions=tuple(float(c) for c in cosines.T.ravel()),
            origin=_three(affine[:3, 3]),
            stored=stored or sizes,
        )

    @property
    def affine(self) -> np.ndarray:
        """float64 4x4: from voxel to scanner coordinates (RAS, mm)."""
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(self.directions, (3, 3)).T * self.spacing
        affine[:3, 3] = self.origin
        return affine


@dataclass(frozen=True)
class Turn:
    """How stored axes become RAS: axis `order[a]` of the file becomes axis a, reversed where a is in `flipped`."""

    order: Triple
    flipped: tuple[int, ...]

    @classmethod
    def of(cls, affine: np.ndarray) -> Turn:
        """SP-11.12-5: the assignment of stored axes to R, A, S whose absolute cosines have the largest sum."""
        cosines = affine[:3, :3] / edges(affine)
        orders = ((x, y, z) for x, y, z in permutations(range(3)))
        order = max(orders, key=lambda o: sum(abs(cosines[a, o[a]]) for a in range(3)))
        return cls(order, tuple(a for a in range(3) if cosines[a, order[a]] < 0))

    @property
    def codes(self) -> str:
        """Towards which side each stored axis grows, such as "LPS"."""
        letters = {source: _CODES[axis][axis not in self.flipped] for axis, source in enumerate(self.order)}
        return "".join(letters[source] for source in range(3))

    def voxels(self, stored: np.ndarray) -> np.ndarray:
        """A view of stored voxels in RAS order."""
        reverse = tuple(slice(None, None, -1) if axis in self.flipped else slice(None) for axis in range(3))
        return stored.transpose(self.order)[reverse]

    def stored(self, ras: np.ndarray) -> np.ndarray:
        """A view of voxels in RAS order as they are stored: the inverse of `voxels`."""
        reverse = tuple(slice(None, None, -1) if axis in self.flipped else slice(None) for axis in range(3))
        return ras[reverse].transpose(np.argsort(self.order))

    def grid(self, shape: Triple, affine: np.ndarray) -> tuple[Triple, np.ndarray]:
        """Shape and affine of the same voxels in RAS order."""
        ras = np.array(affine, np.float64)
        for axis, source in enumerate(self.order):
            step = affine[:3, source]
            if axis in self.flipped:
                ras[:3, 3] += step * (shape[source] - 1)
                step = -step
            ras[:3, axis] = step
        x, y, z = (shape[source] for source in self.order)
        return (x, y, z), ras + 0.0  # no negative zeros


def spacing_of(sizes: Sequence[float] | None) -> Millimetres | None:
    """A job's voxel sizes, in mm, as three numbers; None where it names none: as stored."""
    if not sizes:
        return None
    x, y, z = sizes
    return x, y, z


def edges(affine: np.ndarray) -> np.ndarray:
    """Length of a voxel's three edges, in mm."""
    lengths: np.ndarray = np.sqrt(np.square(affine[:3, :3]).sum(axis=0))
    return lengths


def shear(shape: Triple, affine: np.ndarray) -> float:
    """How far, in mm, the volume's far side is shifted because its axes are not at right angles."""
    spacing = edges(affine)
    cosines = affine[:3, :3] / spacing
    extent = spacing * shape
    pairs = ((0, 1), (0, 2), (1, 2))
    return max(abs(float(cosines[:, a] @ cosines[:, b])) * float(max(extent[a], extent[b])) for a, b in pairs)


def apart(shape: Triple, one: np.ndarray, other: np.ndarray) -> float:
    """The largest distance, in mm, between equal voxels of two grids of `shape`."""
    corners = np.array(np.meshgrid(*((0, n - 1) for n in shape), indexing="ij"), float).reshape(3, -1)
    with np.errstate(over="ignore", invalid="ignore"):  # numbers from the wire may be of any size
        difference = (one - other)[:3]
        distances = np.sqrt(np.square(difference[:, :3] @ corners + difference[:, 3:]).sum(axis=0))
        return float(distances.max()) if np.isfinite(distances).all() else math.inf


def angle(one: np.ndarray, other: np.ndarray) -> float:
    """The angle in degrees by which one grid is turned against the other; exact for small ones too."""
    chord = np.linalg.norm(one[:3, :3] / edges(one) - other[:3, :3] / edges(other)) / math.sqrt(8)
    return math.degrees(2 * math.asin(min(float(chord), 1.0)))


def compare_geometry(sites: Mapping[str, Mapping[bytes, Geometry]]) -> None:
    """Refuse sites that hold one patient on different grids: equal windows would show different anatomy.

    `sites`: site -> patient key -> geometry; a patient is compared among the sites that have it. Raises
    DataError that names the first patient key (hex), the two sites and everything that differs.
    """
    first: dict[bytes, tuple[str, Geometry]] = {}
    for site in sorted(sites):
        for key in sorted(sites[site]):
            here = sites[site][key]
            known_site, known = first.setdefault(key, (site, here))
            if different := differences(known, here):
                raise DataError(
                    f"patient {handle(key)}: {known_site} and {site} differ in {'; '.join(different)}: "
                    f"co-register and resample all modalities of the patient to one grid"
                )


def differences(one: Geometry, other: Geometry) -> list[str]:
    """What differs between two grids, each as "name a against b"; empty where they agree (SP-11.12-9)."""
    found = []
    if not all(_same_length(one, other, axis) for axis in range(3)):
        found.append(f"shape {_numbers(one.shape)} against {_numbers(other.shape)}")
    x, y, z = (min(pair) for pair in zip(one.shape, other.shape, strict=True))
    distance = apart((x, y, z), one.affine, other.affine)
    allowed = GRID_TOLERANCE * min(*one.spacing, *other.spacing)
    # "not <=" so that a NaN counts as different.
    if not distance <= allowed:
        found += _described(one, other)
        found.append(f"position: equal voxels lie up to {distance:.3g} mm apart, {allowed:.3g} mm is allowed")
    return found


def _same_length(one: Geometry, other: Geometry, axis: int) -> bool:
    """Resampling rounds the length of an axis, and a coarse one ends up to one of its own voxels early."""
    if (one.stored, other.stored) == (one.spacing, other.spacing):
        return one.shape[axis] == other.shape[axis]
    spacing = max(one.spacing[axis], other.spacing[axis])
    slack = max(spacing, one.stored[axis], other.stored[axis])
    return abs(one.shape[axis] - other.shape[axis]) * spacing <= slack + SPACING_TOLERANCE


def _described(one: Geometry, other: Geometry) -> list[str]:
    found = []
    if _numbers(one.spacing) != _numbers(other.spacing):
        found.append(f"spacing {_numbers(one.spacing)} against {_numbers(other.spacing)} mm")
    with np.errstate(all="ignore"):
        turned = angle(one.affine, other.affine)
    if not turned < 0.01:
        found.append(f"direction: turned by {turned:.3g} degrees")
    if _numbers(one.origin) != _numbers(other.origin):
        found.append(f"origin {_numbers(one.origin)} against {_numbers(other.origin)} mm")
    return found


def _three(values: np.ndarray) -> Millimetres:
    x, y, z = (float(value) for value in values)
    return x, y, z


def _numbers(values: tuple[float, ...]) -> str:
    return "x".join(f"{value:.6g}" for value in values)
