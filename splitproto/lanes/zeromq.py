"""The ZeroMQ lane: a ROUTER that listens, a DEALER for each dialled link (SP-5).

ZeroMQ hides what TLS must know, so: one DEALER per link and no automatic reconnect (a TLS session never
outlives its connection); the socket monitor reports a lost connection at once; ROUTER_MANDATORY turns silent
drops into errors; routing ids are libzmq's own and mean nothing, the certificate alone is identity; sends never
block, so one stalled peer cannot hold up the others. Sockets are read on the event loop through their
file descriptor (`zeromq_reader`), which is edge-triggered: after every send the queue is looked at again.
"""

from __future__ import annotations

import asyncio
import errno

import zmq

from splitproto import constants
from splitproto.errors import BindFailed, EnvelopeError, LinkLost

from .addresses import format_address, parse_address
from .base import Caller, Dialled, Lane, Reception
from .tcp import LONGEST_MESSAGE, QUEUE, Port
from .zeromq_reader import Reader, unwatch, watch

Context = zmq.Context[zmq.Socket[bytes]]

ZMTP_HANDSHAKE_MS = 1000
"""A connection that is not ZeroMQ is dropped after this."""
_ASK_AGAIN = 0.1
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def _common_options(socket: zmq.Socket[bytes], handshake_ms: int) -> None:
    socket.set_hwm(QUEUE)
    socket.linger = 0
    socket.setsockopt(zmq.MAXMSGSIZE, LONGEST_MESSAGE)
    socket.setsockopt(zmq.HANDSHAKE_IVL, handshake_ms)
    # The kernel's timers detect a vanished machine. ZeroMQ's heartbeats could not: if a peer floods a full
    # queue and hangs up, libzmq's next beat aborts the process (zeromq/libzmq#4364).
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, int(2 * constants.HEARTBEAT_INTERVAL))
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, int(constants.HEARTBEAT_INTERVAL))
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 2)
    socket.setsockopt(zmq.TCP_MAXRT, int(constants.PEER_TIMEOUT * 1000))


class Dealer(Dialled):
    """The dialling end of one link.

    Args:
        address: `tcp://host:port` with a numeric host.
    """

    def __init__(self, address: str, context: Context | None = None) -> None:
        self._address = address
        self._socket = (context or zmq.Context.instance()).socket(zmq.DEALER)
        _common_options(self._socket, int(constants.HANDSHAKE_TIMEOUT * 1000))
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.IPV6, 1)
        # SP-5-6: "A link MUST NOT outlive its connection": libzmq may not reconnect behind our back.
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._caller: Caller | None = None
        self._monitor = watch(self._socket, _LOST | _FAILED, self._happened)
        self._reader: Reader | None = None

    def start(self, caller: Caller) -> None:
        self._caller = caller
        self._reader = Reader(self._socket, self._deliver)
        try:
            self._socket.connect(self._address)
        except zmq.ZMQError as error:
            caller.carrier_lost(LinkLost(f"cannot dial {self._address}: {error.strerror}"))

    def try_send(self, data: bytes) -> bool:
        if self._socket.closed:
            raise LinkLost("the socket is closed")
        try:
            # Copied: pyzmq's way without a copy wakes a thread of its own for every message, which costs more.
            self._socket.send(data, zmq.NOBLOCK)
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
        self._caller = None

    # --- inside -----------------------------------------------------------------------------------------

    def _deliver(self, frames: list[zmq.Frame]) -> None:
        if self._caller is not None and len(frames) == 1:
            self._caller.arrived(frames[0].buffer)

    def _happened(self, event: int, value: int) -> None:
        if self._caller is None:
            return
        # A connection that breaks so early says nothing about what listens there.
        if event & _FAILED and value not in (errno.ECONNRESET, errno.EPIPE):
            self._caller.carrier_lost(
                EnvelopeError(
                    f"what answers at {self._address} is not ZeroMQ: is this the coordinator's port?"
                )
            )
        elif self._reader is not None:
            # What has already arrived (an error, an alert) explains the loss better than the loss itself.
            self._reader.drain()
            if self._caller is not None:
                asyncio.get_running_loop().call_soon(
                    self._caller.carrier_lost, LinkLost("the connection was lost")
                )


class ZmqLane(Lane):
    """A ROUTER at one port.

    Args:
        address: `tcp://interface:port` to bind; `*` for all interfaces, port 0 for one that the system chooses.
    """

    def __init__(self, address: str, context: Context | None = None) -> None:
        self._address = address
        self._context = context or zmq.Context.instance()
        self._asking: asyncio.TimerHandle | None = None

    @property
    def address(self) -> str:
        """Where it listens; after `listen` with the port that the system chose if `address` said 0."""
        return self._address

    async def listen(self, reception: Reception) -> None:
        host, port = parse_address(self.address)
        self._loop = asyncio.get_running_loop()
        self._reception = reception
        self._socket = self._context.socket(zmq.ROUTER)
        _common_options(self._socket, ZMTP_HANDSHAKE_MS)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
        # SP-5-14: with a ZAP domain libzmq speaks no ZMTP before 3, for which any bytes would do.
        self._socket.setsockopt(zmq.ZAP_DOMAIN, b"splitproto")
        self._monitor = watch(self._socket, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED, self._happened)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        try:
            self._socket.bind(format_address(host, port))
        except zmq.ZMQError as error:
            unwatch(self._socket, self._monitor)
            self._socket.close(linger=0)
            raise BindFailed(_why_not_bound(error, self.address, host, port)) from None
        try:
            self._read_port()
        except BaseException:
            # For example, the process may open no more descriptors.
            unwatch(self._socket, self._monitor)
            self._socket.close(linger=0)
            raise

    def reply(self, route: bytes, data: bytes) -> bool:
        if self._socket.closed:
            raise LinkLost("the listener is closed")
        try:
            self._socket.send_multipart((route, data), zmq.NOBLOCK)
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

    def leave(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        self._socket.unbind(self._endpoint)  # nobody new is reported while we leave
        unwatch(self._socket, self._monitor)
        self._port.close()
        self._reader.close(linger_ms=500)

    # --- inside -----------------------------------------------------------------------------------------

    def _read_port(self) -> None:
        endpoint: bytes = self._socket.getsockopt(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
        self._endpoint = endpoint.decode().rstrip("\0")
        bound = int(self._endpoint.rpartition(":")[2])
        self._port = Port(bound)
        # A connection is known before what it says is read: libzmq reports it first.
        self._reader = Reader(self._socket, self._deliver, first=self._monitor.drain)
        self._address = f"{self._address.rpartition(':')[0]}:{bound}"

    def _deliver(self, parts: list[zmq.Frame]) -> None:
        visitor = self._port.spoke(_descriptor(parts[-1]), len(parts[-1]))
        route, source = parts[0].bytes, _source(parts[1])
        if len(parts) == 2:
            self._reception.arrived(self, route, parts[1].buffer, source, visitor)
        else:
            error = EnvelopeError("a ZeroMQ message of several parts")
            self._reception.malformed(self, route, source, visitor, error)

    def _happened(self, event: int, descriptor: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._gone(descriptor)  # had it not been reported: the number is a new connection's now
            self._reception.came(self._port.came(descriptor, self._loop.time()))
        else:
            self._gone(descriptor, reported=True)

    def _gone(self, descriptor: int, *, reported: bool = False) -> None:
        visitor = self._port.left(descriptor)
        if visitor is not None:
            self._reception.left(visitor)
            if not visitor.read and not visitor.ended:
                self._reception.tell(
                    visitor.source,
                    EnvelopeError(
                        "a connection ended before a message: not ZeroMQ, so another program, or a port scan"
                    ),
                )
        if (visitor is None and reported) or (visitor is not None and visitor.links):
            # ROUTER_MANDATORY finds out whose link was lost. The monitor may report before the socket itself knows
            # of the loss, so ask once more.
            self._reception.doubtful(self)
            if self._asking is None:
                self._asking = self._loop.call_later(_ASK_AGAIN, self._ask_again)

    def _ask_again(self) -> None:
        self._asking = None
        self._reception.doubtful(self)


def _why_not_bound(error: zmq.ZMQError, address: str, host: str, port: int) -> str:
    if error.errno == zmq.EADDRINUSE:
        return f"port {port} of {host} is in use: stop what listens there or choose another"
    if error.errno in (errno.ENODEV, errno.EADDRNOTAVAIL):
        return (
            f"cannot listen on {address}: this machine has no such address or interface: "
            f"use one of its own, or tcp://*:{port} for all"
        )
    return f"cannot listen on {address}: {error.strerror}"


def _source(part: zmq.Frame) -> str:
    """The address that a part of a message came from."""
    try:
        return str(part.get("Peer-Address"))
    except zmq.ZMQError:
        return "an unknown address"


def _descriptor(part: zmq.Frame) -> int:
    """Descriptor of the connection that a part of a message came from; -1 if unknown."""
    try:
        return int(part.get(zmq.SRCFD))
    except (zmq.ZMQError, ValueError):
        return -1
