"""The door: which peers are admitted on any of its lanes, and which are ended (SP-5-8, SP-5-9, SP-5-12, SP-5-13).

One door has one policy for all its lanes: strangers share the caps and the budget, so a second lane does not
double them. Links of all lanes are rechecked together (`vigil`), and end together.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from . import envelope
from .admission import HandshakeBudget, network_of, one_too_many
from .connection import Connection, Timing
from .envelope import Kind, ResetReason
from .errors import (
    CarrierVersionError,
    DeadlineExceeded,
    LinkLost,
    LocalError,
    SplitprotoError,
    TooManyLinks,
)
from .identity import AllowList, Credentials, Identity
from .lanes.base import Lane, Reception, Visitor
from .negotiation import Offer
from .recheck import Presented
from .session import Session
from .states import Side
from .vigil import Vigil
from .visitors import MAX_FAULTS, Visitors

log = logging.getLogger(__name__)

_LOOK = 0.05
"""Seconds between two checks of the connections."""

Refused = Callable[[str, SplitprotoError], None]
"""Called with (address of the source, error) when a door refuses a peer."""
Key = tuple[Lane, bytes, bytes]
"""Lane, route and link id: a link belongs to the connection that it began on (SP-5-6)."""


class _Link:
    """The carrier of one accepted link."""

    def __init__(
        self, door: Door, key: Key, source: str, visitor: Visitor | None, own: Identity, files: bytes
    ) -> None:
        self.door = door
        self.key = key
        self.source = source
        self.network = network_of(source)
        self.visitor = visitor
        self.own, self.files = own, files  # the door's, when this link began
        self.session: Session | None = None
        self.admitted = False

    def try_send(self, data: bytes) -> bool:
        lane, route, _ = self.key
        return lane.reply(route, data)

    def close(self) -> None:
        self.door._forget(self)


class Door(Reception):
    """Turns dialling peers into sessions.

    Use as an async context manager; `accept` hands out sessions that are already mutually admitted. A site
    may have several sessions: the application decides which one counts (SP-9-6).

    Args:
        lanes: the ways in, at least one.
        credentials: this side's certificate, key and CA; read again when a file was replaced.
        allow: which roles and sites may come.
        refused: called for every peer that was refused, or cut off because its certificate is no longer good.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        credentials: Credentials,
        allow: AllowList,
        offer: Offer | None = None,
        *,
        timing: Timing | None = None,
        refused: Refused | None = None,
    ) -> None:
        self.lanes = tuple(lanes)
        self._credentials = credentials
        self._allow = allow
        self._offer = offer or Offer()
        self._timing = timing or Timing()
        self._refused = refused or (lambda source, error: log.warning("refused %s: %s", source, error))
        self._links: dict[Key, _Link] = {}
        self._ready: deque[Session] = deque()
        self._arrived = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._looking: asyncio.TimerHandle | None = None
        self._presented = Presented(credentials)
        self._visitors = Visitors(self._timing.handshake + 1.0)

    @property
    def address(self) -> str:
        """Where the first lane listens."""
        return self.lanes[0].address

    async def __aenter__(self) -> Self:
        """Open all lanes.

        Raises:
            AddressError, BindFailed: one of them cannot listen; then none of them does.
        """
        self._loop = asyncio.get_running_loop()
        self._budget = HandshakeBudget(self._loop.time())
        self._vigil = Vigil(self._credentials, self._timing.recheck, self.tell)
        self._open_lanes: list[Lane] = []
        try:
            for lane in self.lanes:
                await lane.listen(self)
                self._open_lanes.append(lane)
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave()

    async def accept(self, timeout: float) -> Session:
        """The next admitted peer.

        Raises:
            DeadlineExceeded: no peer came in time.
        """
        deadline = self._loop.time() + timeout
        while True:
            while self._ready:
                session = self._ready.popleft()
                if session.alive:
                    return session
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._arrived.wait()
            except TimeoutError:
                raise DeadlineExceeded(f"waited {timeout:g} s for a peer to connect") from None

    # --- for the lanes ------------------------------------------------------------------------------------

    def came(self, visitor: Visitor) -> None:
        for source, error in self._visitors.came(visitor):
            self.tell(source, error)
        if self._looking is None and not self._leaving:
            self._looking = self._loop.call_later(_LOOK, self._look)

    def left(self, visitor: Visitor) -> None:
        self._visitors.left(visitor)

    def arrived(
        self, lane: Lane, route: bytes, data: bytes | memoryview, source: str, visitor: Visitor | None
    ) -> None:
        if self._turned_out(visitor):
            return
        key = (lane, route, envelope.link_of(data))
        link = self._links.get(key)
        if link is not None and link.session is not None:
            self._came_by(link, visitor)
            if link.admitted or self._budget.take(link.network, len(data), self._loop.time()):
                link.session.arrived(data)
            else:
                self._evict(link, "too many bytes before admission")
            return
        try:
            found = envelope.decode(data)
        except LocalError as error:
            self._turn_away(key, source, visitor, error)
            return
        if found.kind is Kind.OPEN and found.sequence == 0:
            self._open(key, source, visitor, data)
        elif found.kind is Kind.DATA:
            # SP-5-9: ciphertext of an unknown link is answered so that the dialler starts again.
            self._reset(key, ResetReason.UNKNOWN_LINK, "")
            self._fault(source, visitor)

    def malformed(
        self, lane: Lane, route: bytes, source: str, visitor: Visitor | None, error: LocalError
    ) -> None:
        if self._turned_out(visitor):
            return
        self._turn_away((lane, route, envelope.NO_LINK), source, visitor, error)
        if visitor is not None and not visitor.links:
            visitor.refused = True

    def lost(self, lane: Lane, route: bytes) -> None:
        for link in list(self._links.values()):
            if link.key[:2] == (lane, route) and link.session is not None:
                link.session.carrier_lost(LinkLost("the connection was lost"))

    def doubtful(self, lane: Lane) -> None:
        for link in list(self._links.values()):
            if link.key[0] is lane and link.session is not None:
                link.session.probe()

    def tell(self, source: str, error: SplitprotoError) -> None:
        try:
            self._refused(source, error.again())
        except Exception as defect:
            # The application's, so its loop reports it; strangers are still refused.
            self._loop.call_exception_handler(
                {"message": "a listener's callback `refused` failed", "exception": defect}
            )

    # --- inside -----------------------------------------------------------------------------------------

    def _turned_out(self, visitor: Visitor | None) -> bool:
        """Whether the connection was marked for ending; then it ends now, and no more work is done for it."""
        if visitor is None or not visitor.refused:
            return False
        self._visitors.end(visitor)
        return True

    def _came_by(self, link: _Link, visitor: Visitor | None) -> None:
        """Note which connection a link belongs to: a lane may hear of a connection only after its first message."""
        if visitor is None or visitor is link.visitor:
            return
        if link.admitted:
            if link.visitor is not None:
                self._visitors.parted(link.visitor, self._loop.time())
            self._visitors.admitted(visitor)
        link.visitor = visitor

    def _open(self, key: Key, source: str, visitor: Visitor | None, data: bytes | memoryview) -> None:
        if self._leaving:
            self._reset(key, ResetReason.BUSY, "shutting down")
            return
        # SP-5-12: the work that strangers can cause has a budget.
        if not self._budget.take(network_of(source), len(data), self._loop.time(), opens=True):
            self.tell(source, TooManyLinks("more handshakes than this listener does for one source"))
            self._reset(key, ResetReason.BUSY, "try again in a few seconds")
            self._fault(source, visitor)
            return
        try:
            own, files, tls = self._presented.now()
        except LocalError as error:
            self.tell(source, error)
            self._reset(key, ResetReason.BUSY, "the listener cannot use its certificate now")
            return
        connection = Connection(
            Side.COORDINATOR,
            key[2],
            tls,
            own.sha256,
            lambda peer: self._allow.check(peer, own.federation),
            self._offer,
            self._loop.time(),
            timing=self._timing,
        )
        link = self._links[key] = _Link(self, key, source, visitor, own, files)
        link.session = Session(connection, link)
        link.session.address = source
        task = self._loop.create_task(self._admit(link, link.session))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        link.session.arrived(data)
        # SP-5-8: nothing is kept for more strangers than this; the oldest is dropped, as an honest handshake is quick.
        waiting = [other for other in self._links.values() if not other.admitted]
        if (oldest := one_too_many(waiting, lambda one: one.network)) is not None:
            self._evict(oldest, "too many links without an admitted peer: the oldest is closed")

    def _evict(self, link: _Link, why: str) -> None:
        """End a link that is not admitted, at once."""
        session = link.session
        self._reset(link.key, ResetReason.BUSY, "try again in a few seconds")
        self._forget(link)
        if session is not None:
            session.carrier_lost(TooManyLinks(why))

    async def _admit(self, link: _Link, session: Session) -> None:
        try:
            await session.established()
        except SplitprotoError as error:
            self.tell(link.source, error)
            return
        if self._links.get(link.key) is not link:
            return  # it was over, or evicted, before this ran: nobody would subtract it from the count
        link.admitted = True
        self._budget.admitted(link.network)
        if link.visitor is not None:
            self._visitors.admitted(link.visitor)
        self._vigil.watch(session, link.own, link.files, link.source)
        self._ready = deque(waiting for waiting in self._ready if waiting.alive)
        self._ready.append(session)
        self._arrived.set()

    def _reset(self, key: Key, reason: ResetReason, text: str) -> None:
        lane, route, link = key
        try:
            lane.reply(route, envelope.encode_reset(link, reason, text))
        except LinkLost:
            # The peer is gone already.
            return

    def _turn_away(self, key: Key, source: str, visitor: Visitor | None, error: LocalError) -> None:
        self.tell(source, error)
        reason = (
            ResetReason.CARRIER_VERSION if isinstance(error, CarrierVersionError) else ResetReason.MALFORMED
        )
        self._reset(key, reason, f"splitproto: {error.reason}")
        self._fault(source, visitor)

    def _fault(self, source: str, visitor: Visitor | None) -> None:
        """A message that belongs to no link: a few are an accident; each costs as much as an OPEN."""
        affordable = self._budget.take(network_of(source), 0, self._loop.time(), opens=True)
        if visitor is not None and not visitor.links:
            visitor.faults += 1
            visitor.refused = not affordable or visitor.faults >= MAX_FAULTS

    def _look(self) -> None:
        self._looking = self._loop.call_later(_LOOK, self._look) if len(self._visitors) else None
        for source, error in self._visitors.look(self._loop.time()):
            self.tell(source, error)

    def _forget(self, link: _Link) -> None:
        if self._links.get(link.key) is not link:
            return
        del self._links[link.key]
        if link.admitted and link.visitor is not None:
            self._visitors.parted(link.visitor, self._loop.time())
        link.session = None

    async def _leave(self) -> None:
        self._leaving = True
        self._vigil.close()
        sessions = [link.session for link in self._links.values() if link.session is not None]
        await asyncio.gather(*(session.close("drain") for session in sessions))
        if self._looking is not None:
            self._looking.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with ExitStack() as leaving:  # a lane that fails to close does not keep the others open
            leaving.callback(self._visitors.clear)
            for lane in self._open_lanes:
                leaving.callback(lane.leave)
