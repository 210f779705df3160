"""The image at this site that a segmentation belongs to, and the way from an answer back to its grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from splitpeer.data.files import Case
from splitpeer.data.geometry import Geometry, Triple, differences, edges
from splitpeer.data.patients import patient_id
from splitpeer.data.rules import Rules
from splitpeer.errors import DataError

if TYPE_CHECKING:
    from splitpeer.daemon.spooled import SpoolResult
    from splitpeer.data.nifti import NiftiHeader
    from splitpeer.prepare.record import PreparedRecord
    from splitpeer.results.dicom_source import SourceSeries
    from splitpeer.results.segmentation import Origin, Segmentation


@dataclass(frozen=True)
class OwnScan:
    """One image of a patient, as this site stores it."""

    patient: str
    modality: str
    case: Case
    header: NiftiHeader
    record: PreparedRecord | None = None
    """Where `splitpeer data prepare` has it from; None: the file is as the hospital has it."""

    @property
    def path(self) -> Path:
        """The file."""
        return self.case.path

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of a segmentation must know of the image."""
        if self.record is None:
            return self.header.warnings
        taken = tuple(f"taken in spite of: {reason}" for reason in self.record.reasons)
        return (*self.header.warnings, *self.record.warnings, *taken)

    @property
    def prepared(self) -> tuple[float, ...] | None:
        """Voxel size, in mm, of an image that was prepared; None: it is as the hospital has it."""
        return None if self.record is None else tuple(map(float, edges(self.record.atlas.affine)))

    @property
    def grid(self) -> tuple[Triple, np.ndarray]:
        """Shape and affine that a segmentation of it has (`brought_back`)."""
        from splitpeer.results.own_grid import stored_affine

        if self.record is not None:
            return self.record.shape, self.record.affine
        header = self.header
        return header.stored_shape, stored_affine(header.shape, header.affine, header.turn)

    def voxels(self, rules: Rules) -> np.ndarray:
        """Its voxels on the grid that a segmentation of it has, float32 [i, j, k]. Raises DataError."""
        from splitpeer.data.nifti import read_voxels
        from splitpeer.prepare.back import to_original
        from splitpeer.results.own_grid import as_stored

        voxels, header = read_voxels(self.case, rules)
        if self.record is not None:
            return to_original(voxels, header.affine, self.record, order=1)
        stored: np.ndarray = as_stored(voxels[None], header.turn)[0]
        return stored

    def series(self, folder: Path, *, force: bool) -> SourceSeries:
        """The series that it shows: the files that it was made of, or else all in the patient's folder below `folder`,
        or in `folder`.

        Args:
            folder: of DICOM files.
            force: whether an image that was not prepared may be of a patient whom DICOM calls something else.

        Raises:
            ConfigError: pydicom is not installed.
            DataError: a file that it was made of is not there, or no mask of it can be written for these files.
        """
        from splitpeer.results.dicom_source import read_series

        if self.record is None:
            own = folder / self.patient
            found = read_series([own if own.is_dir() else folder])
        else:
            found = read_series(self._files(folder, self.record), self.record.frames)
        self._check_series(found, folder, force=force)
        found.check(*self.grid)
        return found

    def _files(self, folder: Path, record: PreparedRecord) -> list[Path]:
        files = [folder / name for name in record.files]
        if gone := [file for file in files if not file.is_file()]:
            raise DataError(
                f"{gone[0]}: not there, and {self.path.name} was made of it: name the folder that splitpeer data "
                "prepare read with --dicom"
            )
        return files

    def _check_series(self, series: SourceSeries, folder: Path, *, force: bool) -> None:
        """That a mask of this image belongs into the study of `series`: nobody's mask is filed under somebody else."""
        first = series.datasets[0]
        if self.record is None:
            # The name itself stays out of the line: it is the hospital's, not the study's.
            written = str(first.get("PatientID", "")).strip()
            if not force and (not written or patient_id(written) != self.patient):
                raise DataError(
                    f"{folder}: its PatientID is not {self.patient}, and no record says that they are one: check the "
                    "folder, then add --force"
                )
            return
        if (str(first.SeriesInstanceUID), str(first.StudyInstanceUID)) != (
            self.record.series,
            self.record.study,
        ):
            raise DataError(
                f"{folder}: another series than the one that {self.path.name} was made of: name the folder that "
                "splitpeer data prepare read, as it was then, or prepare the patient again"
            )


def brought_back(result: SpoolResult, own: OwnScan, *, keep: bool = False) -> Segmentation:
    """An answer on the grid of the patient's own image; of a prepared one, of the scan that it was made of.

    Args:
        result: the answer, on the grid of the run.
        own: the image, as it was when the segmentation was asked for.
        keep: whether the probabilities are wanted as well.

    Raises:
        DataError: the image is on another grid by now.
    """
    from splitpeer.data.volumes import grid_of
    from splitpeer.prepare.back import to_original
    from splitpeer.results.own_grid import chances, decided, on_file

    task, grid = result.task, result.grid
    values = chances(task, result.regions) if result.kind == "mask" else result.values
    wanted = grid_of(own.case, own.header, grid.spacing)
    if different := differences(wanted, grid):
        raise DataError(
            f"{own.path}: the answer is on another grid than this image: {'; '.join(different)}: ask again, or name "
            "the modality that it was made from with --modality"
        )
    values = _fitted(values, wanted, background=task.exclusive)
    record = own.record
    if record is None:
        stored, affine = on_file(values, wanted, own.header)
    else:
        stored = np.stack([to_original(channel, wanted.affine, record, order=1) for channel in values])
        affine = record.affine
    return decided(own.patient, task, stored, affine, origin_of(result, own.warnings), keep=keep)


def origin_of(result: SpoolResult, warnings: Sequence[str] = ()) -> Origin:
    """What an answer was made by, and from."""
    from splitpeer.results.segmentation import Origin

    made = result.provenance

    def modalities(seats: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for seat in seats for name in made.modalities.get(seat, (seat,)))

    causes = [f"{', '.join(modalities([seat]))}: {cause}" for seat, cause in made.causes.items()]
    return Origin(
        run=made.run,
        name=made.job,
        model=made.digest,
        used=modalities(made.used),
        missing=modalities(made.missing),
        step=made.step,
        warnings=(*causes, *warnings),
        created=made.created.replace(microsecond=0),
    )


def _fitted(values: np.ndarray, grid: Geometry, *, background: bool) -> np.ndarray:
    """Values [channels, x, y, z] cut, or filled with background, to the grid: stacks of one patient may end up to one
    voxel apart (`data.geometry.differences`).
    """
    if values.shape[1:] == grid.shape:
        return values
    out = np.zeros((len(values), *grid.shape), values.dtype)
    if background:
        out[0] = 1
    x, y, z = (min(pair) for pair in zip(values.shape[1:], grid.shape, strict=True))
    out[:, :x, :y, :z] = values[:, :x, :y, :z]
    return out
