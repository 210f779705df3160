"""The grid of a volume, and whether all sites hold a patient on the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from splitpeer.errors import DataError
from splitpeer.logs import handle

SPACING_TOLERANCE = 1e-3  # mm
# Quaternions in float32 headers move an origin 240 mm away by some micrometres; a voxel is a hundred times
# more.
ORIGIN_TOLERANCE = 1e-2  # mm


@dataclass(frozen=True)
class Geometry:
    """The grid that windows are cut from.

    `shape` in voxels, `spacing` in mm and `origin` (the centre of voxel 0, 0, 0, in mm) hold after
    reorientation to RAS and resampling; `orientation` is what the file had: three axis codes such as "LPS".
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    orientation: str
    origin: tuple[float, float, float]


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
                    f"co-register and resample all contrasts of the patient to one grid"
                )


def differences(one: Geometry, other: Geometry) -> list[str]:
    """What differs between two grids, each as "name a against b"; empty where they agree."""
    found = []
    if one.shape != other.shape:
        found.append(f"shape {_numbers(one.shape)} against {_numbers(other.shape)}")
    if _apart(one.spacing, other.spacing, SPACING_TOLERANCE):
        found.append(f"spacing {_numbers(one.spacing)} against {_numbers(other.spacing)} mm")
    if one.orientation != other.orientation:
        found.append(f"orientation {one.orientation} against {other.orientation}")
    if _apart(one.origin, other.origin, ORIGIN_TOLERANCE):
        found.append(f"origin {_numbers(one.origin)} against {_numbers(other.origin)} mm")
    return found


def _apart(one: tuple[float, ...], other: tuple[float, ...], tolerance: float) -> bool:
    # "not <=" so that a NaN from the wire counts as different.
    return len(one) != len(other) or not all(abs(a - b) <= tolerance for a, b in zip(one, other, strict=True))


def _numbers(values: tuple[float, ...]) -> str:
    return "x".join(f"{value:.6g}" for value in values)
