"""`splitpeer segment`: ask this site's daemon for segmentations of patients, and write them for PACS and people."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from splitpeer.cli.options import (
    FILE,
    echo_json,
    load_peer,
    peer_options,
    private_files,
)
from splitpeer.cli.segmenting import LEAST, Watched, all_in_one, wait_option
from splitpeer.cli.terminal import echo
from splitpeer.errors import ConfigError, JobFailed, PeerError
from splitpeer.storage import durable
from splitpeer.storage.staged import Staged

if TYPE_CHECKING:
    from splitpeer.daemon.asking import AnswerTold
    from splitpeer.daemon.spooled import SpoolResult
    from splitpeer.results.own_scan import OwnScan
    from splitpeer.results.segmentation import Segmentation
    from splitpeer.settings.peer import PeerConfig

MASKS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Files:
    """Where what is made of one patient goes; None: not asked for."""

    mask: Path
    probabilities: Path | None
    dicom_seg: Path | None
    report: Path | None

    @property
    def every(self) -> list[Path]:
        """All of them, with the JSON files beside the masks."""
        named = (self.mask, self.probabilities, self.dicom_seg, self.report)
        return [path for path in named if path is not None] + [
            _beside(path) for path in (self.mask, self.probabilities) if path is not None
        ]


@click.command()
@click.argument("patients", nargs=-1, required=True, metavar="PATIENT...")
@click.option(
    "--out",
    type=FILE,
    required=True,
    help="The mask, .nii.gz or .nii, with a JSON beside it; a folder for several patients.",
)
@click.option(
    "--dicom-seg", type=FILE, metavar="FILE", help="Also as DICOM SEG; with several patients a folder."
)
@click.option(
    "--dicom",
    type=FILE,
    metavar="FOLDER",
    help="The original DICOM files, for --dicom-seg: the folder that data prepare read (--from). For an image that was "
    "not prepared: the folder of its series, or one with a folder named PATIENT.",
)
@click.option(
    "--report", type=FILE, metavar="FILE", help="Also a page to look at; with several patients a folder."
)
@click.option(
    "--probabilities", is_flag=True, help="Also what is behind the mask, as FILE_probabilities.nii.gz."
)
@click.option(
    "--require",
    type=LEAST,
    help="Refuse a segmentation made from fewer seats (inputs of the network, usually one modality each). Default: "
    "take what there is, with a warning.",
)
@click.option(
    "--modality",
    metavar="NAME",
    help="Whose grid the mask gets. Default: the first of [peer] modality that there is.",
)
@wait_option
@click.option(
    "--force",
    is_flag=True,
    help="Replace files that are there; with --dicom, take an image that was not prepared also with another PatientID.",
)
@peer_options
def segment(
    patients: tuple[str, ...],
    out: Path,
    dicom_seg: Path | None,
    dicom: Path | None,
    report: Path | None,
    probabilities: bool,
    require: Any,
    modality: str | None,
    wait: float,
    force: bool,
    config_file: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Segment PATIENTs with the other hospitals; run it where this site's daemon runs, as its user.

    The daemon asks the coordinator, each hospital computes its part, and the mask comes back to this hospital only,
    on the grid of its own image. Ctrl-C withdraws what is not done.

    Exit codes: 0 ok, also with a missing modality, which is a warning; 1 refused, or impossible; 2 no daemon, or a
    peer went away; 3 the deadline passed, too many requests, or the disk is full; 4 settings, files, or an unknown
    patient; 5 a bug; 130 interrupted. Of several patients, the remaining ones are still processed.
    """
    from splitpeer.cli.own_images import OwnImages
    from splitpeer.daemon.asking import SpoolAsker

    config = load_peer(config_file, settings)
    private_files()
    images = OwnImages(config)
    own = {one.patient: one for one in (images.of(patient, modality) for patient in patients)}
    if (dicom_seg is None) != (dicom is None):
        raise ConfigError("--dicom-seg and --dicom go together: the mask is written for the original files")
    targets = _targets(list(own), out, dicom_seg, report, probabilities)
    _check_free(targets, force)
    if dicom is not None:
        # Before anybody computes anything.
        for scan in own.values():
            scan.series(dicom, force=force)
    asking = SpoolAsker(config.peer.state, require=require, wait=wait)
    asking.check()
    work = _Work(config, own, targets, dicom, as_json=as_json, force=force)
    with closing(asking.ask(list(own))) as told, Watched(list(own)) as watched:
        for one in told:
            watched.show(one)
            if one.over:
                with watched.paused():
                    work.finish(one)
    work.close()


class _Work:
    """What becomes of the answers.

    Args:
        own: the images, by patient.
        targets: the files, by patient.
        dicom: folder of the original files.
        force: whether they may be of a patient with another id, where no record says whose they are.
    """

    def __init__(
        self,
        config: PeerConfig,
        own: dict[str, OwnScan],
        targets: dict[str, Files],
        dicom: Path | None,
        *,
        as_json: bool,
        force: bool,
    ) -> None:
        self._config, self._own, self._targets, self._dicom = config, own, targets, dicom
        self._as_json, self._force = as_json, force
        self._rows: list[dict[str, Any]] = []
        self._errors: dict[str, PeerError] = {}

    def finish(self, told: AnswerTold) -> None:
        """Write what was asked for, or note why not."""
        patient = told.patient
        try:
            if told.result is None:
                raise told.error or JobFailed("there is no answer")
            segmentation, files = self._write(told, told.result)
        except PeerError as error:
            self._errors[patient] = error
            self._rows.append({"patient": patient, "error": str(error), "exit": error.exit_code})
            if len(self._own) > 1:
                echo(f"{patient}: {error}", err=True)
            return
        self._said(segmentation, files)

    def close(self) -> None:
        """The end: JSON if it is wanted. Raises the error of the patients that failed."""
        if self._as_json:
            echo_json(self._rows)
        if self._errors:
            raise all_in_one(self._errors, len(self._own), "patients were not segmented")

    def _write(self, told: AnswerTold, result: SpoolResult) -> tuple[Segmentation, list[Path]]:
        """All files of a patient, or none."""
        from splitpeer.results.dicom_seg import write_dicom_seg
        from splitpeer.results.nifti_out import write_nifti
        from splitpeer.results.own_scan import brought_back

        own, files = self._own[told.patient], self._targets[told.patient]
        segmentation = brought_back(result, own, keep=files.probabilities is not None)
        with Staged() as staged:
            write_nifti(segmentation, staged.at(files.mask))
            staged.at(_beside(files.mask))
            if files.probabilities is not None:
                write_nifti(segmentation, staged.at(files.probabilities), kind="probabilities")
                staged.at(_beside(files.probabilities))
            if files.dicom_seg is not None and self._dicom is not None:
                write_dicom_seg(
                    segmentation,
                    own.series(self._dicom, force=self._force),
                    staged.at(files.dicom_seg),
                    codes=self._config.results.codes,
                )
            if files.report is not None:
                self._write_page(segmentation, own, staged.at(files.report), staged.written)
        return segmentation, staged.final

    def _write_page(
        self, segmentation: Segmentation, own: OwnScan, path: Path, others: Sequence[Path]
    ) -> None:
        from splitpeer.results.page import write_page

        files = [other for other in others if other != path]
        image = own.voxels(self._config.data.rules())
        write_page(
            segmentation,
            path,
            image=image,
            image_name=own.modality,
            prepared=own.prepared,
            files=files,
        )

    def _said(self, segmentation: Segmentation, files: Sequence[Path]) -> None:
        from splitpeer.results.nifti_out import in_one_line

        origin = segmentation.origin
        for caution in origin.cautions:
            echo(f"warning: {segmentation.patient}: {caution}", err=True)
        self._rows.append(
            {
                "patient": segmentation.patient,
                "files": [str(path) for path in files],
                "ml": {name: round(ml, 4) for name, ml in segmentation.volumes.items()},
                "modalities": {"used": list(origin.used), "missing": list(origin.missing)},
                "warnings": list(origin.cautions),
                "run": {
                    "id": origin.run,
                    "name": origin.name,
                    "step": origin.step,
                    "model_sha256": origin.model,
                },
            }
        )
        if not self._as_json:
            echo(
                f"{segmentation.patient}: {in_one_line(segmentation.volumes)}; made from {', '.join(origin.used)}; "
                f"{', '.join(str(path) for path in files)}"
            )


def _targets(
    patients: Sequence[str], out: Path, dicom_seg: Path | None, report: Path | None, probabilities: bool
) -> dict[str, Files]:
    """The files of every patient. Raises ConfigError: their names cannot be."""
    single = len(patients) == 1 and not out.is_dir() and out.name.lower().endswith(MASKS)
    if single:
        return {patients[0]: Files(out, _probabilities(out) if probabilities else None, dicom_seg, report)}
    if out.name.lower().endswith(MASKS) and not out.is_dir():
        raise ConfigError(
            f"{out}: of several patients --out is a folder, and so are --dicom-seg and --report"
        )
    if not out.is_dir() and out.suffix:
        raise ConfigError(f"{out}: a mask is called .nii.gz or .nii: choose another name")
    targets: dict[str, Files] = {}
    names: dict[str, str] = {}
    for patient in patients:
        name = patient.replace("/", "_").lstrip(".") or "_"
        if (other := names.setdefault(name, patient)) != patient:
            raise ConfigError(
                f"the files of {other} and {patient} would have one name: ask for one at a time"
            )
        mask = out / f"{name}.nii.gz"
        targets[patient] = Files(
            mask,
            _probabilities(mask) if probabilities else None,
            None if dicom_seg is None else dicom_seg / f"{name}.dcm",
            None if report is None else report / f"{name}.html",
        )
    for folder in (out, dicom_seg, report):
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise durable.refusal(error, str(folder), "the folder") from None
    return targets


def _probabilities(mask: Path) -> Path:
    return mask.with_name(f"{_stem(mask)}_probabilities.nii.gz")


def _beside(mask: Path) -> Path:
    return mask.with_name(f"{_stem(mask)}.json")


def _stem(mask: Path) -> str:
    return mask.name[: -len(next(end for end in MASKS if mask.name.lower().endswith(end)))]


def _check_free(targets: dict[str, Files], force: bool) -> None:
    """Before anybody computes anything. Raises ConfigError: a file is there, or its folder cannot be written."""
    for files in targets.values():
        for path in files.every:
            if not path.parent.is_dir():
                raise ConfigError(f"{path}: there is no folder {path.parent}: make it first")
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise ConfigError(f"{path}: the folder may not be written: choose another")
            if path.is_dir():
                raise ConfigError(f"{path}: is a folder: choose another name")
            if path.exists() and not force:
                raise ConfigError(f"{path}: exists and is not overwritten: move it away, or add --force")
