"""A capture: what one peer sent and received, as octets of a file (spec/capture.md). No files, no clock here.

    SPLTCAP3 | header record | record | record | ...
    record = u32 envelope length | u64 body length | envelope | body | padding | chain (32 octets)

An envelope is one strict msgpack map whose `kind` says what it is; a message's body is the body of the wire.
`chain` is BLAKE3 over the former chain and this record, so that damage and edits show. With encryption,
envelope and body of every record but the header are sealed, each by itself; the chain runs over what is in
the file and can be checked without the key. Files of version 2 are read too: their chain is SHA-256, and
they have no padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from . import codec, messages
from .capture_records import (
    CHAIN,
    FORMER_MAGIC,
    KEY_BYTES,
    MAGIC,
    MAX_BODY,
    MAX_ENVELOPE,
    PREFIX,
    SALT_BYTES,
    TAG_BYTES,
    CaptureError,
    CaptureKeyNeeded,
    CaptureTampered,
    CaptureTruncated,
    CaptureVersion,
    End,
    Envelope,
    Gap,
    Header,
    Party,
    Said,
    Sampling,
    pack,
    unpack,
)  # fmt: skip
from .errors import CodecError, LocalError
from .messages import Message
from .tensors import DTYPES, Array, Descriptor, body_bytes

__all__ = [
    "CaptureError",
    "CaptureKeyNeeded",
    "CaptureReader",
    "CaptureTampered",
    "CaptureTruncated",
    "CaptureVersion",
    "CaptureWriter",
    "End",
    "Gap",
    "Header",
    "Party",
    "Recorded",
    "Sampling",
]

Buffer = bytes | memoryview

_INFO = b"splitproto capture v1"
_SEAL_PIECE = 16 << 20
_DIGESTS: dict[bytes, Callable[[Buffer], Any]] = {MAGIC: blake3, FORMER_MAGIC: hashlib.sha256}
"""Of the chain, by a file's magic. BLAKE3 takes less than half of the time, and a tenth on processors without
instructions for SHA-256."""
_ENVELOPE_SEAL, _BODY_SEAL = b"\0\0\0\0", b"\0\0\0\1"


@dataclass(frozen=True)
class Recorded:
    """One recorded message. What it holds of tensors is read, and decrypted, when `message` is first asked for."""

    n: int
    """Number of the record in its file."""
    time: float
    """Seconds since 1970 by the recorder's clock."""
    peer: str
    """Site of the other end."""
    direction: str
    """"in": from the peer; "out": to it."""
    head: Message
    """The message with its tensors empty."""
    descriptors: tuple[Descriptor, ...]
    _body: Buffer = field(repr=False)
    _unseal: _Seal | None = field(repr=False)
    _aad: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """The message's type, such as `activations`."""
        return self.head.name

    @property
    def octets(self) -> int:
        """Octets of the body on the wire."""
        return body_bytes(self.descriptors)

    @cached_property
    def message(self) -> Message:
        """The message with its tensors: read-only arrays over the capture's own octets where it is not encrypted.

        Raises:
            CaptureTampered: the body is not what the head announces.
        """
        if not self.descriptors:
            return self.head
        body = self._body
        if self._unseal is not None:
            body = self._unseal.open(_BODY_SEAL, self.n, self._aad, body)
        tensors, at = {}, 0
        for d in self.descriptors:
            head = codec.bin_header(d.nbytes)
            if bytes(body[at : at + len(head)]) != head:
                raise CaptureTampered(f"record {self.n}: tensor {d.name} is not where its head says")
            at += len(head)
            tensors[d.name] = _array(d, body[at : at + d.nbytes])
            at += d.nbytes
        return replace(self.head, tensors=tensors)  # type: ignore[type-var]


Record = Header | Recorded | Gap | End


def _array(d: Descriptor, octets: Buffer) -> Array:
    array = np.frombuffer(octets, DTYPES[d.dtype]).reshape(d.shape)
    array.flags.writeable = False
    return array


# --- sealing -------------------------------------------------------------------------------------------------


class _Seal:
    """AES-256-GCM under a key of this file alone; every nonce is used once: (envelope or body, number)."""

    def __init__(self, key: bytes, salt: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise CaptureKeyNeeded(f"a capture's key is {KEY_BYTES} bytes, not {len(key)}")
        material = HKDF(SHA256(), KEY_BYTES + 16, salt, _INFO).derive(key)
        self._cipher = algorithms.AES(material[:KEY_BYTES])
        self.check = material[KEY_BYTES:]

    def close(self, what: bytes, n: int, aad: bytes, pieces: Iterable[Buffer]) -> list[Buffer]:
        """The pieces' ciphertext and its tag."""
        sealing = Cipher(self._cipher, modes.GCM(what + n.to_bytes(8, "big"))).encryptor()
        sealing.authenticate_additional_data(aad)
        sealed: list[Buffer] = [sealing.update(part) for piece in pieces for part in _cut(piece)]
        sealed.append(sealing.finalize() + sealing.tag)
        return sealed

    def open(self, what: bytes, n: int, aad: bytes, sealed: Buffer) -> memoryview:
        """The octets under the seal.

        Raises:
            CaptureTampered: they are not what was sealed.
        """
        sealed, length = memoryview(sealed), len(sealed) - TAG_BYTES
        if length < 0:
            raise CaptureTampered(f"record {n} is shorter than its seal")
        opening = Cipher(
            self._cipher, modes.GCM(what + n.to_bytes(8, "big"), bytes(sealed[length:]))
        ).decryptor()
        opening.authenticate_additional_data(aad)
        opened, at = memoryview(bytearray(length + 15)), 0  # the cipher asks for room of one block more
        for part in _cut(sealed[:length]):
            at += opening.update_into(part, opened[at:])
        try:
            opening.finalize()
        except InvalidTag:
            raise CaptureTampered(f"record {n} was changed after it was sealed") from None
        return opened[:length].toreadonly()


def _cut(piece: Buffer) -> Iterator[memoryview]:
    view = memoryview(piece)
    for at in range(0, len(view), _SEAL_PIECE):
        yield view[at : at + _SEAL_PIECE]


# --- writing -------------------------------------------------------------------------------------------------


class CaptureWriter:
    """Turns messages into the octets of one file. Every method returns what to append, in order, uncopied.

    Args:
        header: without salt and check.
        key, salt: 32 octets each to encrypt; the salt is random and new for every file.

    Raises:
        CodecError: the header has a field that the format does not carry.
    """

    def __init__(self, header: Header, key: bytes | None = None, salt: bytes | None = None) -> None:
        self._seal: _Seal | None = None
        if key is not None:
            if salt is None or len(salt) != SALT_BYTES:
                raise CodecError(f"an encrypted capture needs a salt of {SALT_BYTES} octets")
            self._seal = _Seal(key, salt)
            header = replace(header, encryption="aes-256-gcm", salt=salt, check=self._seal.check)
        self.header = header
        self.chain = bytes(CHAIN)
        """The newest record's chain."""
        self.records = 0
        """Records so far, the header included; also the number of the next one."""
        self.messages = 0
        self.lost = 0
        self.ended = False
        self._former = self._counts()

    def start(self) -> list[Buffer]:
        """Magic and header; once, first."""
        if self.records:
            raise ValueError("a capture has one header")
        return self._append(self.header, (), MAGIC)

    def message(self, message: Message, *, time: float, peer: str, direction: str) -> list[Buffer]:
        """One message that was sent or received; the octets of its tensors are referred to, not copied.

        Raises:
            CodecError, TensorError: a field or tensor that the wire does not carry.
        """
        head, segments = messages.encode(message)
        said = Said(self.records, time, peer, direction, head)
        buffers = self._append(said, segments)
        self.messages += 1
        return buffers

    def gap(self, *, time: float, reason: str, records: int, octets: int) -> list[Buffer]:
        """`records` messages with bodies of `octets` in all were not kept."""
        buffers = self._append(Gap(self.records, time, reason, records, octets), ())
        self.lost += records
        return buffers

    def end(self, *, time: float, reason: str, text: str = "") -> list[Buffer]:
        """The last record."""
        buffers = self._append(End(self.records, time, reason, self.messages, self.lost, text), ())
        self.ended = True
        return buffers

    def take_back(self) -> None:
        """Forget the newest record, which was not written; once.

        Never for an encrypted record of which an octet was written: its nonce would be used twice.
        """
        self.chain, self.records, self.messages, self.lost = self._former
        self.ended = False

    def _counts(self) -> tuple[bytes, int, int, int]:
        return self.chain, self.records, self.messages, self.lost

    def _append(self, envelope: Envelope, segments: Iterable[Buffer], before: bytes = b"") -> list[Buffer]:
        if self.ended or (not self.records and not before):
            raise ValueError("a capture begins with its header, and nothing follows its end")
        sealed: list[Buffer] = [pack(envelope)]
        body = [segment for segment in segments if len(segment)]
        if self._seal is not None and not before:
            sealed = self._seal.close(_ENVELOPE_SEAL, self.records, self.chain, sealed)
            body = self._seal.close(_BODY_SEAL, self.records, self.chain, body) if body else []
        lengths = (sum(map(len, sealed)), sum(map(len, body)))
        if lengths[0] > MAX_ENVELOPE or lengths[1] > MAX_BODY:
            raise CodecError("a record longer than a capture carries")
        prefix = before + lengths[0].to_bytes(4, "big") + lengths[1].to_bytes(8, "big")
        padding = _padding(len(prefix) + sum(lengths) + CHAIN, self.header.block)
        buffers: list[Buffer] = [prefix, *sealed, *body, *([bytes(padding)] if padding else [])]
        digest = _DIGESTS[MAGIC](b"" if before else self.chain)
        for buffer in buffers:
            digest.update(buffer)
        self._former = self._counts()
        self.chain = digest.digest()
        self.records += 1
        return [*buffers, self.chain]


def _padding(octets: int, block: int) -> int:
    """What a record of so many octets, chain and magic included, is short of a multiple of `block`."""
    return -octets % block


# --- reading -------------------------------------------------------------------------------------------------


class _Contents(NamedTuple):
    """An envelope that was read, and the message in it."""

    envelope: Envelope
    message: Message | None = None
    described: tuple[Descriptor, ...] = ()


class _Begun(NamedTuple):
    """A record whose envelope was read. Places are from its beginning, which in the header is that of the file."""

    contents: _Contents | None
    """None: it is sealed, and is skipped."""
    body: int
    """Where the body begins."""
    body_end: int
    padding: int


class CaptureReader:
    """Reads one file, in order: `receive_data` takes it piece by piece, `over` a whole file in memory.

    Args:
        key: 32 octets, for an encrypted capture.
        verify: compute the chain. Without it the stored one is believed: for files verified before.
        blind: without the key, verify an encrypted capture's chain: its records are counted, not read.

    After an error the reader is over; what it returned before is good.
    """

    def __init__(self, key: bytes | None = None, *, verify: bool = True, blind: bool = False) -> None:
        self._key, self._verify, self._blind = key, verify, blind
        self._seal: _Seal | None = None
        self._buffer = bytearray()
        self._begun: _Begun | None = None  # a record of which the envelope was read already
        self._magic = MAGIC
        self.header: Header | None = None
        self.chain = bytes(CHAIN)
        """Chain of the newest record."""
        self.records = 0
        """Whole records so far, the header included."""
        self.messages = 0
        self.gaps = 0
        self.lost = 0
        self.end: End | None = None
        self.octets = 0
        """Where the newest whole record ends in the file."""

    def receive_data(self, data: Buffer) -> list[Record]:
        """The records that `data` completes.

        Raises:
            CaptureTampered, CaptureVersion, CaptureKeyNeeded: see there.
        """
        self._buffer += data
        found, at = [], 0
        with memoryview(self._buffer) as view:
            while (size := self._whole(view[at:])) is not None:
                # Records handed out own their octets, as the buffer is reused.
                record = self._take(memoryview(bytes(view[at : at + size])))
                at += size
                if record is not None:
                    found.append(record)
        del self._buffer[:at]
        return found

    def over(self, file: Buffer) -> Iterator[Record]:
        """All records of a file in memory, without copying bodies.

        Raises:
            CaptureTruncated: at the end, where the last record is not whole; and those of `receive_data`.
        """
        view = memoryview(file).toreadonly()
        while (size := self._whole(view[self.octets :])) is not None:
            record = self._take(view[self.octets : self.octets + size])
            if record is not None:
                yield record
        self._finish(len(view) - self.octets)

    def close(self) -> None:
        """No more data follows.

        Raises:
            CaptureTruncated: in the middle of a record.
        """
        self._finish(len(self._buffer))

    def _finish(self, rest: int) -> None:
        if rest or self.header is None:
            raise CaptureTruncated(
                f"ends within record {self.records}, at octet {self.octets + rest}: the recording was cut off; "
                + (
                    f"the {self.records} records before it are good"
                    if self.records
                    else "nothing can be read"
                )
            )

    def _whole(self, view: memoryview) -> int | None:
        """Octets of the record at the beginning of `view`; None where more are needed to know, or to have it all."""
        start = 0 if self.records else len(MAGIC)
        if start:
            self._magic = _magic(bytes(view[:start]))
        elif self.end is not None and len(view):
            raise CaptureTampered(f"octets follow the end, record {self.end.n}")
        if len(view) < start + PREFIX:
            return None
        envelope = int.from_bytes(view[start : start + 4], "big")
        body = int.from_bytes(view[start + 4 : start + PREFIX], "big")
        # SP-C-3: "A reader MUST check both lengths before it takes memory".
        if envelope > MAX_ENVELOPE or body > MAX_BODY:
            raise CaptureTampered(
                f"record {self.records} claims {envelope} and {body} octets: more than allowed"
            )
        at = start + PREFIX
        if len(view) < at + envelope:
            return None
        if self._begun is None:
            contents = self._opened(view[at : at + envelope], body)
            header = self.header if self.header is not None or contents is None else contents.envelope
            block = header.block if isinstance(header, Header) else 1
            at, end = at + envelope, at + envelope + body
            self._begun = _Begun(contents, at, end, _padding(end + CHAIN, block))
        size = self._begun.body_end + self._begun.padding + CHAIN
        return size if len(view) >= size else None

    def _opened(self, octets: memoryview, body: int) -> _Contents | None:
        """The envelope's contents, checked against the body's length; None if the record is skipped."""
        sealed = self.header is not None and self.header.encryption != "none"
        try:
            if sealed and self._seal is None:
                if not self._blind:
                    raise CaptureKeyNeeded("the capture is encrypted: give the key file it was recorded with")
                return None
            if self._seal is not None:
                octets = self._seal.open(_ENVELOPE_SEAL, self.records, self.chain, octets)
            envelope = unpack(octets, self._magic)
            if (type(envelope) is Header) != (self.records == 0):
                raise CaptureTampered(f"record {self.records} is a {envelope.kind}, which has no place there")
            if not isinstance(envelope, Header) and envelope.n != self.records:
                raise CaptureTampered(f"record {self.records} says it is number {envelope.n}")
            wanted, contents = 0, _Contents(envelope)
            if isinstance(envelope, Said):
                message, described = messages.decode_head(envelope.head)
                wanted, contents = body_bytes(described), _Contents(envelope, message, described)
            elif isinstance(envelope, End) and (envelope.messages, envelope.lost) != (
                self.messages,
                self.lost,
            ):
                raise CaptureTampered("the end counts other messages than there are")
        except LocalError as error:
            raise CaptureTampered(f"record {self.records}: {error}") from None
        if body != wanted + (TAG_BYTES if sealed and wanted else 0):
            raise CaptureTampered(f"record {self.records} has a body of {body} octets where {wanted} belong")
        return contents

    def _take(self, view: memoryview) -> Record | None:
        """One whole record."""
        assert self._begun is not None  # `_whole` said so  # noqa: S101
        contents, at, end, padding = self._begun
        self._begun = None
        stored = bytes(view[-CHAIN:])
        former = self.chain if self.records else b""
        if self._verify:
            digest = _DIGESTS[self._magic](former)
            digest.update(view[:-CHAIN])
            if digest.digest() != stored:
                raise CaptureTampered(
                    f"record {self.records} does not fit the chain: it, or one before, was changed"
                )
        # SP-C-1: "octets of zero".
        if bytes(view[end : end + padding]).strip(b"\0"):
            raise CaptureTampered(f"record {self.records} is followed by octets that nobody recorded")
        record: Record | None = None
        if contents is not None:
            said, message, described = contents
            if isinstance(said, Said) and message is not None:
                record = Recorded(
                    said.n,
                    said.time,
                    said.peer,
                    said.direction,
                    message,
                    described,
                    view[at:end],
                    self._seal,
                    former,
                )
            elif not isinstance(said, Said):
                record = said
        self._count(record)
        self.chain = stored
        self.records += 1
        self.octets += len(view)
        return record

    def _count(self, record: Record | None) -> None:
        match record:
            case Header():
                self.header = record
                if record.encryption != "none" and self._key is not None:
                    self._seal = _Seal(self._key, record.salt or b"")
                    if self._seal.check != record.check:
                        raise CaptureKeyNeeded("the capture was recorded with another key: give that one")
            case Recorded():
                self.messages += 1
            case Gap():
                self.gaps += 1
                self.lost += record.records
            case End():
                self.end = record


def _magic(found: bytes) -> bytes:
    """That of a file, by its first octets, as far as they are there."""
    for magic in (MAGIC, FORMER_MAGIC):
        if magic.startswith(found):
            return magic
    if found[:7] == MAGIC[:7]:
        raise CaptureVersion("a capture of another format version: read it with the splitproto that wrote it")
    raise CaptureVersion("not a capture: it does not begin with SPLTCAP3")
