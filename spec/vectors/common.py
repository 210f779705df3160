"""What the generators of the test vectors share: fixed inputs, and the notation of values in JSON."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

Case = dict[str, Any]

# What the examples speak of; every number is arbitrary but fixed.
LINK = bytes(range(0xA0, 0xB0))
RUN = bytes(range(0x10, 0x20))
INCARNATION = bytes(range(0x20, 0x30))
KEY = bytes(range(0x30, 0x40))
OTHER_KEY = bytes(range(0x40, 0x50))
SALT = bytes(range(32))
DIALLER = hashlib.sha256(b"the dialler's certificate").digest()
LISTENER = hashlib.sha256(b"the listener's certificate").digest()
SEED = 0x0123456789ABCDEF
SMALL = np.array([[1.0, -2.0], [0.5, 0.0]], "<f4")
TINY = np.array([[[[0], [1]], [[1], [1]]]], "u1")
"""A mask [regions, x, y, z]."""


def as_json(value: Any) -> Any:
    """The notation of values: what JSON cannot tell apart is an object with one key."""
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 53 else {"int": str(value)}
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {"map": {key: as_json(item) for key, item in value.items()}}
    return [as_json(item) for item in value]


def refused(name: str, layer: str) -> dict[str, str]:
    """What a negative case expects."""
    return {"error": name, "layer": layer}
