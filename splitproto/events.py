"""What a connection tells its owner."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import SplitprotoError
from .identity import Identity
from .messages import Message
from .negotiation import Agreement


class Event:
    """Root of all events."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Established(Event):
    """Both sides admitted each other; messages may flow."""

    peer: Identity
    agreement: Agreement
    tls: str
    """Version and suite, for logs."""


@dataclass(frozen=True, slots=True)
class Received(Event):
    """A whole message."""

    message: Message
    octets: int
    """Octets of its body; give them back with `release` when the message has been taken."""
    head: int
    """Octets of its head, which needed no credit."""


@dataclass(frozen=True, slots=True)
class RotationDue(Event):
    """Say bye("rotate") at the next good moment, then dial again."""

    cause: str
    """For people: a budget that is spent, a life that is over."""


@dataclass(frozen=True, slots=True)
class Closed(Event):
    """The link is over; the last event."""

    error: SplitprotoError | None
    """None after two byes."""
