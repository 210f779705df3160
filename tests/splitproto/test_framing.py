"""Frame headers, cutting and the inbox."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitproto import framing
from splitproto.constants import FRAME_HEADER, MAX_FRAME_PAYLOAD
from splitproto.errors import FrameError
from splitproto.framing import FrameHeader, FrameType, Inbox


def raw(kind: int, flags: int, zero: int, stream: int, length: int) -> bytes:
    return struct.pack(">BBHII", kind, flags, zero, stream, length)


@pytest.mark.parametrize(
    ("octets", "header"),
    [
        ("01 01 0000 00000001 00000005", FrameHeader(FrameType.HEAD, True, 1, 5)),
        (
            "01 00 0000 ffffffff 0003fff4",
            FrameHeader(FrameType.HEAD, False, (1 << 32) - 1, MAX_FRAME_PAYLOAD),
        ),
        ("02 00 0000 00000002 00000001", FrameHeader(FrameType.BODY, False, 2, 1)),
        ("03 00 0000 00000000 00000008", FrameHeader(FrameType.CREDIT, False, 0, 8)),
        ("04 00 0000 00000000 00000008", FrameHeader(FrameType.PING, False, 0, 8)),
        ("05 00 0000 00000000 00000008", FrameHeader(FrameType.PONG, False, 0, 8)),
    ],
)
def test_headers_octet_by_octet(octets: str, header: FrameHeader) -> None:
    data = bytes.fromhex(octets)
    assert framing.decode_header(data) == header
    assert framing.encode_header(header.type, header.stream, header.length, end=header.end) == data


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(raw(0, 0, 0, 1, 1), id="type 0"),
        pytest.param(raw(6, 0, 0, 1, 1), id="type 6"),
        pytest.param(raw(255, 0, 0, 1, 1), id="type 255"),
        pytest.param(raw(1, 2, 0, 1, 1), id="unknown flag"),
        pytest.param(raw(1, 0x81, 0, 1, 1), id="unknown flag beside END"),
        pytest.param(raw(1, 1, 1, 1, 1), id="reserved bits"),
        pytest.param(raw(1, 1, 0x8000, 1, 1), id="reserved high bit"),
        pytest.param(raw(1, 1, 0, 1, MAX_FRAME_PAYLOAD + 1), id="HEAD too long"),
        pytest.param(raw(2, 0, 0, 1, MAX_FRAME_PAYLOAD + 1), id="BODY too long"),
        pytest.param(raw(2, 0, 0, 1, (1 << 32) - 1), id="BODY of 4 GiB"),
        pytest.param(raw(1, 1, 0, 0, 1), id="HEAD on stream 0"),
        pytest.param(raw(2, 1, 0, 0, 1), id="BODY on stream 0"),
        pytest.param(raw(1, 1, 0, 1, 0), id="empty HEAD"),
        pytest.param(raw(3, 0, 0, 1, 8), id="CREDIT on a stream"),
        pytest.param(raw(4, 1, 0, 0, 8), id="PING with END"),
        pytest.param(raw(5, 0, 0, 0, 7), id="PONG of 7 octets"),
        pytest.param(raw(3, 0, 0, 0, 9), id="CREDIT of 9 octets"),
        pytest.param(raw(4, 0, 0, 0, 0), id="PING of 0 octets"),
    ],
)
def test_malformed_headers_are_refused(header: bytes) -> None:
    with pytest.raises(FrameError):
        framing.decode_header(header)


@given(st.binary(min_size=FRAME_HEADER, max_size=FRAME_HEADER))
def test_any_twelve_octets_raise_nothing_but_frame_error(data: bytes) -> None:
    try:
        header = framing.decode_header(data)
    except FrameError:
        return
    assert framing.encode_header(header.type, header.stream, header.length, end=header.end) == data


@given(st.integers(0, (1 << 64) - 1))
def test_numbers_survive(value: int) -> None:
    frame = framing.encode_number(FrameType.CREDIT, value)
    assert framing.decode_header(frame[:FRAME_HEADER]).length == 8
    assert framing.decode_number(frame[FRAME_HEADER:]) == value


@given(st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=8), st.integers(1, 40))
def test_cut_keeps_every_octet_in_full_frames_and_marks_the_last(parts: list[bytes], limit: int) -> None:
    frames = list(framing.cut([memoryview(part) for part in parts], limit))
    assert b"".join(bytes(piece) for pieces, _, _ in frames for piece in pieces) == b"".join(parts)
    assert all(octets == sum(map(len, pieces)) <= limit for pieces, octets, _ in frames)
    assert all(octets == limit for _, octets, _ in frames[:-1])
    assert [end for _, _, end in frames] == [False] * (len(frames) - 1) + [True]


def test_cut_does_not_copy() -> None:
    source = bytearray(100)
    frames = list(framing.cut([memoryview(source)], 30))
    source[:] = b"x" * 100
    assert all(bytes(piece) == b"x" * len(piece) for pieces, _, _ in frames for piece in pieces)


def test_inbox_takes_octets_as_they_come() -> None:
    inbox = Inbox()
    frame = framing.encode_number(FrameType.PING, 7)
    for octet in frame[: FRAME_HEADER - 1]:
        inbox.buffer()[:1] = bytes((octet,))
        assert not inbox.filled(1)
        assert inbox.header is None
    inbox.buffer()[:1] = frame[FRAME_HEADER - 1 : FRAME_HEADER]
    assert inbox.filled(1)
    assert inbox.take_header() == FrameHeader(FrameType.PING, False, 0, 8)
    payload = inbox.payload_small(8)
    for octet in frame[FRAME_HEADER:]:
        inbox.buffer()[:1] = bytes((octet,))
        full = inbox.filled(1)
    assert full and framing.decode_number(payload) == 7
    inbox.next_frame()
    assert inbox.header is None and len(inbox.buffer()) == FRAME_HEADER


def test_inbox_takes_memory_as_frames_need_it() -> None:
    inboxes = [Inbox() for _ in range(20)]
    tracemalloc.start()
    try:
        for inbox in inboxes:
            inbox.payload_small(1000)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 20 * 8192
    for length in (framing.SCRATCH + 1, 3, MAX_FRAME_PAYLOAD, 8):
        payload = inboxes[0].payload_small(length)
        inboxes[0].buffer()[:] = bytes([length % 251]) * length
        assert inboxes[0].filled(length) and bytes(payload) == bytes([length % 251]) * length


def test_inbox_leads_a_payload_into_its_target() -> None:
    inbox = Inbox()
    target = bytearray(5)
    inbox.payload_into(memoryview(target))
    inbox.buffer()[:3] = b"abc"
    assert not inbox.filled(3)
    inbox.buffer()[:2] = b"de"
    assert inbox.filled(2)
    assert target == b"abcde"
