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
    for name, octets, text, notes in (
        ("not-utf8", b"a\xffb", "a\ufffdb", "SP-4-5: octets that are not UTF-8 become U+FFFD"),
        ("controls", "a\x00\x1b[31m\x7f\x9bb".encode(), "a??[31m??b", "SP-4-5: C0, DEL and C1 controls"),
        ("separators", "a\u2028\u2029b".encode(), "a??b", "SP-4-5: line and paragraph separators"),
        ("directions", "\u202eabc\u2066".encode(), "?abc?", "SP-4-5: overrides and isolates"),
        ("byte-order-mark", "\ufeffabc".encode(), "?abc", "SP-4-5: a decoder must not drop it unseen"),
        ("fixed-ranges", "\U0001fae8\u0378\u00a0\ue000".encode(), "\U0001fae8\u0378\u00a0\ue000",
         "SP-8.2-5: printable at every version of Unicode"),
    ):  # fmt: skip
        body = LINK + bytes(8) + b"\x01\x00" + octets
        yield case(f"reset-text-{name}", b"SPLT\x01\x03\0\0" + body, reset(1, [], text), notes)
    longest = b"SPLT\x01\x03\0\0" + LINK + bytes(8) + b"\x01\x00" + "é".encode() * 100
    yield case("reset-text-longest", longest, reset(1, [], "é" * 100), "SP-4-5: 200 octets, 100 characters")
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
    exact, _ = messages.encode(
        messages.Activations("train", 1, 0, bytes(32), {"x4": np.zeros((8189,), "u1")})
    )
    filling = b"\xc5" + (8189).to_bytes(2, "big") + bytes(8189)
    whole = frame(FrameType.HEAD, 101, exact) + frame(FrameType.BODY, 101, filling, end=True)
    yield case(
        "message-largest",
        whole,
        good("activations"),
        "SP-7-8: 8192 octets with the bin head, exactly the limit",
    )
    over, _ = messages.encode(messages.Activations("train", 1, 0, bytes(32), {"x4": np.zeros((8190,), "u1")}))
    yield case(
        "message-one-octet-too-large", frame(FrameType.HEAD, 101, over), bad("message-too-large"), "SP-7-8"
    )
    rest, _ = messages.encode(messages.Activations("train", 1, 0, bytes(32), {"x4": np.zeros((2186,), "u1")}))
    more, _ = messages.encode(messages.Activations("train", 1, 0, bytes(32), {"x4": np.zeros((2187,), "u1")}))
    fill = frame(FrameType.HEAD, 101, half), (6000).to_bytes(2, "big")
    taken = fill[0] + frame(FrameType.BODY, 101, b"\xc5" + fill[1] + bytes(6000), end=True)
    last = frame(FrameType.BODY, 103, b"\xc5" + (2186).to_bytes(2, "big") + bytes(2186), end=True)
    yield case("credit-to-the-last-octet", taken + frame(FrameType.HEAD, 103, rest) + last,
               good("activations", "activations"), "SP-7-8: 6003 and 2189 octets, credit is 8192")  # fmt: skip
    yield case(
        "credit-one-octet-beyond", taken + frame(FrameType.HEAD, 103, more), bad("flow-control"), "SP-7-8"
    )
    yield case("credit-not-back", taken + frame(FrameType.HEAD, 103, half), bad("flow-control"),
               "SP-7-9: a message that arrived whole is not one that was taken")  # fmt: skip
    sixteen = b"".join(frame(FrameType.HEAD, 101 + 2 * n, head) for n in range(constants.MAX_STREAMS))
    yield case("streams-sixteen", sixteen, good(), "SP-7-10: sixteen half received are allowed")
    yield case(
        "ids-left-out", said(4294967295, applied), good("applied"), "SP-7-5: ids may be left out; the highest"
    )
    yield case(
        "error-retry", said(101, messages.Error(0x0601, "")), {"ended_by": 0x0601, "retry": True}, "SP-12-2"
    )
    yield case("error-unknown", said(101, messages.Error(0x7777, "")), {"ended_by": 0x7777, "retry": False},
               "SP-12-2: a code that is not in the registry is final")  # fmt: skip
    yield case("after-bye", said(101, messages.Bye("drain", "")) + said(103, applied),
               bad("unexpected-message", "states"), "SP-7-6, SP-9-3: a bye is the last message")  # fmt: skip
    third, _ = messages.encode(messages.Activations("train", 1, 0, bytes(32), {"x4": np.zeros((1,), "u1")}))
    three = taken + frame(FrameType.HEAD, 103, rest) + last + frame(FrameType.HEAD, 105, third)
    yield case(
        "credit-spent-by-two",
        three,
        bad("flow-control"),
        "SP-7-8: 3 octets more, after all 8192 were charged",
    )
    yield case("credit-spent", both, bad("flow-control"), "SP-7-8: two bodies of 6003 octets, credit is 8192")
    begin = said(101, messages.Begin(0, 1))
    yield case("not-yours", begin, bad("unexpected-message", "states"), "SP-9-1: the coordinator's word")
    hello = said(101, MESSAGES["hello"])
    yield case("too-late", hello, bad("unexpected-message", "states"), "SP-9-1: hello in state working")
    yield case("garbage", frame(FrameType.HEAD, 101, b"\xc1", end=True), bad("codec", "codec"), "SP-8.1-1")


NOTED = {
    "map-order": "SP-8.1-5: the order of keys means nothing and is kept",
    "text-byte-order-mark": "SP-8.1-2: U+FEFF is a character like others: decoders that drop it do not fit",
    "keys-byte-order-mark": "SP-8.1-3: two keys",
    "keys-decomposed": "SP-8.1-3: two keys: text is not normalised",
    "text-decomposed": "SP-8.1-2: text is not normalised",
    "depth-8-empty": "SP-8.1-6: the innermost array stands inside eight",
}

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
        "text-255": "x" * 255, "text-byte-order-mark": "\ufeffa", "text-astral": "\U0001f600" * 2,
        "text-decomposed": "u\u0308", "text-nul": "a\0b",
        "octets": b"\x00\xff", "octets-empty": b"", "octets-255": bytes(255), "octets-256": bytes(256),
        "u16-max": 65535, "u32-max": (1 << 32) - 1, "i8-min": -128, "i16-min": -32768, "i32-min": -(1 << 31),
        "array": [1, "a", [b"", None]], "array-15": [0] * 15, "array-16": [0] * 16,
        "map": {"a": 1, "b": {"c": []}}, "map-empty": {},
        "map-15": {f"k{n:x}": n for n in range(15)}, "map-16": {f"k{n:x}": n for n in range(16)},
        "map-order": {"b": 1, "a": 2},
        "depth-8": [[[[[[[[0]]]]]]]], "depth-8-maps": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": 0}}}}}}}},
        "depth-8-empty": [[[[[[[[[]]]]]]]]], "keys-decomposed": {"\u00e9": 1, "e\u0301": 2},
        "keys-byte-order-mark": {"a": 1, "\ufeffa": 2}, "key-empty": {"": 0},
    }  # fmt: skip
    for name, value in examples.items():
        notes = NOTED.get(name, "SP-8.1-1")
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
        *wide_integers(),
        *wide_lengths(),
        ("int-wide-in-array", "91cc01", "SP-8.1-4: inside, too"),
        ("int-wide-in-map", "81a161cc01", "SP-8.1-4: inside, too"),
        ("key-wide", "81d9016100", "SP-8.1-4: a key as str8"),
        ("text-wide", "d90161", "SP-8.1-4: str8 where fixstr is enough"),
        ("octets-wide", "c5000100", "SP-8.1-4: bin16 where bin8 is enough"),
        ("array-wide", "dc0000", "SP-8.1-4: array16 where fixarray is enough"),
        ("map-wide", "de0000", "SP-8.1-4: map16 where fixmap is enough"),
        ("depth-9", "91" * 9 + "00", "SP-8.1-6: a value inside nine arrays"),
        ("depth-9-empty", "91" * 8 + "9190", "SP-8.1-6: an empty array inside nine"),
        ("depth-9-maps", "81a161" * 9 + "00", "SP-8.1-6: a value inside nine maps"),
        ("float-minus-infinity", "cbfff0000000000000", "SP-8.1-2: not finite"),
        ("float-signalling-nan", "cb7ff0000000000001", "SP-8.1-2: not finite"),
        ("text-utf16", "a4d83dde00", "SP-8.1-2: not UTF-8"),
        ("text-cesu8", "a6eda0bdedb880", "SP-8.1-2: a pair of surrogates is not UTF-8"),
        ("text-overlong", "a2c080", "SP-8.1-2: an overlong form is not UTF-8"),
        ("text-beyond", "a4f4908080", "SP-8.1-2: beyond U+10FFFF"),
        ("key-octets-inside", "81a16181c4016101", "SP-8.1-3: a key that is not text"),
        ("depth-bomb", "91" * 2000 + "00", "SP-8.1-6"),
    ):
        yield case(name, bytes.fromhex(octets), bad, notes)
    key = constants.MAX_TEXT
    for name, letter, length, expect, notes in (
        ("key-longest", b"k", key, None, "SP-8.1-3: 4096 characters"),
        (
            "key-longest-astral",
            "\U0001f600".encode(),
            key,
            None,
            "SP-8.1-3: 4096 code points, 8192 in UTF-16",
        ),
        ("key-too-long", b"k", key + 1, bad, "SP-8.1-3: 4097 characters"),
        ("key-too-long-accents", "é".encode(), key + 1, bad, "SP-8.1-3: 4097 characters"),
    ):
        head = b"\x81\xda" + (length * len(letter)).to_bytes(2, "big")
        short = {"input": head.hex(), "repeat": [letter.hex(), length], "tail": "01"}
        yield {"name": name, "notes": notes, **short, "expect": expect or {"accepted": True}}
    most = constants.MAX_ITEMS
    for count in (most, most + 1):
        verdict: dict[str, Any] = bad if count > most else {"accepted": True}
        array, map_ = ((first + count.to_bytes(4, "big")).hex() for first in (b"\xdd", b"\xdf"))
        notes = f"SP-8.1-6: {count} entries, at most {most} are allowed"
        yield {
            "name": f"array-{count}",
            "notes": notes,
            "input": array,
            "repeat": ["00", count],
            "expect": verdict,
        }
        yield {"name": f"map-{count}", "notes": notes, "input": map_, "entries": count, "expect": verdict}


def wide_integers() -> Iterator[tuple[str, str, str]]:
    """Every form of an integer that is longer than the shortest: at both ends of what the shorter form holds."""
    forms = {"cc": 1, "cd": 2, "ce": 4, "cf": 8}
    signed = {"d0": 1, "d1": 2, "d2": 4, "d3": 8}
    shortest = {0: 0, 127: 0, 128: 1, 255: 1, 256: 2, 65535: 2, 65536: 4, (1 << 32) - 1: 4}
    for value, size in shortest.items():
        for head, width in forms.items():
            if width > size:
                yield f"int-{value}-as-{head}", head + value.to_bytes(width, "big").hex(), "SP-8.1-4"
        for head, width in signed.items():
            if value < 1 << 8 * width - 1:
                octets = value.to_bytes(width, "big", signed=True).hex()
                yield f"int-{value}-as-{head}", head + octets, "SP-8.1-4: not negative, in a signed form"
    for value, size in {-1: 0, -32: 0, -33: 1, -128: 1, -129: 2, -32768: 2, -32769: 4, -(1 << 31): 4}.items():
        for head, width in signed.items():
            if width > size:
                yield (
                    f"int-minus-{-value}-as-{head}",
                    head + value.to_bytes(width, "big", signed=True).hex(),
                    "SP-8.1-4",
                )


def wide_lengths() -> Iterator[tuple[str, str, str]]:
    """Every form of a length that is longer than the shortest."""
    families = {
        "text": ({31: 0, 255: 1, 256: 2}, {"d9": 1, "da": 2, "db": 4}, ["61"]),
        "octets": ({0: 1, 255: 1, 256: 2}, {"c4": 1, "c5": 2, "c6": 4}, ["00"]),
        "array": ({0: 0, 15: 0, 16: 2}, {"dc": 2, "dd": 4}, ["00"]),
        "map": ({0: 0, 15: 0, 16: 2}, {"de": 2, "df": 4}, [f"a16{n:x}00" for n in range(16)]),
    }
    for family, (lengths, forms, items) in families.items():
        for length, size in lengths.items():
            body = "".join(items[n % len(items)] for n in range(length))
            for head, width in forms.items():
                if width > size:
                    octets = head + length.to_bytes(width, "big").hex() + body
                    yield f"{family}-{length}-as-{head}", octets, "SP-8.1-4"


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
    sizes = {"f32": 4, "f64": 8, "f16": 2, "bf16": 2, "u8": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8}
    every = [(f"t.{dtype}", dtype, [3, 5], 15 * size) for dtype, size in sizes.items()]
    yield describe(
        "every-dtype", [list(item[:3]) for item in every], good(*every), "SP-8.3-3: the whole registry"
    )
    yield describe("none", [], good(), "SP-8.3-1: no tensors is allowed here; the schema decides")
    limit = ("n-_.0", "u8", [constants.MAX_TENSOR_BYTES])
    yield describe(
        "largest",
        [list(limit)],
        good((*limit, constants.MAX_TENSOR_BYTES)),
        "SP-8.3-5: as long as a bin can be",
    )
    six = ["x", "u8", [1, 1, 1, 1, 1, 2]]
    yield describe("six-dimensions", [six], good(("x", "u8", [1, 1, 1, 1, 1, 2], 2)), "SP-8.3-5")
    for name, value, notes in (
        ("not-a-list", {"x0": 1}, "SP-8.3-1"),
        ("not-three", [["x0", "f32"]], "SP-8.3-1: no shape"),
        ("four", [[*one, 1]], "SP-8.3-1: a fourth entry"),
        ("name-empty", [["", "f32", [1]]], "SP-8.3-4"),
        ("name-space", [["x 0", "f32", [1]]], "SP-8.3-4"),
        ("name-backslash", [["x\\0", "f32", [1]]], "SP-8.3-4"),
        ("name-accent", [["é", "f32", [1]]], "SP-8.3-4"),
        ("name-long", [["x" * 129, "f32", [1]]], "SP-8.3-4: 129 characters"),
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
        "7f7fffff": "7f80", "80000000": "8000", "00000001": "0000", "7f7f7fff": "7f7f", "7f7f8000": "7f80",
        "ff7fffff": "ff80", "7f800000": "7f80", "ff800000": "ff80", "0000ffff": "0001", "00008000": "0000",
        "00018000": "0002", "00017fff": "0001", "bf808001": "bf81", "bf808000": "bf80", "00800000": "0080",
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
    for single in ("7fc00000", "ffc00000", "7f800001", "ff800001", "7fffffff", "ffffffff", "7fbfffff"):
        yield {
            "name": f"bf16-nan-{single}",
            "operation": "bf16",
            "notes": "SP-11.8-3: a NaN stays one: neither infinity nor a number; which, is free",
            "input": single,
            "expect": {"nan": True},
        }
    # 1, -2 and 0.5 in every dtype of floats, -2 and 1 in every one of integers.
    for dtype, values, notes in (
        ("f64", struct.pack("<3d", 1, -2, 0.5), "binary64"),
        ("f16", bytes.fromhex("003c00c00038"), "binary16"),
        ("bf16", bytes.fromhex("803f00c0003f"), "the upper half of a binary32"),
        ("i8", b"\xfe\x01\x00", "two's complement"),
        ("i16", struct.pack("<3h", -2, 1, 0), "two's complement"),
        ("i32", struct.pack("<3i", -2, 1, 0), "two's complement"),
    ):
        head = bytes((0xC4, len(values))).hex()
        yield body(f"values-{dtype}", [("x", dtype, [3], values)], head + values.hex(), f"SP-8.3-3: {notes}")
    order = [("x1", "u8", [1], b"\2"), ("x0", "u8", [1], b"\1")]
    yield body(
        "as-announced", order, "c40102c40101", "SP-8.3-2: in the order of the descriptors, not of names"
    )
    rows = [("x", "u8", [2, 3], bytes(range(6)))]
    yield body("c-order", rows, "c406000102030405", "SP-8.3-3: the last dimension varies fastest")

    def fits(name: str, described: list[Any], sent: list[Any], notes: str, error: str = "") -> Case:
        expect = refused(error, "semantics") if error else {"fits": True}
        return {
            "name": name,
            "operation": "agreed",
            "notes": notes,
            "agreed": described,
            "sent": sent,
            "expect": expect,
        }

    agreed: list[list[Any]] = [["x0", "f32", [2, 4, 32, 32]], ["x4", "f32", [2, 8, 2, 2]]]
    mismatch = "schema-mismatch"
    yield fits("agreed", agreed, agreed, "SP-11-9")
    yield fits("agreed-order", agreed, agreed[::-1], "SP-11-9: the order of the job's levels", mismatch)
    yield fits("agreed-lacking", agreed, agreed[1:], "SP-11-9: a level is missing", mismatch)
    yield fits("agreed-more", agreed[1:], agreed, "SP-11-9: a level too many", mismatch)
    yield fits("agreed-none", agreed, [], "SP-11-9: no tensors", mismatch)
    for name, place, wrong in (
        ("name", 0, "x3"), ("dtype", 1, "bf16"), ("integers", 1, "i32"), ("samples", 2, [1, 8, 2, 2]),
        ("transposed", 2, [8, 2, 2, 2]), ("flat", 2, [64]),
    ):  # fmt: skip
        other = [*agreed[1]]
        other[place] = wrong
        yield fits(f"agreed-other-{name}", agreed, [agreed[0], other], "SP-11-9, SP-11-10", mismatch)
