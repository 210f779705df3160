"""The TCP connections at a listener's port, below ZeroMQ (SP-5-13).

libzmq accepts every connection, keeps a silent one forever, and assembles a message of any number
of parts before anybody above sees it, at 64 bytes of memory for an empty part of 2 bytes. It can be told none of
this, but it names the descriptor of each connection: the monitor when it comes and goes, a message when it arrives.
So a connection without an admitted link is shut down here when there are too many, when it has had its time, or
when libzmq holds more for it than it may; libzmq then finds it closed by its peer.

A descriptor's number may have been taken over by another file meanwhile, so it is duplicated first and compared.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from . import constants
from .admission import network_of, one_too_many
from .errors import DeadlineExceeded, LocalError, MessageTooLarge, TooManyLinks

LONGEST_MESSAGE = constants.ENVELOPE_HEADER + constants.MAX_ENVELOPE_BODY
QUEUE = 16
"""ZeroMQ messages queued per peer and direction: at most 16 MiB, usually 4."""
STRANGER_HOLDS = 2 * constants.MAX_HANDSHAKE_BYTES
"""Bytes that libzmq may hold for a connection without an admitted link: a whole handshake and its envelopes."""
PEER_HOLDS = (QUEUE + 2) * LONGEST_MESSAGE
"""For one with an admitted link: a full queue, the message that is being read and the one that arrives."""
MAX_FAULTS = 4
"""Messages without a link that one connection may send."""
_NONE = -1
"""No file has this inode."""
_RECEIVED = struct.Struct("=128xQ")
"""`tcpi_bytes_received` in Linux's `struct tcp_info`."""


@dataclass(eq=False, slots=True)
class Visitor:
    """One TCP connection."""

    number: int
    """Of its descriptor."""
    inode: int
    source: str
    since: float
    """When it came, or when its last admitted link ended."""
    links: int = 0
    """Admitted ones."""
    read: int = 0
    """Bytes that ZeroMQ has handed over, as they were on the wire."""
    faults: int = 0
    refused: bool = False
    """To be shut down at the next look: what was sent to it is on its way by then."""
    shut: bool = False
    network: str = field(init=False)

    def __post_init__(self) -> None:
        self.network = network_of(self.source)


class Visitors:
    """All connections at one listener's port.

    Args:
        port: of the listener; a descriptor that is anything else is left alone.
        patience: seconds that a connection may be without an admitted link.
    """

    def __init__(self, port: int, patience: float) -> None:
        self._port = port
        self._patience = patience
        self._all: dict[int, Visitor] = {}
        self._strangers: dict[Visitor, Visitor] = {}
        # Two descriptors of our own, so that looking needs no free one when strangers have taken all.
        self._nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._spare = os.dup(self._nothing)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def strangers(self) -> list[Visitor]:
        """Those without an admitted link, the oldest first."""
        return list(self._strangers.values())

    def close(self) -> None:
        self._all.clear()
        self._strangers.clear()
        os.close(self._spare)
        os.close(self._nothing)

    def came(self, number: int, now: float) -> list[tuple[str, LocalError]]:
        """A connection was accepted. Returns who had to go for it, and why."""
        inode, source = _NONE, "an unknown address"  # it has gone already, and its number is another's
        with suppress(OSError, IndexError), self._duplicate(number) as its:
            if its.getsockname()[1] == self._port:
                inode, source = os.fstat(self._spare).st_ino, str(its.getpeername()[0])
        visitor = self._all[number] = Visitor(number, inode, source, now)
        self._strangers[visitor] = visitor
        return self._thin_out()

    def went(self, number: int) -> Visitor | None:
        """A connection was closed."""
        visitor = self._all.pop(number, None)
        if visitor is not None:
            self._strangers.pop(visitor, None)
        return visitor

    def admitted(self, visitor: Visitor) -> None:
        """One of its links was admitted."""
        visitor.links += 1
        self._strangers.pop(visitor, None)

    def parted(self, visitor: Visitor, now: float) -> None:
        """One of its admitted links has ended."""
        visitor.links -= 1
        if not visitor.links and not visitor.shut and self._all.get(visitor.number) is visitor:
            visitor.since = now
            self._strangers[visitor] = visitor

    def spoke(self, number: int, octets: int) -> Visitor | None:
        """It sent a message of `octets`; whose it is, if that is known."""
        visitor = self._all.get(number)
        if visitor is not None:
            # ZMTP 3.1: one byte of flags and a length of one byte or eight.
            visitor.read += octets + (2 if octets < 256 else 9)
        return visitor

    def look(self, now: float) -> list[tuple[str, LocalError]]:
        """Shut down the connections that are over a limit. Returns which, and why."""
        told = []
        for visitor in self._all.values():
            if visitor.shut:
                continue
            if visitor.refused:
                self.shut(visitor)
            elif (error := self._judge(visitor, now)) is not None:
                self.shut(visitor)
                told.append((visitor.source, error))
        return told + self._thin_out()

    def shut(self, visitor: Visitor) -> None:
        """End a connection now: libzmq sees that it has ended, and closes it."""
        if visitor.shut:
            return
        visitor.refused = visitor.shut = True
        self._strangers.pop(visitor, None)
        try:
            with self._duplicate(visitor.number) as its:
                if os.fstat(self._spare).st_ino == visitor.inode:
                    its.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has gone already

    # --- inside -----------------------------------------------------------------------------------------

    def _judge(self, visitor: Visitor, now: float) -> LocalError | None:
        if not visitor.links and now - visitor.since >= self._patience:
            return DeadlineExceeded(f"a connection without an admitted link for {self._patience:g} s")
        may = PEER_HOLDS if visitor.links else STRANGER_HOLDS
        if (held := self._held(visitor)) > may:
            return MessageTooLarge(
                f"an unfinished ZeroMQ message: {held >> 10} KiB arrived and are no envelope, at most "
                f"{may >> 10} KiB are allowed"
            )
        return None

    def _thin_out(self) -> list[tuple[str, LocalError]]:
        told: list[tuple[str, LocalError]] = []
        while (victim := one_too_many(self.strangers, lambda one: one.network)) is not None:
            self.shut(victim)
            told.append(
                (
                    victim.source,
                    TooManyLinks("too many connections without an admitted link: the oldest goes"),
                )
            )
        return told

    def _held(self, visitor: Visitor) -> int:
        """Bytes that libzmq has taken from the connection and not handed over."""
        if sys.platform != "linux":
            return 0
        try:
            with self._duplicate(visitor.number) as its:
                if os.fstat(self._spare).st_ino != visitor.inode:
                    return 0
                (received,) = _RECEIVED.unpack(
                    its.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED.size)
                )
                waiting = bytearray(4)
                fcntl.ioctl(its.fileno(), termios.FIONREAD, waiting)
        except (OSError, struct.error):
            return 0
        return int(received) - int.from_bytes(waiting, sys.byteorder) - visitor.read

    @contextmanager
    def _duplicate(self, number: int) -> Iterator[socket.socket]:
        """Raises OSError: there is no such descriptor, or it is no socket."""
        os.dup2(number, self._spare, inheritable=False)
        try:
            its = socket.socket(fileno=self._spare)
            try:
                yield its
            finally:
                its.detach()
        finally:
            os.dup2(self._nothing, self._spare, inheritable=False)
