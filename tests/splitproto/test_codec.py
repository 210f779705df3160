"""Strict msgpack: one encoding per value, and nothing but CodecError for anything else."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitproto import codec
from splitproto.constants import MAX_DEPTH, MAX_ITEMS, MAX_TEXT
from splitproto.errors import CodecError

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=40)
    | st.binary(max_size=40)
)


def values(depth: int = MAX_DEPTH - 1) -> st.SearchStrategy[Any]:
    """Every strict value, nested at most `depth` deep."""
    if depth == 0:
        return LEAVES
    deeper = st.deferred(lambda: values(depth - 1))
    return LEAVES | st.lists(deeper, max_size=4) | st.dictionaries(st.text(max_size=10), deeper, max_size=4)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@given(values())
def test_every_strict_value_survives(value: Any) -> None:
    octets = codec.encode(value)
    back = codec.decode(octets)
    assert back == value
    assert codec.encode(back) == octets
    assert octets == msgpack.packb(value)


@given(values())
def test_types_survive_not_only_equality(value: Any) -> None:
    back = codec.decode(codec.encode(value))
    assert type(back) is type(value)
    if isinstance(value, float):
        assert math.copysign(1, back) == math.copysign(1, value)


@given(st.binary(max_size=200))
def test_random_octets_raise_nothing_but_codec_error(data: bytes) -> None:
    try:
        value = codec.decode(data)
    except CodecError:
        return
    assert codec.encode(value) == data


@given(values(3), st.data())
def test_damaged_values_raise_nothing_but_codec_error(value: Any, data: st.DataObject) -> None:
    octets = bytearray(codec.encode(value))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(octets) - 1))
        octets[place] = data.draw(st.integers(0, 255))
    try:
        read = codec.decode(octets)
    except CodecError:
        return
    assert codec.encode(read) == octets


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param("", id="nothing"),
        pytest.param("c1", id="the unused type"),
        pytest.param("c000", id="trailing octets"),
        pytest.param("9201", id="array cut short"),
        pytest.param("a2c3", id="text cut short"),
        pytest.param("c4", id="bin without length"),
        pytest.param("82a16101a16102", id="one key twice"),
        pytest.param("81c4016101", id="bin key"),
        pytest.param("810101", id="integer key"),
        pytest.param("81c001", id="nil key"),
        pytest.param("819101", id="array key"),
        pytest.param("a2c328", id="invalid UTF-8"),
        pytest.param("a3eda080", id="UTF-8 surrogate"),
        pytest.param("d40100", id="fixext"),
        pytest.param("c7000000", id="ext 8 of no octets"),
        pytest.param("d6ff00000000", id="timestamp 32"),
        pytest.param("d7ff0000000000000000", id="timestamp 64"),
        pytest.param("c70cff000000000000000000000000", id="timestamp 96"),
        pytest.param("ca3f800000", id="float32"),
        pytest.param("cb7ff8000000000000", id="NaN"),
        pytest.param("cb7ff0000000000000", id="infinity"),
        pytest.param("cbfff0000000000000", id="minus infinity"),
        pytest.param("cc01", id="wide uint 8"),
        pytest.param("cd0001", id="wide uint 16"),
        pytest.param("cf0000000000000001", id="wide uint 64"),
        pytest.param("d001", id="positive int 8"),
        pytest.param("d0ff", id="wide negative int 8"),
        pytest.param("d90161", id="wide str 8"),
        pytest.param("c5000161", id="wide bin 16"),
        pytest.param("dc000101", id="wide array 16"),
        pytest.param("de0001a16101", id="wide map 16"),
        pytest.param("dd7fffffff", id="array of 2^31-1"),
        pytest.param("df7fffffff", id="map of 2^31-1"),
        pytest.param("c67fffffff", id="bin of 2^31-1"),
        pytest.param("91" * (MAX_DEPTH + 1) + "00", id="too deep"),
        pytest.param("91" * 100_000, id="far too deep"),
        pytest.param("81a161" * 5_000 + "00", id="maps far too deep"),
    ],
)
def test_refused(octets: str) -> None:
    with pytest.raises(CodecError):
        codec.decode(bytes.fromhex(octets))


@pytest.mark.parametrize(
    ("octets", "words"),
    [
        ("82a16101a16102", "one key twice"),
        ("81c4016101", "key that is not a string"),
        ("c70000", "ext type"),
        ("cb7ff8000000000000", "NaN"),
        ("cc01", "not minimally encoded"),
        ("91" * (MAX_DEPTH + 1) + "00", "nesting deeper"),
        ("c000", "not one msgpack value"),
    ],
)
def test_the_error_says_what_is_wrong(octets: str, words: str) -> None:
    with pytest.raises(CodecError, match=words):
        codec.decode(bytes.fromhex(octets))


def test_limits_are_the_last_good_value() -> None:
    assert codec.decode(codec.encode(nested(MAX_DEPTH))) == nested(MAX_DEPTH)
    assert len(codec.decode(codec.encode([0] * MAX_ITEMS))) == MAX_ITEMS
    wide = {str(n): 0 for n in range(MAX_ITEMS)}
    assert codec.decode(codec.encode(wide)) == wide
    assert codec.decode(codec.encode({"k" * MAX_TEXT: 0})) == {"k" * MAX_TEXT: 0}


@pytest.mark.parametrize(
    "octets",
    [
        msgpack.packb([0] * (MAX_ITEMS + 1)),
        msgpack.packb({str(n): 0 for n in range(MAX_ITEMS + 1)}),
        msgpack.packb({"k" * (MAX_TEXT + 1): 0}),
    ],
    ids=["array", "map", "key"],
)
def test_one_more_than_the_limit_is_refused(octets: bytes) -> None:
    with pytest.raises(CodecError):
        codec.decode(octets)


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        1 << 64,
        -(1 << 63) - 1,
        {1: 2},
        {b"k": 2},
        {"k" * (MAX_TEXT + 1): 0},
        object(),
        {1, 2},
        bytearray(b"x"),
        memoryview(b"x"),
        msgpack.Timestamp(1),
        msgpack.ExtType(1, b""),
        "\ud800",
        {"\ud800": 0},
        nested(MAX_DEPTH + 1),
        [0] * (MAX_ITEMS + 1),
        type("Number", (int,), {})(1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_decode_refuses_encode_does_not_make(value: Any) -> None:
    with pytest.raises(CodecError):
        codec.encode(value)


def test_a_short_value_cannot_announce_much_memory() -> None:
    # Each of the 150 nested arrays claims 65,535 entries: 76 MiB if the claims were believed.
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            codec.decode(b"\xdc\xff\xff" * 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("length", [0, 1, 255, 256, 65_535, 65_536, 1 << 20])
def test_bin_header_is_the_one_msgpack_writes(length: int) -> None:
    head = codec.bin_header(length)
    assert head + bytes(length) == msgpack.packb(bytes(length))


def test_bin_header_has_an_end() -> None:
    assert codec.bin_header((1 << 32) - 1) == b"\xc6\xff\xff\xff\xff"
    with pytest.raises(CodecError):
        codec.bin_header(1 << 32)
