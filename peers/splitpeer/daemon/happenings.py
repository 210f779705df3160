"""What happens to a daemon, as data: told once, by the code that knows it, and put into words by the `sinks`.

A new happening needs a decision in each sink on what people see of it; a sink that does not know it says nothing.
Runs are named in full, in hexadecimal; times are seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

Scores = dict[str, float | None]
"""Dice by region; None: the region is in no mask."""


class Happening:
    """Each is a frozen dataclass; it is complete when it is told."""


Sink = Callable[[Happening], None]
"""Must not raise or wait."""


class Report:
    """Tells every sink, in their order. One that raises costs neither the run nor the sinks after it."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks
        self._logged: set[tuple[int, type[Exception]]] = set()  # of which sink, by its place

    def __call__(self, happening: Happening) -> None:
        for place, sink in enumerate(self._sinks):
            try:
                sink(happening)
            except Exception as error:
                # Once of each kind: it may fail at every step.
                if (place, type(error)) not in self._logged:
                    self._logged.add((place, type(error)))
                    what = {"sink": type(sink).__name__, "happening": type(happening).__name__}
                    log.exception("sink.failed", extra={"fields": what})

    def to(self, *sinks: Sink) -> Report:
        """One that tells these as well."""
        report = Report(*self._sinks, *sinks)
        report._logged = self._logged
        return report


# --- of any daemon -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready(Happening):
    """It works: its settings and data are read."""

    address: str
    """Of the coordinator."""


@dataclass(frozen=True)
class PhaseBegan(Happening):
    """What it does from now on, such as "training"."""

    phase: str


@dataclass(frozen=True)
class DataWarning(Happening):
    """The data can be used, and somebody should have a look. May name files."""

    cause: str


@dataclass(frozen=True)
class PatientNamed(Happening):
    """An error named a patient by key or handle; the people here know it by its file."""

    patient: str
    file: Path


@dataclass(frozen=True)
class JobEnded(Happening):
    """Bye was said."""

    job: str
    run: str
    reason: str
    step: int


# --- of a coordinator, from its start to the first step ----------------------------------------------------


@dataclass(frozen=True)
class CoordinatorStarted(Happening):
    """It listens."""

    site: str
    job: str
    listen: str
    run: str
    salt_check: str


@dataclass(frozen=True)
class RunChosen(Happening):
    """Which run it is, new or resumed."""

    job: str
    run: str
    steps: int
    absence: str


@dataclass(frozen=True)
class AlreadyComplete(Happening):
    """The run ended in an earlier life, and all sites know."""

    job: str
    run: str
    step: int


@dataclass(frozen=True)
class SitesAwaited(Happening):
    """Work waits for these to join; empty: for nobody any more."""

    sites: str


@dataclass(frozen=True)
class FarewellDue(Happening):
    """The run is complete, and these sites have not been told yet."""

    sites: str


@dataclass(frozen=True)
class SiteOverlaps(Happening):
    """Who joined, and how many of its patients the others have."""

    site: str
    patients: int
    shared: str
    few: bool
    """Too few for the job."""
    hint: str


@dataclass(frozen=True)
class SiteNotBound(Happening):
    """Who holds a site's part could not be noted."""

    site: str
    cause: str


@dataclass(frozen=True)
class PatientsMatched(Happening):
    """Who is at all sites."""

    shared: int
    labels: int
    sites: Mapping[str, int]


@dataclass(frozen=True)
class RunResumes(Happening):
    """It goes on from here, or from a step before."""

    step: int
    steps: int


@dataclass(frozen=True)
class RunBegan(Happening):
    """Work begins with `sites`, and without `missing`."""

    steps: int
    sites: Sequence[str]
    missing: Sequence[str]


# --- of a coordinator at work ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingBegan(Happening):
    """The step after `step` is being made."""

    step: int
    steps: int


@dataclass(frozen=True)
class StepCommitted(Happening):
    """SP-11-7: every party has applied it."""

    step: int
    loss: float
    """Not a number: nobody took part."""
    without: Sequence[str]
    """Modalities that sat it out, by chance or absence."""
    absent: Sequence[str]
    """Those of them whose site is absent."""
    seconds: float
    waited: float
    """Of them, for activations."""
    computed: float
    """Of them, by the decoder."""
    octets: dict[str, int]
    """On the wire by site, since the start."""


@dataclass(frozen=True)
class EvaluationSkipped(Happening):
    """No site here can take part in one."""

    step: int


@dataclass(frozen=True)
class BatchScored(Happening):
    """One of the batches of an evaluation."""

    done: int
    total: int


@dataclass(frozen=True)
class Evaluated(Happening):
    """Scores over the patients held out."""

    step: int
    volumes: int
    dice: Scores
    modalities: Sequence[str]
    """What the scores are made from."""
    missing: Mapping[str, Scores]
    """Scores without the modality named."""
    hd95: Scores
    """Distances of borders, mm; empty: not asked for."""
    seconds: float


@dataclass(frozen=True)
class CheckpointsHeld(Happening):
    """Steps whose own half is safe on disk."""

    steps: Sequence[int]


@dataclass(frozen=True)
class CheckpointCommitted(Happening):
    """SP-11-13: all parties hold this step."""

    run: str
    step: int
    digests: Mapping[str, str]
    """By site, hexadecimal."""


@dataclass(frozen=True)
class CheckpointMissed(Happening):
    """SP-11-32: not all could write it."""

    step: int
    sites: Sequence[str] = ()
    cause: str = ""
    """The coordinator's own; else `sites` could not."""


@dataclass(frozen=True)
class SiteForgot(Happening):
    """A site came back without its memory."""

    site: str


@dataclass(frozen=True)
class RunRolledBack(Happening):
    """All parties went back to `step`."""

    step: int
    before: int
    cause: str
    checkpoints: Sequence[int]


@dataclass(frozen=True)
class PatientWithdrawn(Happening):
    """SP-11.13-4: the run continues without a patient, from `step` on."""

    run: str
    site: str
    """Whose file it is; empty: the coordinator's own mask."""
    patient: str
    """Its handle."""
    step: int
    cause: str


@dataclass(frozen=True)
class WithdrawnInAll(Happening):
    """How many patients the run is made without."""

    step: int
    patients: int
    more: bool
    """More than before; else they were known."""


@dataclass(frozen=True)
class Draining(Happening):
    """It was asked to stop."""

    step: int


@dataclass(frozen=True)
class Drained(Happening):
    """It has stopped; its own half is saved."""

    committed: int
    saved: int


# --- of a site and its link --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteStarted(Happening):
    """Its images are found; it has not dialled yet."""

    site: str
    modality: str | None
    patients: int
    salt_check: str
    coordinator: str
    """Its address."""


@dataclass(frozen=True)
class Dialling(Happening):
    """For so long at most."""

    patience_s: float


@dataclass(frozen=True)
class DialFailed(Happening):
    """It is tried again."""

    cause: str
    patience_s: float


@dataclass(frozen=True)
class LinkUp(Happening):
    """The coordinator answers."""

    coordinator: str
    tls: str


@dataclass(frozen=True)
class LinkLost(Happening):
    """The job is not: it is dialled again."""

    cause: str


@dataclass(frozen=True)
class LeftByCoordinator(Happening):
    """A bye that does not end the job."""

    reason: str
    text: str


@dataclass(frozen=True)
class AskedTooMuch(Happening):
    """SP-11.15-8: more than the site's budgets allow."""

    cause: str
    pause_s: float


# --- of a site at work -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobDeclined(Happening):
    """The site's policy does not allow it."""

    job: str
    run: str
    cause: str


@dataclass(frozen=True)
class JobJoined(Happening):
    """What the site brings to the job it is offered."""

    job: str
    run: str
    step: int
    steps: int
    checkpoints: Sequence[int]


@dataclass(frozen=True)
class JobAccepted(Happening):
    """On these terms."""

    job: str
    run: str
    coordinator: str
    terms: str
    """SHA-256 of the job on the wire, hexadecimal."""
    schema: str
    levels: Sequence[str]
    """What it sends, by name."""
    precision: str
    defences: tuple[str, ...]
    recorded: bool
    applied: int
    patients: int


@dataclass(frozen=True)
class JobBegan(Happening):
    """The other sites are there as well."""

    job: str
    step: int
    patients: int


@dataclass(frozen=True)
class StepApplied(Happening):
    """Gradients were applied."""

    step: int
    octets_in: int
    """Over all links."""
    octets_out: int


@dataclass(frozen=True)
class StepCounted(Happening):
    """SP-11-31: steps up to this one were made without the site."""

    step: int


@dataclass(frozen=True)
class SiteRolledBack(Happening):
    """As the coordinator asked."""

    run: str
    step: int
    before: int


@dataclass(frozen=True)
class SiteSaved(Happening):
    """A checkpoint that the coordinator asked for."""

    run: str
    step: int
    digest: str
    checkpoints: Sequence[int]


@dataclass(frozen=True)
class SiteNotSaved(Happening):
    """It could not be written."""

    run: str
    step: int
    cause: str
    """Names a folder."""


@dataclass(frozen=True)
class LeftAt(Happening):
    """The site was asked to stop, and its half of this step is safe."""

    step: int


@dataclass(frozen=True)
class SiteStopped(Happening):
    """It was asked to."""


@dataclass(frozen=True)
class SiteJobEnded(JobEnded):
    """The same at a site."""

    advanced: int
    """Steps made without it."""


@dataclass(frozen=True)
class JobComplete(Happening):
    """The site was told so; None: it had not joined in this life."""

    job: str | None = None
    step: int | None = None


@dataclass(frozen=True)
class JobNotClosed(Happening):
    """What ended the work is told elsewhere; this went wrong after it."""

    cause: str


@dataclass(frozen=True)
class PrivacySpent(Happening):
    """What the site's releases have cost, of its whole life."""

    epsilon: float
    budget: float
    delta: float
    patients: int
    half_spent: int
    all_spent: int


# --- what a coordinator can cause at a site as often as it likes: see `sinks.sparing` ----------------------


@dataclass(frozen=True)
class FiguresTold(Happening):
    """How the training goes."""

    step: int
    steps: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class MissingTold(Happening):
    """SP-11-42: modalities that the job does without at the moment, and why."""

    step: int
    missing: Mapping[str, str]


@dataclass(frozen=True)
class MissingChanged(Happening):
    """The same where it differs from before."""

    step: int
    gone: Mapping[str, str]
    back: Sequence[str]
    missing: Sequence[str]
    """All that are missing now."""


@dataclass(frozen=True)
class PatientOut(Happening):
    """SP-11.13-8: a patient of this site is left out."""

    by: str
    """`withdraw`: by the site itself; `withdrawn`: the coordinator says so."""
    run: str
    key: bytes = field(repr=False)
    step: int
    cause: str
    file: Path | None
    """Where it is this site's that is bad."""
