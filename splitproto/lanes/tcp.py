"""The TCP connections at a ZeroMQ lane's port, below ZeroMQ (SP-5-13).

libzmq accepts every connection, keeps a silent one forever, and assembles a message of any number
of parts before anybody above sees it, at 64 bytes of memory for an empty part of 2 bytes. It can be told none of
this, but it names the descriptor of each connection: the monitor when it comes and goes, a message when it arrives.
So a connection that has to go is shut down here; libzmq then finds it closed by its peer.

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

from splitproto import constants
from splitproto.errors import LocalError, MessageTooLarge

from .base import Visitor

LONGEST_MESSAGE = constants.ENVELOPE_HEADER + constants.MAX_ENVELOPE_BODY
QUEUE = 4
"""ZeroMQ messages queued per peer and direction, at most 4 MiB: a small message waits for what is queued here."""
STRANGER_HOLDS = 2 * constants.MAX_HANDSHAKE_BYTES
"""Bytes that libzmq may hold for a connection without an admitted link: a whole handshake and its envelopes."""
PEER_HOLDS = (QUEUE + 3) * LONGEST_MESSAGE
"""For one with an admitted link: a full queue, the message that is being read, the one that arrives, and ZMTP's own."""
_NONE = -1
"""No file has this inode."""
_RECEIVED = struct.Struct("=128xQ")
"""`tcpi_bytes_received` in Linux's `struct tcp_info`."""


@dataclass(eq=False, slots=True)
class TcpVisitor(Visitor):
    """One TCP connection."""

    port: Port
    number: int
    """Number of its descriptor."""
    inode: int
    read: int = field(default=0, init=False)
    """Bytes that ZeroMQ has handed over, as they were on the wire."""

    def hang_up(self) -> None:
        self.port.shut(self)

    def excess(self) -> LocalError | None:
        may = PEER_HOLDS if self.links else STRANGER_HOLDS
        if (held := self.port.held(self)) > may:
            return MessageTooLarge(
                f"an unfinished ZeroMQ message: {held >> 10} KiB arrived and are not an envelope, at most "
                f"{may >> 10} KiB are allowed"
            )
        return None


class Port:
    """The connections at one port.

    Args:
        number: of the port; a descriptor that is anything else is left alone.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._all: dict[int, TcpVisitor] = {}
        # Two descriptors of our own, so that looking needs no free one when strangers have taken all.
        self._nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._spare = os.dup(self._nothing)
        except OSError:
            os.close(self._nothing)
            raise

    def close(self) -> None:
        """Forget all connections; they are not ended."""
        self._all.clear()
        os.close(self._spare)
        os.close(self._nothing)

    def came(self, number: int, now: float) -> TcpVisitor:
        """A connection was accepted on the descriptor `number`."""
        inode, source = _NONE, "an unknown address"  # it has gone already, and its number is another's
        with suppress(OSError, IndexError), self._duplicate(number) as its:
            if its.getsockname()[1] == self._number:
                inode, source = os.fstat(self._spare).st_ino, str(its.getpeername()[0])
        visitor = self._all[number] = TcpVisitor(source, now, self, number, inode)
        return visitor

    def left(self, number: int) -> TcpVisitor | None:
        """A connection was closed."""
        return self._all.pop(number, None)

    def spoke(self, number: int, octets: int) -> TcpVisitor | None:
        """It sent a message of `octets`; whose it is, if that is known."""
        visitor = self._all.get(number)
        if visitor is not None and visitor.refused and not self._holds(visitor):
            # It is gone, and its number another connection's, of which the monitor has not told yet.
            return None
        if visitor is not None:
            # ZMTP 3.1: one byte of flags and a length of one byte or eight.
            visitor.read += octets + (2 if octets < 256 else 9)
        return visitor

    def shut(self, visitor: TcpVisitor) -> None:
        """End a connection: libzmq sees that it has ended, and closes it."""
        try:
            with self._duplicate(visitor.number) as its:
                if os.fstat(self._spare).st_ino == visitor.inode:
                    its.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has gone already

    def held(self, visitor: TcpVisitor) -> int:
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

    # --- inside -----------------------------------------------------------------------------------------

    def _holds(self, visitor: TcpVisitor) -> bool:
        """Whether the visitor's descriptor is its own still."""
        try:
            return os.fstat(visitor.number).st_ino == visitor.inode
        except OSError:
            return True  # closed, and nobody else's

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
