"""The series a mask belongs to: read without its pixels, put in order, and laid over the mask's grid.

DICOM counts millimetres to the left, posterior and superior; everything else here counts RAS. A series is columns,
rows and frames; frames are ordered along the normal of the slices, whatever the order of the files.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from splitpeer.data.geometry import GRID_TOLERANCE, Triple, apart, edges
from splitpeer.errors import ConfigError, DataError
from splitpeer.results.segmentation import grid_in_words

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_FILES = 10_000
"""Files read for one series; a folder with more is not one series."""
MAX_HEADER = 64 << 20
"""Bytes before the pixels that are read of one file."""
INSTALL = 'install it: in the clone, pip install ".[dicom]"'
FLAT = 1e-3
"""Direction cosines of one series may differ by so much."""
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_NEEDED = ("SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


@dataclass(frozen=True, eq=False)
class Plane:
    """Where one frame lies, in DICOM's own millimetres."""

    position: np.ndarray
    """Centre of the first pixel, LPS, float64 [3]."""
    along: np.ndarray
    """Unit vectors in the direction of columns, then of rows, float64 [2, 3]."""
    spacing: tuple[float, float]
    """Millimetres between rows, then between columns, as DICOM writes them."""
    thickness: float


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """One series in space.

    Args:
        datasets: single-frame images, or one with several frames; without pixels.
        order: frame number (in the order of `datasets`, or in the one dataset), in spatial order.
        shape: columns, rows and frames.
        affine: float64 4x4, from (column, row, place in `order`) to RAS millimetres.
    """

    datasets: tuple[Dataset, ...]
    order: tuple[int, ...]
    shape: Triple
    affine: np.ndarray

    def frames(self, volumes: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """A volume's voxels as this series' frames, in the order of its datasets (or of the one dataset's frames).

        Args:
            volumes: [channels, i, j, k].
            affine: float64 4x4, from (i, j, k) to RAS millimetres.

        Returns:
            [frames, rows, columns, channels] of the same dtype.

        Raises:
            DataError: the volume is not on the series' grid; one line.
        """
        i, j, k = volumes.shape[1:]
        shape: Triple = (i, j, k)
        axes, flipped = self._turn(shape, affine)
        turned = volumes.transpose(0, *(axis + 1 for axis in axes))
        turned = turned[(slice(None), *(slice(None, None, -1 if flip else 1) for flip in flipped))]
        placed = np.empty((self.shape[2], self.shape[1], self.shape[0], len(volumes)), volumes.dtype)
        # [channels, columns, rows, place] to [place, rows, columns, channels]
        placed[list(self.order)] = turned.transpose(3, 2, 1, 0)
        return placed

    def check(self, shape: Triple, affine: np.ndarray) -> None:
        """That a mask of this grid can be written for the series. Raises DataError: it is on another one."""
        self._turn(shape, affine)

    def _turn(self, shape: Triple, affine: np.ndarray) -> tuple[Triple, tuple[bool, bool, bool]]:
        """The volume's axis behind columns, rows and frames, and which of the three run the other way."""
        between = np.linalg.solve(affine, self.affine)[:3, :3]
        x, y, z = (int(np.abs(between[:, axis]).argmax()) for axis in range(3))
        backward, back_rows, back_frames = (
            bool(between[source, axis] < 0) for axis, source in enumerate((x, y, z))
        )
        flipped = (backward, back_rows, back_frames)
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


def read_series(paths: Sequence[Path]) -> SourceSeries:
    """The one series that lies at `paths`: files, or folders with all that is below them.

    What is not DICOM, or is no image, is passed over in a folder and refused as a file.

    Raises:
        ConfigError: pydicom is not installed.
        DataError: no image there, several series, or slices that make no volume; one line.
    """
    where = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
    datasets = _datasets(paths, where)
    if not datasets:
        raise DataError(f"{where}: no DICOM image: name the folder of the patient's series")
    series = {str(one.SeriesInstanceUID): one for one in datasets}
    if len(series) > 1:
        names = ", ".join(
            sorted(f"{one.get('SeriesDescription', '') or uid}" for uid, one in series.items())[:4]
        )
        raise DataError(f"{where}: {len(series)} series ({names}): name the files or the folder of one")
    for what, attribute in (("patients", "PatientID"), ("frames of reference", "FrameOfReferenceUID")):
        if (count := len({str(one.get(attribute, "")) for one in datasets})) > 1:
            # Nobody's mask may be filed under somebody else.
            raise DataError(f"{where}: images of {count} {what} in one series: name the files of one")
    # A file copied twice is one image.
    datasets = list({str(one.SOPInstanceUID): one for one in datasets}.values())
    several = [one for one in datasets if int(one.get("NumberOfFrames", 1) or 1) > 1 or _enhanced(one)]
    if several and len(datasets) > 1:
        raise DataError(f"{where}: {len(datasets)} images with several frames each: name the file of one")
    try:
        planes = _planes_within(datasets[0]) if several else [_plane(one, one, one) for one in datasets]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise DataError(
            f"{where}: an image does not say where it lies (position, orientation, pixel spacing): "
            "export the series again, as it left the scanner"
        ) from None
    sizes = {(int(one.Columns), int(one.Rows)) for one in datasets}
    if len(sizes) > 1:
        raise DataError(f"{where}: slices of different sizes: name the files of one stack")
    ((columns, rows),) = sizes
    order, affine = _stack(planes, where)
    return SourceSeries(tuple(datasets), order, (columns, rows, len(planes)), affine)


def _datasets(paths: Sequence[Path], where: str) -> list[Any]:
    files: list[tuple[Path, bool]] = []
    for path in paths:
        if path.is_dir():
            files += ((file, False) for file in sorted(path.rglob("*")) if file.is_file())
        else:
            files.append((path, True))
        if len(files) > MAX_FILES:
            raise DataError(f"{where}: more than {MAX_FILES} files: name the folder of one series")
    found = []
    for file, named in files:
        one = _dataset(file)
        if isinstance(one, str):
            if named:
                raise DataError(f"{file}: {one}: name the files of the patient's series")
            continue
        if lacking := [name for name in _NEEDED if not one.get(name)]:
            raise DataError(f"{file}: has no {lacking[0]}: export the series again, as it left the scanner")
        found.append(one)
    return found


def _dataset(path: Path) -> Any:
    """A file's attributes before the pixels, or why it is no image."""
    try:
        from pydicom import dcmread
        from pydicom.errors import InvalidDicomError
    except ImportError:
        raise ConfigError(f"pydicom is not there: {INSTALL}") from None
    try:
        with warnings.catch_warnings():
            # Hospitals' files break small rules; what matters is checked here.
            warnings.simplefilter("ignore")
            one = dcmread(path, stop_before_pixels=True, defer_size=MAX_HEADER)
            is_image = "Rows" in one and "Columns" in one and one.get("Modality") not in ("SEG", "RTSTRUCT")
    except InvalidDicomError:
        return "not a DICOM file"
    except OSError as error:
        return f"cannot be read ({error.strerror or 'truncated'})"
    except Exception as error:  # a damaged file makes pydicom raise anything
        return f"damaged ({type(error).__name__})"
    return one if is_image else "no image"


def _enhanced(one: Any) -> bool:
    return "PerFrameFunctionalGroupsSequence" in one


def _planes_within(one: Any) -> list[Plane]:
    (shared,) = one.get("SharedFunctionalGroupsSequence") or (None,)
    planes = []
    for frame in one.PerFrameFunctionalGroupsSequence:

        def group(name: str, frame: Any = frame) -> Any:
            return getattr(frame, name, None) or getattr(shared, name)

        planes.append(
            _plane(
                group("PlanePositionSequence")[0],
                group("PlaneOrientationSequence")[0],
                group("PixelMeasuresSequence")[0],
            )
        )
    return planes


def _plane(position: Any, orientation: Any, measures: Any) -> Plane:
    along = np.array([float(cosine) for cosine in orientation.ImageOrientationPatient]).reshape(2, 3)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    rows, columns = (float(mm) for mm in measures.PixelSpacing)
    place = np.array([float(mm) for mm in position.ImagePositionPatient]).reshape(3)
    thickness = float(measures.get("SliceThickness") or 1)
    if not (np.isfinite(place).all() and np.isfinite(along).all() and rows > 0 and columns > 0):
        raise ValueError
    return Plane(place, along, (rows, columns), thickness)


def _stack(planes: Sequence[Plane], where: str) -> tuple[tuple[int, ...], np.ndarray]:
    """The spatial order of the frames, and the affine (RAS) of the stack."""
    first = planes[0]
    for one in planes:
        if np.abs(one.along - first.along).max() > FLAT or not np.allclose(one.spacing, first.spacing, 1e-4):
            raise DataError(
                f"{where}: slices of different orientations or spacings: name the files of one stack"
            )
    normal = np.cross(*first.along)
    heights = np.array([one.position @ normal for one in planes])
    order = tuple(int(frame) for frame in np.argsort(heights, kind="stable"))
    low, high = planes[order[0]].position, planes[order[-1]].position
    step = normal * first.thickness if len(planes) == 1 else (high - low) / (len(planes) - 1)
    length = float(np.linalg.norm(step))
    if len(planes) > 1:
        gaps = np.diff(heights[list(order)])
        if gaps.min() < 1e-3 * max(length, 1e-3):
            raise DataError(
                f"{where}: two slices at the same place: name the files of one stack (one echo, one time point)"
            )
        usual = float(np.median(gaps))
        slack = GRID_TOLERANCE * min(usual, *first.spacing)
        if (wide := int(np.abs(gaps - usual).argmax())) >= 0 and abs(gaps[wide] - usual) > slack:
            raise DataError(
                f"{where}: slices {wide + 1} and {wide + 2} are {gaps[wide]:.3g} mm apart, the others {usual:.3g} mm: "
                "a slice is missing, copy the whole series"
            )
        for place, frame in enumerate(order):
            if math.dist(planes[frame].position, low + place * step) > GRID_TOLERANCE * min(
                length, *first.spacing
            ):
                raise DataError(
                    f"{where}: the slices are not one straight stack: name the files of one stack"
                )
    affine = np.eye(4)
    affine[:3, 0] = first.along[0] * first.spacing[1]
    affine[:3, 1] = first.along[1] * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = low
    return order, _LPS_TO_RAS @ affine
