"""`splitpeer evaluate`: segmentations of all patients with masks, against those masks: figures, worst cases, files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table as Printed

from splitpeer.cli.options import (
    FILE,
    LAYOUT,
    echo_json,
    load_peer,
    peer_options,
    private_files,
)
from splitpeer.cli.progress import bar
from splitpeer.cli.segmenting import LEAST, Watched, all_in_one, wait_option
from splitpeer.cli.terminal import echo
from splitpeer.data.files import Case
from splitpeer.data.labels import task_of
from splitpeer.data.layouts import find_labels
from splitpeer.data.patients import patient_id
from splitpeer.errors import ConfigError, DataError, JobFailed, PeerError
from splitpeer.settings.peer import PeerConfig
from splitpeer.settings.task import CONVENTION_OF_TASK
from splitpeer.storage import durable
from splitpeer.storage.staged import Staged
from splitproto.errors import printable

if TYPE_CHECKING:
    import numpy as np

    from splitpeer.daemon.spooled import SpoolResult
    from splitpeer.data.geometry import Geometry
    from splitpeer.data.task import Task
    from splitpeer.results.evaluate import EvaluationTable
    from splitpeer.results.evaluation_page import ShownImage, Worst
    from splitpeer.results.segmentation import Origin

CSV, JSON, PAGE = "evaluation.csv", "evaluation.json", "evaluation.html"
CONVENTIONS = click.Choice(("msd", "brats", "brats2023", "nnunet", "task"))


@click.command()
@click.argument("patients", nargs=-1, metavar="[PATIENT]...")
@click.option("--out", type=FILE, required=True, metavar="FOLDER", help=f"For {CSV}, {JSON} and {PAGE}.")
@click.option("--labels", type=FILE, metavar="FOLDER", help="The masks. Default: [data] labels.")
@click.option("--layout", type=LAYOUT, help="Of the masks. Default: [data] layout.")
@click.option("--convention", type=CONVENTIONS, help="Of the masks. Default: [data] convention.")
@click.option(
    "--masks",
    type=FILE,
    metavar="FOLDER",
    help="Compare segmentations that are there, such as predictions/ of a run; nobody is asked.",
)
@click.option(
    "--job", "job_file", type=FILE, help='job.toml, for --masks of a job whose convention is "task".'
)
@click.option(
    "--worst", type=click.IntRange(0, 50), default=3, show_default=True, help="Patients with pictures."
)
@click.option("--require", type=LEAST, help="Accept no segmentation made from fewer seats.")
@wait_option
@peer_options
def evaluate(
    patients: tuple[str, ...],
    out: Path,
    labels: Path | None,
    layout: str | None,
    convention: str | None,
    masks: Path | None,
    job_file: Path | None,
    worst: int,
    require: Any,
    wait: float,
    config_file: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Segment all patients with masks, or PATIENTs, and compare: Dice, 95 % Hausdorff distance, volumes.

    Run it where the masks are, as the user of this peer's daemon, which asks for the segmentations as it does for
    splitpeer segment. Neither masks nor segmentations leave. Older files in FOLDER are replaced.

    Masks and segmentations are compared on one grid: asked for, the grid of [data] images (of prepared images: their
    labels/); with --masks, the grid of those files.

    Exit codes: those of segment. Patients without figures are named in the files, with the reason.
    """
    config = load_peer(config_file, settings)
    private_files()
    convention = convention or config.data.convention
    truths = _truths(config, labels or config.data.labels, layout or config.data.layout, patients)
    study = _Study(config, truths, convention, worst)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise durable.refusal(error, str(out), "--out") from None
    if masks is not None:
        study.read(masks, _task_of_files(convention, job_file))
    else:
        study.ask(require, wait)
    table = study.close()
    _write(table, study, out)
    if as_json:
        echo_json(table.document())
    else:
        _print(table)
        echo(f"{len(table.rows)} patients: {out / CSV}, {out / JSON}, {out / PAGE}")
    if study.errors:
        raise all_in_one(study.errors, len(study.truths), f"patients have no figures, see {JSON}")


class _Study:
    """The patients with masks, and what becomes of each.

    Args:
        config: `peer.toml`.
        truths: the mask of each patient.
        convention: of the masks, if one is named.
        worst: patients kept for pictures.
    """

    def __init__(
        self, config: PeerConfig, truths: Mapping[str, Case], convention: str | None, worst: int
    ) -> None:
        self.truths = truths
        self.errors: dict[str, PeerError] = {}
        self._config, self._convention, self._most = config, convention, worst
        self._table: EvaluationTable | None = None
        self._worst: Worst | None = None

    def ask(self, require: Any, wait: float) -> None:
        """Have all segmented by way of the daemon. Raises PeerError: there is none, or it went away."""
        from splitpeer.daemon.asking import SpoolAsker

        asking = SpoolAsker(self._config.peer.state, require=require, wait=wait)
        asking.check()
        patients = list(self.truths)
        with closing(asking.ask(patients)) as told, Watched(patients) as watched:
            for one in told:
                watched.show(one)
                if one.over:
                    with watched.paused():
                        self._try(one.patient, one.result, one.error)

    def read(self, folder: Path, task: Task) -> None:
        """Compare with the files in a folder, named by patient. Raises DataError: there is no such folder."""
        from splitpeer.results.evaluate import truth_of

        found = {case.patient: case for case in find_labels(folder, "folder")}
        with bar("compared") as progress:
            for patient, case in progress.track(list(self.truths.items())):
                try:
                    if (theirs := found.get(patient)) is None:
                        raise DataError(f"no segmentation of {patient} in {folder}")
                    made = truth_of(theirs, task, self._config.data.rules())
                    self._add(patient, task, made.masks, made.grid, case)
                except PeerError as error:
                    self._fail(patient, error)

    def close(self) -> EvaluationTable:
        """The figures. Raises the error of the patients where there are none."""
        if self._table is None:
            raise all_in_one(self.errors, len(self.truths), "patients could not be evaluated")
        self._table.failed.update({patient: str(error) for patient, error in self.errors.items()})
        return self._table

    def worst(self) -> list[ShownImage]:
        """The worst patients, in arrays."""
        return self._worst.shown() if self._worst is not None else []

    def image(self, patient: str) -> np.ndarray | None:
        """This peer's own image of a patient, on the grid of the mask; None: there is none on that grid."""
        from splitpeer.cli.own_images import OwnImages
        from splitpeer.data.geometry import differences
        from splitpeer.data.nifti import read_header, read_voxels

        if self._config.data.images is None or not self._config.peer.modalities:
            return None
        rules = self._config.data.rules()
        try:
            own = OwnImages(self._config).of(patient)
            if differences(own.header.geometry, read_header(self.truths[patient], rules).geometry):
                return None
            return read_voxels(own.case, rules)[0]
        except PeerError:
            return None

    def _try(self, patient: str, result: SpoolResult | None, error: PeerError | None) -> None:
        try:
            if result is None:
                raise error or JobFailed("there is no answer")
            self._compare(patient, result)
        except PeerError as failed:
            self._fail(patient, failed)

    def _fail(self, patient: str, error: PeerError) -> None:
        self.errors[patient] = error
        if len(self.truths) > 1:
            echo(f"{patient}: {error}", err=True)

    def _compare(self, patient: str, result: SpoolResult) -> None:
        import numpy as np

        from splitpeer.data.nifti import read_header
        from splitpeer.results.own_scan import OwnScan, brought_back

        case = self.truths[patient]
        header = read_header(case, self._config.data.rules())
        segmentation = brought_back(result, OwnScan(patient, "mask", case, header))
        masks = np.stack([header.turn.voxels(mask) for mask in segmentation.masks])
        meaning = _meaning(self._convention, result.task)
        self._add(patient, meaning, masks, header.geometry, case, segmentation.origin)

    def _add(
        self,
        patient: str,
        task: Task,
        masks: np.ndarray,
        grid: Geometry,
        case: Case,
        origin: Origin | None = None,
    ) -> None:
        from splitpeer.results.evaluate import EvaluationTable, check_grid, truth_of
        from splitpeer.results.evaluation_page import Worst

        truth = truth_of(case, task, self._config.data.rules())
        check_grid(case, truth, grid, masks)
        if self._table is None or self._worst is None:
            self._table = EvaluationTable(task.region_names)
            self._worst = Worst(self._table, self._most)
        if task.region_names != self._table.regions:
            raise JobFailed("segmented for other regions than the patients before: the job was changed")
        row = self._table.add(patient, masks, truth, origin)
        self._worst.add(row, masks, truth.masks, truth.grid.affine)


def _truths(
    config: PeerConfig, folder: Path | None, layout: str, patients: tuple[str, ...]
) -> dict[str, Case]:
    """The masks, of all or of some patients. Raises ConfigError, DataError."""
    if folder is None:
        raise ConfigError(f"{config.source}: names no masks: add --labels FOLDER, or [data] labels")
    cases = {case.patient: case for case in find_labels(folder, layout)}
    if not patients:
        if not cases:
            raise DataError(f"{folder}: no masks (layout {layout})")
        return cases
    wanted = [patient_id(patient) for patient in patients]
    if unknown := [patient for patient in wanted if patient not in cases]:
        raise DataError(f"{unknown[0]}: no mask of this patient in {folder}")
    return {patient: cases[patient] for patient in wanted}


def _meaning(convention: str | None, answered: Task) -> Task:
    """What the numbers in the masks mean. Raises ConfigError: that is not said, or the job segments something else."""
    if convention is None or convention == CONVENTION_OF_TASK:
        if answered.convention:
            raise ConfigError(
                "the masks of a glioma follow a convention: add --convention, such as msd or brats"
            )
        return answered
    task = task_of(convention)
    if task.region_names != answered.region_names:
        raise ConfigError(
            f"convention {convention} is of glioma masks, and the run segments {', '.join(answered.region_names)}: "
            "add --convention task"
        )
    return task


def _task_of_files(convention: str | None, job_file: Path | None) -> Task:
    """The same of masks that are there. Raises ConfigError."""
    from splitpeer.settings.job import JobConfig

    if job_file is not None:
        return JobConfig.load(job_file).task.task(convention)
    if convention is None or convention == CONVENTION_OF_TASK:
        raise ConfigError(
            "what the masks mean is not said: add --convention msd or brats or ..., or --job job.toml"
        )
    return task_of(convention)


def _write(table: EvaluationTable, study: _Study, out: Path) -> None:
    from splitpeer.results.evaluation_page import write_evaluation_page

    text = json.dumps(table.document(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with Staged() as staged:
        for name, content in ((CSV, table.csv()), (JSON, text)):
            path = staged.at(out / name)
            try:
                durable.replace(path, content.encode())
            except OSError as error:
                raise durable.refusal(error, str(path), "--out") from None
        write_evaluation_page(table, study.worst(), staged.at(out / PAGE), image=study.image)


def _print(table: EvaluationTable) -> None:
    """The summary, and the worst patients."""
    shown = Printed(box=box.SIMPLE)
    for column in ("region", "Dice", "median", "worst", "HD95 mm", "median", "network ml", "people ml"):
        shown.add_column(column, justify="left" if column == "region" else "right")
    for name, of in table.summary().items():
        if name == "mean":
            shown.add_row(name, f"{of['dice']:.3f}")
            continue
        shown.add_row(
            name, *(f"{of[key]:.3f}" for key in ("dice", "dice_median", "dice_worst")),
            *(f"{of[key]:.1f}" for key in ("hd95", "hd95_median", "predicted_ml", "true_ml")),
        )  # fmt: skip
    console = Console(highlight=False)
    console.print(shown)
    worst = ", ".join(f"{row.patient} {table.mean_dice(row):.3f}" for row in table.worst()[:3])
    echo(f"worst: {printable(worst)}")
