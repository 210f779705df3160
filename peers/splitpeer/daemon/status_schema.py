"""What `status.json` holds: `board` writes it, `observe` and `splitpeer status` read it, and all by these names.

A name that is written or read wrongly is an error of mypy. A key that is missing, and None, mean: not known.
The file of another version may contain figures without a name here: they are shown as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, cast

NAME = "status.json"
VERSION = 2

SiteState = Literal["awaited", "joining", "present", "lost", "absent", "returned", "catching up"]
"""As in the table of `coordinator/standing.py`, which a status is read without."""


class Moment(TypedDict):
    """One instant, twice."""

    at: str
    """UTC, ISO 8601 with milliseconds."""
    monotonic: float
    """Seconds on this machine's clock, of one start of the machine."""


class Wait(TypedDict):
    """What is waited for."""

    who: str
    """At a coordinator, the site; else empty."""
    what: str
    since: Moment
    until: Moment | None
    """None: not known, or without end."""


class Ended(TypedDict):
    """How the daemon stopped."""

    at: Moment
    phase: str
    cause: str
    """Empty: in good order."""


class PatientTable(TypedDict):
    """How many patients each site fills at each seat."""

    used: int
    """In the run."""
    complete: int
    """Those of them with every seat."""
    held_out: int
    held_out_complete: int
    seats: list[str]
    """Seats of the network, in order."""
    with_seats: Mapping[str, int]
    """Number of seats, as text, to patients who have so many."""
    fills: Mapping[str, Mapping[str, int]]
    """By site and seat, how many patients the site fills there."""


class ServedCounts(TypedDict):
    """How many segmentations sites have asked a coordinator for."""

    waiting: int
    running: int
    finished: int
    """However they ended; counted over restarts."""
    askers: Mapping[str, Mapping[str, int]]
    """By site: how many of its requests are `waiting` and `running`, and were `segmented`, `refused`, `cancelled` and
    `failed`."""


class Served(ServedCounts):
    """By which run."""

    run: str
    """Hexadecimal."""
    step: int
    """Its weights are served."""
    serves: bool
    """Whether requests are worked on now; if not, they wait until the run is complete, or has a first checkpoint."""
    last: Moment | None
    """When one ended last."""


class InferenceCounts(TypedDict):
    """Segmentations at a site whose policy allows some, since its daemon started."""

    policy: str
    """[policy] inference: own or listed."""
    serves: bool | None
    """Whether the job on the present link has inference; None: there is no link."""
    waiting: int
    """Of those that people here have asked for."""
    running: int
    segmented: int
    cancelled: int
    failed: int
    """Refused or failed, here or elsewhere."""
    askers: Mapping[str, Mapping[str, int]]
    """By who asked (the coordinator's word; `others`: whom the policy does not name): how many requests this site
    `answered`, how many its policy `refused`, and for how many it was `unable`, having no image that can be used."""


class SiteInference(InferenceCounts):
    """The same, and when."""

    last: Moment | None
    """When one that was asked for here ended last."""
    answered_last: Moment | None
    """When this site was asked last."""


class Work(TypedDict, total=False):
    """Figures of the work, as a role tells them."""

    job: str
    run: str
    """Hexadecimal."""
    step: int | None
    steps: int | None
    loss: float | None
    dice: Mapping[str, float | None]
    """By region."""
    hd95: Mapping[str, float | None]
    """95 % Hausdorff distances by region, mm; of the last evaluation alone."""
    volume_ml: Mapping[str, Mapping[str, float]]
    """Volumes by region, `predicted` and `true`; as `hd95`."""
    made_from: list[str]
    """Seats of the last evaluation."""
    seats: Mapping[str, int]
    """At a site: the seats of the job that it fills, and for how many patients."""
    bank: str
    """A coordinator's, in a job with frozen encoders: how much of it is there, in words."""
    released: int
    """At a site: windows that have left in a job with frozen encoders."""
    privacy: str
    """At a site with a privacy budget: what is spent of it, in words, as of its last tenth."""
    missing: list[str]
    """At a site: seats that the job does without at the moment."""
    serving: Served
    """A coordinator's, in a job with inference."""
    inference: SiteInference
    """A site's, with `[policy] inference`."""
    withdrawn: int
    """Patients."""
    patients: PatientTable
    """A coordinator's."""
    checkpoints: list[int]
    absence: str
    """The job's [absence] mode."""
    address: str
    """A coordinator's own, where it listens; a site's: the coordinator's."""
    coordinator: str
    tls: str
    octets_in: int
    octets_out: int


class Rates(TypedDict, total=False):
    """What the board makes of counters; None: not known yet."""

    step_per_s: float | None
    octets_in_per_s: float | None
    octets_out_per_s: float | None


class WorkStatus(Work, Rates, total=False):
    """The same as they stand in the file."""


class _OfSite(TypedDict, total=False):
    seats: str
    """Those that it fills, in words."""
    state: SiteState | None
    cause: str
    """Why it is absent."""
    tls: str
    applied: int | None
    """Its newest step."""
    checkpoints: list[int]
    octets_in: int
    octets_out: int


class SiteFigures(_OfSite, total=False):
    """What a coordinator tells of a site; instants are of `time.monotonic`."""

    link_since: float
    absent_since: float


class SiteStatus(_OfSite, Rates, total=False):
    """The same, as stored in the file."""

    state_since: Moment
    link_since: Moment
    absent_since: Moment


class StatusHead(TypedDict):
    """Who writes."""

    version: int
    agent: str
    role: str
    site: str
    federation: str
    modality: str | None
    pid: int
    host: str
    boot: str
    """Id of this boot of the machine."""
    started: Moment


class Document(StatusHead):
    """The whole file."""

    written: Moment
    ready: bool
    phase: str
    phase_since: Moment
    work: WorkStatus
    waits: list[Wait]
    sites: dict[str, SiteStatus]
    ended: Ended | None


# --- of a file that anybody may have written ---------------------------------------------------------------


def document(found: object) -> Document:
    """With every key; None where `found` has none, or is no map. The values are as they were found."""
    return cast("Document", _filled(Document, found))


def work(found: object) -> WorkStatus:
    """As `document`."""
    return cast("WorkStatus", _filled(WorkStatus, found))


def site(found: object) -> SiteStatus:
    """As `document`."""
    return cast("SiteStatus", _filled(SiteStatus, found))


def wait(found: object) -> Wait:
    """As `document`."""
    return cast("Wait", _filled(Wait, found))


def ended(found: object) -> Ended:
    """As `document`."""
    return cast("Ended", _filled(Ended, found))


def moment(found: object) -> Moment:
    """As `document`."""
    return cast("Moment", _filled(Moment, found))


def _filled(kind: Any, found: object) -> dict[str, Any]:
    known = found if isinstance(found, Mapping) else {}
    return {key: known.get(key) for key in kind.__annotations__}
