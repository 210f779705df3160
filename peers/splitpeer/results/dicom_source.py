"""The series a mask belongs to: its headers, on the grid that `data prepare` sees, laid over the mask's grid.

`dicom.stacks` alone decides which slices make a volume, in which order and where; what an image was prepared from can
be segmented, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from splitpeer.data.geometry import GRID_TOLERANCE, Triple, apart, edges
from splitpeer.errors import DataError
from splitpeer.results.segmentation import grid_in_words

if TYPE_CHECKING:
    from pydicom import Dataset

    from splitpeer.dicom.headers import DicomHeader
    from splitpeer.dicom.stacks import SliceStack

MAX_FILES = 10_000
"""Files read for one series; a folder with more is not one series."""
_NEEDED = ("SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
_NO_SOURCES = ("SEG", "RTSTRUCT")
"""Modalities of what was drawn on images."""


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """One series in space.

    Args:
        datasets: single-frame images in the order of the slices, or one with several frames; without pixels.
        frames: of the one dataset, the frame of each slice, from 0; None: an image per slice.
        shape: columns, rows and slices.
        affine: float64 4x4, from (column, row, slice) to RAS millimetres.
    """

    datasets: tuple[Dataset, ...]
    frames: tuple[int, ...] | None
    shape: Triple
    affine: np.ndarray

    def slices_of(self, volumes: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """A volume's voxels as this series' slices.

        Args:
            volumes: [channels, i, j, k].
            affine: float64 4x4, from (i, j, k) to RAS millimetres.

        Returns:
            [slices, rows, columns, channels] of the same dtype.

        Raises:
            DataError: the volume is not on the series' grid; one line.
        """
        i, j, k = volumes.shape[1:]
        shape: Triple = (i, j, k)
        axes, flipped = self._turn(shape, affine)
        turned = volumes.transpose(0, *(axis + 1 for axis in axes))
        turned = turned[(slice(None), *(slice(None, None, -1 if flip else 1) for flip in flipped))]
        # [channels, columns, rows, slices] to [slices, rows, columns, channels]
        return np.ascontiguousarray(turned.transpose(3, 2, 1, 0))

    def check(self, shape: Triple, affine: np.ndarray) -> None:
        """That a mask of this grid can be written for the series. Raises DataError: it is on another one."""
        self._turn(shape, affine)

    def _turn(self, shape: Triple, affine: np.ndarray) -> tuple[Triple, tuple[bool, bool, bool]]:
        """The volume's axis behind columns, rows and slices, and which of the three run the other way."""
        between = np.linalg.solve(affine, self.affine)[:3, :3]
        x, y, z = (int(np.abs(between[:, axis]).argmax()) for axis in range(3))
        backward, back_rows, back_slices = (
            bool(between[source, axis] < 0) for axis, source in enumerate((x, y, z))
        )
        flipped = (backward, back_rows, back_slices)
        if sorted((x, y, z)) != [0, 1, 2] or tuple(shape[axis] for axis in (x, y, z)) != self.shape:
            raise DataError(self._other_grid(shape, affine, ""))
        wanted = np.eye(4)
        wanted[:3] = 0
        for axis, (source, flip) in enumerate(zip((x, y, z), flipped, strict=True)):
            wanted[source, axis] = -1 if flip else 1
            wanted[source, 3] = shape[source] - 1 if flip else 0
        distance = apart(self.shape, affine @ wanted, self.affine)
        if not distance <= GRID_TOLERANCE * float(min(edges(self.affine).min(), edges(affine).min())):
            raise DataError(self._other_grid(shape, affine, f", up to {distance:.3g} mm apart"))
        return (x, y, z), flipped

    def _other_grid(self, shape: Triple, affine: np.ndarray, distance: str) -> str:
        return (
            f"the series ({grid_in_words(self.shape, self.affine)}) is not on the grid of the mask "
            f"({grid_in_words(shape, affine)}){distance}: name the series that the patient's image was made from"
        )


def read_series(paths: Sequence[Path], frames: Sequence[int] | None = None) -> SourceSeries:
    """The one series that lies at `paths`: files, or folders with all that is below them.

    What is not DICOM, or is no image, is passed over in a folder and refused as a file.

    Args:
        paths: see above.
        frames: `PreparedRecord.frames`: which of a multi-frame file's make the volume; None: all images do.

    Raises:
        ConfigError: pydicom is not installed.
        DataError: no image there, several series, or slices that make no volume; one line.
    """
    from splitpeer.dicom.stacks import grid_of

    where = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
    found = _images(paths, where)
    if not found:
        raise DataError(f"{where}: no DICOM image: name the folder of the patient's series")
    headers = [header for header, _ in found.values()]
    _of_one_series(headers, where)
    try:
        grid = grid_of(_stack(headers, frames))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    datasets = [found[path][1] for path in dict.fromkeys(header.path for header, _ in grid.slices)]
    several = "PerFrameFunctionalGroupsSequence" in datasets[0]
    if several and len(datasets) > 1:
        raise DataError(f"{where}: {len(datasets)} enhanced images of one frame each: export them as one")
    return SourceSeries(
        tuple(datasets),
        tuple(frame.index for _, frame in grid.slices) if several else None,
        grid.shape,
        grid.affine,
    )


# --- inside ------------------------------------------------------------------------------------------------


def _images(paths: Sequence[Path], where: str) -> dict[str, tuple[DicomHeader, Dataset]]:
    """The images at `paths`, by path."""
    from splitpeer.dicom.headers import NotAnImage, read_file

    files: list[tuple[Path, bool]] = []
    for path in paths:
        if path.is_dir():
            files += ((file, False) for file in sorted(path.rglob("*")) if file.is_file())
        else:
            files.append((path, True))
        if len(files) > MAX_FILES:
            raise DataError(f"{where}: more than {MAX_FILES} files: name the folder of one series")
    found = {}
    for file, named in files:
        try:
            header, data = read_file(file, str(file))
            if header.modality in _NO_SOURCES:
                raise NotAnImage(f"drawn on images ({header.modality})")
        except NotAnImage as reason:
            if named:
                raise DataError(f"{file}: {reason}: name the files of the patient's series") from None
            continue
        if lacking := [name for name in _NEEDED if not data.get(name)]:
            raise DataError(f"{file}: has no {lacking[0]}: export the series again, as it left the scanner")
        found[header.path] = header, data
    return found


def _of_one_series(headers: Sequence[DicomHeader], where: str) -> None:
    series = {header.series: header.description or header.series for header in headers}
    if len(series) > 1:
        names = ", ".join(sorted(series.values())[:4])
        raise DataError(f"{where}: {len(series)} series ({names}): name the files or the folder of one")
    for what, values in (
        ("patients", {header.patient for header in headers}),
        ("frames of reference", {header.frame_of_reference for header in headers}),
    ):
        if len(values) > 1:
            # Nobody's mask may be filed under somebody else.
            raise DataError(f"{where}: images of {len(values)} {what} in one series: name the files of one")


def _stack(headers: Sequence[DicomHeader], frames: Sequence[int] | None) -> SliceStack:
    """What makes the volume. Raises DataError, without a name."""
    from splitpeer.dicom.stacks import SliceStack, stacks_of

    if frames is not None:
        if len(headers) != 1 or not set(frames) <= set(range(len(headers[0].frames))):
            raise DataError("has changed since the image was prepared from it: prepare the patient again")
        return SliceStack(tuple((headers[0], headers[0].frames[index]) for index in frames))
    if any(
        None in (frame.position, frame.orientation, frame.spacing)
        for header in headers
        for frame in header.frames
    ):
        raise DataError(
            "an image does not say where it lies (position, orientation, pixel spacing): export the series again, as "
            "it left the scanner"
        )
    first, *others = stacks_of(headers)
    if others:
        sizes = " and ".join(str(len(stack.slices)) for stack in (first, *others[:3]))
        raise DataError(
            f"several stacks ({sizes} slices): name the files of one, or prepare the image with "
            "splitpeer data prepare, which notes what it was made from"
        )
    return first
