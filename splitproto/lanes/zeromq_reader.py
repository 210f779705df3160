"""Reads a ZeroMQ socket on the event loop, in turns of bounded work (SP-5-11).

libzmq hands over a message only once it has all its parts, and then all of them at once: a peer may send millions
of empty ones. So they are taken one by one, the first `KEPT` are kept, and the loop gets its turn in between. The
descriptor is edge-triggered: it does not report again what is already waiting.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

log = logging.getLogger(__name__)

KEPT = 3
"""Parts of one message that are kept: one more than any valid message has, so that its reader sees the excess."""
MESSAGES_A_TURN, PARTS_A_TURN, BYTES_A_TURN = 32, 256, 1 << 20
"""Read before others on the loop get a turn: an answer waits no longer than it takes to decrypt about a MiB."""
MONITOR_QUEUE = 100_000
"""Parts of reports that may wait, two to a report, 64 bytes each; libzmq adds 1,000 of its own."""


class Reader:
    """Calls back for every message of a ZeroMQ socket, on the event loop.

    Args:
        socket: not read by anything else.
        deliver: told the parts of each message, at most `KEPT`. Whatever it raises is logged, once for each kind,
            and never reaches the loop.
        first: called before each turn.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        deliver: Callable[[list[zmq.Frame]], None],
        first: Callable[[], None] = lambda: None,
    ) -> None:
        self.socket = socket
        self._deliver, self._first = deliver, first
        self._parts: list[zmq.Frame] = []
        self._defects: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._fd: int = socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        self._scheduled = False
        self._loop.add_reader(self._fd, self._read)
        self.look()

    def look(self) -> None:
        """Read soon, whatever the file descriptor says."""
        # Asking for EVENTS first would be cheaper, but makes libzmq throw away what a lost connection left.
        if not self._scheduled and not self.socket.closed:
            self._scheduled = True
            self._loop.call_soon(self._read)

    def close(self, linger_ms: int = 0) -> None:
        """Read no more and close the socket; what was sent has `linger_ms` milliseconds to go out. Idempotent."""
        if not self.socket.closed:
            self._loop.remove_reader(self._fd)
            self.socket.close(linger=linger_ms)
            # No reference cycle outlives a link: with its TLS state it would wait for a full garbage collection.
            del self._deliver, self._first

    def drain(self) -> None:
        """Read all that waits now; for sockets that strangers cannot fill."""
        while not self.socket.closed and self._take(PARTS_A_TURN, PARTS_A_TURN):
            pass

    def discard(self) -> None:
        """Throw away all that waits now."""
        while not self.socket.closed:
            try:
                self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return

    def _read(self) -> None:
        self._scheduled = False
        if self.socket.closed:
            return
        self._first()
        if self._take(MESSAGES_A_TURN, PARTS_A_TURN):
            self.look()

    def _take(self, messages: int, parts: int) -> bool:
        """Read so many; whether there may be more."""
        octets = 0
        for _ in range(parts):
            if self.socket.closed:
                return False
            try:
                part = self.socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            if len(self._parts) < KEPT:
                self._parts.append(part)
            octets += len(part)
            if part.more:
                continue
            self._hand_over()
            messages -= 1
            if not messages or octets >= BYTES_A_TURN:
                break
        return True

    def _hand_over(self) -> None:
        parts, self._parts = self._parts, []
        try:
            self._deliver(parts)
        except Exception as error:
            # A stranger may be able to cause it again and again: the log gets it once.
            if repr(error) not in self._defects and len(self._defects) < MESSAGES_A_TURN:
                self._defects.add(repr(error))
                log.exception("a message could not be handled; this is a defect, please report it")


def watch(socket: zmq.Socket[bytes], events: int, report: Callable[[int, int], None]) -> Reader:
    """Report the events of a socket's monitor, each with its value."""

    def deliver(parts: list[zmq.Frame]) -> None:
        happened = parse_monitor_message([part.bytes for part in parts])
        report(int(happened["event"]), int(happened["value"]))

    address = f"inproc://splitproto.monitor.{socket.getsockopt(zmq.FD)!s}"
    socket.monitor(address, events)
    monitor: zmq.Socket[bytes] = socket.context.socket(zmq.PAIR)
    monitor.set(zmq.RCVHWM, MONITOR_QUEUE)
    monitor.connect(address)
    return Reader(monitor, deliver)


def unwatch(socket: zmq.Socket[bytes], monitor: Reader) -> None:
    """End the reports.

    libzmq's only I/O thread holds a lock while it waits for room in a full queue of reports, or for ever if nobody
    holds its other end. `disable_monitor` waits for that lock, and pyzmq keeps Python's own meanwhile, so that no
    other thread could make room. So: nobody new, an empty queue with room for a flood, and only then the end.
    """
    monitor.discard()
    socket.disable_monitor()
    monitor.close()
