"""The capture format without files: round trips of a real conversation, damage anywhere, hostile lengths, sealing."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitproto import messages, records
from splitproto.capture import (
    CaptureError,
    CaptureKeyNeeded,
    CaptureReader,
    CaptureTampered,
    CaptureTruncated,
    CaptureVersion,
    CaptureWriter,
    Header,
    Party,
    Recorded,
)
from splitproto.errors import CodecError
from splitproto.events import Received
from splitproto.states import Side

KEY, SALT = bytes(range(32)), bytes(range(32, 64))
HEADER = Header(
    "coordinator",
    "hub",
    "fed",
    "test",
    1.5,
    run=bytes(16),
    peers=(Party("charite", (records.Seat("t1", ("t1",)),), ("dropout:0.5",)),),
)
ARRAYS = {"x0": np.arange(24, dtype="<f4").reshape(2, 3, 4), "x4": np.full((1, 2), 7, "<u2")}
SAMPLE = records.Sample(bytes(range(16)), (0, -3, 7))
SAID = (
    ("out", messages.Forward("train", 1, 0, (SAMPLE,), bytes(32), 7)),
    ("in", messages.Activations("train", 1, 0, bytes(32), ARRAYS)),
    ("out", messages.Gradients(1, ARRAYS)),
    ("in", messages.Applied(1)),
)


def written(key: bytes | None = None, *, end: bool = True) -> tuple[bytes, list[int]]:
    """A small capture, and where each record begins."""
    writer = CaptureWriter(HEADER, key, SALT if key else None)
    pieces = [b"".join(writer.start())]
    for n, (direction, message) in enumerate(SAID):
        pieces.append(b"".join(writer.message(message, time=2.0 + n, peer="charite", direction=direction)))
    pieces.append(b"".join(writer.gap(time=9.0, reason="queue", records=2, octets=10)))
    if end:
        pieces.append(b"".join(writer.end(time=10.0, reason="closed")))
    places = [sum(map(len, pieces[:n])) for n in range(len(pieces))]
    return b"".join(pieces), places


def read(octets: bytes, key: bytes | None = None) -> list[Any]:
    """All records, tensors included."""
    reader, found = CaptureReader(key), []
    for record in reader.over(octets):
        if isinstance(record, Recorded):
            assert record.message is not None
        found.append(record)
    return found


def fed(octets: bytes) -> None:
    """All at once, then nothing more."""
    reader = CaptureReader()
    reader.receive_data(octets)
    reader.close()


def same(one: messages.Message, other: messages.Message) -> bool:
    """Equal, tensors to the bit."""
    ours, theirs = messages.encode(one), messages.encode(other)
    return ours[0] == theirs[0] and b"".join(ours[1]) == b"".join(theirs[1])


@pytest.mark.parametrize("key", [None, KEY])
def test_both_roles_record_one_conversation(
    make_pair: Callable[..., Any], example: Callable[[str], messages.Message], key: bytes | None
) -> None:
    pair = make_pair()
    clock = count(1)
    files = {side: CaptureWriter(HEADER, key, SALT if key else None) for side in Side}
    octets = {side: b"".join(files[side].start()) for side in Side}

    def note(side: Side, direction: str, message: messages.Message) -> None:
        record = files[side].message(message, time=float(next(clock)), peer="x", direction=direction)
        octets[side] += b"".join(record)

    pair.establish()
    for side, name in (
        (Side.COORDINATOR, "job-offer"),
        (Side.CLIENT, "job-accept"),
        (Side.CLIENT, "inventory"),
        (Side.COORDINATOR, "begin"),
        (Side.COORDINATOR, "forward"),
        (Side.CLIENT, "activations"),
        (Side.COORDINATOR, "gradients"),
        (Side.CLIENT, "applied"),
        (Side.COORDINATOR, "progress"),
    ):
        message = example(name)
        note(side, "out", message)
        pair.of(side).send(message)
        pair.exchange()
        for event in pair.take(side.other):
            if isinstance(event, Received):
                note(side.other, "in", event.message)
                pair.of(side.other).release(event.octets)
    ours, theirs = (list(CaptureReader(key).over(octets[side]))[1:] for side in Side)
    assert len(ours) == len(theirs) == 9
    for one, other in zip(ours, theirs, strict=True):
        assert {one.direction, other.direction} == {"in", "out"}
        assert same(one.message, other.message)


def test_tensors_are_views_of_the_file() -> None:
    octets, _ = written()
    _, _, activations, *_ = read(octets)
    (array, other) = activations.message.tensors.values()
    assert np.shares_memory(array, np.frombuffer(octets, "u1"))
    assert not array.flags.writeable
    assert other.dtype == np.dtype("<u2")
    assert activations.octets == 2 + 96 + 2 + 4
    assert activations.head.tensors == {}


def test_writing_refers_to_tensors_and_does_not_copy_them() -> None:
    writer = CaptureWriter(HEADER)
    writer.start()
    array = np.arange(8, dtype="<f4")
    buffers = writer.message(messages.Gradients(1, {"x0": array}), time=1.0, peer="a", direction="out")
    assert any(np.shares_memory(array, np.frombuffer(b, "u1")) for b in buffers if len(b) == 32)


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_fed_in_pieces(key: bytes | None, size: int) -> None:
    octets, places = written(key)
    reader, found = CaptureReader(key), []
    for at in range(0, len(octets), size):
        found += reader.receive_data(octets[at : at + size])
    reader.close()
    whole = read(octets, key)
    assert len(found) == len(whole) == len(places)
    for one, other in zip(found, whole, strict=True):
        if isinstance(one, Recorded):
            assert same(one.message, other.message)
        else:
            assert one == other
    assert reader.end == whole[-1]


# --- damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, KEY])
@given(data=st.data())
def test_a_changed_octet_is_never_accepted(key: bytes | None, data: st.DataObject) -> None:
    octets, places = written(key)
    at = data.draw(st.integers(0, len(octets) - 1))
    changed = bytearray(octets)
    changed[at] ^= data.draw(st.integers(1, 255))
    found: list[Any] = []
    reader = CaptureReader(key)
    with pytest.raises(CaptureError):
        found.extend(reader.over(bytes(changed)))
    # What was given out before is what was written.
    assert len(found) <= sum(place <= at for place in places)


def test_every_octet_changed_is_never_accepted_without_the_key() -> None:
    octets, _ = written(KEY)
    for at in range(len(octets)):
        changed = octets[:at] + bytes([octets[at] ^ 0x40]) + octets[at + 1 :]
        with pytest.raises(CaptureError):
            list(CaptureReader(blind=True).over(changed))


@pytest.mark.parametrize("key", [None, KEY])
def test_cut_anywhere_all_records_before_are_read(key: bytes | None) -> None:
    octets, places = written(key)
    for at in range(len(octets)):
        reader, found = CaptureReader(key), 0
        try:
            for _ in reader.over(octets[:at]):
                found += 1
            cut = False
        except CaptureTruncated:
            cut = True
        assert found == sum(place <= at for place in places[1:])
        assert cut == (at not in places[1:])
        assert reader.end is None


def test_somebody_without_the_key_cannot_edit_and_mend_the_chain() -> None:
    octets, places = written(KEY)
    # Another header in front: the first seal was made after another chain.
    other = b"".join(CaptureWriter(Header("client", "hub", "fed", "test", 1.5), KEY, SALT).start())
    with pytest.raises(CaptureTampered, match="after it was sealed"):
        read(other + octets[places[1] :], KEY)


def test_another_key_or_none() -> None:
    octets, _ = written(KEY)
    with pytest.raises(CaptureKeyNeeded, match="another key"):
        read(octets, bytes(32))
    with pytest.raises(CaptureKeyNeeded, match="give the key"):
        read(octets)
    assert KEY not in octets
    assert ARRAYS["x0"].tobytes() not in octets


def test_not_a_capture() -> None:
    for octets in (b"PK\x03\x04" + bytes(100), b"{", b"SPLTCAP0" + bytes(50)):
        with pytest.raises(CaptureVersion) as caught:
            read(octets)
        assert "\n" not in str(caught.value)


def test_lengths_never_take_memory() -> None:
    octets, places = written()
    start = octets[: places[1]]
    for envelope, body in ((0xFFFFFFFF, 0), (1 << 20, 1 << 40), (100, (1 << 64) - 1)):
        lengths = envelope.to_bytes(4, "big") + body.to_bytes(8, "big")
        tracemalloc.start()
        with pytest.raises(CaptureError):
            fed(start + lengths + bytes(1000))
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert taken < 1 << 20


def test_a_wrong_body_length_is_known_before_the_body_came() -> None:
    octets, places = written()
    at = places[2] + 4
    lengths = (1 << 39).to_bytes(8, "big")
    with pytest.raises(CaptureTampered, match="where 104 belong"):
        CaptureReader().receive_data(octets[:at] + lengths + octets[at + 8 :])


# --- writing ----------------------------------------------------------------------------------------------


def test_taking_back_goes_on_as_if_nothing_had_been() -> None:
    writer, other = CaptureWriter(HEADER), CaptureWriter(HEADER)
    for one in (writer, other):
        one.start()
    writer.message(SAID[1][1], time=1.0, peer="a", direction="in")
    writer.take_back()
    ends = [b"".join(one.end(time=1.0, reason="disk")) for one in (writer, other)]
    assert ends[0] == ends[1]


def test_two_salts_share_nothing() -> None:
    one = b"".join(CaptureWriter(HEADER, KEY, SALT).start())
    other = b"".join(CaptureWriter(HEADER, KEY, bytes(32)).start())
    headers = [next(CaptureReader(KEY).over(octets)) for octets in (one, other)]
    assert headers[0].check != headers[1].check


@pytest.mark.parametrize(
    ("header", "cause"),
    [
        (Header("coordinator", "a\nb", "f", "g", 0.0), "cannot be printed"),
        (Header("coordinator", "a", "f", "g", float("nan")), "not a finite float64"),
        (Header("coordinator", "a", "f", "g", 0.0, run=b"short"), "not 16 octets"),
    ],
)
def test_a_header_that_is_not_carried(header: Header, cause: str) -> None:
    with pytest.raises(CodecError, match=cause):
        CaptureWriter(header).start()


def test_a_header_that_contradicts_itself() -> None:
    with pytest.raises(CodecError, match="exactly if"):
        Header("coordinator", "a", "f", "g", 0.0, part=1)
    with pytest.raises(CodecError, match="exactly if"):
        Header("coordinator", "a", "f", "g", 0.0, encryption="aes-256-gcm")


def test_order_of_calls() -> None:
    writer = CaptureWriter(HEADER)
    with pytest.raises(ValueError, match="begins with its header"):
        writer.gap(time=1.0, reason="queue", records=1, octets=0)
    writer.start()
    with pytest.raises(ValueError, match="one header"):
        writer.start()
    writer.end(time=1.0, reason="closed")
    with pytest.raises(ValueError, match="nothing follows its end"):
        writer.end(time=1.0, reason="closed")
