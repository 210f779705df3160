"""The envelope: what one ZeroMQ message carries, unencrypted, and no version may change (SP-4).

     0        4  5  6     8                        24               32
    +--------+--+--+-----+------------------------+----------------+------------------+
    | "SPLT" |v |k | 0 0 | link id (16 octets)    | sequence (u64) | body <= 1 MiB    |
    +--------+--+--+-----+------------------------+----------------+------------------+

`v` carrier version, `k` kind. Numbers are big-endian. OPEN and DATA carry TLS bytes; RESET carries one
octet of reason, one octet n, n octets of supported carrier versions, then UTF-8 text for people.
A RESET is not authenticated, so it can only make its receiver dial again.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from .constants import (
    CARRIER_VERSION,
    ENVELOPE_HEADER,
    LINK_ID_BYTES,
    MAGIC,
    MAX_ENVELOPE_BODY,
    MAX_RESET_TEXT,
)
from .errors import CarrierVersionError, EnvelopeError, printable

_HEADER = struct.Struct(">4sBBH16sQ")
NO_LINK = bytes(LINK_ID_BYTES)


class Kind(IntEnum):
    """What an envelope is for."""

    OPEN = 1
    """The dialler's first: a new link id and the ClientHello."""
    DATA = 2
    """TLS bytes of a known link."""
    RESET = 3
    """The sender knows no such link, or refuses to have it."""


class ResetReason(IntEnum):
    """Why a link was reset."""

    UNKNOWN_LINK = 1
    CARRIER_VERSION = 2
    MALFORMED = 3
    BUSY = 4
    SEQUENCE = 5


@dataclass(frozen=True, slots=True)
class Envelope:
    """One ZeroMQ message, decoded."""

    kind: Kind
    link: bytes
    """16 octets, chosen at random by the dialler, new for every TLS session."""
    sequence: int
    """Per direction, from 0, no gaps."""
    body: memoryview


@dataclass(frozen=True, slots=True)
class Reset:
    """The body of a RESET."""

    reason: ResetReason | int
    versions: tuple[int, ...]
    text: str


def encode_header(kind: Kind, link: bytes, sequence: int) -> bytes:
    """The 32 octets before the body."""
    return _HEADER.pack(MAGIC, CARRIER_VERSION, kind, 0, link, sequence)


def encode(kind: Kind, link: bytes, sequence: int, body: bytes | bytearray | memoryview = b"") -> bytes:
    """The octets of one envelope."""
    if len(body) > MAX_ENVELOPE_BODY:
        raise EnvelopeError(f"an envelope holds at most {MAX_ENVELOPE_BODY} octets, not {len(body)}")
    return b"".join((encode_header(kind, link, sequence), body))


def decode(data: bytes | bytearray | memoryview) -> Envelope:
    """Read one ZeroMQ message.

    Raises:
        EnvelopeError: not an envelope.
        CarrierVersionError: an envelope of another version (a RESET is readable in any version).
    """
    view = memoryview(data)
    if len(view) < ENVELOPE_HEADER or view[:4] != MAGIC:
        raise EnvelopeError("these bytes are not splitproto: another program is talking to this port")
    _, version, kind, reserved, link, sequence = _HEADER.unpack_from(view)
    body = view[ENVELOPE_HEADER:]
    if len(body) > MAX_ENVELOPE_BODY:
        raise EnvelopeError(f"an envelope of {len(body)} octets, at most {MAX_ENVELOPE_BODY} are allowed")
    # SP-4-4: "A RESET keeps its form in every version", so it is read before the version is judged.
    if kind == Kind.RESET:
        return Envelope(Kind.RESET, link, sequence, body)
    if version != CARRIER_VERSION:
        raise CarrierVersionError(f"the peer uses carrier version {version}, this side {CARRIER_VERSION}")
    if kind not in (Kind.OPEN, Kind.DATA) or reserved or link == NO_LINK:
        raise EnvelopeError("an envelope with an unknown kind, reserved bits or no link id")
    return Envelope(Kind(kind), link, sequence, body)


def link_of(data: bytes | bytearray | memoryview) -> bytes:
    """The link id of an envelope of any version, or `NO_LINK` if there is none."""
    view = memoryview(data)
    return bytes(view[8:24]) if len(view) >= ENVELOPE_HEADER and view[:4] == MAGIC else NO_LINK


def encode_reset(link: bytes, reason: ResetReason, text: str) -> bytes:
    """A RESET for `link`; `text` is one line for people."""
    said = text.encode()[:MAX_RESET_TEXT].decode(errors="ignore").encode()
    return encode(Kind.RESET, link, 0, bytes((reason, 1, CARRIER_VERSION)) + said)


def decode_reset(body: memoryview) -> Reset:
    """Read the body of a RESET.

    Raises:
        EnvelopeError: too short or too long.
    """
    if len(body) < 2 or len(body) < 2 + body[1] or len(body) > 2 + body[1] + MAX_RESET_TEXT:
        raise EnvelopeError("a RESET without its reason")
    reason, count = body[0], body[1]
    text = bytes(body[2 + count :]).decode(errors="replace")
    known = ResetReason(reason) if reason in ResetReason._value2member_map_ else reason
    return Reset(known, tuple(body[2 : 2 + count]), printable(text))
