"""ZeroMQ below a session: `dial` connects a DEALER, `Listener` binds a ROUTER (SP-5).

ZeroMQ hides what TLS must know, so: one DEALER per link and no automatic reconnect (a TLS session never
outlives its connection); the socket monitor reports a lost connection at once; ROUTER_MANDATORY turns silent
drops into errors; routing ids are libzmq's own and mean nothing, the certificate alone is identity; sends never
block, so one stalled peer cannot hold up the others. Sockets are read on the event loop through their
file descriptor (`reader`), which is edge-triggered: after every send the queue is looked at again. Strangers at the
listener's port are bounded in number and work (`admission`), and below ZeroMQ by their connections (`visitors`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import secrets
import socket as tcp
from collections import deque
from collections.abc import Callable
from types import TracebackType

import zmq

from . import constants, envelope
from .admission import HandshakeBudget, network_of, one_too_many
from .connection import Connection, Timing
from .envelope import Kind, ResetReason
from .errors import (
    CarrierVersionError,
    DeadlineExceeded,
    EnvelopeError,
    LinkLost,
    LocalError,
    SplitprotoError,
    TooManyLinks,
)
from .hosts import split_address, without_zone
from .identity import AllowList, Credentials, Identity
from .negotiation import Offer
from .reader import Reader, unwatch, watch
from .recheck import Presented, files_digest
from .session import Session
from .states import Side
from .vigil import Vigil
from .visitors import LONGEST_MESSAGE, MAX_FAULTS, QUEUE, Visitor, Visitors

log = logging.getLogger(__name__)

ZMTP_HANDSHAKE_MS = 1000
"""A connection that is not ZeroMQ is dropped after this."""
_ASK_AGAIN = 0.1
_LOOK = 0.05
"""Seconds between two looks at the connections of the port."""
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

Refused = Callable[[str, SplitprotoError], None]
"""Called with (address of the source, error) when a listener turns somebody away."""


def _common_options(socket: zmq.Socket[bytes], handshake_ms: int) -> None:
    socket.set_hwm(QUEUE)
    socket.linger = 0
    socket.setsockopt(zmq.MAXMSGSIZE, LONGEST_MESSAGE)
    socket.setsockopt(zmq.HANDSHAKE_IVL, handshake_ms)
    # A vanished machine, by the kernel's timers. Not by ZeroMQ's heartbeats: where a peer floods a full queue and
    # hangs up, libzmq's next beat aborts the process (zeromq/libzmq#4364).
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, int(2 * constants.HEARTBEAT_INTERVAL))
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, int(constants.HEARTBEAT_INTERVAL))
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 2)
    socket.setsockopt(zmq.TCP_MAXRT, int(constants.PEER_TIMEOUT * 1000))


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of `tcp://host:port`.

    Raises:
        LinkLost: not such an address.
    """
    try:
        return split_address(address)
    except ValueError as error:
        raise LinkLost(str(error)) from None


def _endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


# --- dialling --------------------------------------------------------------------------------------------


class _Dealer:
    """The carrier of one dialled link."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._address = address
        self._socket = context.socket(zmq.DEALER)
        _common_options(self._socket, int(constants.HANDSHAKE_TIMEOUT * 1000))
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.IPV6, 1)
        # SP-5-6: "A link MUST NOT outlive its connection": libzmq may not reconnect behind our back.
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._session: Session | None = None
        self._monitor = watch(self._socket, _LOST | _FAILED, self._happened)
        self._reader: Reader | None = None

    def start(self, session: Session) -> None:
        self._session = session
        self._reader = Reader(self._socket, self._deliver)
        try:
            self._socket.connect(self._address)
        except zmq.ZMQError as error:
            session.carrier_lost(LinkLost(f"cannot dial {self._address}: {error.strerror}"))

    def _deliver(self, frames: list[zmq.Frame]) -> None:
        if self._session is not None and len(frames) == 1:
            self._session.arrived(frames[0].buffer)

    def _happened(self, event: int, value: int) -> None:
        if self._session is None:
            return
        # A line that breaks so early says nothing about what listens there.
        if event & _FAILED and value not in (errno.ECONNRESET, errno.EPIPE):
            self._session.carrier_lost(
                EnvelopeError(
                    f"what answers at {self._address} is not ZeroMQ: is this the coordinator's port?"
                )
            )
        elif self._reader is not None:
            # What has already arrived (an error, an alert) explains the loss better than the loss itself.
            self._reader.look()
            asyncio.get_running_loop().call_soon(
                self._session.carrier_lost, LinkLost("the connection was lost")
            )

    def try_send(self, data: bytes) -> bool:
        if self._socket.closed:
            raise LinkLost("the socket is closed")
        try:
            # Not copied (pyzmq still copies what is small): nobody changes an envelope once it is made.
            self._socket.send(data, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        finally:
            # A send, also one that fails, may swallow the report that something arrived.
            if self._reader is not None:
                self._reader.look()
        return True

    def close(self) -> None:
        if self._socket.closed:
            return
        unwatch(self._socket, self._monitor)
        if self._reader is not None:
            # What is queued (an alert, a bye) may still go out.
            self._reader.close(linger_ms=500)
        self._session = None


async def dial(
    address: str,
    credentials: Credentials,
    allow: AllowList,
    offer: Offer | None = None,
    *,
    timing: Timing | None = None,
    context: zmq.Context[zmq.Socket[bytes]] | None = None,
) -> Session:
    """Connect to a coordinator and wait until both sides have admitted each other.

    Args:
        address: `tcp://host:port`; the listener's certificate must name the host.
        credentials: this side's certificate, key and CA; read again.
        allow: who may answer.

    Raises:
        LinkLost: nobody there, name unknown (`retry` is True).
        SplitprotoError: refused, by either side; `retry` says whether trying again can help.
    """
    host, port = parse_address(address)
    if port == 0:
        raise LinkLost(f"{address!r} names no port to dial")
    timing = timing or Timing()
    # libzmq tries only the first address of a name; a coordinator often serves just one of IPv6 and IPv4.
    *others, last = await _resolve(host, port, timing.handshake)
    for other in others:
        try:
            return await _dial(other, host, credentials, allow, offer, timing, context)
        except _NobodyThere as error:
            log.info("%s: %s; trying the next address of %s", other, error.cause, host)
    try:
        return await _dial(last, host, credentials, allow, offer, timing, context)
    except _NobodyThere as error:
        raise await _diagnose(host, port, error.cause) from None


class _NobodyThere(Exception):
    """Nothing came back from one address; never leaves this module."""

    def __init__(self, cause: SplitprotoError) -> None:
        self.cause = cause


async def _resolve(host: str, port: int, timeout: float) -> list[str]:
    """ZeroMQ endpoints of every address of `host`, in the system's order of preference."""
    try:
        async with asyncio.timeout(timeout):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=tcp.SOCK_STREAM)
    except TimeoutError:
        raise DeadlineExceeded(f"the name {host} was not resolved within {timeout:g} s") from None
    except (OSError, UnicodeError) as error:
        raise LinkLost(
            f"the name {host} is unknown: check [network] coordinator and DNS", detail=str(error)
        ) from None
    hosts = []
    for _, _, _, _, at in found:
        scope = f"%{at[3]}" if len(at) == 4 and at[3] else ""
        hosts.append(f"{at[0]}{scope}")
    return [_endpoint(one, port) for one in dict.fromkeys(hosts)]


async def _dial(
    endpoint: str,
    host: str,
    credentials: Credentials,
    allow: AllowList,
    offer: Offer | None,
    timing: Timing,
    context: zmq.Context[zmq.Socket[bytes]] | None,
) -> Session:
    loop = asyncio.get_running_loop()
    own, files = credentials.identity, files_digest(credentials)

    def authorise(peer: Identity) -> None:
        allow.check(peer, own.federation)

    connection = Connection(
        Side.CLIENT,
        secrets.token_bytes(constants.LINK_ID_BYTES),
        credentials.client_context(),
        own.sha256,
        authorise,
        offer or Offer(),
        loop.time(),
        hostname=without_zone(host),
        timing=timing,
    )
    dealer = _Dealer(context or zmq.Context.instance(), endpoint)
    session = Session(connection, dealer)
    session.address = endpoint
    dealer.start(session)
    try:
        await session.established()
    except SplitprotoError as error:
        if session.bytes_in:
            raise
        raise _NobodyThere(error) from None
    except asyncio.CancelledError:
        session.carrier_lost(LinkLost("gave up"))
        raise
    vigil = Vigil(credentials, timing.recheck, lambda _, error: log.warning("%s", error))
    vigil.watch(session, own, files, endpoint)
    session.ended.add_done_callback(lambda _: vigil.close())
    return session


async def _diagnose(host: str, port: int, error: SplitprotoError) -> SplitprotoError:
    """Name the cause of a failed connection by trying plain TCP once."""
    if not isinstance(error, LinkLost | DeadlineExceeded):
        return error
    try:
        async with asyncio.timeout(3):
            _, writer = await asyncio.open_connection(host, port)
        writer.close()
    except TimeoutError:
        return LinkLost(f"no answer from {host} port {port}: a firewall, or the wrong address")
    except ConnectionRefusedError:
        return LinkLost(f"nothing listens at {host} port {port}: is the coordinator running?")
    except OSError as cause:
        return LinkLost(f"cannot reach {host} port {port}: {cause.strerror or cause}")
    if isinstance(error, DeadlineExceeded):
        return DeadlineExceeded(
            f"{host} port {port} accepts connections but does not answer as a coordinator"
        )
    return LinkLost(
        f"{host} port {port} closes the connection at once: what listens there is not a coordinator, "
        "or something in between ends it"
    )


# --- listening -------------------------------------------------------------------------------------------


class _Link:
    """The carrier of one accepted link."""

    def __init__(
        self, listener: Listener, key: tuple[bytes, bytes], source: str, own: Identity, files: bytes
    ) -> None:
        self.listener = listener
        self.key = key
        self.source = source
        self.network = network_of(source)
        self.visitor: Visitor | None = None
        self.own, self.files = own, files  # the listener's, when this link began
        self.session: Session | None = None
        self.admitted = False

    def try_send(self, data: bytes) -> bool:
        return self.listener._try_send(self.key[0], data)

    def close(self) -> None:
        self.listener._forget(self)


class Listener:
    """A ROUTER that turns dialling peers into sessions.

    Use as an async context manager; `accept` hands out sessions that are already mutually admitted. A site may have
    several: which one counts is for the application to say (SP-9-6).

    Args:
        address: `tcp://interface:port` to bind.
        credentials: this side's certificate, key and CA; read again when a file was replaced.
        allow: which roles and sites may come.
        refused: told about everybody who was turned away, or cut off when the certificate no longer held.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        allow: AllowList,
        offer: Offer | None = None,
        *,
        timing: Timing | None = None,
        refused: Refused | None = None,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self._address = address
        self._credentials = credentials
        self._allow = allow
        self._offer = offer or Offer()
        self._timing = timing or Timing()
        self._refused = refused or (lambda source, error: log.warning("refused %s: %s", source, error))
        self._context = context or zmq.Context.instance()
        self._links: dict[tuple[bytes, bytes], _Link] = {}
        self._ready: deque[Session] = deque()
        self._arrived = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._asking: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._presented = Presented(credentials)
        self.address = address
        """Where it listens; with the port that the system chose if `address` said 0."""

    async def __aenter__(self) -> Listener:
        host, port = parse_address(self._address)
        self._loop = asyncio.get_running_loop()
        self._socket = self._context.socket(zmq.ROUTER)
        _common_options(self._socket, ZMTP_HANDSHAKE_MS)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
        # SP-5-14: with a ZAP domain libzmq speaks no ZMTP before 3, for which any bytes would do.
        self._socket.setsockopt(zmq.ZAP_DOMAIN, b"splitproto")
        self._monitor = watch(self._socket, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED, self._happened)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        try:
            self._socket.bind(_endpoint(host, port))
        except zmq.ZMQError as error:
            unwatch(self._socket, self._monitor)
            self._socket.close(linger=0)
            if error.errno == zmq.EADDRINUSE:
                raise LinkLost(
                    f"port {port} of {host} is in use: stop what listens there or choose another"
                ) from None
            if error.errno in (errno.ENODEV, errno.EADDRNOTAVAIL):
                raise LinkLost(
                    f"cannot listen on {self._address}: this machine has no such address or interface: "
                    f"use one of its own, or tcp://*:{port} for all"
                ) from None
            raise LinkLost(f"cannot listen on {self._address}: {error.strerror}") from None
        endpoint: bytes = self._socket.getsockopt(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
        self.address = (
            f"{self._address.rpartition(':')[0]}:{endpoint.decode().rstrip(chr(0)).rpartition(':')[2]}"
        )
        self._visitors = Visitors(int(self.address.rpartition(":")[2]), self._timing.handshake + 1.0)
        self._budget = HandshakeBudget(self._loop.time())
        # A connection is known before what it says is read: libzmq tells of it first.
        self._reader = Reader(self._socket, self._deliver, first=self._monitor.drain)
        self._vigil = Vigil(self._credentials, self._timing.recheck, self._tell)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving = True
        self._vigil.close()
        sessions = [link.session for link in self._links.values() if link.session is not None]
        await asyncio.gather(*(session.close("drain") for session in sessions))
        for timer in (self._asking, self._looking):
            if timer is not None:
                timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        unwatch(self._socket, self._monitor)
        self._visitors.close()
        self._reader.close(linger_ms=500)

    async def accept(self, timeout: float) -> Session:
        """The next admitted peer.

        Raises:
            DeadlineExceeded: nobody came in time.
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

    # --- inside -----------------------------------------------------------------------------------------

    def _deliver(self, parts: list[zmq.Frame]) -> None:
        visitor = self._visitors.spoke(_descriptor(parts[-1]), len(parts[-1]))
        if visitor is not None and visitor.refused:
            # It was told and goes on: no more work is done for it.
            self._visitors.shut(visitor)
            return
        route, data = parts[0].bytes, parts[1].buffer
        if len(parts) != 2:
            error = EnvelopeError("a ZeroMQ message of several parts")
            self._turn_away(route, envelope.NO_LINK, _source(parts[1]), visitor, error)
            if visitor is not None and not visitor.links:
                visitor.refused = True
            return
        key = (route, envelope.link_of(data))
        link = self._links.get(key)
        if link is not None and link.session is not None:
            if link.admitted or self._budget.take(link.network, len(data), self._loop.time()):
                link.session.arrived(data)
            else:
                self._evict(link, "too many bytes before admission")
            return
        source = _source(parts[1])
        try:
            arrived = envelope.decode(data)
        except LocalError as error:
            self._turn_away(route, key[1], source, visitor, error)
            return
        if arrived.kind is Kind.OPEN and arrived.sequence == 0:
            self._open(key, source, visitor, data)
        elif arrived.kind is Kind.DATA:
            # SP-5-9: ciphertext of an unknown link is answered so that the dialler starts again.
            self._reset(route, arrived.link, ResetReason.UNKNOWN_LINK, "")
            self._fault(source, visitor)

    def _open(self, key: tuple[bytes, bytes], source: str, visitor: Visitor | None, data: memoryview) -> None:
        if self._leaving:
            self._reset(key[0], key[1], ResetReason.BUSY, "shutting down")
            return
        # SP-5-12: what strangers may make this side do has a budget.
        if not self._budget.take(network_of(source), len(data), self._loop.time(), opens=True):
            self._tell(source, TooManyLinks("more handshakes than this listener does for one source"))
            self._reset(key[0], key[1], ResetReason.BUSY, "try again in a few seconds")
            self._fault(source, visitor)
            return
        try:
            own, files, tls = self._presented.now()
        except LocalError as error:
            self._tell(source, error)
            self._reset(key[0], key[1], ResetReason.BUSY, "the listener cannot use its certificate now")
            return
        connection = Connection(
            Side.COORDINATOR,
            key[1],
            tls,
            own.sha256,
            lambda peer: self._allow.check(peer, own.federation),
            self._offer,
            self._loop.time(),
            timing=self._timing,
        )
        link = self._links[key] = _Link(self, key, source, own, files)
        link.visitor = visitor
        link.session = Session(connection, link)
        link.session.address = source
        task = self._loop.create_task(self._admit(link, link.session))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        link.session.arrived(data)
        # SP-5-8: nothing is kept for more strangers than this; the newest comes last and is an honest one's chance.
        waiting = [other for other in self._links.values() if not other.admitted]
        if (oldest := one_too_many(waiting, lambda one: one.network)) is not None:
            self._evict(oldest, "too many links without an admitted peer: the oldest goes")

    def _evict(self, link: _Link, why: str) -> None:
        """End a link that is not admitted, at once."""
        session = link.session
        self._reset(*link.key, ResetReason.BUSY, "try again in a few seconds")
        self._forget(link)
        if session is not None:
            session.carrier_lost(TooManyLinks(why))

    async def _admit(self, link: _Link, session: Session) -> None:
        try:
            await session.established()
        except SplitprotoError as error:
            self._tell(link.source, error)
            return
        link.admitted = True
        self._budget.admitted(link.network)
        if link.visitor is not None:
            self._visitors.admitted(link.visitor)
        self._vigil.watch(session, link.own, link.files, link.source)
        self._ready = deque(waiting for waiting in self._ready if waiting.alive)
        self._ready.append(session)
        self._arrived.set()

    def _try_send(self, route: bytes, data: bytes) -> bool:
        if self._socket.closed:
            raise LinkLost("the listener is closed")
        try:
            self._socket.send_multipart((route, data), zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise LinkLost("the connection was lost") from None
            raise
        finally:
            # A send, also one that fails, may swallow the report that something arrived.
            self._reader.look()
        return True

    def _reset(self, route: bytes, link: bytes, reason: ResetReason, text: str) -> None:
        try:
            self._try_send(route, envelope.encode_reset(link, reason, text))
        except LinkLost:
            # Whoever it was has gone already.
            return

    def _turn_away(
        self, route: bytes, link: bytes, source: str, visitor: Visitor | None, error: LocalError
    ) -> None:
        self._tell(source, error)
        reason = (
            ResetReason.CARRIER_VERSION if isinstance(error, CarrierVersionError) else ResetReason.MALFORMED
        )
        self._reset(route, link, reason, f"splitproto: {error.reason}")
        self._fault(source, visitor)

    def _fault(self, source: str, visitor: Visitor | None) -> None:
        """A message came that belongs to no link: few are an accident, and work like an OPEN."""
        affordable = self._budget.take(network_of(source), 0, self._loop.time(), opens=True)
        if visitor is not None and not visitor.links:
            visitor.faults += 1
            visitor.refused = not affordable or visitor.faults >= MAX_FAULTS

    def _tell(self, source: str, error: SplitprotoError) -> None:
        try:
            self._refused(source, error.again())
        except Exception as defect:
            # The application's, so its loop hears of it; strangers are turned away all the same.
            self._loop.call_exception_handler(
                {"message": "a listener's callback `refused` failed", "exception": defect}
            )

    def _happened(self, event: int, descriptor: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            for source, error in self._visitors.came(descriptor, self._loop.time()):
                self._tell(source, error)
            if self._looking is None and not self._leaving:
                self._looking = self._loop.call_later(_LOOK, self._look)
            return
        visitor = self._visitors.went(descriptor)
        if visitor is not None and not visitor.read and not visitor.shut:
            self._tell(
                visitor.source,
                EnvelopeError(
                    "a connection ended before a message: not ZeroMQ, so another program, or a port scan"
                ),
            )
        if visitor is not None and not visitor.links:
            return
        # ROUTER_MANDATORY finds out whose link was lost. The monitor speaks before the socket itself has heard of
        # the loss, so ask once more.
        self._ask()
        if self._asking is None:
            self._asking = self._loop.call_later(_ASK_AGAIN, self._ask_again)

    def _look(self) -> None:
        self._looking = self._loop.call_later(_LOOK, self._look) if len(self._visitors) else None
        for source, error in self._visitors.look(self._loop.time()):
            self._tell(source, error)

    def _ask(self) -> None:
        for link in list(self._links.values()):
            if link.session is not None:
                link.session.probe()

    def _ask_again(self) -> None:
        self._asking = None
        self._ask()

    def _forget(self, link: _Link) -> None:
        if self._links.get(link.key) is not link:
            return
        del self._links[link.key]
        if link.admitted and link.visitor is not None:
            self._visitors.parted(link.visitor, self._loop.time())
        link.session = None


def _source(part: zmq.Frame) -> str:
    """The address that a part of a message came from."""
    try:
        return str(part.get("Peer-Address"))
    except zmq.ZMQError:
        return "an unknown address"


def _descriptor(part: zmq.Frame) -> int:
    """Of the connection that a part of a message came from; -1 if that is not known."""
    try:
        return int(part.get(zmq.SRCFD))
    except (zmq.ZMQError, ValueError):
        return -1
