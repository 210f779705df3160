"""Frames: how messages share one TLS stream, so that a heartbeat never waits behind a tensor (SP-7).

     0     1       2        4            8             12
    +-----+-------+--------+------------+-------------+---------------------+
    |type | flags | zero   | stream u32 | length u32  | payload <= 256 KiB  |
    +-----+-------+--------+------------+-------------+---------------------+

A message is a stream: one HEAD frame with its msgpack map, then, if the head announces tensors, BODY frames
with one msgpack `bin` per tensor. END marks the last frame. Dialler streams are odd, listener streams even.
PING, PONG and CREDIT belong to stream 0 and carry one u64.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from .constants import FRAME_HEADER, MAX_FRAME_PAYLOAD
from .errors import FrameError

_HEADER = struct.Struct(">BBHII")
_U64 = struct.Struct(">Q")
END = 0x01
SCRATCH = 4096
"""Octets of the buffer for a frame that is no piece of a tensor; it grows for a longer one, which few links see."""


class FrameType(IntEnum):
    """The frame types of version 1."""

    HEAD = 1
    """The msgpack map of a message; always exactly one frame."""
    BODY = 2
    """A piece of a message's tensors."""
    CREDIT = 3
    """u64: the receiver takes that many more BODY octets."""
    PING = 4
    """u64 chosen by the sender."""
    PONG = 5
    """The u64 of the PING it answers."""


_ON_STREAM_ZERO = frozenset((FrameType.CREDIT, FrameType.PING, FrameType.PONG))


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """A checked frame header."""

    type: FrameType
    end: bool
    stream: int
    length: int


def encode_header(kind: FrameType, stream: int, length: int, *, end: bool = False) -> bytes:
    """The 12 octets before a payload of `length` octets."""
    return _HEADER.pack(kind, END if end else 0, 0, stream, length)


def encode_number(kind: FrameType, value: int) -> bytes:
    """A whole CREDIT, PING or PONG frame."""
    return encode_header(kind, 0, _U64.size) + _U64.pack(value)


def decode_number(payload: bytes | bytearray | memoryview) -> int:
    """The u64 of a CREDIT, PING or PONG."""
    value: int = _U64.unpack(payload)[0]
    return value


def decode_header(data: bytes | bytearray | memoryview) -> FrameHeader:
    """Check 12 octets.

    Raises:
        FrameError: unknown type or flag, reserved bits, wrong stream, or a length beyond the limit.
    """
    kind, flags, reserved, stream, length = _HEADER.unpack(data)
    if kind not in FrameType._value2member_map_:
        raise FrameError(f"an unknown frame type {kind}")
    if reserved or flags & ~END:
        raise FrameError("a frame with reserved bits set")
    # SP-7-3: "A receiver MUST check the length before it takes memory."
    if length > MAX_FRAME_PAYLOAD:
        raise FrameError(f"a frame of {length} octets, at most {MAX_FRAME_PAYLOAD} are allowed")
    if kind in _ON_STREAM_ZERO:
        if stream or flags or length != _U64.size:
            raise FrameError("a control frame is 8 octets on stream 0 without flags")
    elif stream == 0:
        raise FrameError("a message on stream 0, which belongs to control frames")
    if kind == FrameType.HEAD and length == 0:
        raise FrameError("a HEAD without a message")
    return FrameHeader(FrameType(kind), bool(flags & END), stream, length)


def cut(
    segments: Sequence[memoryview], limit: int = MAX_FRAME_PAYLOAD
) -> Iterator[tuple[list[memoryview], int, bool]]:
    """Cut a body into payloads of at most `limit` octets without copying: (pieces, octets, last?)."""
    left = sum(len(segment) for segment in segments)
    pieces: list[memoryview] = []
    room = limit
    for segment in segments:
        while len(segment):
            piece, segment = segment[:room], segment[room:]
            pieces.append(piece)
            room -= len(piece)
            left -= len(piece)
            if room == 0 or left == 0:
                yield pieces, limit - room, left == 0
                pieces, room = [], limit


class Inbox:
    """Where the octets of one frame stream go next: a header, then a payload, over and over.

    The caller fills `buffer()` and reports how much with `filled()`; payloads of BODY frames land in the
    tensors themselves, without another copy.
    """

    def __init__(self) -> None:
        self._head = bytearray(FRAME_HEADER)
        self._small = bytearray()  # not needed before the peer is authenticated
        self._view = memoryview(self._head)
        self.header: FrameHeader | None = None

    def buffer(self) -> memoryview:
        """Where the next octets belong; never empty."""
        return self._view

    def filled(self, count: int) -> bool:
        """Record that `count` octets were written; True when the buffer given out is full."""
        self._view = self._view[count:]
        return not len(self._view)

    def take_header(self) -> FrameHeader:
        """Check the header just completed.

        Raises:
            FrameError: as `decode_header`.
        """
        self.header = decode_header(self._head)
        return self.header

    def payload_into(self, target: memoryview) -> None:
        """The payload's next octets go to `target`."""
        self._view = target

    def payload_small(self, length: int) -> memoryview:
        """The payload goes to the scratch buffer; returns the view that will hold it."""
        if len(self._small) < length:
            self._small = bytearray(max(length, SCRATCH))
        self._view = memoryview(self._small)[:length]
        return self._view

    def next_frame(self) -> None:
        """Expect a header again."""
        self.header = None
        self._view = memoryview(self._head)
