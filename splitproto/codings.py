"""Codings: float32 tensors of a batch in fewer octets, each sample by itself (SP-11.21).

A coded tensor travels as u8 [samples, octets]: for each sample its scales, then its values. What a sample becomes
depends on that sample alone, so it is the same in whichever batch it leaves, and rows can be put together and taken
apart as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import SchemaMismatch, TensorError
from .tensors import Array

CODINGS = ("f16", "int8", "int4")
LEVEL_FORMS = ("f32", "bf16", *CODINGS)
"""What a list may say of a level: a coding, or the job's precision where it has none (SP-11.21-8)."""
Coding = str | tuple[str, ...]
"""One of `CODINGS` for all levels; or one of `LEVEL_FORMS` for each level that is sent, the finest first."""
Form = str | Mapping[str, str]
"""How tensors travel: a precision or one of `CODINGS`, the same for all levels, or by level."""
BLOCK = 64
"""Values that share a scale: 2 octets to 64 make int8 1.03 octets a value, and one outlier costs 63 neighbours."""

_GREATEST = {"int8": 127, "int4": 7}
_INFINITE = 0x7F80
"""bfloat16's infinity; NaNs are above it, and so is, as an unsigned integer, whatever is negative."""
_PIECE = 1 << 12
"""Blocks worked on at a time, so that they stay in the cache: 1 MiB of float32."""

_Octets = NDArray[np.uint8]
_Floats = NDArray[np.float32]


def words(coding: Coding | None) -> tuple[str, ...]:
    """Each that it names; () where nothing is coded."""
    return (coding,) if isinstance(coding, str) else coding or ()


def form_at(form: Form, level: str) -> str:
    """That of one level."""
    return form if isinstance(form, str) else form[level]


def row_octets(coding: str, values: int) -> int:
    """Octets of one coded sample of so many values (SP-11.21-2)."""
    if coding == "f16":
        return 2 + 2 * values
    return 2 * _blocks(values) + (values if coding == "int8" else -(-values // 2))


def encode(tensor: Array, coding: str) -> Array:
    """A tensor of a batch as it travels (SP-11.21-2 to SP-11.21-4).

    Args:
        tensor: f32 [samples, ...].
        coding: one of `CODINGS`.

    Returns:
        u8 [samples, octets].

    Raises:
        TensorError: a value is not finite.
    """
    samples = len(tensor)
    rows = np.ascontiguousarray(tensor, np.float32).reshape(samples, math.prod(tensor.shape[1:]))
    coded = np.empty((samples, row_octets(coding, rows.shape[1])), np.uint8)
    return _to_f16(rows, coded) if coding == "f16" else _to_integers(rows, coded, coding)


def decode(coded: Array, coding: str, shape: Sequence[int]) -> Array:
    """What the receiver reads of it.

    Args:
        coded: as `encode` returns it.
        shape: of one sample.

    Returns:
        f32 [samples, *shape]. Values of f16 that are not finite, and products beyond the greatest float32, are not
        finite either.

    Raises:
        SchemaMismatch: it has another length than a tensor of this shape.
        TensorError: see `check`.
    """
    check(coded, coding, math.prod(shape))
    read = _from_f16 if coding == "f16" else _from_integers
    return read(coded, coding, math.prod(shape)).reshape(len(coded), *shape)


def check(coded: Array, coding: str, values: int) -> None:
    """Look at length and scales, before memory is taken for the values.

    Args:
        values: of one sample.

    Raises:
        SchemaMismatch: not so many values of each sample.
        TensorError: a scale is negative or not finite.
    """
    if coded.dtype != np.uint8 or coded.ndim != 2 or coded.shape[1] != row_octets(coding, values):
        raise SchemaMismatch(f"a tensor coded as {coding} has another length than its values need")
    # SP-11.21-5: "a scale that is negative (also -0), infinite or NaN is `tensor`".
    if (_scale_bits(coded, coding, values) >= _INFINITE).any():
        raise TensorError(f"a scale of a tensor coded as {coding} is negative or not finite")


# --- f16: one scale for each sample --------------------------------------------------------------------------


def _to_f16(rows: _Floats, coded: _Octets) -> _Octets:
    exponents = _greatest_bits(rows) >> 23
    # SP-11.21-3: a power of two, so that scaling rounds nothing; the largest value comes to lie below 2^15.
    bits = (np.maximum(exponents.astype(np.int32) - 14, 1) << 7).astype("<u2")
    coded[:, :2] = bits.reshape(-1, 1).view(np.uint8)
    inverse = 1 / _from_bits(bits)
    coded[:, 2:] = np.multiply(rows, inverse[:, None]).astype("<f2").view(np.uint8)
    return coded


def _from_f16(coded: _Octets, coding: str, values: int) -> _Floats:
    halves = np.ascontiguousarray(coded[:, 2:]).view("<f2").astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        halves *= _from_bits(_scale_bits(coded, coding, values))
    return halves


# --- int8, int4: one scale for each block of values ----------------------------------------------------------


def _to_integers(rows: _Floats, coded: _Octets, coding: str) -> _Octets:
    samples, values = rows.shape
    blocks = _blocks(values)
    if values % BLOCK:
        # SP-11.21-4: "The last block may be shorter": zeros change no scale.
        rows = np.pad(rows, ((0, 0), (0, blocks * BLOCK - values)))
    every = rows.reshape(-1, BLOCK)
    bits, integers = np.empty(len(every), "<u2"), np.empty(every.shape, np.int8)
    for first in range(0, len(every), _PIECE):
        piece = slice(first, first + _PIECE)
        _block_integers(every[piece], _GREATEST[coding], bits[piece], integers[piece])
    coded[:, : 2 * blocks] = bits.view(np.uint8).reshape(samples, 2 * blocks)
    sent = integers.view(np.uint8) if coding == "int8" else _packed(integers)
    octets = blocks * (BLOCK if coding == "int8" else BLOCK // 2)
    coded[:, 2 * blocks :] = sent.reshape(samples, octets)[:, : coded.shape[1] - 2 * blocks]
    return coded


def _block_integers(
    every: _Floats, greatest: int, bits: NDArray[np.uint16], integers: NDArray[np.int8]
) -> None:
    """Scales, bfloat16's bits, and integers of some blocks [blocks, BLOCK]."""
    largest = _greatest_bits(every).view(np.float32)
    # Rounded up, so that no value is beyond the greatest integer.
    bits[:] = ((largest / np.float32(greatest)).view(np.uint32) + 0xFFFF) >> 16
    scales = _from_bits(bits)
    scales[scales == 0] = 1
    quotients = every / scales[:, None]
    integers[:] = np.rint(quotients, out=quotients)


def _from_integers(coded: _Octets, coding: str, values: int) -> _Floats:
    samples, blocks = len(coded), _blocks(values)
    scales = _from_bits(_scale_bits(coded, coding, values))
    sent = coded[:, 2 * blocks :]
    integers = sent.view(np.int8) if coding == "int8" else _unpacked(sent)
    if values % BLOCK:
        padded = np.zeros((samples, blocks * BLOCK), np.int8)
        padded[:, :values] = integers[:, :values]
        integers = padded
    shape = (samples, blocks, BLOCK)
    out = np.empty(shape, np.float32)
    with np.errstate(over="ignore"):
        np.multiply(integers.reshape(shape), scales[..., None], out=out)
    return out.reshape(samples, blocks * BLOCK)[:, :values]


def _packed(integers: NDArray[np.int8]) -> _Octets:
    """Two to an octet, the first in the lower four bits."""
    pairs = integers.view("<u2")
    return ((pairs & 0x0F) | (pairs >> 4 & 0xF0)).astype(np.uint8)


def _unpacked(octets: _Octets) -> NDArray[np.int8]:
    pairs = octets.astype("<u2")
    pairs |= pairs << 4
    pairs &= 0x0F0F
    # Two's complement of four bits: 8 to 15 are -8 to -1.
    pairs ^= 0x0808
    integers = pairs.view(np.int8)
    integers -= 8
    return integers


# --- scales --------------------------------------------------------------------------------------------------


def _blocks(values: int) -> int:
    return -(-values // BLOCK)


def _scale_bits(coded: _Octets, coding: str, values: int) -> NDArray[np.uint16]:
    """bfloat16's bits [samples, scales]."""
    count = 1 if coding == "f16" else _blocks(values)
    return np.ascontiguousarray(coded[:, : 2 * count]).view("<u2")


def _from_bits(bits: NDArray[np.uint16]) -> _Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _greatest_bits(rows: _Floats) -> NDArray[np.uint32]:
    """The bits of each row's largest magnitude: as integers, they are in the order of the magnitudes.

    Raises:
        TensorError: it is not finite.
    """
    greatest: NDArray[np.uint32] = (rows.view(np.uint32) & 0x7FFFFFFF).max(axis=-1)
    # SP-11.21-2: such a value is not sent.
    if (greatest >= _INFINITE << 16).any():
        raise TensorError("a value to be coded is not finite")
    return greatest
