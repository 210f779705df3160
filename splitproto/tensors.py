"""Tensors on the wire: a registry of dtypes, a descriptor per tensor, a digest of what a cut layer sends (SP-8.3).

A tensor travels as one msgpack `bin` after the head of its message: little-endian, C order, no padding.
Its descriptor `[name, dtype, [dims...]]` is in the head, so the receiver checks and allocates first.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import codec
from .constants import MAX_DIMENSIONS, MAX_TENSOR_BYTES, MAX_TENSORS
from .errors import TensorError

Array = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "f64": np.dtype("<f8"),
    "f16": np.dtype("<f2"),
    # bfloat16 has no numpy type: its 16 bits travel as they are, numpy sees unsigned integers.
    "bf16": np.dtype("<u2"),
    "u8": np.dtype("u1"),
    "i8": np.dtype("i1"),
    "i16": np.dtype("<i2"),
    "i32": np.dtype("<i4"),
    "i64": np.dtype("<i8"),
}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-+/")
MAX_NAME = 128


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What one tensor is: name, registry dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Octets of the tensor's values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def to_wire(self) -> list[Any]:
        """`[name, dtype, [dims...]]`."""
        return [self.name, self.dtype, list(self.shape)]

    @classmethod
    def from_wire(cls, value: Any) -> Descriptor:
        """Check and read one descriptor.

        Raises:
            TensorError: malformed, unknown dtype, or too large.
        """
        if type(value) is not list or len(value) != 3:
            raise TensorError("a tensor descriptor is [name, dtype, [dims...]]")
        name, dtype, shape = value
        if type(name) is not str or not 0 < len(name) <= MAX_NAME or not NAME_CHARACTERS.issuperset(name):
            raise TensorError("a tensor name is 1-128 characters of A-Z a-z 0-9 . _ - + /")
        if type(dtype) is not str or dtype not in DTYPES:
            raise TensorError(f"the dtype of tensor {name} is not in the registry ({', '.join(DTYPES)})")
        if type(shape) is not list or not 0 < len(shape) <= MAX_DIMENSIONS:
            raise TensorError(f"tensor {name} has no dimensions, or more than {MAX_DIMENSIONS}")
        # SP-8.3-5: sizes are checked one by one and as a product before any memory is taken.
        if any(type(size) is not int or not 0 < size < 1 << 32 for size in shape):
            raise TensorError(f"tensor {name} has a dimension that is not a positive integer")
        described = cls(name, dtype, tuple(shape))
        if described.nbytes > MAX_TENSOR_BYTES:
            raise TensorError(f"tensor {name} is longer than a msgpack bin can be")
        return described

    @classmethod
    def of(cls, name: str, array: Array) -> Descriptor:
        """The descriptor of `array`; uint16 stands for the bits of bfloat16.

        Raises:
            TensorError: numpy type without a place in the registry.
        """
        known = _NAME_OF.get(array.dtype.newbyteorder("<"))
        if known is None:
            raise TensorError(
                f"tensor {name} has numpy dtype {array.dtype}, which the registry does not carry"
            )
        return cls.from_wire([name, known, list(array.shape)])


def read_descriptors(values: Any) -> tuple[Descriptor, ...]:
    """Check the list of descriptors in a head: names unique, at most `MAX_TENSORS`.

    Raises:
        TensorError: malformed, repeated or too many.
    """
    if type(values) is not list or len(values) > MAX_TENSORS:
        raise TensorError(f"tensors are announced as a list of at most {MAX_TENSORS} descriptors")
    described = tuple(Descriptor.from_wire(value) for value in values)
    if len({d.name for d in described}) != len(described):
        raise TensorError("two tensors of one message have the same name")
    return described


def wire_view(array: Array) -> memoryview:
    """The octets of `array` as they travel; copies only if the array is not little-endian C order."""
    if sys.byteorder != "little" or array.dtype.byteorder == ">":  # pragma: no cover - big-endian machines
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def body_bytes(descriptors: Iterable[Descriptor]) -> int:
    """Octets of a message's BODY: every tensor with its bin head. This is what credit counts."""
    return sum(d.nbytes + len(codec.bin_header(d.nbytes)) for d in descriptors)


def schema_digest(descriptors: Iterable[Descriptor]) -> bytes:
    """SP-11.8-2: SHA-256 of the descriptors' strict msgpack, in order: what both sides of a cut agree on."""
    return hashlib.sha256(codec.encode([d.to_wire() for d in descriptors])).digest()


def matches(descriptors: Iterable[Descriptor], tensors: Mapping[str, Array]) -> bool:
    """Whether `tensors` have exactly the names, shapes and dtypes described."""
    wanted = list(descriptors)
    return [d.name for d in wanted] == list(tensors) and all(
        tensors[d.name].shape == d.shape and tensors[d.name].dtype == DTYPES[d.dtype] for d in wanted
    )
