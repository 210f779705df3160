"""What a lane is: one way for envelopes to reach a listener and to get back (SP-5).

A lane moves octets and reports what happens to its connections. The door decides who is admitted: the lane
calls its `Reception`, and the door calls back to answer or to end a connection. All of it happens on one
event loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from splitproto.admission import network_of
from splitproto.errors import LocalError, SplitprotoError


@dataclass(eq=False, slots=True)
class Visitor(ABC):
    """One connection at a lane. The lane makes it; the door keeps its count of links and faults."""

    source: str
    """The peer's address, without a port."""
    since: float
    """When it came, or when its last admitted link ended; seconds of the event loop."""
    links: int = field(default=0, init=False)
    """Admitted ones."""
    known: bool = field(default=False, init=False)
    """It has had an admitted link, so ending it is no refusal."""
    faults: int = field(default=0, init=False)
    """Messages that belonged to no link."""
    refused: bool = field(default=False, init=False)
    """To be ended at the next look, when what was sent to it is on its way."""
    ended: bool = field(default=False, init=False)
    """The door has ended it."""
    network: str = field(init=False)

    def __post_init__(self) -> None:
        self.network = network_of(self.source)

    @abstractmethod
    def hang_up(self) -> None:
        """End the connection now. The lane reports that it `left`, at once or later."""

    def excess(self) -> LocalError | None:
        """Why the lane holds more for this connection than it may, if it does."""
        return None


class Reception(Protocol):
    """Receives what a lane reports: the door."""

    def came(self, visitor: Visitor) -> None:
        """A connection was accepted."""
        ...

    def left(self, visitor: Visitor) -> None:
        """A connection is over. Its links are reported apart, by `lost` or `doubtful`."""
        ...

    def arrived(
        self, lane: Lane, route: bytes, data: bytes | memoryview, source: str, visitor: Visitor | None
    ) -> None:
        """One message.

        Args:
            route: the way back, for `Lane.reply`.
            source: the peer's address.
            visitor: the connection it came by, if the lane can tell.
        """
        ...

    def malformed(
        self, lane: Lane, route: bytes, source: str, visitor: Visitor | None, error: LocalError
    ) -> None:
        """Something came that is not one envelope."""
        ...

    def lost(self, lane: Lane, route: bytes) -> None:
        """The peer at the other end of `route` is gone."""
        ...

    def doubtful(self, lane: Lane) -> None:
        """A connection with links is over, and the lane cannot tell which: ask all peers of this lane."""
        ...

    def tell(self, source: str, error: SplitprotoError) -> None:
        """The lane itself refused a connection."""
        ...


class Lane(Protocol):
    """One way in."""

    @property
    def address(self) -> str:
        """Where it listens; complete once `listen` has returned."""
        ...

    async def listen(self, reception: Reception) -> None:
        """Begin to listen; from now on `reception` is called.

        Raises:
            AddressError: the address is none.
            BindFailed: the address cannot be had.
        """
        ...

    def reply(self, route: bytes, data: bytes) -> bool:
        """Send one envelope back; False when the queue is full now.

        Raises:
            LinkLost: the peer is gone.
        """
        ...

    def leave(self) -> None:
        """The door closes: no more reports. What was sent may still go out."""
        ...


class Caller(Protocol):
    """The session of the dialling peer, as its end of a lane sees it."""

    def arrived(self, data: bytes | memoryview) -> None:
        """One envelope."""
        ...

    def carrier_lost(self, error: SplitprotoError) -> None:
        """The connection is gone."""
        ...


class Dialled(Protocol):
    """The dialling end of one link: what carries its session."""

    def start(self, caller: Caller) -> None:
        """Connect, and report to `caller`; what fails is reported as well."""
        ...

    def try_send(self, data: bytes) -> bool:
        """Hand over one envelope; False when the queue is full now. Raises `LinkLost` if the peer is gone."""
        ...

    def close(self) -> None:
        """The link is over."""
        ...


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to reach a listener."""

    at: str
    """Where it leads, for logs."""
    open_end: Callable[[], Dialled]
    """Makes the dialling end."""


class Destination(Protocol):
    """What can be dialled: each kind of lane knows how its listeners are reached. Pass one to `dial`."""

    @property
    def host(self) -> str:
        """A name or an address that the listener's certificate must bear."""
        ...

    async def attempts(self, timeout: float) -> Sequence[Attempt]:
        """The ways to get there; each is tried when nothing came back from the one before.

        Args:
            timeout: seconds that looking them up may take.

        Raises:
            SplitprotoError: there is none.
        """
        ...

    async def diagnose(self, error: SplitprotoError) -> SplitprotoError:
        """Nothing came back from anywhere: what to tell of it, given what the last attempt ended with."""
        ...
