"""Strict msgpack: the only module that touches the msgpack library (SP-8.1).

Allowed: nil, bool, int -2^63..2^64-1, float64 (finite), str, bin, array, map with str keys. Refused, where
the library would be silent: duplicate keys, ext types and timestamps, non-string keys, NaN and infinity
outside tensors, float32, nesting beyond `MAX_DEPTH`, non-minimal encodings, trailing octets.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack

from .constants import MAX_DEPTH, MAX_ITEMS, MAX_TEXT
from .errors import CodecError

Value = Any
"""A msgpack value: None, bool, int, float, str, bytes, list or dict; checked at run time, not by the type checker."""


def _pairs(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if type(key) is not str:
            raise CodecError("a map key that is not a string")
        if key in result:
            raise CodecError("a map with one key twice")
        result[key] = value
    return result


def _no_ext(code: int, data: bytes) -> Any:
    raise CodecError("an ext type; only core msgpack types are allowed")


def _check(value: Value, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise CodecError(f"nesting deeper than {MAX_DEPTH}")
    kind = type(value)
    if kind in (dict, list, tuple) and len(value) > MAX_ITEMS:
        raise CodecError(f"a map or list of more than {MAX_ITEMS} entries")
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str or len(key) > MAX_TEXT:
                raise CodecError("a map key that is not a short string")
            _check(item, depth + 1)
    elif kind in (list, tuple):
        for item in value:
            _check(item, depth + 1)
    elif kind is float:
        if not math.isfinite(value):
            raise CodecError("NaN or infinity outside a tensor")
    elif kind is int:
        if not -(1 << 63) <= value < 1 << 64:
            raise CodecError("an integer beyond 64 bits")
    elif kind not in (str, bytes, bool, type(None)):
        raise CodecError(f"a value of type {kind.__name__}, which has no place in a message")


def encode(value: Value) -> bytes:
    """The canonical octets of one value: minimal integers and lengths, maps in the order given.

    Raises:
        CodecError: the value has no strict msgpack form.
    """
    _check(value, 0)
    try:
        result: bytes = msgpack.packb(value, use_bin_type=True)
    except UnicodeEncodeError:
        raise CodecError("text with a lone surrogate, which UTF-8 does not carry") from None
    return result


def decode(data: bytes | bytearray | memoryview) -> Value:
    """Read exactly one value.

    Raises:
        CodecError: not one strict, minimally encoded msgpack value.
    """
    # An entry is at least one octet, so a short value cannot make the library reserve a long list.
    most = min(MAX_ITEMS, len(data))
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            use_list=True,
            object_pairs_hook=_pairs,
            ext_hook=_no_ext,
            max_array_len=most,
            max_map_len=most,
            max_ext_len=0,
        )
    except CodecError:
        raise
    # msgpack raises ValueError and its subclasses, and RecursionError beyond its own nesting limit.
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise CodecError("bytes that are not one msgpack value", detail=str(error)[:200]) from None
    # SP-8.1-4: "Every value has one encoding": re-encoding finds ext timestamps, float32 and wide integers.
    if encode(value) != bytes(data):
        raise CodecError("a value that is not minimally encoded")
    return value


def bin_header(length: int) -> bytes:
    """The msgpack head of a `bin` of `length` octets, so that tensors are written without a copy.

    Raises:
        CodecError: longer than a `bin` can be.
    """
    if length < 1 << 8:
        return bytes((0xC4, length))
    if length < 1 << 16:
        return b"\xc5" + length.to_bytes(2, "big")
    if length < 1 << 32:
        return b"\xc6" + length.to_bytes(4, "big")
    raise CodecError("a tensor longer than a msgpack bin can be; send it in slabs")
