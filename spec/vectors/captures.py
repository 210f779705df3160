"""Cases of capture files, put together octet by octet from the words of capture.md, not by the library's writer."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator
from typing import Any

from blake3 import blake3
from common import RUN, Case, as_json, refused
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from derive import SCHEMA, schema_digest
from talk import JOB, MESSAGES

from splitproto import codec, messages
from splitproto.fields import write_map

MAGIC, FORMER_MAGIC = b"SPLTCAP3", b"SPLTCAP2"
FILE_KEY = bytes(range(0x60, 0x80))
FILE_SALT = bytes(range(0x80, 0xA0))
TIME = 1763683200.5
HEADER: dict[str, Any] = {
    "kind": "header",
    "role": "coordinator",
    "site": "hub",
    "federation": "brats",
    "agent": "splitpeer/0.1.0",
    "created": TIME,
    "run": RUN,
    "seats": [],
    "peers": [
        {
            "site": "charite",
            "seats": [{"name": "t1", "modalities": ["t1"]}],
            "defences": ["dropout:0.5"],
            "recorded": False,
        }
    ],
    "defences": [],
    "features": ["dtype.f32", "train"],
    "sampling": {"every": 1, "keys": []},
    "part": 0,
    "encryption": "none",
    "block": 1,
}
FORMER_HEADER = {key: value for key, value in HEADER.items() if key != "block"}

ORDER = (
    "kind", "role", "site", "federation", "agent", "created", "run", "seats", "job", "schema", "peers",
    "defences", "features", "sampling", "part", "previous", "encryption", "salt", "check", "extensions",
    "block",
)  # fmt: skip
"""Any order would do (SP-8.1-5); in this one a writer makes the same octets."""


def lengths(envelope: int, body: int) -> bytes:
    """What a record begins with."""
    return struct.pack(">IQ", envelope, body)


def chained(former: bytes, before: bytes, magic: bytes = MAGIC) -> bytes:
    """A record up to its chain -> the record with it."""
    digest = blake3 if magic == MAGIC else hashlib.sha256
    return before + digest(former + before).digest()


def padded(before: bytes, block: int, fill: bytes = b"\0") -> bytes:
    """A record up to its padding -> up to its chain."""
    return before + fill * (-(len(before) + 32) % block)


def record(
    former: bytes,
    envelope: Any,
    body: bytes = b"",
    *,
    magic: bytes = MAGIC,
    block: int = 1,
    fill: bytes = b"\0",
) -> bytes:
    """One record that is not sealed."""
    octets = envelope if isinstance(envelope, bytes) else codec.encode(envelope)
    before = lengths(len(octets), len(body)) + octets + body
    return chained(former, padded(before, block, fill), magic)


def derived(key: bytes, salt: bytes) -> tuple[bytes, bytes]:
    """SP-C-16: HKDF-SHA256 by the words of RFC 5869: the file's key and its check."""
    extracted = hmac.digest(salt, key, "sha256")
    info = b"splitproto capture v1"
    first = hmac.digest(extracted, info + b"\1", "sha256")
    return first, hmac.digest(extracted, first + info + b"\2", "sha256")[:16]


def sealed(
    former: bytes,
    n: int,
    envelope: Any,
    body: bytes = b"",
    *,
    key: bytes = FILE_KEY,
    magic: bytes = MAGIC,
    block: int = 1,
) -> bytes:
    """SP-C-17: one sealed record."""
    seal = AESGCM(derived(key, FILE_SALT)[0])
    number = n.to_bytes(8, "big")
    head = seal.encrypt(b"\0\0\0\0" + number, codec.encode(envelope), former)
    if body:
        body = seal.encrypt(b"\0\0\0\1" + number, body, former)
    return chained(former, padded(lengths(len(head), len(body)) + head + body, block), magic)


def said(n: int, name: str, direction: str, **changed: Any) -> tuple[dict[str, Any], bytes]:
    """Envelope and body of a message."""
    head, segments = messages.encode(MESSAGES[name])
    envelope = {"kind": "message", "n": n, "time": TIME + n, "peer": "charite", "direction": direction}
    return {**envelope, "head": head, **changed}, b"".join(segments)


def gap(n: int) -> dict[str, Any]:
    """The envelope of record `n` that says how much was not written."""
    return {"kind": "gap", "n": n, "time": TIME + n, "reason": "queue", "records": 3, "octets": 4096}


def end(n: int, count: int, lost: int) -> dict[str, Any]:
    """The envelope of record `n` that ends a capture of `count` messages, where `lost` were not written."""
    return {
        "kind": "end", "n": n, "time": TIME + n, "reason": "closed", "messages": count, "lost": lost, "text": "",
    }  # fmt: skip


def shown(envelope: dict[str, Any]) -> dict[str, Any]:
    """A record as `expect` lists it: its map; of a message its type and tensors' octets instead of the head."""
    if envelope["kind"] != "message":
        plain: dict[str, Any] = as_json(envelope)
        return plain
    head = codec.decode(envelope["head"])
    sent = MESSAGES["activations"]
    assert isinstance(sent, messages.Activations)
    values = {"x4": sent.tensors["x4"].tobytes()} if "tensors" in head else {}
    fields = {key: value for key, value in envelope.items() if key != "head"}
    message: dict[str, Any] = as_json({**fields, "type": head["type"], "tensors": values})
    return message


class File:
    """A capture that grows."""

    def __init__(
        self, header: dict[str, Any] = HEADER, key: bytes | None = None, magic: bytes = MAGIC
    ) -> None:
        self.key, self.magic, self.block = key, magic, header.get("block", 1)
        if key is not None:
            check = derived(key, FILE_SALT)[1]
            header = {**header, "encryption": "aes-256-gcm", "salt": FILE_SALT, "check": check}
        header = {name: header[name] for name in ORDER if name in header}
        octets = codec.encode(header)
        before = magic + lengths(len(octets), 0) + octets
        self.octets = chained(b"", padded(before, self.block), magic)
        self.listed = [shown(header)]
        self.places = [0]

    @property
    def chain(self) -> bytes:
        return self.octets[-32:]

    def add(self, envelope: dict[str, Any], body: bytes = b"") -> File:
        self.places.append(len(self.octets))
        if self.key is None:
            self.octets += record(self.chain, envelope, body, magic=self.magic, block=self.block)
        else:
            n = len(self.listed)
            self.octets += sealed(
                self.chain, n, envelope, body, key=self.key, magic=self.magic, block=self.block
            )
        self.listed.append(shown(envelope))
        return self

    def expect(self) -> dict[str, Any]:
        return {
            "records": self.listed, "ended": self.listed[-1]["map"]["kind"] == "end", "chain": self.chain.hex(),
        }  # fmt: skip


def small(key: bytes | None = None, header: dict[str, Any] = HEADER, magic: bytes = MAGIC) -> File:
    """A batch, what came back, a gap, the end."""
    file = File(header, key, magic)
    return (
        file.add(*said(1, "forward", "out")).add(*said(2, "activations", "in")).add(gap(3)).add(end(4, 2, 3))
    )


def captures() -> Iterator[Case]:
    """Octets of one file (and a key) -> its records."""

    def good(name: str, file: File, notes: str) -> Case:
        key = {} if file.key is None else {"key": file.key.hex()}
        return {"name": name, "notes": notes, "input": file.octets.hex(), **key, "expect": file.expect()}

    def bad(name: str, octets: bytes, intact: int, notes: str, error: str = "tampered", **more: Any) -> Case:
        """`intact`: records that are read before the error."""
        expect = refused(f"capture-{error}", "capture")
        return {
            "name": name, "notes": notes, "input": octets.hex(), **more, "intact": intact, "expect": expect,
        }  # fmt: skip

    file = small()
    octets, places = file.octets, file.places
    yield good("small", file, "SP-C-1, SP-C-4: the example of capture.md")
    yield good("header-only", File(), "SP-C-5: nothing was said yet")
    yield good("no-end", File().add(*said(1, "forward", "out")), "SP-C-10: the recorder was killed")
    full = {
        **HEADER, "role": "client", "site": "charite", "job": write_map(JOB, "job"),
        "schema": schema_digest(SCHEMA), "peers": [{"site": "hub", "seats": [], "defences": []}],
        "seats": [{"name": "flair", "modalities": ["flair"]}, {"name": "mri", "modalities": ["t1", "t2"]}],
        "sampling": {"every": 10, "keys": ["90c7", "8a"]}, "extensions": {"example.org/colour": ["blue", None]},
    }  # fmt: skip
    yield good("header-full", File(full).add(*said(1, "gradients", "in")), "SP-C-5: every field; a client's")
    least = {key: HEADER[key] for key in ("kind", "role", "site", "federation", "agent", "created")}
    yield good("header-least", File(least), "SP-C-5: no field that may be absent")
    later = File({**HEADER, "part": 1, "previous": file.chain}).add(end(1, 0, 0))
    yield good("second-part", later, "SP-C-12: names the last chain of `small`")
    locked = small(FILE_KEY)
    yield good("encrypted", locked, "SP-C-15 to SP-C-17")
    blocks = {**HEADER, "block": 64}
    spaced = small(header=blocks)
    yield good("blocks", spaced, "SP-C-1: every record ends at a multiple of 64 octets")
    yield good("blocks-encrypted", small(FILE_KEY, blocks), "SP-C-1, SP-C-17: padding is not sealed")
    former = small(header=FORMER_HEADER, magic=FORMER_MAGIC)
    yield good("version-2", former, "SP-C-22")
    yield good("version-2-encrypted", small(FILE_KEY, FORMER_HEADER, FORMER_MAGIC), "SP-C-22")
    later = File({**HEADER, "part": 1, "previous": former.chain}).add(end(1, 0, 0))
    yield good("after-version-2", later, "SP-C-12, SP-C-22: names the last chain of `version-2`")

    # --- cut off ---
    body_at = len(octets[: places[2]]) + 12 + len(codec.encode(said(2, "activations", "in")[0]))
    for name, at, intact in (
        ("empty", 0, 0),
        ("magic", 5, 0),
        ("header-lengths", 15, 0),
        ("header", 100, 0),
        ("header-chain", places[1] - 1, 0),
        ("lengths", places[2] + 11, 2),
        ("envelope", places[2] + 12 + 40, 2),
        ("body", body_at + 5, 2),
        ("chain", places[3] - 32, 2),
        ("last-octet", len(octets) - 1, 4),
    ):
        yield bad(f"cut-{name}", octets[:at], intact, "SP-C-10", "truncated")
    yield bad("cut-encrypted", locked.octets[:-40], 4, "SP-C-10", "truncated", key=FILE_KEY.hex())

    # --- changed ---
    def flipped(at: int) -> bytes:
        return octets[:at] + bytes([octets[at] ^ 1]) + octets[at + 1 :]

    site = octets.index(b"hub")
    yield bad("flipped-header", flipped(site), 0, "SP-C-4: the recorder's name")
    yield bad("flipped-header-chain", flipped(places[1] - 1), 0, "SP-C-4")
    yield bad("flipped-time", flipped(octets.index(b"time", places[1]) + 11), 1, "SP-C-4: when it passed")
    yield bad("flipped-head", flipped(octets.index(b"seed", places[1]) + 8), 1, "SP-C-4: the message's seed")
    yield bad("flipped-body", flipped(body_at + 7), 2, "SP-C-4: one value of a tensor")
    yield bad("flipped-chain", flipped(places[3] - 1), 2, "SP-C-4")
    yield bad("flipped-length", flipped(places[2] + 11), 2, "SP-C-8: a body of another length than announced")
    pieces = [octets[a:b] for a, b in zip(places, [*places[1:], len(octets)], strict=True)]
    yield bad("removed", b"".join([pieces[0], *pieces[2:]]), 1, "SP-C-4: without its first message")
    yield bad("repeated", b"".join([*pieces[:2], pieces[1]]), 2, "SP-C-4")
    swapped = b"".join([pieces[0], pieces[2], pieces[1], *pieces[3:]])
    yield bad("swapped", swapped, 1, "SP-C-4: order counts")
    rewritten = codec.encode({**HEADER, "site": "hut"})
    rewritten = chained(b"", MAGIC + lengths(len(rewritten), 0) + rewritten)
    yield bad("other-header", rewritten + octets[places[1] :], 1, "SP-C-4: a header from elsewhere")

    # --- not of this format ---
    yield bad("version", b"SPLTCAP1" + octets[8:], 0, "SP-C-2: of the version before", "version")
    yield bad("version-4", b"SPLTCAP4" + octets[8:], 0, "SP-C-2: of the version after", "version")
    yield bad("picture", b"\x89PNG\r\n\x1a\n" + bytes(40), 0, "SP-C-2", "version")
    yield bad("text", b"h", 0, "SP-C-2: one octet that no capture begins with", "version")

    # --- of version 2 ---
    old = former.octets
    yield bad("version-2-as-3", MAGIC + old[8:], 0, "SP-C-4: chained with SHA-256")
    yield bad(
        "version-3-as-2", FORMER_MAGIC + octets[8:], 0, "SP-C-22: chained with BLAKE3, and with `block`"
    )
    known = codec.encode(HEADER)
    known = chained(b"", FORMER_MAGIC + lengths(len(known), 0) + known, FORMER_MAGIC)
    yield bad("version-2-block", known, 0, "SP-C-22: a header with `block`, chained in good order")
    at = old.index(b"seed", former.places[1]) + 8
    yield bad("version-2-flipped", old[:at] + bytes([old[at] ^ 1]) + old[at + 1 :], 1, "SP-C-4, SP-C-22")
    yield bad("version-2-cut", old[:-1], 4, "SP-C-10", "truncated")

    # --- padding ---
    at = len(spaced.octets) - 33
    assert not spaced.octets[at]
    yield bad("padding-flipped", spaced.octets[:at] + b"\1" + spaced.octets[at + 1 :], 4, "SP-C-4")
    begun = File(blocks)
    filled = begun.octets + record(begun.chain, end(1, 0, 0), block=64, fill=b"\1")
    yield bad("padding-filled", filled, 1, "SP-C-1: not zero, chained in good order")
    yield bad("padding-missing", begun.octets + record(begun.chain, end(1, 0, 0)), 1, "SP-C-1", "truncated")
    yield bad("padding-cut", spaced.octets[: spaced.places[4] - 40], 3, "SP-C-10", "truncated")

    # --- lengths ---
    start = File()
    for name, head, tail in (
        ("envelope", (1 << 20) + 1, 0),
        ("envelope-most", (1 << 32) - 1, 0),
        ("body", 40, (1 << 40) + 1),
        ("body-most", 40, (1 << 64) - 1),
    ):
        yield bad(f"long-{name}", start.octets + lengths(head, tail), 1, "SP-C-3: before memory is taken")
    yield bad("long-header", MAGIC + lengths((1 << 20) + 1, 0), 0, "SP-C-3")

    # --- chained in good order, but not what a recorder writes ---
    def after(envelope: Any, body: bytes = b"") -> bytes:
        return start.octets + record(start.chain, envelope, body)

    def first(envelope: Any, body: bytes = b"") -> bytes:
        data = envelope if isinstance(envelope, bytes) else codec.encode(envelope)
        return chained(b"", MAGIC + lengths(len(data), len(body)) + data + body)

    envelope, body = said(1, "activations", "in")
    yield bad("not-msgpack", after(b"\xc1"), 1, "SP-C-6")
    yield bad(
        "not-minimal", after(codec.encode(end(1, 0, 0)).replace(b"\xa1n\x01", b"\xa1n\xcc\x01")), 1, "SP-C-6"
    )
    yield bad("no-envelope", after(b""), 1, "SP-C-6")
    yield bad("not-a-map", after([1]), 1, "SP-C-6")
    yield bad("kind-missing", after({"n": 1}), 1, "SP-C-6")
    yield bad("kind-unknown", after({"kind": "remark", "n": 1}), 1, "SP-C-6")
    yield bad("field-unknown", after({**gap(1), "colour": "blue"}), 1, "SP-C-6")
    yield bad(
        "field-missing", after({key: item for key, item in gap(1).items() if key != "octets"}), 1, "SP-C-6"
    )
    yield bad("direction", after({**envelope, "direction": "sideways"}, body), 1, "SP-C-6")
    yield bad(
        "control-characters", after({**envelope, "peer": "char\x1b[2Jite"}, body), 1, "SP-C-6: SP-8.2-4"
    )
    yield bad("header-missing", first(end(1, 0, 0)), 0, "SP-C-5")
    yield bad("header-twice", after(HEADER), 1, "SP-C-5")
    yield bad("header-body", first(HEADER, b"x"), 0, "SP-C-8")
    yield bad("header-salt", first({**HEADER, "salt": FILE_SALT}), 0, "SP-C-15: a salt, but no encryption")
    yield bad("header-no-salt", first({**HEADER, "encryption": "aes-256-gcm"}), 0, "SP-C-15")
    yield bad("header-cipher", first({**HEADER, "encryption": "rot13"}), 0, "SP-C-15")
    yield bad("header-block", first({**HEADER, "block": 0}), 0, "SP-C-6: a block of nothing")
    yield bad("header-block-long", first({**HEADER, "block": (1 << 16) + 1}), 0, "SP-C-6")
    yield bad("part-no-previous", first({**HEADER, "part": 1}), 0, "SP-C-12")
    yield bad("previous-no-part", first({**HEADER, "previous": RUN + RUN}), 0, "SP-C-12")
    yield bad("number-zero", after(gap(0)), 1, "SP-C-7")
    yield bad("number-two", after(gap(2)), 1, "SP-C-7")
    yield bad(
        "head-not-a-message", after({**envelope, "head": codec.encode({"type": "weights"})}), 1, "SP-C-8"
    )
    yield bad("body-missing", after(envelope), 1, "SP-C-8")
    yield bad("body-short", after(envelope, body[:-1]), 1, "SP-C-8")
    yield bad("body-long", after(envelope, body + b"\0"), 1, "SP-C-8")
    yield bad("body-of-none", after(gap(1), b"x"), 1, "SP-C-8: only messages have one")
    yield bad("body-bin", after(envelope, b"\xc5" + body[1:]), 1, "SP-C-8: not the bin head announced")
    yield bad("end-count", after(end(1, 1, 0)), 1, "SP-C-9: counts a message that is not there")
    yield bad("end-lost", after(end(1, 0, 1)), 1, "SP-C-9")
    yield bad("after-end", octets + b"\0", 5, "SP-C-9")

    # --- encrypted ---
    key = {"key": FILE_KEY.hex()}
    yield bad("key-missing", locked.octets, 1, "SP-C-18", "key")
    yield bad("key-other", locked.octets, 0, "SP-C-16", "key", key=bytes(32).hex())
    yield bad("key-short", locked.octets, 0, "SP-C-16", "key", key=FILE_KEY[:16].hex())
    base = File(key=FILE_KEY)

    def edited(n: int, at: int) -> bytes:
        """Record `n` changed by somebody who has no key, but mends the chain."""
        parts = [
            locked.octets[a:b]
            for a, b in zip(locked.places, [*locked.places[1:], len(locked.octets)], strict=True)
        ]
        piece = parts[n][:-32]
        piece = piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
        return b"".join(parts[:n]) + chained(parts[n - 1][-32:], piece)

    yield bad("edited-envelope", edited(1, 20), 1, "SP-C-17: the chain fits, the seal does not", **key)
    yield bad(
        "edited-body",
        edited(2, len(locked.octets[locked.places[2] : locked.places[3]]) - 50),
        2,
        "SP-C-17",
        **key,
    )
    moved = base.octets + sealed(base.chain, 2, gap(2))
    yield bad("sealed-elsewhere", moved, 1, "SP-C-17: sealed as record 2, but it stands first", **key)
    foreign = base.octets + sealed(bytes(32), 1, gap(1))
    yield bad("sealed-after-another", foreign, 1, "SP-C-17: sealed after another chain", **key)
    yield bad("sealed-not", base.octets + record(base.chain, gap(1)), 1, "SP-C-17: not sealed at all", **key)
    yield bad("sealed-short", base.octets + record(base.chain, b"x"), 1, "SP-C-17: shorter than a tag", **key)
