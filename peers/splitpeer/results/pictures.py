"""Slices of a patient with the contours of regions, as SVG: pixels as the scanner made them, borders as vectors.

As radiologists hang them: seen from below, from the front and from the patient's left, so that the patient's right is
at the left of axial and coronal pictures, and anterior is at the left of sagittal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from skimage.measure import find_contours

from splitpeer.data.geometry import Turn, edges
from splitpeer.report.pictures import png, window_of
from splitpeer.results.palette import dash_of, hex_of

MARGIN = 4.0
"""Millimetres around the body that are shown."""
FAINT = 0.08
"""Below this share of the grey window a voxel is not of the body."""
BARS = (100, 50, 20, 10, 5, 2, 1)
"""Lengths of the scale bar, mm; the longest that fits a third of a picture."""
NEARLY = 0.95
"""A slice with this share of the most that any slice holds of a region shows it as well."""


@dataclass(frozen=True)
class SliceView:
    """One of the three ways to cut a body."""

    name: str
    axis: int
    """RAS axis that its slices are stacked along."""
    sides: tuple[str, str, str, str]
    """What is at the left, right, top and bottom of a picture, in DICOM's letters."""
    ends: tuple[str, str]
    """Where its slices are stacked from and to, along the RAS axis."""


VIEWS = (
    SliceView("axial", 2, ("R", "L", "A", "P"), ("feet", "head")),
    SliceView("coronal", 1, ("R", "L", "H", "F"), ("back", "front")),
    SliceView("sagittal", 0, ("A", "P", "H", "F"), ("left", "right")),
)


@dataclass(frozen=True)
class Contour:
    """The border of one region in one picture."""

    path: str
    """SVG path data, in millimetres."""
    colour: str
    dash: str


@dataclass(frozen=True)
class SlicePicture:
    """One slice, in millimetres of the screen's axes."""

    view: SliceView
    number: int
    """Of the slice, from 1, in the order of the file's own axis."""
    of: int
    width: float
    height: float
    side: float
    """Of the square that each picture of a sheet has, so that all have one scale."""
    address: str
    """data: address of the pixels; empty where there is no image."""
    contours: tuple[Contour, ...]
    bar: int
    """Millimetres of the scale bar."""


class Sheet:
    """Draws slices of one patient.

    Args:
        masks: bool [regions, i, j, k].
        affine: float64 4x4, from (i, j, k) to RAS millimetres.
        image: [i, j, k], any numbers; None: contours on black.
    """

    def __init__(self, masks: np.ndarray, affine: np.ndarray, image: np.ndarray | None = None) -> None:
        turn = Turn.of(affine)
        self._reversed = turn.flipped
        self.masks = np.stack([turn.voxels(mask) for mask in masks])
        shape: tuple[int, ...] = masks.shape[1:]
        _, ras = turn.grid((shape[0], shape[1], shape[2]), affine)
        self.spacing = tuple(float(mm) for mm in edges(ras))
        self._image = None if image is None else turn.voxels(np.asarray(image, np.float64))
        body: np.ndarray = np.asarray(self.masks.any(axis=0))
        if self._image is not None:
            finite = self._image[np.isfinite(self._image)]
            low = float(finite.min()) if finite.size else 0.0
            # Air around the body would stretch the window downwards.
            self._window = window_of(self._image, self._image > low)
            floor, ceiling = min(low, self._window[0]), self._window[1]
            body |= self._image > floor + FAINT * (ceiling - floor)
        self._box = [self._span(body, axis) for axis in range(3)]
        self._side = max((end - start) * mm for (start, end), mm in zip(self._box, self.spacing, strict=True))

    def _span(self, body: np.ndarray, axis: int) -> tuple[int, int]:
        """The voxels that are shown along an axis: the body and a margin."""
        length = body.shape[axis]
        hits = np.flatnonzero(body.any(axis=tuple(other for other in range(3) if other != axis)))
        if not hits.size:
            return 0, length
        margin = round(MARGIN / self.spacing[axis])
        return max(int(hits[0]) - margin, 0), min(int(hits[-1]) + 1 + margin, length)

    def counted(self) -> list[tuple[str, str]]:
        """Each view, and where the file counts its slices to, such as ("axial", "head")."""
        return [(view.name, view.ends[view.axis not in self._reversed]) for view in VIEWS]

    def largest(self, region: int) -> tuple[int, int, int]:
        """The slice of each view that holds most of a region; the middle ones where it is empty."""
        if not self.masks[region].any():
            x, y, z = (self.masks.shape[view.axis + 1] // 2 for view in VIEWS)
            return x, y, z
        x, y, z = (int(areas.argmax()) for areas in self._areas(region))
        return x, y, z

    def shows(self, region: int, levels: Sequence[int]) -> bool:
        """Whether pictures at these slices show a region about as large as any would."""
        return all(
            areas[level] >= NEARLY * areas.max()
            for areas, level in zip(self._areas(region), levels, strict=True)
        )

    def _areas(self, region: int) -> list[np.ndarray]:
        """Voxels of a region in each slice of each view."""
        mask = self.masks[region]
        return [mask.sum(axis=tuple(other for other in range(3) if other != view.axis)) for view in VIEWS]

    def pictures(self, levels: Sequence[int], regions: Sequence[int] | None = None) -> list[SlicePicture]:
        """One picture of each view at the given slices, with contours of the regions (all)."""
        shown = range(len(self.masks)) if regions is None else regions
        return [self._picture(view, level, shown) for view, level in zip(VIEWS, levels, strict=True)]

    def _picture(self, view: SliceView, level: int, regions: Sequence[int]) -> SlicePicture:
        across, up = (axis for axis in range(3) if axis != view.axis)
        dx, dy = self.spacing[across], self.spacing[up]
        contours = tuple(
            Contour(path, hex_of(region), dash_of(region))
            for region in regions
            if (path := _outline(self._screen(self.masks[region], view, level), dx, dy))
        )
        address = ""
        if self._image is not None:
            low, high = self._window
            plane = np.nan_to_num(self._screen(self._image, view, level), nan=low, posinf=high, neginf=low)
            grey = (255 * np.clip((plane - low) / (high - low), 0, 1)).astype(np.uint8)
            address = png(np.repeat(grey[..., None], 3, axis=2))
        columns, rows = (end - start for start, end in (self._box[across], self._box[up]))
        width, height = columns * dx, rows * dy
        slices = self.masks.shape[view.axis + 1]
        bar = next((mm for mm in BARS if mm <= self._side / 3), 1)
        return SlicePicture(
            view,
            slices - level if view.axis in self._reversed else level + 1,
            slices,
            width,
            height,
            self._side,
            address,
            contours,
            bar,
        )

    def _screen(self, volume: np.ndarray, view: SliceView, level: int) -> np.ndarray:
        """One slice as rows from the top, columns from the left: both RAS axes run backwards on the screen."""
        cut = [slice(*span) for span in self._box]
        index: list[slice | int] = [*cut]
        index[view.axis] = level
        return volume[tuple(index)][::-1, ::-1].T


def _outline(mask: np.ndarray, dx: float, dy: float) -> str:
    """Path data of a mask's borders: between its pixels and the others, halfway."""
    if not mask.any():
        return ""
    parts = []
    for line in find_contours(np.pad(mask.astype(float), 1), 0.5):
        # A pixel's centre is half a pixel in; the padding takes one away.
        points = " ".join(f"{(column - 0.5) * dx:.2f},{(row - 0.5) * dy:.2f}" for row, column in line[:-1])
        parts.append(f"M{points}Z")
    return "".join(parts)
