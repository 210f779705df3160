"""Events of a site, its link and its work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING
from pathlib import Path

from splitpeer.daemon.happenings.any_daemon import JobEnded
from splitpeer.daemon.happenings.base import Happening
from splitpeer.timeline.spans import StepTiming

# --- it and its link ---------------------------------------------------------------------------------------


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

    line = "link.waiting"
    level = WARNING

    cause: str
    patience_s: float


@dataclass(frozen=True)
class LinkUp(Happening):
    """The coordinator answers."""

    line = "link.up"

    coordinator: str
    tls: str


@dataclass(frozen=True)
class LinkBroke(Happening):
    """The job is not: it is dialled again."""

    line = "link.lost"
    level = WARNING

    cause: str


@dataclass(frozen=True)
class LeftByCoordinator(Happening):
    """A bye that does not end the job."""

    line = "link.bye"

    reason: str
    text: str


@dataclass(frozen=True)
class LinkProbed(Happening):
    """SP-11.22: the coordinator has measured the link, before it offers a job. What crossed it were zeros."""

    line = "link.probed"
    sparing = True

    coordinator: str
    """Who asked."""
    probes: int
    octets_in: int
    """That came with the probes."""
    octets_out: int
    """That the site answered with."""
    why: str = "measured before a job is offered: zeros, nothing of a patient"


@dataclass(frozen=True)
class AskedTooMuch(Happening):
    """SP-11.15-8: more than the site's budgets allow."""

    line = "policy.refused"
    level = WARNING

    cause: str
    pause_s: float


# --- at work -----------------------------------------------------------------------------------------------


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
    seats: Mapping[str, int]
    """Those that it fills, such as "mri (t2, t1)", and for how many patients."""


@dataclass(frozen=True)
class JobAccepted(Happening):
    """On these terms."""

    job: str
    run: str
    coordinator: str
    terms: str
    """SHA-256 of the job on the wire, hexadecimal."""
    schema: str
    seats: Sequence[str]
    """Those that it fills, such as "mri (t2, t1)"."""
    levels: Sequence[str]
    """What it sends, by name."""
    precision: str
    defences: tuple[str, ...]
    recorded: bool
    applied: int
    patients: int
    weights: Sequence[str] = ()
    """Seat and SHA-256 of the file that its encoder started from, where that was one of ``splitpeer pretrain``."""


@dataclass(frozen=True)
class JobBegan(Happening):
    """The other sites are there as well."""

    line = "job.begin"

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
class StepTimed(Happening):
    """A step has been made, and the coordinator told of it."""

    step: int
    seconds: float
    """Since its batch was due."""
    timing: StepTiming


@dataclass(frozen=True)
class LabelsScored(Happening):
    """An evaluation with this site's masks is over; the table stays here."""

    line = "labels.scored"

    run: str
    step: int
    dice: Mapping[str, float | None]
    """As computed here."""
    told: Mapping[str, float]
    """What the coordinator gets of it."""
    predictions: int


@dataclass(frozen=True)
class StepCounted(Happening):
    """SP-11-31: steps up to this one were made without the site."""

    step: int


@dataclass(frozen=True)
class WindowsReleased(Happening):
    """SP-11.17: activations of a batch have left for good."""

    windows: int
    """All that have left in this run."""
    octets_in: int
    """Over all links."""
    octets_out: int


@dataclass(frozen=True)
class ReleasesEnded(Happening):
    """SP-11.17-8: the coordinator has all that it needs of this site."""

    line = "job.released"

    run: str
    windows: int
    patients: int
    hint: str
    """What to do when consent is withdrawn later."""


@dataclass(frozen=True)
class EncoderShared(Happening):
    """SP-11.16-2: the weights of an encoder leave for the coordinator."""

    run: str
    step: int
    seat: str


@dataclass(frozen=True)
class PartnersProven(Happening):
    """SP-11.18-8: these sites are in the sum with this one; each has proven its key."""

    run: str
    partners: list[str]
    least: int
    """How many the policy wants."""


@dataclass(frozen=True)
class MaskKeyDeleted(Happening):
    """SP-11.18-16, SP-11.18-19: what was recorded of a run's training cannot be read with anything that is here."""

    run: str
    cause: str


@dataclass(frozen=True)
class ServiceKeyReplaced(Happening):
    """SP-11.18-18, SP-11.18-19: nothing kept here can unmask recorded requests of earlier epochs any more."""

    run: str
    epoch: int
    """The new key's."""
    cause: str


@dataclass(frozen=True)
class ServiceKeyDeleted(Happening):
    """SP-11.18-5, SP-11.18-19: nothing kept here can unmask recorded requests of this run, and no new key was made."""

    run: str
    cause: str


@dataclass(frozen=True)
class ValuesClipped(Happening):
    """SP-11.18-3: values were too large for the sum."""

    step: int
    clipped: int
    """Values of this batch that were."""
    values: int
    """All values of this batch."""
    so_far: int
    """Since the process started."""
    range: float


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

    line = "job.checkpoint"

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
    """Whether the site was told; None: it had not joined since the start of this process."""

    job: str | None = None
    step: int | None = None


@dataclass(frozen=True)
class JobNotClosed(Happening):
    """An error after the work had ended; the cause of the end is reported separately."""

    line = "job.not_closed"
    level = WARNING

    cause: str


@dataclass(frozen=True)
class RunPruned(Happening):
    """SP-11.15-6: an old run made room for another."""

    line = "run.pruned"
    level = WARNING

    folder: str
    mib: int


@dataclass(frozen=True)
class RunNotMarked(Happening):
    """That the run is complete could not be noted in its folder."""

    line = "run.not_marked"
    level = WARNING

    folder: str
    cause: str


@dataclass(frozen=True)
class PrivacySpent(Happening):
    """What the site's releases have cost, of its whole life: at every tenth of the budget, and at the end of a job."""

    line = "privacy.spent"

    epsilon: float
    alone: float
    """Epsilon if all other sites that share the noise tell theirs."""
    budget: float
    delta: float
    patients: int
    half_spent: int
    """Patients who have used half of it or more."""
    all_spent: int
    """Those who cannot pay for one more record."""


# --- what a coordinator can cause at a site as often as it likes: see `sinks.sparing` ----------------------


@dataclass(frozen=True)
class FiguresTold(Happening):
    """How the training goes."""

    sparing = True

    step: int
    steps: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class MissingTold(Happening):
    """SP-11-42: seats that the job does without at the moment, and why."""

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


# --- inference ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatientLocated(Happening):
    """SP-11.19-16: a segmentation was asked for, and whether this site takes part in it."""

    line = "inference.located"
    sparing = True

    run: str
    request: str
    patient: str
    """Its handle."""
    asker: str
    """The coordinator's word."""
    outcome: str
    """"used", or why not."""


@dataclass(frozen=True)
class SegmentationAsked(Happening):
    """For people here."""

    line = "inference.asked"

    run: str
    request: str
    patient: str


@dataclass(frozen=True)
class SegmentationCame(Happening):
    """One that was asked for here is there."""

    line = "inference.done"

    run: str
    request: str
    step: int
    seats: Sequence[str]
    """It was made from these."""
    missing: Sequence[str]


@dataclass(frozen=True)
class SegmentationFailed(Happening):
    """One that was asked for here does not come."""

    line = "inference.failed"
    level = WARNING

    request: str
    cause: str
    reason: str


@dataclass(frozen=True)
class SiteRequestsStand(Happening):
    """How many segmentations people here have asked for, and this site was asked to take part in."""

    policy: str
    """[policy] inference: own or listed."""
    serves: bool | None
    """Whether the job on the present link has inference; None: there is no link."""
    waiting: int
    running: int
    ended: Mapping[str, int]
    """What became of those that were asked for here."""
    ended_last: float | None
    """When one ended last, seconds since 1970; None: none has."""
    answered: Mapping[str, Mapping[str, int]]
    """By who asked, what this site has answered."""
    answered_last: float | None
