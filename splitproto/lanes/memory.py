"""The in-memory lane: both ends in one process and one event loop, without a socket.

TLS and all above it run as on any lane. Envelopes keep their order, a full queue makes the sender wait, and what was
sent before an end closed still arrives: as on a ZeroMQ lane, but for delays and network faults.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from splitproto.errors import BindFailed, LinkLost, SplitprotoError

from .base import Attempt, Caller, Dialled, Lane, Reception, Visitor

QUEUE = 16
"""Envelopes on their way in one direction of a connection."""


class MemoryLane(Lane):
    """One way in; pass it to `dial` instead of an address.

    Args:
        host: a name that the listener's certificate bears.
        source: the address that diallers seem to come from; what counts as one source shares a cap.
    """

    def __init__(self, host: str = "localhost", source: str = "memory") -> None:
        self.host = host
        self.source = source
        self._reception: Reception | None = None
        self._ends: dict[bytes, MemoryEnd] = {}
        self._routes = count(1)

    @property
    def address(self) -> str:
        """For logs."""
        return f"memory:{self.host}"

    async def attempts(self, timeout: float) -> list[Attempt]:
        """One: it is where it is."""
        return [Attempt(self.address, lambda: MemoryEnd(self))]

    async def diagnose(self, error: SplitprotoError) -> SplitprotoError:
        """There is nothing else to look at."""
        return error

    async def listen(self, reception: Reception) -> None:
        if self._reception is not None:
            raise BindFailed(f"another listener is at {self.address}: give each listener a lane of its own")
        self._reception = reception

    def reply(self, route: bytes, data: bytes) -> bool:
        if (end := self._ends.get(route)) is None:
            raise LinkLost("the connection was lost")
        return end._down.put(data)

    def leave(self) -> None:
        for end in list(self._ends.values()):
            self._part(end)
        self._reception = None

    # --- for its ends ------------------------------------------------------------------------------------

    def _join(self, end: MemoryEnd) -> bool:
        """Whether there is a listener; then `end` is connected."""
        if self._reception is None:
            return False
        end.route = next(self._routes).to_bytes(8, "big")
        self._ends[end.route] = end
        end.visitor = _MemoryVisitor(self.source, asyncio.get_running_loop().time(), end)
        self._reception.came(end.visitor)
        return True

    def _deliver(self, end: MemoryEnd, data: bytes) -> None:
        if self._reception is not None and end.route in self._ends:
            self._reception.arrived(self, end.route, data, self.source, end.visitor)

    def _part(self, end: MemoryEnd) -> None:
        """A connection is over: report it to both sides."""
        if self._ends.pop(end.route, None) is None:
            return
        if self._reception is not None:
            if end.visitor is not None:
                self._reception.left(end.visitor)
            self._reception.lost(self, end.route)
        asyncio.get_running_loop().call_soon(end._lost)


class MemoryEnd(Dialled):
    """The dialling end of one connection."""

    def __init__(self, lane: MemoryLane) -> None:
        self.route = b""
        self.visitor: Visitor | None = None
        self._lane = lane
        self._caller: Caller | None = None
        self._closed = False
        self._up = _Pipe(lambda data: lane._deliver(self, data))
        self._down = _Pipe(self._arrived)

    def start(self, caller: Caller) -> None:
        self._caller = caller
        if not self._lane._join(self):
            caller.carrier_lost(LinkLost(f"nothing listens at {self._lane.address}"))

    def try_send(self, data: bytes) -> bool:
        if self._closed or not self.route:
            raise LinkLost("the connection was lost")
        return self._up.put(data)

    def close(self) -> None:
        if not self._closed:
            self._closed, self._caller = True, None
            # After what waits in the pipe: an alert or a bye still arrives.
            asyncio.get_running_loop().call_soon(self._lane._part, self)

    # --- inside -----------------------------------------------------------------------------------------

    def _arrived(self, data: bytes) -> None:
        if self._caller is not None:
            self._caller.arrived(data)

    def _lost(self) -> None:
        self._closed = True
        if self._caller is not None:
            self._caller.carrier_lost(LinkLost("the connection was lost"))


class _Pipe:
    """One direction: what is put in comes out in a later turn of the event loop, in order."""

    def __init__(self, deliver: Callable[[bytes], None]) -> None:
        self._deliver = deliver
        self._waiting = 0

    def put(self, data: bytes) -> bool:
        """False: it is full now."""
        if self._waiting >= QUEUE:
            return False
        self._waiting += 1
        asyncio.get_running_loop().call_soon(self._out, data)
        return True

    def _out(self, data: bytes) -> None:
        self._waiting -= 1
        self._deliver(data)


@dataclass(eq=False, slots=True)
class _MemoryVisitor(Visitor):
    end: MemoryEnd

    def hang_up(self) -> None:
        self.end._lane._part(self.end)
