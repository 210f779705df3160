"""Events of any daemon."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from logging import WARNING
from pathlib import Path

from splitpeer.daemon.happenings.base import Happening


@dataclass(frozen=True)
class Ready(Happening):
    """It works: its settings and data are read."""

    address: str
    """Address of the coordinator."""


@dataclass(frozen=True)
class PhaseBegan(Happening):
    """What it does from now on, such as "training"."""

    phase: str


@dataclass(frozen=True)
class DataWarning(Happening):
    """The data can be used, but deserve a look. May name files."""

    line = "data.warning"
    level = WARNING

    cause: str


@dataclass(frozen=True)
class PatientFileBad(Happening):
    """A patient is left out: the file cannot be used. May name it."""

    line = "patient.unusable"
    level = WARNING

    patient: str
    """Its handle."""
    cause: str


@dataclass(frozen=True)
class PredictionsRemoved(Happening):
    """Predicted masks of patients who are out, and their scores where these are kept by patient."""

    run: str
    keys: Collection[bytes] = field(repr=False)
    """Of the patients."""


@dataclass(frozen=True)
class PatientNamed(Happening):
    """An error named a patient by key or handle; the people here know it by its file."""

    patient: str
    file: Path


@dataclass(frozen=True)
class Awaited(Happening):
    """The work waits for this."""

    what: str
    deadline_s: float
    """At most so long."""


@dataclass(frozen=True)
class NotAwaited(Happening):
    """It does not wait any more."""


@dataclass(frozen=True)
class PeerLinked(Happening):
    """A link is up: whose."""

    peer: str
    role: str
    tls: str


@dataclass(frozen=True)
class PeerAnnounced(Happening):
    """SP-11-29, SP-11-30: what a peer says about itself, where it is new."""

    peer: str
    recorded: bool | None
    """None: not said."""
    defences: Sequence[str] | None


@dataclass(frozen=True)
class CaptureStarted(Happening):
    """What is sent and received is recorded from now on."""

    file: str
    encrypted: bool
    run: str


@dataclass(frozen=True)
class CaptureEnded(Happening):
    """No more is recorded."""

    file: str
    reason: str
    messages: int
    octets: int
    lost: int
    """Messages that were not recorded."""
    last_chain: str
    """Hexadecimal; empty: nothing was recorded."""


@dataclass(frozen=True)
class JobEnded(Happening):
    """Bye was said."""

    job: str
    run: str
    reason: str
    step: int
