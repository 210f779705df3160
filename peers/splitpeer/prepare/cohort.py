"""All patients of a DICOM folder: each prepared or named with its reason; one bad patient never ends the run."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from splitpeer.data.files import LABELS, PREPARED, examples
from splitpeer.data.layouts import look
from splitpeer.data.patients import duplicate_warnings
from splitpeer.data.rules import MAX_VOXELS
from splitpeer.dicom.choice import Choice, by_patient, choose
from splitpeer.dicom.headers import DicomHeader, read_folder
from splitpeer.dicom.rules import SeriesRule
from splitpeer.errors import ConfigError, DataError
from splitpeer.prepare.atlas import Atlas
from splitpeer.prepare.identifiers import read_ids, study_id
from splitpeer.prepare.one import HELD_BACK, WORK, PatientPaths, SeriesSource, Steps, Workshop
from splitpeer.prepare.record import FOLDER, PreparedRecord
from splitpeer.prepare.removal import remove_unlisted
from splitpeer.prepare.tools import ProgramFailed, check_program
from splitpeer.prepare.workers import spread
from splitpeer.storage import durable

REPORT, PAGE = PREPARED, "prepare.html"
"""In the folder of images."""
_PAGE = Path(__file__).parent / "page"
_REMOVED = "its image of an earlier run was removed"
_STAYS = "its image of an earlier run stays"

State = Literal["prepared", "unchanged", "accepted", "held back", "failed", "removed"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done ("reading", "preparing"), how many are done, and how many there are."""


@dataclass(frozen=True)
class PreparationPlan:
    """One run."""

    root: Path
    """Folder of DICOM files."""
    out: Path
    """Folder of images; made where it is missing."""
    modality: str
    rule: SeriesRule
    steps: Steps
    patient_id: str = "PatientID"
    ids: Path | None = None
    masks: Path | None = None
    """Folder of NIfTI masks, `ID.nii.gz`, by the hospital's or the study's id."""
    max_voxels: int = MAX_VOXELS
    accept: Collection[str] = ()
    """Study ids of patients whose images are taken in spite of suspicious figures: somebody looked at them."""
    workers: int = 1
    """Processes; what they make is the same, however many."""


@dataclass(frozen=True)
class PatientOutcome:
    """What became of one patient."""

    patient: str
    state: State
    reasons: tuple[str, ...] = ()
    """Why it is held back, failed, or was removed."""
    series: str = ""
    """Which series was taken, and why."""
    left_out: tuple[str, ...] = ()
    """Other series, and why they were not taken."""
    warnings: tuple[str, ...] = ()
    kept: str = ""
    """Which registration was kept: rigid, affine, none; empty: there was none to judge."""
    quality: Mapping[str, float] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """There is an image."""
        return self.state not in ("held back", "failed", "removed")


@dataclass(frozen=True)
class PreparationSummary:
    """What became of all."""

    modality: str
    atlas: str
    out: str
    outcomes: tuple[PatientOutcome, ...]
    notes: tuple[str, ...]
    """What concerns files rather than a patient."""

    @property
    def complete(self) -> bool:
        """Every patient has an image, or is to have none, and no file was refused."""
        return all(one.usable or one.state == "removed" for one in self.outcomes) and not self.notes

    def counts(self) -> str:
        """Such as "3 prepared, 1 held back"."""
        states = [one.state for one in self.outcomes]
        return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "no patient"

    def lines(self) -> list[str]:
        """For a terminal: patients with something to say, then the rest in figures."""
        said = [*self.notes]
        for one in self.outcomes:
            if not one.usable:
                said.append(f"{one.patient}: {one.state}: {'; '.join(one.reasons)}")
            said += [f"{one.patient}: {text}" for text in one.warnings]
        return [*said, f"{self.counts()}; look at the images: {Path(self.out) / PAGE}"]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"complete": self.complete, "counts": self.counts()}


def prepare(plan: PreparationPlan, atlas: Atlas, progress: Progress | None = None) -> PreparationSummary:
    """Prepare every patient of a folder; those that are done and unchanged are left as they are.

    Writes images, records and pictures below `plan.out`, and `REPORT` and `PAGE` about all of them. Where there is a
    list of ids, what earlier runs wrote of patients whom it does not name is removed first.

    Raises:
        DataError: the folder, the list of ids or that of masks cannot be used, or the list is not that of `plan.out`.
        DiskTrouble, ConfigError: the output cannot be written; what was finished before stays.
        ConfigError: an outside program cannot be started; nothing was touched.
        JobFailed: one of several workers was killed; what was finished before stays.
    """
    for setting, template in plan.steps.programs.items():
        check_program(setting, template)
    ids = None if plan.ids is None else read_ids(plan.ids)
    masks = {} if plan.masks is None else _masks(plan.masks)
    tell = progress or (lambda what, done, total: None)
    folder = read_folder(plan.root, plan.patient_id, lambda done, total: tell("reading", done, total))
    patients, notes = by_patient(folder.headers)
    notes += [
        f"{count} files passed over: {reason}" for reason, count in folder.passed.items() if _worth(reason)
    ]
    try:
        with _alone(plan.out):
            gone = {} if ids is None else remove_unlisted(plan.out, ids, patients)
            workshop = Workshop(plan.out, atlas, plan.steps, _software(plan.steps))
            outcomes = _all(plan, workshop, patients, ids, masks, tell)
            notes += _unused(masks, {*patients, *(one.patient for one in outcomes)})
            outcomes += [PatientOutcome(name, "removed", (why,)) for name, why in gone.items()]
            notes += duplicate_warnings([one.patient for one in outcomes if one.usable])
            summary = PreparationSummary(
                plan.modality, atlas.name, str(plan.out), tuple(outcomes), tuple(notes)
            )
            _report(plan.out, summary)
    except OSError as error:
        raise durable.refusal(error, f"{plan.out}: the images", "--out") from None
    return summary


# --- inside ------------------------------------------------------------------------------------------------


def _all(
    plan: PreparationPlan,
    workshop: Workshop,
    patients: Mapping[str, list[DicomHeader]],
    ids: Mapping[str, str] | None,
    masks: Mapping[str, Path],
    tell: Progress,
) -> list[PatientOutcome]:
    tell("preparing", 0, len(patients))
    found: dict[int, PatientOutcome] = {}
    work = partial(_one, plan, workshop, ids, masks)
    with closing(spread(work, sorted(patients.items()), plan.workers)) as done:
        for place, outcome in done:
            found[place] = outcome
            tell("preparing", len(found), len(patients))
    return [found[place] for place in sorted(found)]


def _one(
    plan: PreparationPlan,
    workshop: Workshop,
    ids: Mapping[str, str] | None,
    masks: Mapping[str, Path],
    hospital: str,
    headers: list[DicomHeader],
) -> PatientOutcome:
    name, choice, places = hospital or "(no id)", None, None
    try:
        name = study_id(hospital, ids)
        places = PatientPaths.of(plan.out, name)
        before = places.image.exists()
        choice = choose(headers, plan.modality, plan.rule, plan.max_voxels)
        if choice.taken is None:
            raise DataError(choice.why)
        mask = _mask_of(masks, hospital, name)
        source = SeriesSource(name, plan.modality, plan.root, choice.taken, mask)
        accept = name in plan.accept
        record = workshop.done(source, accept=accept)
        fresh = record is None
        record = workshop.prepare(source, accept=accept) if record is None else record
        return _outcome(record, choice, fresh=fresh, removed=before and record.held_back)
    except DataError as error:
        if error.exit_code != DataError.exit_code:
            raise  # the disk: all others would fail, too
        left_out = () if choice is None else tuple(one.text for one in choice.left_out)
        if isinstance(error, ProgramFailed) and _same(places, choice):
            return PatientOutcome(name, "failed", (str(error), _STAYS), left_out=left_out)
        # What cannot be made today may be another series, or another person's: it must not be trained on.
        removed = places is not None and places.forget()
        return PatientOutcome(
            name, "failed", (str(error), *([_REMOVED] if removed else [])), left_out=left_out
        )


def _same(places: PatientPaths | None, choice: Choice | None) -> bool:
    """Whether the image of an earlier run is of the series that is chosen now."""
    return bool(places and choice and choice.taken and places.shows(choice.taken.header.series))


def _outcome(record: PreparedRecord, choice: Choice, *, fresh: bool, removed: bool) -> PatientOutcome:
    state: State = "prepared" if fresh else "unchanged"
    if record.held_back:
        state = "held back"
    elif record.accepted and fresh:
        state = "accepted"
    return PatientOutcome(
        record.patient,
        state,
        (*record.reasons, *([_REMOVED] if removed else [])),
        choice.why,
        tuple(one.text for one in choice.left_out),
        record.warnings,
        record.kept,
        record.quality,
    )


def _masks(folder: Path) -> dict[str, Path]:
    found = look(folder, "folder", None)
    if found.problems:
        raise DataError(found.problems[0])
    return {case.patient: case.path for case in found.cases}


def _mask_of(masks: Mapping[str, Path], hospital: str, name: str) -> Path | None:
    found = {masks[one] for one in (hospital, name) if one in masks}
    if len(found) > 1:
        raise DataError("two masks, one by the hospital's id and one by the study's: keep one of them")
    return found.pop() if found else None


def _unused(masks: Mapping[str, Path], known: Collection[str]) -> list[str]:
    lost = sorted(masks.keys() - set(known))
    return (
        [f"{len(lost)} masks of nobody in this folder: {examples(lost)}: correct their names"] if lost else []
    )


def _worth(reason: str) -> bool:
    """Whether files that were passed over for this reason may be missed by somebody."""
    return not reason.startswith(("no image", "not DICOM"))


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The folder of images, which no other process prepares meanwhile; what a crash left there is removed."""
    durable.make_folder(out / FOLDER)
    folder = os.open(out / FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: another splitpeer data prepare writes here: wait for it") from None
        for left in (out / FOLDER).glob(f"{WORK}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(folder)


def _software(steps: Steps) -> dict[str, str]:
    """Versions of what decides about voxels; of outside programs, whose version is unknown, the command line."""
    found = {"bias_field": steps.bias_field, "skull_strip": steps.skull_strip or "none"}
    for name in ("splitproto", "SimpleITK", "pydicom", "numpy", "scipy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _report(out: Path, summary: PreparationSummary) -> None:
    text = json.dumps(summary.to_json(), indent=1, ensure_ascii=False) + "\n"
    durable.replace(out / REPORT, text.encode(), sync=False)
    environment = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    order: dict[State, int] = {"held back": 0, "failed": 1, "removed": 2}
    shown = sorted(summary.outcomes, key=lambda one: (order.get(one.state, 3), one.patient))
    page = environment.get_template("page.html.jinja").render(
        modality=summary.modality,
        atlas=summary.atlas,
        counts=summary.counts(),
        notes=summary.notes,
        patients=[
            asdict(one)
            | {
                "css": {"held back": "held", "failed": "failed"}.get(one.state, ""),
                "picture": _picture(out / FOLDER / f"{one.patient}.png"),
            }
            for one in shown
        ],
    )
    durable.replace(out / PAGE, page.encode(), sync=False)


def _picture(path: Path) -> str:
    """In the page itself, which is one file to carry to where somebody can look at it; empty: there is none."""
    try:
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    except FileNotFoundError:
        return ""


__all__ = ["HELD_BACK", "LABELS", "PatientOutcome", "PreparationPlan", "PreparationSummary", "prepare"]
