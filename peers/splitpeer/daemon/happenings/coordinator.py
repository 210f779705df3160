"""Events of a coordinator and its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING

from splitpeer.daemon.happenings.base import Happening, Scores
from splitpeer.timeline.spans import StepTiming

# --- from its start to the first step ----------------------------------------------------------------------


@dataclass(frozen=True)
class CoordinatorStarted(Happening):
    """It listens."""

    site: str
    job: str
    listen: str
    run: str
    salt_check: str


@dataclass(frozen=True)
class RunLeft(Happening):
    """The last run is not complete, and job.toml has changed since: this is a new one."""

    run: str


@dataclass(frozen=True)
class RecordSetAside(Happening):
    """The record of a run that is given up was kept under the run's name."""

    line = "run.set_aside"

    file: str


@dataclass(frozen=True)
class RunFound(Happening):
    """The last run is resumed."""

    run: str


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
    """Work waits for these to join."""

    sites: str


@dataclass(frozen=True)
class CodingsChosen(Happening):
    """What `[wire]` left open is decided, for the whole run."""

    line = "codings.chosen"

    measured: str
    """Rates and round trip of each site's link; or that it was decided before."""
    activations: str
    gradients: str
    terms: str
    """Digest of the job as it is offered now."""


@dataclass(frozen=True)
class FarewellDue(Happening):
    """The run is complete, and these sites do not know yet."""

    line = "job.farewell"

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

    line = "site.not_bound"
    level = WARNING

    site: str
    cause: str


@dataclass(frozen=True)
class PatientsMatched(Happening):
    """How many patients each site fills at each seat."""

    shared: int
    """In the run."""
    labels: int
    sites: Mapping[str, int]
    """Usable at each."""
    complete: int
    """Those in the run with every seat."""
    held_out: int
    held_out_complete: int
    seats: Sequence[str]
    """Seats of the network, in order."""
    with_seats: Mapping[int, int]
    """Number of seats to patients who have so many, most seats first."""
    fills: Mapping[str, Mapping[str, int]]
    """By site and seat, how many patients the site fills there."""


@dataclass(frozen=True)
class RunResumes(Happening):
    """The run continues from here, or from an earlier step."""

    step: int
    steps: int


@dataclass(frozen=True)
class RunBegan(Happening):
    """Work begins with `sites`, and without `missing`."""

    steps: int
    sites: Sequence[str]
    missing: Sequence[str]


# --- releases into the feature bank ----------------------------------------------------------------------


@dataclass(frozen=True)
class BankPlanned(Happening):
    """SP-11.17: how much will be kept, told before the first release."""

    folder: str
    windows: int
    """Over all sites."""
    octets: int
    kept: int
    """Windows that are there already."""
    encrypted: bool


@dataclass(frozen=True)
class BankGrew(Happening):
    """One more release is safe on disk; or how many are, at the beginning."""

    kept: int
    windows: int
    octets: int
    of_octets: int


@dataclass(frozen=True)
class BankComplete(Happening):
    """All is there: no site is needed any more."""

    windows: int
    octets: int


@dataclass(frozen=True)
class ReleasesRemoved(Happening):
    """What sites released of patients who have withdrawn consent is removed."""

    line = "bank.dropped"

    run: str
    patients: str
    """Their handles."""


@dataclass(frozen=True)
class ReleasesCleared(Happening):
    """What sites released for requests is removed; if somebody asks about the patients again, so are the sites."""

    run: str
    keys: Sequence[bytes] = field(repr=False)
    """Of the patients."""
    octets: int
    cause: str


# --- at work -----------------------------------------------------------------------------------------------


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
    """Not a number if no site took part."""
    without: Sequence[str]
    """Seats that it was made without, by chance, for absence, or as no patient of the batch has them."""
    absent: Sequence[str]
    """Seats of its patients that absent sites fill."""
    seconds: float
    waited: float
    """Seconds of them waiting for activations."""
    computed: float
    """Seconds of them computing in the decoder."""
    octets: dict[str, int]
    """On the wire by site, since the start."""
    timing: StepTiming | None = None
    """Where the coordinator's time went; None: it was not recorded."""
    turns: bool = False
    """Gradients went to one site after the other."""


@dataclass(frozen=True)
class TurnsChosen(Happening):
    """From now on gradients leave in another way than before; a run begins with all sites at once."""

    line = "gradients.order"

    sent: str
    """How."""
    at_once_s: float
    """Seconds from gradients that leave to the next activations of all, as measured."""
    in_turns_s: float


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
    made_from: Sequence[str]
    """Seats that the scores are made from."""
    missing: Mapping[str, Scores]
    """Scores without the seat named."""
    hd95: Scores
    """Distances of borders, mm; empty: not asked for."""
    volume_ml: Mapping[str, Mapping[str, float]]
    """By region, `predicted` and `true`; empty: not asked for."""
    seconds: float


@dataclass(frozen=True)
class SeatsAveraged(Happening):
    """SP-11.16: the sites continue from the mean of their encoders."""

    step: int
    """The committed one."""
    sites: Mapping[str, Sequence[str]]
    """By seat, whose encoders."""


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

    line = "job.restarted_site"
    level = WARNING

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
class DrainBegan(Happening):
    """It was asked to stop."""

    line = "job.draining"

    step: int


@dataclass(frozen=True)
class Drained(Happening):
    """It has stopped; its own half is saved."""

    line = "job.drained"

    committed: int
    saved: int


# --- inference ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServiceBegan(Happening):
    """Sites may ask for segmentations."""

    line = "inference.ready"

    job: str
    run: str
    step: int
    """Its weights are served."""


@dataclass(frozen=True)
class SegmentationBegan(Happening):
    """A request's turn has come."""

    line = "inference.began"

    request: str
    patient: str
    """Its handle."""
    site: str
    """Who asked."""
    waiting: int
    """Others that wait."""


@dataclass(frozen=True)
class SiteTooLate(Happening):
    """Requests kept waiting for a site: for a while they do without it."""

    line = "inference.site_left_out"
    level = WARNING

    site: str
    seconds: float


@dataclass(frozen=True)
class SegmentationCancelled(Happening):
    """A request was given up by its site before its turn had come."""

    line = "inference.cancelled"

    run: str
    request: str
    patient: str
    """Its handle."""
    site: str


@dataclass(frozen=True)
class SegmentationServed(Happening):
    """How a request has ended."""

    line = "inference.served"

    run: str
    request: str
    patient: str
    site: str
    step: int
    outcome: str
    """"segmented", or why not."""
    seats: str
    """It was made from these."""
    missing: str
    causes: str
    """Why sites took no part."""
    windows: int
    seconds: float


@dataclass(frozen=True)
class RequestsStand(Happening):
    """How many segmentations sites have asked for."""

    run: str
    step: int
    """Its weights are served."""
    serves: bool
    """Whether requests are worked on already."""
    waiting: int
    running: int
    ended: int
    last: float | None
    """When one ended last, seconds since 1970; None: none has."""
    askers: Mapping[str, Mapping[str, int]]
    """By site, how many wait and run, and what became of the others."""
