"""The contents of a capture: its limits, its errors, and the envelope of each kind of record (spec/capture.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from . import codec, records
from .constants import MAX_FRAME_PAYLOAD
from .errors import CodecError, SplitprotoError
from .fields import (
    Bool,
    Extensions,
    Int,
    ListOf,
    Octets,
    OctetsUpTo,
    Real,
    Record,
    Text,
    read_map,
    wire,
    write_map,
)
from .messages import DIGEST
from .records import Job, Seat

# --- limits (SP-C): checked before memory is taken ---------------------------------------------------------
MAGIC = b"SPLTCAP3"
"""The eighth octet is the version of the format."""
FORMER_MAGIC = b"SPLTCAP2"
"""Files of this version are read, and no longer written."""
PREFIX = 12
"""Octets of the two lengths."""
CHAIN = 32
MAX_ENVELOPE = 1 << 20
"""A message's head is at most 256 KiB; a header names at most 1024 peers."""
MAX_BODY = 1 << 40
"""256 tensors of 4 GiB: the longest body of a message."""
MAX_BLOCK = 1 << 16
"""Padding of a record is shorter than this."""
KEY_BYTES = 32
SALT_BYTES = 32
TAG_BYTES = 16
"""What sealing adds to an envelope and to a body that is not empty."""

END_REASONS = ("closed", "rotated", "size", "disk", "failed")
GAP_REASONS = ("queue", "early")
ENCRYPTIONS = ("none", "aes-256-gcm")


class CaptureError(SplitprotoError):
    """A capture that cannot be read. One line; never on the wire."""

    name = "capture"


class CaptureTruncated(CaptureError):
    """The file ends within a record; everything before that record is good."""

    name = "capture-truncated"


class CaptureTampered(CaptureError):
    """Octets that no recorder wrote: a damaged, edited or hostile file."""

    name = "capture-tampered"


class CaptureVersion(CaptureError):
    """Not a capture, or one of a version that is not known here."""

    name = "capture-version"


class CaptureKeyNeeded(CaptureError):
    """The capture is encrypted: a key is missing, or another one fits."""

    name = "capture-key"


# --- envelopes -----------------------------------------------------------------------------------------------


SITE = Text(63)
DEFENCES = ListOf(Text(500), 64)
SEATS = ListOf(Record(Seat), records.MOST_SEATS)


@dataclass(frozen=True, slots=True)
class Party:
    """A peer of the recorder, and what it said of itself."""

    site: str = wire(SITE)
    seats: tuple[Seat, ...] = wire(SEATS, default=())
    """Those that it fills, as it was offered them; none of a coordinator."""
    defences: tuple[str, ...] = wire(DEFENCES, default=())
    """What it says it applies to what it sends."""
    recorded: bool | None = wire(Bool(), default=None)
    """Whether it says that it records; absent: it did not say."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which batches were kept."""

    every: int = wire(Int(1), default=1)
    """Keep the training steps 1, 1 + every, 1 + 2 every, ..."""
    keys: tuple[str, ...] = wire(ListOf(Text(32), 1024), default=())
    """Hexadecimal beginnings of pseudonyms; a batch is kept if a sample begins with one. Empty: all batches."""


@dataclass(frozen=True, slots=True)
class Header:
    """Record 0: who recorded what. Never encrypted; it names no patient."""

    kind: ClassVar[str] = "header"
    role: str = wire(Text(32))
    """The recorder's role: client or coordinator."""
    site: str = wire(SITE)
    federation: str = wire(Text(255))
    agent: str = wire(Text(128))
    """Software and version."""
    created: float = wire(Real())
    """Seconds since 1970, UTC."""
    run: bytes | None = wire(Octets(16), default=None)
    seats: tuple[Seat, ...] = wire(SEATS, default=())
    """The recorder's, as they were offered; none of a coordinator."""
    job: Job | None = wire(Record(Job), default=None)
    schema: bytes | None = wire(DIGEST, default=None)
    """Digest of the cut layer's descriptors for one batch."""
    peers: tuple[Party, ...] = wire(ListOf(Record(Party), 1024), default=())
    defences: tuple[str, ...] = wire(DEFENCES, default=())
    """What the recorder applies to what it sends."""
    features: tuple[str, ...] = wire(ListOf(Text(64), 64), default=())
    sampling: Sampling = wire(Record(Sampling), default=Sampling())
    part: int = wire(Int(0, 1 << 20), default=0)
    """Number of this file among those of one capture."""
    previous: bytes | None = wire(DIGEST, default=None)
    """Last chain of the part before; absent in part 0."""
    encryption: str = wire(Text(16, ENCRYPTIONS), default="none")
    salt: bytes | None = wire(Octets(SALT_BYTES), default=None)
    check: bytes | None = wire(Octets(16), default=None)
    """Tells a wrong key from damage."""
    extensions: dict[str, Any] | None = wire(Extensions(), default=None)
    block: int = wire(Int(1, MAX_BLOCK), default=1)
    """Every record ends at a multiple of this many octets."""

    def __post_init__(self) -> None:
        sealed = self.encryption != "none"
        if (self.salt is not None, self.check is not None) != (sealed, sealed):
            raise CodecError("a header has salt and check exactly if it is of an encrypted capture")
        if (self.part > 0) != (self.previous is not None):
            raise CodecError("a header names the chain of the previous part exactly if there is one")


@dataclass(frozen=True, slots=True)
class Said:
    """The envelope of a message."""

    kind: ClassVar[str] = "message"
    n: int = wire(Int(1))
    time: float = wire(Real())
    peer: str = wire(SITE)
    direction: str = wire(Text(3, ("in", "out")))
    head: bytes = wire(OctetsUpTo(MAX_FRAME_PAYLOAD))


@dataclass(frozen=True, slots=True)
class Gap:
    """Messages passed here that were not kept; those that the sampling leaves out are no gap."""

    kind: ClassVar[str] = "gap"
    n: int = wire(Int(1))
    time: float = wire(Real())
    reason: str = wire(Text(16, GAP_REASONS))
    """queue: the disk was slower than the wire; early: too much came before the header was known."""
    records: int = wire(Int(1))
    octets: int = wire(Int())


@dataclass(frozen=True, slots=True)
class End:
    """The last record of a file that was closed in good order."""

    kind: ClassVar[str] = "end"
    n: int = wire(Int(1))
    time: float = wire(Real())
    reason: str = wire(Text(16, END_REASONS))
    messages: int = wire(Int())
    """Message records in this file."""
    lost: int = wire(Int())
    """Messages that the gaps of this file stand for."""
    text: str = wire(Text(500), default="")
    """One line for people."""


Envelope = Header | Said | Gap | End
KINDS: dict[str, type[Envelope]] = {c.kind: c for c in (Header, Said, Gap, End)}


def pack(envelope: Envelope) -> bytes:
    """The octets of one envelope.

    Raises:
        CodecError: a field that the format does not carry.
    """
    octets = codec.encode({"kind": envelope.kind, **write_map(envelope, envelope.kind)})
    if len(octets) > MAX_ENVELOPE - TAG_BYTES:
        raise CodecError(f"a {envelope.kind} longer than an envelope may be")
    return octets


def unpack(octets: memoryview, magic: bytes = MAGIC) -> Envelope:
    """Check and read one envelope of a file that begins with `magic`.

    Raises:
        CodecError: not an envelope of that version.
    """
    value = codec.decode(octets)
    if type(value) is not dict or type(value.get("kind")) is not str:
        raise CodecError("an envelope without a kind")
    kind = value.pop("kind")
    if kind not in KINDS:
        raise CodecError(f"an unknown kind of record, {kind[:40]!r}")
    # SP-C-22: "its header has no `block`".
    if magic == FORMER_MAGIC and "block" in value:
        raise CodecError("the field block, which this version of the format does not have")
    return KINDS[kind](**read_map(KINDS[kind], value, kind))
