"""Events of one site, as its coordinator sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Literal

from splitpeer.daemon.happenings.base import Happening
from splitpeer.daemon.status_schema import SiteState

# --- its standing and its links ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteStands(Happening):
    """Its standing in the run from now on."""

    site: str
    seats: str
    state: SiteState


@dataclass(frozen=True)
class SiteJoined(Happening):
    """Over a new link."""

    site: str
    seats: str
    patients: int
    """Usable ones."""
    unusable: str
    """How many are not, and why; empty: none."""
    applied: int
    """Its newest step."""
    checkpoints: Sequence[int]
    tls: str
    address: str
    serial: str
    """Serial number of its certificate."""


@dataclass(frozen=True)
class SiteLost(Happening):
    """Its link broke: it is awaited on another."""

    site: str
    cause: str
    waiting_for: str = ""
    """What it had been asked; empty: nothing."""
    patience_s: float | None = None
    """How long it is waited for; None: not said."""


@dataclass(frozen=True)
class SiteLeft(Happening):
    """It said bye, whether it had joined or only looked (splitpeer doctor)."""

    line = "site.left"

    site: str
    cause: str


@dataclass(frozen=True)
class SiteDeclined(Happening):
    """It does not want the job."""

    site: str
    run: str
    cause: str


@dataclass(frozen=True)
class SiteAbsent(Happening):
    """The run continues without it."""

    line = "site.absent"
    level = WARNING

    site: str
    seats: str
    cause: str


@dataclass(frozen=True)
class SitePresent(Happening):
    """It was absent and has caught up: the run counts on it again."""

    line = "site.present"

    site: str
    seats: str
    step: int


@dataclass(frozen=True)
class SiteAwaited(Happening):
    """The run waits for it."""

    site: str
    what: str
    deadline_s: float
    """At most so long."""


@dataclass(frozen=True)
class SiteNotAwaited(Happening):
    """The run does not wait for it any more."""

    site: str


# --- its part in the work ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteProgressed(Happening):
    """It answered a request about its steps."""

    site: str
    applied: int
    checkpoints: Sequence[int]
    octets_in: int
    """Over all links, as the coordinator counts them."""
    octets_out: int


@dataclass(frozen=True)
class SiteUnsaved(Happening):
    """SP-11-32: it could not write a checkpoint."""

    line = "site.unsaved"
    level = WARNING

    site: str
    step: int
    cause: str


@dataclass(frozen=True)
class SiteRestored(Happening):
    """SP-11-34: it had lost its memory, and went back to this step alone."""

    line = "site.restored"

    site: str
    step: int


# --- what peers and strangers can cause as often as they like: see `sinks.budgets` -------------------------


@dataclass(frozen=True)
class SiteRefused(Happening):
    """It dialled and did not join: it stays away."""

    line = "site.refused"
    level = WARNING

    site: str
    seats: str
    cause: str


@dataclass(frozen=True)
class SecondLink(Happening):
    """SP-11.14: two links hold the certificate of one site."""

    site: str
    outcome: Literal["second_holder", "superseded"]
    """The new one was refused, or the older one ended."""
    cause: str
    address: str
    """Address of the new link."""
    serial: str
    other_address: str | None
    """Address of the older link; None: there is none."""
    other_serial: str | None


@dataclass(frozen=True)
class LinkRefused(Happening):
    """SP-14-5: a peer was refused at the port."""

    source: str
    cause: str
    not_shown: int
    """How many others since the last line were not reported."""
