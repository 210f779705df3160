"""Slices to a grid: which lie in one stack, in which order, and whether they are evenly spaced.

A stack is what can become one volume: slices of one series with one orientation, size and spacing, acquired in one way.
A tilted gantry shifts its slices against each other; the grid is then sheared, and its affine says so exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitpeer.data.geometry import Triple
from splitpeer.dicom.headers import DicomHeader, Frame
from splitpeer.errors import DataError

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
ONE_DIRECTION = 1e-3
"""What rounding leaves of a cosine vector: its norm differs from 1 by less. Slices of one stack: ten times that."""
SAME_PLACE = 1e-2
"""Slices closer than this share of their distance are at one place."""
UNEVEN = 0.1
"""A slice may lie so far from where an even spacing has it, as a share of that spacing. At a tenth of a voxel a
resampled image cannot tell."""
GAP = 1.5
"""A distance so many times the usual one means that slices are missing."""
TILTED = 0.5
"""Degrees between the slices' normal and the direction in which they follow each other, from which on it is said."""
MAX_SLICES = 4096
"""Of one volume."""

Slice = tuple[DicomHeader, Frame]


@dataclass(frozen=True)
class SliceStack:
    """One series' slices that may become a volume, as found; not yet looked at."""

    slices: tuple[Slice, ...]

    @property
    def first(self) -> DicomHeader:
        """For what all its files say alike."""
        return self.slices[0][0]


@dataclass(frozen=True)
class SliceGrid:
    """Where a stack's voxels are.

    `slices` in the order of the third axis. Voxel [column, row, slice] is at `affine` @ (column, row, slice, 1), in
    RAS millimetres.
    """

    shape: Triple
    affine: NDArray[np.float64]
    slices: tuple[Slice, ...]
    warnings: tuple[str, ...]


def stacks_of(headers: Sequence[DicomHeader]) -> list[SliceStack]:
    """The stacks of one series, the largest first."""
    groups: dict[tuple[object, ...], list[list[Slice]]] = defaultdict(list)
    for header in headers:
        for frame in header.frames:
            alike = groups[header.rows, header.columns, frame.spacing, frame.apart]
            for group in alike:
                if _one_direction(group[0][1], frame):
                    group.append((header, frame))
                    break
            else:
                alike.append([(header, frame)])
    stacks = [SliceStack(tuple(group)) for alike in groups.values() for group in alike]
    return sorted(stacks, key=lambda stack: -len(stack.slices))


def grid_of(stack: SliceStack, max_voxels: int | None = None) -> SliceGrid:
    """The grid of a stack's slices.

    Args:
        stack: see `stacks_of`.
        max_voxels: the largest that somebody will read; None: nobody reads its voxels.

    Raises:
        DataError: why they are no volume, without a name.
    """
    warnings: list[str] = []
    across, down, normal = _directions(stack)
    slices, dropped = _without_copies(stack.slices)
    if dropped:
        warnings.append(f"{dropped} slices are there twice: one copy of each is used")
    files = {header.path for header, _ in slices}
    if len(files) > 1 and any(len(header.frames) > 1 for header, _ in slices):
        raise DataError(f"slices spread over {len(files)} multi-frame files: export the series in one piece")
    if len(slices) > MAX_SLICES:
        raise DataError(f"{len(slices)} slices, more than {MAX_SLICES}", "too-large")
    first = stack.first
    shape = (first.columns, first.rows, len(slices))
    count = int(np.prod(shape, dtype=np.int64))
    if max_voxels is not None and count > max_voxels:
        raise DataError(f"{count} voxels, more than {max_voxels}: raise [data] max_voxels", "too-large")
    places = np.array([frame.position for _, frame in slices], np.float64)
    order = np.argsort(places @ normal, kind="stable")
    slices, places = [slices[k] for k in order], places[order]
    step, origin = _even(places, normal)
    spacing = slices[0][1].spacing
    if spacing is None or not all(0 < mm < np.inf for mm in spacing):
        raise DataError("no pixel spacing: export the original series")
    lps = np.eye(4)
    # PS3.3 C.7.6.2.1.1: PixelSpacing is the distance of rows, then that of columns.
    lps[:3, 0], lps[:3, 1], lps[:3, 2], lps[:3, 3] = across * spacing[1], down * spacing[0], step, origin
    cosine = abs(float(normal @ step)) / float(np.linalg.norm(step))
    if (degrees := float(np.degrees(np.arccos(min(cosine, 1.0))))) > TILTED:
        warnings.append(
            f"its slices follow each other {degrees:.1f} degrees off their normal (a tilted gantry?)"
        )
    return SliceGrid(shape, LPS_TO_RAS @ lps + 0.0, tuple(slices), tuple(warnings))


# --- inside ------------------------------------------------------------------------------------------------


def _one_direction(one: Frame, other: Frame) -> bool:
    if one.orientation is None or other.orientation is None:
        return one.orientation is other.orientation
    return float(np.abs(np.subtract(one.orientation, other.orientation)).max()) < 10 * ONE_DIRECTION


def _directions(stack: SliceStack) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors along a row, along a column, and across the slices."""
    if any(frame.position is None or frame.orientation is None for _, frame in stack.slices):
        raise DataError("slices without position or orientation (a screenshot, or a bad export)")
    cosines = np.array([frame.orientation for _, frame in stack.slices], np.float64)
    if not np.isfinite(cosines).all() or np.abs(cosines - cosines[0]).max() > 10 * ONE_DIRECTION:
        raise DataError("slices of several orientations")
    across, down = np.reshape(cosines[0], (2, 3))
    lengths = (np.linalg.norm(across), np.linalg.norm(down))
    if max(abs(length - 1) for length in lengths) > ONE_DIRECTION or abs(across @ down) > ONE_DIRECTION:
        raise DataError("an orientation that is none (cosines not at right angles): export it again")
    return across, down, np.cross(across, down)


def _without_copies(slices: Sequence[Slice]) -> tuple[list[Slice], int]:
    """Each object once: copies carry one SOP instance UID."""
    kept: dict[tuple[str, int], Slice] = {}
    for header, frame in slices:
        kept.setdefault((header.instance or header.path, frame.index), (header, frame))
    return list(kept.values()), len(slices) - len(kept)


def _even(places: NDArray[np.float64], normal: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """The step from slice to slice and the place of the first, by least squares. Raises DataError: uneven."""
    if len(places) < 2:
        raise DataError("a single slice")
    if not np.isfinite(places).all():
        raise DataError("slice positions with NaN or infinity: export it again")
    along = places @ normal
    steps = np.diff(along)
    usual = float(np.median(steps))
    if usual <= 0 or steps.min() < SAME_PLACE * usual:
        twice = int((steps < max(SAME_PLACE * usual, 1e-6)).sum())
        raise DataError(
            f"{twice} places with several images (time points, echoes, phases?): export one volume"
        )
    if steps.max() > GAP * usual:
        k = int(steps.argmax())
        lacking = round(float(steps[k]) / usual) - 1
        more = f", and {gaps - 1} more gaps" if (gaps := int((steps > GAP * usual).sum())) > 1 else ""
        raise DataError(
            f"{lacking} of its slices missing after slice {k + 1} of {len(places)}{more}: export the whole series"
        )
    count = np.arange(len(places)) - (len(places) - 1) / 2
    step = count @ places / (count @ count)
    origin = places.mean(axis=0) - (len(places) - 1) / 2 * step
    off = np.linalg.norm(places - (origin + np.arange(len(places))[:, None] * step), axis=1).max()
    if off > UNEVEN * np.linalg.norm(step):
        raise DataError(
            f"unevenly spaced slices ({steps.min():.3g} to {steps.max():.3g} mm apart): export it evenly spaced"
        )
    return step, origin
