"""One patient: voxels of the chosen series, cleaned, registered, judged, and written; or one line that says why not."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from splitpeer.data.files import LABELS, Case
from splitpeer.data.geometry import Geometry, Millimetres, Turn, differences
from splitpeer.data.nifti import Rules, read_voxels
from splitpeer.data.regrid import onto, softened
from splitpeer.dicom.choice import Candidate
from splitpeer.dicom.voxels import read_voxels as read_dicom
from splitpeer.errors import DataError
from splitpeer.prepare.atlas import Atlas
from splitpeer.prepare.bounds import QualityBounds
from splitpeer.prepare.nifti_file import write_image, write_mask
from splitpeer.prepare.pictures import overlay
from splitpeer.prepare.quality import SeenBrain, figures, seen_on, suspicious
from splitpeer.prepare.record import FOLDER, Method, PreparedRecord, is_of, read, write
from splitpeer.prepare.tools import run_tool
from splitpeer.storage import durable

if TYPE_CHECKING:
    from splitpeer.prepare.register import Registrar

HELD_BACK = "held-back"
"""In the folder of records: those of images that were not written."""
WORK = ".work-"
"""Of a temporary folder's name."""


@dataclass(frozen=True)
class Steps:
    """What is done to every image."""

    method: Method
    spacing: Millimetres | None
    bias_field: str
    skull_strip: str | None
    deadline_s: float
    bounds: QualityBounds

    @property
    def programs(self) -> dict[str, str]:
        """Command lines by the setting that named them, in the order in which they run."""
        named = {"bias_field": self.bias_field, "skull_strip": self.skull_strip}
        return {setting: line for setting, line in named.items() if line not in (None, "none", "n4")}


@dataclass(frozen=True)
class SeriesSource:
    """One patient's series, and the mask drawn on it, if there is one."""

    patient: str
    modality: str
    root: Path
    candidate: Candidate
    mask: Path | None = None


@dataclass(frozen=True)
class PatientPaths:
    """Where one patient's files lie in the folder of images."""

    image: Path
    mask: Path
    record: Path
    held_back: Path
    picture: Path

    @classmethod
    def of(cls, out: Path, patient: str) -> PatientPaths:
        """For a patient's name."""
        records = out / FOLDER
        return cls(
            out / f"{patient}.nii.gz",
            out / LABELS / f"{patient}.nii.gz",
            records / f"{patient}.json",
            records / HELD_BACK / f"{patient}.json",
            records / f"{patient}.png",
        )

    def retire(self) -> bool:
        """Remove the image of an earlier run, its mask and its record, which comes last; whether there was an image."""
        there = self.image.exists()
        _remove(self.image, self.mask, self.record)
        return there

    def forget(self) -> bool:
        """Remove all that earlier runs wrote; whether there was an image."""
        there = self.retire()
        _remove(self.held_back, self.picture)
        return there

    def shows(self, series: str) -> bool:
        """Whether the image of an earlier run is here, and of this series."""
        try:
            record = read(self.record)
        except DataError:
            return False
        return record.series == series and self.image.exists()


@dataclass(frozen=True, eq=False)
class _Placement:
    """An image on the atlas."""

    kept: Method
    transform: NDArray[np.float64]
    """4x4, from the patient's millimetres to the atlas's."""
    seen: SeenBrain
    quality: dict[str, float]
    warnings: tuple[str, ...] = ()


class Workshop:
    """Prepares patients, one after another, with what they share: atlas, steps, versions of software."""

    def __init__(self, out: Path, atlas: Atlas, steps: Steps, software: dict[str, str]) -> None:
        self._out, self._atlas, self._steps, self._software = out, atlas, steps, software
        self._grid = atlas.grid(steps.spacing)
        self._registrar: Registrar | None = None

    def done(self, source: SeriesSource, *, accept: bool) -> PreparedRecord | None:
        """The record of an earlier run, if nothing that it depends on has changed; None: there is work to do."""
        places = PatientPaths.of(self._out, source.patient)
        for path in (places.record, places.held_back):
            with suppress(DataError):
                record = read(path)
                if record.inputs != self._inputs(source) or (record.held_back and accept):
                    continue
                # A crash may have left the image of one run and the record of another.
                if is_of(places.image, record.image) and (not record.mask or is_of(places.mask, record.mask)):
                    return record
        return None

    def prepare(self, source: SeriesSource, *, accept: bool) -> PreparedRecord:
        """Do the work and write what came out of it; the record is written last.

        An image of an earlier run stays until the new one takes its place, or until this one is held back: a daemon
        that reads the folder meanwhile never misses it.

        Raises:
            DataError: this patient cannot be prepared.
            OSError: the folder cannot be written, which ends everything.
        """
        grid = source.candidate.grid
        mask = None if source.mask is None else _mask(source.mask, source.candidate)
        voxels = self._cleaned(read_dicom(source.root, grid), grid.affine)
        placed = self._placed(voxels, grid.affine)
        record = self._record(source, placed, accept=accept)
        places = PatientPaths.of(self._out, source.patient)
        picture = overlay(placed.seen)
        durable.replace(places.picture, picture, sync=False)
        if record.held_back:
            durable.make_folder(places.held_back.parent)
            write(places.held_back, record)
            places.retire()
            return record
        drawn = ""
        if mask is None:
            places.mask.unlink(missing_ok=True)
        else:
            durable.make_folder(places.mask.parent)
            moved = onto(mask, placed.transform @ grid.affine, self._grid.shape, self._grid.affine, order=0)
            drawn = write_mask(places.mask, moved.astype(np.uint8), self._grid.affine)
        image = write_image(places.image, self._on_atlas(voxels, record), self._grid.affine)
        record = replace(record, image=image, mask=drawn)
        write(places.record, record)
        places.held_back.unlink(missing_ok=True)
        return record

    # --- inside --------------------------------------------------------------------------------------------

    def _placed(self, voxels: NDArray[np.float32], affine: NDArray[np.float64]) -> _Placement:
        """Where the image lies on the atlas.

        An affine registration can go astray where the rigid one that it begins with has not. It is kept all the same if
        its peak is not suspicious, even below that of the rigid one: other hospitals' images of this patient are
        stretched, too, and meet better with it.
        """
        method = self._steps.method
        if method == "none":
            return self._judged("none", np.eye(4), voxels, affine)
        if self._registrar is None:
            from splitpeer.prepare.register import Registrar

            self._registrar = Registrar(self._atlas)
        ways = self._registrar.register(voxels, affine, method)
        rigid = partial(self._judged, "rigid", ways["rigid"], voxels, affine)
        if method == "rigid":
            return rigid()
        if "affine" not in ways:
            return replace(rigid(), warnings=("registered rigidly: the affine registration found no place",))
        stretched = self._judged("affine", ways["affine"], voxels, affine)
        peak = stretched.quality["peak"]
        if peak >= self._steps.bounds.least_peak or peak >= (instead := rigid()).quality["peak"]:
            return stretched
        return replace(
            instead, warnings=(f"registered rigidly: the affine registration went astray (peak {peak:.3f})",)
        )

    def _judged(
        self,
        kept: Method,
        transform: NDArray[np.float64],
        voxels: NDArray[np.float32],
        affine: NDArray[np.float64],
    ) -> _Placement:
        seen = seen_on(self._atlas, voxels, transform @ affine)
        return _Placement(kept, transform, seen, figures(seen, transform))

    def _cleaned(self, voxels: NDArray[np.float32], affine: NDArray[np.float64]) -> NDArray[np.float32]:
        steps = self._steps
        if steps.bias_field == "n4":
            from splitpeer.prepare.register import n4

            voxels = n4(voxels, affine)
        for setting, template in steps.programs.items():
            folder = Path(tempfile.mkdtemp(prefix=WORK, dir=self._out / FOLDER))
            try:
                voxels = run_tool(setting, template, voxels, affine, folder, steps.deadline_s)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        return voxels

    def _on_atlas(self, voxels: NDArray[np.float32], record: PreparedRecord) -> NDArray[np.float32]:
        placed = record.transform @ record.affine
        # Air is not 0 in a CT.
        fill = min(float(voxels.min()), 0.0)
        soft = softened(voxels, placed, self._grid.affine)
        return onto(soft, placed, self._grid.shape, self._grid.affine, order=1, fill=fill).astype(np.float32)

    def _record(self, source: SeriesSource, placed: _Placement, *, accept: bool) -> PreparedRecord:
        header, grid = source.candidate.header, source.candidate.grid
        reasons = suspicious(placed.quality, self._steps.bounds)
        files = tuple(dict.fromkeys(one.path for one, _ in grid.slices))
        multiframe = len(header.frames) > 1
        return PreparedRecord(
            patient=source.patient,
            modality=source.modality,
            study=header.study,
            series=header.series,
            frame_of_reference=header.frame_of_reference,
            files=files,
            frames=tuple(frame.index for _, frame in grid.slices) if multiframe else None,
            shape=grid.shape,
            affine=grid.affine,
            atlas=self._grid,
            transform=placed.transform,
            method=self._steps.method,
            kept=placed.kept,
            quality={name: round(value, 4) for name, value in placed.quality.items()},
            reasons=reasons,
            accepted=accept and bool(reasons),
            warnings=(*grid.warnings, *placed.warnings),
            software=self._software,
            inputs=self._inputs(source),
            image="",
            mask="",
        )

    def _inputs(self, source: SeriesSource) -> str:
        grid = source.candidate.grid
        steps: dict[str, Any] = vars(self._steps) | {"bounds": vars(self._steps.bounds)}
        told = {
            "files": [(one.path, one.size, one.changed_ns) for one, _ in grid.slices],
            "grid": [grid.shape, grid.affine.tolist()],
            "modality": source.modality,
            "mask": _stamp(source.mask),
            "steps": steps,
            "atlas": [self._atlas.sha256, self._grid.shape, self._grid.affine.tolist()],
            "software": self._software,
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _remove(*paths: Path) -> None:
    """Also what a crash left of them."""
    for path in paths:
        path.unlink(missing_ok=True)
        path.with_suffix(durable.PART).unlink(missing_ok=True)


def _stamp(path: Path | None) -> tuple[str, int, int] | None:
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    return path.name, status.st_size, status.st_mtime_ns


def _mask(path: Path, candidate: Candidate) -> NDArray[np.uint8]:
    """A mask, in the axes of the series that it was drawn on. Raises DataError: of another grid, or no mask."""
    voxels, header = read_voxels(Case("mask", path), Rules())
    turn = Turn.of(candidate.grid.affine)
    shape, affine = turn.grid(candidate.grid.shape, candidate.grid.affine)
    if different := differences(Geometry.of(shape, affine), Geometry.of(header.shape, header.affine)):
        raise DataError(
            f"{path}: its mask is not on the grid of series {candidate.header.number} ({'; '.join(different)}): draw "
            "it on this series, or choose the series that it was drawn on"
        )
    values = np.rint(voxels)
    if np.abs(values - voxels).max() > 0.01 or values.min() < 0 or values.max() > 255:
        raise DataError(
            f"{path}: holds values other than whole numbers from 0 to 255: save the mask as integers"
        )
    return np.ascontiguousarray(turn.stored(values)).astype(np.uint8)
