"""Codings beyond the vectors: what is lost, and that no sample depends on another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from splitproto import codings
from splitproto.codings import BLOCK, CODINGS

STEPS = {"int8": 127, "int4": 7}
SINGLES = st.floats(width=32, allow_nan=False, allow_infinity=False)
TENSORS = arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=4, max_side=9), elements=SINGLES)


def read(tensor: np.ndarray, coding: str) -> np.ndarray:
    return codings.decode(codings.encode(tensor, coding), coding, tensor.shape[1:])


@pytest.mark.parametrize("coding", CODINGS)
@given(tensor=TENSORS)
@settings(deadline=None)
def test_what_is_read_is_near(coding: str, tensor: np.ndarray) -> None:
    """SP-11.21-3, SP-11.21-4: to half a step of its scale, and f16 to 2^-11 of the value or 2^-39 of the largest."""
    found = read(tensor, coding).astype(np.float64)
    exact = tensor.astype(np.float64)
    assert found.shape == tensor.shape
    rows, near = exact.reshape(len(exact), -1), found.reshape(len(exact), -1)
    largest = np.abs(rows).max()
    if largest > 3e38:
        return  # may be read as infinity, as a vector shows
    if coding == "f16":
        bound = np.abs(rows) * 2**-11 + np.abs(rows).max(axis=1, keepdims=True) * 2.0**-38 + 2.0**-149
    else:
        pad = -rows.shape[1] % BLOCK
        blocks = np.pad(np.abs(rows), ((0, 0), (0, pad))).reshape(len(rows), -1, BLOCK).max(axis=2)
        # A scale is rounded up by less than 2^-7, or to the next of the smallest numbers.
        scales = blocks / STEPS[coding] * (1 + 2**-7) + 2.0**-133
        bound = np.repeat(scales, BLOCK, axis=1)[:, : rows.shape[1]] * 0.5000001
    assert (np.abs(near - rows) <= bound).all()


@pytest.mark.parametrize("coding", CODINGS)
@given(tensor=TENSORS)
@settings(deadline=None)
def test_each_sample_is_coded_by_itself(coding: str, tensor: np.ndarray) -> None:
    """SP-11.21-2."""
    whole = codings.encode(tensor, coding)
    assert whole.shape == (len(tensor), codings.row_octets(coding, tensor[0].size))
    for row, sample in enumerate(tensor):
        assert np.array_equal(codings.encode(sample[None], coding)[0], whole[row])


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_layout_in_memory_is_coded_alike_and_left_alone(coding: str, order: str) -> None:
    tensor = np.random.default_rng(3).normal(size=(2, 5, 4, 7)).astype(np.float32)
    given_ = np.array(tensor, order=order)
    given_.setflags(write=False)
    coded = codings.encode(given_, coding)
    assert np.array_equal(coded, codings.encode(tensor, coding))
    coded.setflags(write=False)
    assert read(tensor, coding).flags.writeable
    assert np.array_equal(codings.decode(coded, coding, (5, 4, 7)), read(tensor, coding))


@pytest.mark.parametrize(("coding", "most"), [("f16", 0.51), ("int8", 0.26), ("int4", 0.135)])
def test_octets_by_those_of_float32(coding: str, most: float) -> None:
    assert codings.row_octets(coding, 32 * 96 * 96) / (4 * 32 * 96 * 96) < most


@pytest.mark.parametrize("coding", CODINGS)
def test_large_tensors_are_worked_on_in_pieces(coding: str) -> None:
    """More blocks than one piece, the last of them short."""
    tensor = np.random.default_rng(5).normal(size=(2, 3 * BLOCK * codings._PIECE // 2 + 5)).astype(np.float32)
    halves = [tensor[:, : BLOCK * codings._PIECE], tensor[:, BLOCK * codings._PIECE :]]
    if coding != "f16":
        together = np.concatenate([read(half, coding) for half in halves], axis=1)
        assert np.array_equal(read(tensor, coding), together)
    assert np.abs(read(tensor, coding) - tensor).max() < np.abs(tensor).max() / 7


@pytest.mark.parametrize("coding", CODINGS)
def test_no_samples_are_no_octets(coding: str) -> None:
    """As of a seat that nobody in a batch has."""
    coded = codings.encode(np.zeros((0, 2, 65), np.float32), coding)
    assert coded.shape == (0, codings.row_octets(coding, 130))
    assert codings.decode(coded, coding, (2, 65)).shape == (0, 2, 65)
