"""Cases of octets: envelopes, frames, streams of frames, msgpack values, tensors."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from common import LINK, SMALL, Case, as_json, refused
from talk import MESSAGES

from splitproto import codec, constants, envelope, framing, messages
from splitproto.envelope import Kind, ResetReason
from splitproto.framing import FrameType

# --- envelope -----------------------------------------------------------------------------------------------


def envelopes() -> Iterator[Case]:
    """Octets of one ZeroMQ message -> envelope."""

    def case(name: str, octets: bytes, expect: Any, notes: str, repeat: list[Any] | None = None) -> Case:
        more = {"repeat": repeat} if repeat else {}
        return {"name": name, "notes": notes, "input": octets.hex(), **more, "expect": expect}

    def good(kind: str, sequence: int, body: bytes) -> dict[str, Any]:
        return {"kind": kind, "link": LINK.hex(), "sequence": as_json(sequence), "body": body.hex()}

    def bad(name: str) -> dict[str, str]:
        return refused(name, "envelope")

    malformed = bad("envelope-malformed")
    hello = envelope.encode(Kind.OPEN, LINK, 0, b"\x16\x03\x01")
    yield case(
        "open", hello, good("OPEN", 0, b"\x16\x03\x01"), "SP-4-1: the first three octets of a ClientHello"
    )
    data = envelope.encode(Kind.DATA, LINK, 258, b"\x17\x03\x03")
    yield case("data", data, good("DATA", 258, b"\x17\x03\x03"), "SP-4-1: sequence numbers are big-endian")
    last = envelope.encode(Kind.DATA, LINK, (1 << 64) - 1)
    yield case("data-empty", last, good("DATA", (1 << 64) - 1, b""), "SP-4-1: the highest number, no body")
    yield case(
        "largest-body",
        envelope.encode(Kind.DATA, LINK, 1),
        {"kind": "DATA", "link": LINK.hex(), "sequence": 1, "body_octets": constants.MAX_ENVELOPE_BODY},
        "SP-4-3: exactly the limit",
        ["00", constants.MAX_ENVELOPE_BODY],
    )

    def reset(reason: int, versions: list[int], text: str) -> dict[str, Any]:
        return {"kind": "RESET", "link": LINK.hex(), "reason": reason, "versions": versions, "text": text}

    unknown = envelope.encode_reset(LINK, ResetReason.UNKNOWN_LINK, "")
    yield case("reset-unknown-link", unknown, reset(1, [1], ""), "SP-4-5")
    other = b"SPLT\x07\x03\0\0" + LINK + bytes(8) + b"\x02\x02\x07\x09" + b"older"
    yield case("reset-other-version", other, reset(2, [7, 9], "older"), "SP-4-4: readable in every version")
    odd = b"SPLT\x01\x03\x80\0" + LINK + b"\xff" * 8 + b"\x63\x00" + "é\n".encode()
    notes = (
        "SP-4-5: unknown reason, reserved bits and sequence are ignored; what is not printable is shown as ?"
    )
    yield case("reset-unknown-reason", odd, reset(99, [], "é?"), notes)
    nobody = b"SPLT\x01\x03\0\0" + bytes(24) + b"\x03\x01\x01"
    expect = {"kind": "RESET", "link": bytes(16).hex(), "reason": 3, "versions": [1], "text": ""}
    yield case("reset-no-link", nobody, expect, "SP-4-5: the answer to what had no link id")

    yield case("empty", b"", malformed, "SP-4-1")
    yield case("short", data[:31], malformed, "SP-4-1: one octet short of a header")
    yield case("magic", b"SPLX" + data[4:], malformed, "SP-4-1: another program")
    yield case("http", b"GET / HTTP/1.1\r\nHost: coordinator.example\r\n\r\n", malformed, "SP-4-1")
    newer = data[:4] + b"\x02" + data[5:]
    yield case("version", newer, bad("carrier-version"), "SP-4-2: a version this side does not speak")
    garbled = data[:4] + b"\x02\x77\xff\xff" + data[8:]
    yield case(
        "version-first", garbled, bad("carrier-version"), "SP-4-2: judged before kind and reserved bits"
    )
    yield case("kind-zero", data[:5] + b"\x00" + data[6:], malformed, "SP-4-1: no such kind")
    yield case("kind-four", data[:5] + b"\x04" + data[6:], malformed, "SP-4-1: no such kind")
    yield case("reserved", data[:6] + b"\x00\x01" + data[8:], malformed, "SP-4-1: reserved bits")
    yield case("no-link", data[:8] + bytes(16) + data[24:], malformed, "SP-4-1: link id of zeros")
    too_long = ["00", constants.MAX_ENVELOPE_BODY + 1]
    yield case("body-too-long", last, malformed, "SP-4-3: one octet beyond the limit", too_long)
    yield case("reset-empty", unknown[:32], malformed, "SP-4-5: no reason")
    yield case("reset-versions-cut", unknown[:34], malformed, "SP-4-5: announces one version, has none")
    long_text = envelope.encode(Kind.RESET, LINK, 0, b"\x03\x00" + b"x" * (constants.MAX_RESET_TEXT + 1))
    yield case("reset-text-too-long", long_text, malformed, "SP-4-5: 201 octets of text")


# --- framing ------------------------------------------------------------------------------------------------


def frame_headers() -> Iterator[Case]:
    """12 octets -> frame header."""

    def case(name: str, octets: bytes, expect: Any, notes: str) -> Case:
        return {"name": name, "notes": notes, "input": octets.hex(), "expect": expect}

    def good(kind: str, end: bool, stream: int, length: int) -> dict[str, Any]:
        return {"type": kind, "end": end, "stream": stream, "length": length}

    def raw(kind: int, flags: int, reserved: int, stream: int, length: int) -> bytes:
        return struct.pack(">BBHII", kind, flags, reserved, stream, length)

    bad = refused("frame-malformed", "framing")
    limit = constants.MAX_FRAME_PAYLOAD
    yield case("head", raw(1, 1, 0, 1, 40), good("HEAD", True, 1, 40), "SP-7-1: a message without tensors")
    yield case(
        "head-more", raw(1, 0, 0, 0x01020304, 1), good("HEAD", False, 0x01020304, 1), "SP-7-1: big-endian"
    )
    yield case("body", raw(2, 0, 0, 3, limit), good("BODY", False, 3, limit), "SP-7-3: exactly the limit")
    yield case(
        "body-end", raw(2, 1, 0, 0xFFFFFFFF, 7), good("BODY", True, 0xFFFFFFFF, 7), "SP-7-1: highest stream"
    )
    yield case("credit", raw(3, 0, 0, 0, 8), good("CREDIT", False, 0, 8), "SP-7-4")
    yield case("ping", raw(4, 0, 0, 0, 8), good("PING", False, 0, 8), "SP-7-4")
    yield case("pong", raw(5, 0, 0, 0, 8), good("PONG", False, 0, 8), "SP-7-4")
    yield case("type-zero", raw(0, 0, 0, 1, 8), bad, "SP-7-2: no such type")
    yield case("type-six", raw(6, 0, 0, 1, 8), bad, "SP-7-2: no such type")
    yield case("flag", raw(1, 3, 0, 1, 8), bad, "SP-7-2: a flag other than END")
    yield case("reserved", raw(1, 1, 1, 1, 8), bad, "SP-7-2: reserved bits")
    yield case("too-long", raw(2, 0, 0, 1, limit + 1), bad, "SP-7-3: one octet beyond the limit")
    yield case("longest", raw(2, 0, 0, 1, 0xFFFFFFFF), bad, "SP-7-3: refused before memory is taken")
    yield case("ping-stream", raw(4, 0, 0, 1, 8), bad, "SP-7-4: a control frame on a stream")
    yield case("ping-end", raw(4, 1, 0, 0, 8), bad, "SP-7-4: a control frame with END")
    yield case("ping-length", raw(4, 0, 0, 0, 7), bad, "SP-7-4: a control frame that is not a u64")
    yield case("head-stream-zero", raw(1, 1, 0, 0, 8), bad, "SP-7-5: a message on stream 0")
    yield case("head-empty", raw(1, 1, 0, 1, 0), bad, "SP-7-1: a HEAD without a map")


def frame(kind: FrameType, stream: int, payload: bytes, *, end: bool = False) -> bytes:
    """One whole frame."""
    return framing.encode_header(kind, stream, len(payload), end=end) + payload


def said(stream: int, message: messages.Message) -> bytes:
    """A message without tensors."""
    return frame(FrameType.HEAD, stream, messages.encode(message)[0], end=True)


def small_activations() -> tuple[bytes, bytes]:
    """Head and body of one small message."""
    head, segments = messages.encode(MESSAGES["activations"])
    return head, b"".join(segments)


def streams() -> Iterator[Case]:
    """Plaintext octets that a client sends in state working -> what the coordinator makes of them."""
    head, body = small_activations()

    def case(name: str, octets: bytes, expect: Any, notes: str) -> Case:
        return {"name": name, "notes": notes, "input": octets.hex(), "expect": expect}

    def good(*names: str, answer: bytes = b"") -> dict[str, Any]:
        return {"messages": list(names), "answer": answer.hex()}

    def bad(name: str, layer: str = "framing") -> dict[str, str]:
        return refused(name, layer)

    applied, error = messages.Applied(1), messages.Error(0x0506, "")
    one = frame(FrameType.HEAD, 101, head) + frame(FrameType.BODY, 101, body, end=True)
    yield case("message", said(101, applied), good("applied"), "SP-7-1")
    yield case("tensors", one, good("activations"), "SP-7-11: one BODY frame")
    cut = frame(FrameType.HEAD, 101, head) + b"".join(
        frame(FrameType.BODY, 101, body[i : i + 1], end=i + 1 == len(body)) for i in range(len(body))
    )
    yield case(
        "tensors-in-octets", cut, good("activations"), "SP-7-11: cut anywhere, also inside the bin head"
    )
    between = frame(FrameType.HEAD, 101, head) + frame(FrameType.BODY, 101, body[:5])
    between += said(103, applied) + frame(FrameType.BODY, 101, body[5:], end=True)
    yield case(
        "overtaken", between, good("applied", "activations"), "SP-7-7: a small message overtakes tensors"
    )
    two = frame(FrameType.HEAD, 101, head) + frame(FrameType.HEAD, 107, head)
    two += frame(FrameType.BODY, 107, body, end=True) + frame(FrameType.BODY, 101, body, end=True)
    yield case("interleaved", two, good("activations", "activations"), "SP-7-10: two messages half received")
    ping, pong = (
        framing.encode_number(kind, 0x0102030405060708) for kind in (FrameType.PING, FrameType.PONG)
    )
    yield case("ping", ping, good(answer=pong), "SP-7-12")
    yield case("pong-unasked", pong, good(), "SP-7-12: ignored")
    yield case("error", said(101, error), {"ended_by": 0x0506, "retry": False}, "SP-12-1: the link ends")

    yield case(
        "parity", said(102, applied), bad("frame-malformed"), "SP-7-5: a listener's stream id from a dialler"
    )
    yield case("stream-again", said(101, applied) * 2, bad("frame-malformed"), "SP-7-5: the same id twice")
    falling = said(105, applied) + said(103, applied)
    yield case("stream-falls", falling, bad("frame-malformed"), "SP-7-5: ids only grow")
    yield case(
        "body-alone", frame(FrameType.BODY, 101, body, end=True), bad("frame-malformed"), "SP-7-11: no HEAD"
    )
    late = one + frame(FrameType.BODY, 101, body, end=True)
    yield case("body-after-end", late, bad("frame-malformed"), "SP-7-11: the message was whole")
    empty = frame(FrameType.HEAD, 101, head) + frame(FrameType.BODY, 101, b"")
    yield case("body-empty", empty, bad("frame-malformed"), "SP-7-11: a BODY without octets")
    early = frame(FrameType.HEAD, 101, head) + frame(FrameType.BODY, 101, body[:5], end=True)
    yield case("end-early", early, bad("frame-malformed"), "SP-7-11: END before the tensors are whole")
    open_end = frame(FrameType.HEAD, 101, head) + frame(FrameType.BODY, 101, body)
    yield case("end-missing", open_end, bad("frame-malformed"), "SP-7-11: the last BODY without END")
    longer = frame(FrameType.HEAD, 101, head) + frame(FrameType.BODY, 101, body + b"\0", end=True)
    yield case("body-too-long", longer, bad("frame-malformed"), "SP-7-11: more octets than announced")
    ended = frame(FrameType.HEAD, 101, head, end=True)
    yield case(
        "head-end-with-tensors", ended, bad("frame-malformed"), "SP-7-11: END, though tensors are announced"
    )
    open_head = frame(FrameType.HEAD, 101, messages.encode(applied)[0])
    yield case("head-open-without-tensors", open_head, bad("frame-malformed"), "SP-7-11: no END, no tensors")
    wrong = frame(FrameType.HEAD, 101, head) + frame(FrameType.BODY, 101, b"\xc4\x11" + body[2:], end=True)
    yield case(
        "bin-head", wrong, bad("frame-malformed"), "SP-8.3-2: the bin is not what its descriptor announces"
    )
    wide = frame(FrameType.HEAD, 101, head) + frame(
        FrameType.BODY, 101, b"\xc5\x00\x10" + body[2:-1], end=True
    )
    yield case("bin-head-wide", wide, bad("frame-malformed"), "SP-8.3-2: a bin16 where a bin8 is enough")
    many = b"".join(frame(FrameType.HEAD, 101 + 2 * n, head) for n in range(constants.MAX_STREAMS + 1))
    yield case(
        "streams-too-many", many, bad("frame-malformed"), "SP-7-10: the seventeenth half-received message"
    )
    credit = framing.encode_number(FrameType.CREDIT, 1)
    yield case("credit-never-taken", credit, bad("flow-control"), "SP-7-9: more credit than was used")
    large, _ = messages.encode(
        messages.Activations("train", 1, 0, bytes(32), {"x4": np.zeros((64, 64, 1), "<f4")})
    )
    too_large = frame(FrameType.HEAD, 101, large)
    yield case(
        "message-too-large", too_large, bad("message-too-large"), "SP-7-8: 16387 octets, the limit is 8192"
    )
    half, _ = messages.encode(
        messages.Activations("train", 1, 0, bytes(32), {"x4": np.zeros((1500,), "<f4")})
    )
    both = frame(FrameType.HEAD, 101, half) + frame(FrameType.HEAD, 103, half)
    yield case("credit-spent", both, bad("flow-control"), "SP-7-8: two bodies of 6003 octets, credit is 8192")
    begin = said(101, messages.Begin(0, 1))
    yield case("not-yours", begin, bad("unexpected-message", "states"), "SP-9-1: the coordinator's word")
    hello = said(101, MESSAGES["hello"])
    yield case("too-late", hello, bad("unexpected-message", "states"), "SP-9-1: hello in state working")
    yield case("garbage", frame(FrameType.HEAD, 101, b"\xc1", end=True), bad("codec", "codec"), "SP-8.1-1")


# --- codec --------------------------------------------------------------------------------------------------


def values() -> Iterator[Case]:
    """Octets -> one value of the data model."""

    def case(name: str, octets: bytes, expect: Any, notes: str) -> Case:
        return {"name": name, "notes": notes, "input": octets.hex(), "expect": expect}

    examples: dict[str, Any] = {
        "nil": None, "false": False, "true": True,
        "zero": 0, "fixint": 127, "u8": 128, "u8-max": 255, "u16": 256, "u32": 65536, "u64": 1 << 32,
        "u64-max": (1 << 64) - 1, "negative-fixint": -32, "i8": -33, "i16": -129, "i32": -32769,
        "i64": -(1 << 31) - 1, "i64-min": -(1 << 63),
        "float": 1.5, "float-whole": 2.0, "float-minus-zero": -0.0, "float-smallest": 5e-324,
        "text": "Charité", "text-empty": "", "text-31": "x" * 31, "text-32": "x" * 32, "text-256": "x" * 256,
        "octets": b"\x00\xff", "octets-empty": b"", "octets-256": bytes(256),
        "array": [1, "a", [b"", None]], "array-16": [0] * 16, "map": {"a": 1, "b": {"c": []}}, "map-empty": {},
        "map-16": {f"k{n:x}": n for n in range(16)}, "map-order": {"b": 1, "a": 2},
        "depth-8": [[[[[[[[0]]]]]]]],
    }  # fmt: skip
    for name, value in examples.items():
        notes = "SP-8.1-5: the order of keys means nothing and is kept" if name == "map-order" else "SP-8.1-1"
        yield case(name, codec.encode(value), {"value": as_json(value)}, notes)

    bad = refused("codec", "codec")
    for name, octets, notes in (
        ("nothing", "", "SP-8.1-1: no value"),
        ("trailing", "0101", "SP-8.1-1: two values"),
        ("cut", "cd01", "SP-8.1-1: an integer without its second octet"),
        ("never-used", "c1", "SP-8.1-1: an octet that msgpack does not use"),
        ("array-cut", "920a", "SP-8.1-1: two entries announced, one there"),
        ("array-huge", "ddffffffff", "SP-8.1-6: four thousand million entries announced"),
        ("map-huge", "dfffffffff", "SP-8.1-6"),
        ("text-not-utf8", "a1ff", "SP-8.1-2: not UTF-8"),
        ("text-surrogate", "a3eda080", "SP-8.1-2: a surrogate is not UTF-8"),
        ("float32", "ca3fc00000", "SP-8.1-2: only float64"),
        ("float-nan", "cb7ff8000000000000", "SP-8.1-2: not finite"),
        ("float-infinity", "cb7ff0000000000000", "SP-8.1-2: not finite"),
        ("ext", "d40500", "SP-8.1-2: an ext type"),
        ("ext-empty", "c70005", "SP-8.1-2: an ext type of no octets"),
        ("timestamp", "d6ff00000000", "SP-8.1-2: ext type -1, a timestamp"),
        ("key-integer", "810101", "SP-8.1-3: a key that is not text"),
        ("key-octets", "81c4016101", "SP-8.1-3: a key that is not text"),
        ("key-nil", "81c001", "SP-8.1-3: a key that is not text"),
        ("key-twice", "82a16101a16102", "SP-8.1-3: the same key twice"),
        ("key-twice-inside", "8182a16101a16102", "SP-8.1-3"),
        ("int-wide-u8", "cc01", "SP-8.1-4: fits a fixint"),
        ("int-wide-u16", "cd00ff", "SP-8.1-4: fits a u8"),
        ("int-wide-u64", "cf0000000000000001", "SP-8.1-4"),
        ("int-signed-positive", "d001", "SP-8.1-4: 1 as i8"),
        ("int-wide-negative", "d1ffff", "SP-8.1-4: -1 as i16"),
        ("text-wide", "d90161", "SP-8.1-4: str8 where fixstr is enough"),
        ("octets-wide", "c5000100", "SP-8.1-4: bin16 where bin8 is enough"),
        ("array-wide", "dc0000", "SP-8.1-4: array16 where fixarray is enough"),
        ("map-wide", "de0000", "SP-8.1-4: map16 where fixmap is enough"),
        ("depth-9", "91" * 9 + "00", "SP-8.1-6: a value inside nine arrays"),
        ("depth-bomb", "91" * 2000 + "00", "SP-8.1-6"),
    ):
        yield case(name, bytes.fromhex(octets), bad, notes)
    long_key = (
        b"\x81\xda" + (constants.MAX_TEXT + 1).to_bytes(2, "big") + b"k" * (constants.MAX_TEXT + 1) + b"\x01"
    )
    yield case("key-too-long", long_key, bad, "SP-8.1-3: 4097 characters")
    many = b"\xdd" + (constants.MAX_ITEMS + 1).to_bytes(4, "big") + bytes(constants.MAX_ITEMS + 1)
    short = {"input": many[:5].hex(), "repeat": ["00", constants.MAX_ITEMS + 1], "expect": bad}
    yield {"name": "array-65537", "notes": "SP-8.1-6: one entry too many", **short}


# --- tensors ------------------------------------------------------------------------------------------------


def tensors() -> Iterator[Case]:
    """Descriptors, bin heads, bodies, bfloat16."""

    def describe(name: str, value: Any, expect: Any, notes: str) -> Case:
        octets = codec.encode(value).hex()
        return {"name": name, "operation": "descriptors", "notes": notes, "input": octets, "expect": expect}

    def good(*described: tuple[str, str, list[int], int]) -> dict[str, Any]:
        keys = ("name", "dtype", "shape", "octets")
        return {"tensors": [dict(zip(keys, item, strict=True)) for item in described]}

    bad = refused("tensor", "tensors")
    one = ["x0", "f32", [4, 32, 96, 96]]
    yield describe("one", [one], good(("x0", "f32", [4, 32, 96, 96], 4718592)), "SP-8.3-1")
    sizes = {"f32": 4, "f64": 8, "f16": 2, "bf16": 2, "u8": 1, "i8": 1, "i32": 4, "i64": 8}
    every = [(f"t.{dtype}", dtype, [3, 5], 15 * size) for dtype, size in sizes.items()]
    yield describe(
        "every-dtype", [list(item[:3]) for item in every], good(*every), "SP-8.3-3: the whole registry"
    )
    yield describe("none", [], good(), "SP-8.3-1: no tensors is allowed here; the schema decides")
    limit = ["n-_.0", "u8", [constants.MAX_TENSOR_BYTES]]
    yield describe(
        "largest", [limit], good((*limit, constants.MAX_TENSOR_BYTES)), "SP-8.3-5: as long as a bin can be"
    )
    six = ["x", "u8", [1, 1, 1, 1, 1, 2]]
    yield describe("six-dimensions", [six], good(("x", "u8", [1, 1, 1, 1, 1, 2], 2)), "SP-8.3-5")
    for name, value, notes in (
        ("not-a-list", {"x0": 1}, "SP-8.3-1"),
        ("not-three", [["x0", "f32"]], "SP-8.3-1: no shape"),
        ("four", [[*one, 1]], "SP-8.3-1: a fourth entry"),
        ("name-empty", [["", "f32", [1]]], "SP-8.3-4"),
        ("name-upper", [["X0", "f32", [1]]], "SP-8.3-4"),
        ("name-slash", [["x/0", "f32", [1]]], "SP-8.3-4"),
        ("name-long", [["x" * 65, "f32", [1]]], "SP-8.3-4: 65 characters"),
        ("name-twice", [one, one], "SP-8.3-4: names are unique"),
        ("dtype-unknown", [["x0", "f128", [1]]], "SP-8.3-3"),
        ("dtype-numpy", [["x0", "<f4", [1]]], "SP-8.3-3"),
        ("dtype-object", [["x0", "object", [1]]], "SP-8.3-3"),
        ("no-dimensions", [["x0", "f32", []]], "SP-8.3-5: a scalar is [1]"),
        ("seven-dimensions", [["x0", "f32", [1] * 7]], "SP-8.3-5"),
        ("zero", [["x0", "f32", [4, 0]]], "SP-8.3-5"),
        ("negative", [["x0", "f32", [-1]]], "SP-8.3-5"),
        ("float-dimension", [["x0", "f32", [4.0]]], "SP-8.3-5"),
        ("bool-dimension", [["x0", "f32", [True]]], "SP-8.3-5"),
        ("dimension-2-32", [["x0", "u8", [1 << 32]]], "SP-8.3-5: one dimension beyond 32 bits"),
        (
            "product-overflows",
            [["x0", "u8", [1 << 31, 1 << 31, 1 << 31]]],
            "SP-8.3-5: 2^93 octets, 0 in 64 bits",
        ),
        ("one-octet-too-long", [["x0", "u8", [1 << 16, 1 << 16]]], "SP-8.3-5: 2^32 octets"),
        (
            "too-many",
            [[f"t{n}", "u8", [1]] for n in range(constants.MAX_TENSORS + 1)],
            "SP-8.3-5: 257 tensors",
        ),
    ):
        yield describe(name, value, bad, notes)

    for length, head in (
        (1, "c401"), (255, "c4ff"), (256, "c50100"), (65535, "c5ffff"), (65536, "c600010000"),
        (4718592, "c600480000"), (constants.MAX_TENSOR_BYTES, "c6ffffffff"),
    ):  # fmt: skip
        yield {
            "name": f"bin-{length}",
            "operation": "bin-head",
            "notes": "SP-8.3-2",
            "length": length,
            "expect": {"head": head},
        }
    too_long = {"length": constants.MAX_TENSOR_BYTES + 1, "expect": refused("codec", "codec")}
    yield {"name": "bin-too-long", "operation": "bin-head", "notes": "SP-8.3-5", **too_long}

    def body(name: str, arrays: list[tuple[str, str, list[int], bytes]], expect: str, notes: str) -> Case:
        keys = ("name", "dtype", "shape", "values")
        listed = [dict(zip(keys, (*item[:3], item[3].hex()), strict=True)) for item in arrays]
        return {
            "name": name,
            "operation": "body",
            "notes": notes,
            "tensors": listed,
            "expect": {"body": expect},
        }

    numbers = SMALL.tobytes()
    whole = small_activations()[1].hex()
    yield body(
        "small",
        [("x4", "f32", [2, 2], numbers)],
        whole,
        "SP-8.3-2: [[1, -2], [0.5, 0]]: little-endian, C order",
    )
    pair = [("x0", "u8", [3], b"\1\2\3"), ("x1", "i64", [1], (-2).to_bytes(8, "little", signed=True))]
    yield body("two", pair, "c403010203c408feffffffffffffff", "SP-8.3-2: one bin after the other, no padding")

    halves = {
        "3f800000": "3f80", "c0000000": "c000", "3f808000": "3f80", "3f818000": "3f82", "3f808001": "3f81",
        "7f7fffff": "7f80", "80000000": "8000", "00000001": "0000",
    }  # fmt: skip
    for single, short in halves.items():
        notes = "SP-8.3-3: nearest, ties to even; both as big-endian numbers"
        yield {
            "name": f"bf16-{single}",
            "operation": "bf16",
            "notes": notes,
            "input": single,
            "expect": {"bits": short},
        }
