"""Descriptors, dtypes and digests of tensors: sizes are checked before memory is allocated."""

from __future__ import annotations

import hashlib
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitproto import tensors
from splitproto.constants import MAX_TENSOR_BYTES, MAX_TENSORS
from splitproto.errors import TensorError
from splitproto.tensors import DTYPES, Descriptor, read_descriptors, wire_view


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "bf16"])
def test_every_dtype_is_described_and_read_back(dtype: str) -> None:
    array = np.arange(6).reshape(1, 2, 3).astype(DTYPES[dtype])
    described = Descriptor.of("level0", array)
    assert described == Descriptor("level0", dtype, (1, 2, 3))
    assert Descriptor.from_wire(described.to_wire()) == described
    octets = wire_view(array)
    assert len(octets) == described.nbytes == array.nbytes
    np.testing.assert_array_equal(np.frombuffer(octets, DTYPES[dtype]).reshape(1, 2, 3), array)


def test_bf16_is_sixteen_bits_that_numpy_sees_as_unsigned() -> None:
    ones = np.full((2, 2), 0x3F80, np.uint16)
    described = Descriptor.of("x", ones)
    assert (described.dtype, described.nbytes) == ("bf16", 8)
    assert bytes(wire_view(ones)) == b"\x80\x3f" * 4


def test_octets_are_little_endian_c_order_whatever_the_array() -> None:
    plain = np.arange(6, dtype="<i4").reshape(2, 3)
    for other in (plain.astype(">i4"), np.asfortranarray(plain), np.repeat(plain, 2, axis=1)[:, ::2]):
        assert bytes(wire_view(other)) == plain.tobytes()
        assert Descriptor.of("x", other) == Descriptor("x", "i32", (2, 3))


def test_contiguous_arrays_are_not_copied() -> None:
    array = np.zeros((4, 4), np.float32)
    view = wire_view(array)
    array[0, 0] = 1
    assert bytes(view[:4]) == array[0, 0].tobytes()


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        [],
        ["x", "f32"],
        ["x", "f32", [1], 0],
        [1, "f32", [1]],
        [b"x", "f32", [1]],
        ["", "f32", [1]],
        ["x" * 129, "f32", [1]],
        ["Ébene", "f32", [1]],
        ["a b", "f32", [1]],
        ["a\\b", "f32", [1]],
        ["a\n", "f32", [1]],
        ["x", "f31", [1]],
        ["x", 4, [1]],
        ["x", None, [1]],
        ["x", "f32", []],
        ["x", "f32", [1] * 7],
        ["x", "f32", 1],
        ["x", "f32", [0]],
        ["x", "f32", [-1]],
        ["x", "f32", [1.0]],
        ["x", "f32", [True]],
        ["x", "f32", ["1"]],
        ["x", "f32", [1 << 32]],
        ["x", "f32", [1 << 63, 1 << 63, 0]],
        ["x", "u8", [1 << 16, 1 << 16]],
        ["x", "u8", [(1 << 32) - 1] * 6],
        ["x", "f32", [1 << 30]],
        ["x", "f64", [1 << 29]],
    ],
    ids=str,
)
def test_malformed_descriptors_are_refused(value: Any) -> None:
    with pytest.raises(TensorError):
        Descriptor.from_wire(value)


def test_the_longest_tensor_a_bin_holds() -> None:
    assert Descriptor.from_wire(["x", "u8", [(1 << 32) - 1]]).nbytes == MAX_TENSOR_BYTES


@given(
    st.recursive(st.none() | st.integers() | st.text() | st.binary() | st.floats(), st.lists, max_leaves=12)
)
def test_any_value_raises_nothing_but_tensor_error(value: Any) -> None:
    try:
        read_descriptors(value)
    except TensorError:
        return
    assert value == []


def test_names_are_unique_and_few() -> None:
    one = ["x", "u8", [1]]
    with pytest.raises(TensorError):
        read_descriptors([one, one])
    many = [[f"x{n}", "u8", [1]] for n in range(MAX_TENSORS + 1)]
    assert len(read_descriptors(many[:-1])) == MAX_TENSORS
    with pytest.raises(TensorError):
        read_descriptors(many)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((), np.float32),
        np.zeros((0, 3), np.float32),
        np.zeros((1,) * 7, np.float32),
        np.zeros(3, np.complex64),
        np.zeros(3, bool),
        np.zeros(3, object),
        np.zeros(3, "U3"),
        np.zeros(3, np.uint32),
        np.zeros(3, [("a", "f4")]),
        np.zeros(3, "M8[s]"),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_without_a_place_on_the_wire_are_refused(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(TensorError):
        Descriptor.of("x", array)


def test_body_counts_every_bin_head() -> None:
    described = read_descriptors([["a", "u8", [255]], ["b", "u8", [256]], ["c", "f32", [1 << 16]]])
    whole = b"".join(msgpack.packb(bytes(d.nbytes)) for d in described)
    assert tensors.body_bytes(described) == len(whole)


def test_digest_is_of_the_canonical_descriptors_in_order() -> None:
    """SP-11.8-2."""
    a, b = Descriptor("a", "f32", (2, 3)), Descriptor("b", "bf16", (1,))
    wanted = hashlib.sha256(msgpack.packb([["a", "f32", [2, 3]], ["b", "bf16", [1]]])).digest()
    assert tensors.schema_digest([a, b]) == wanted
    assert tensors.schema_digest([b, a]) != wanted


def test_matches_compares_names_order_shapes_and_dtypes() -> None:
    described = [Descriptor("a", "f32", (2,)), Descriptor("b", "bf16", (1,))]
    a, b = np.zeros(2, np.float32), np.zeros(1, np.uint16)
    assert tensors.matches(described, {"a": a, "b": b})
    assert not tensors.matches(described, {"b": b, "a": a})
    assert not tensors.matches(described, {"a": a})
    assert not tensors.matches(described, {"a": a, "b": b, "c": b})
    assert not tensors.matches(described, {"a": a.astype(np.float64), "b": b})
    assert not tensors.matches(described, {"a": np.zeros((2, 1), np.float32), "b": b})
