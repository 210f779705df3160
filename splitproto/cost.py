"""How much of its process's time a link has taken so far, by what it was taken for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LinkCost:
    """Seconds since the link began; they only grow. Kept by `Session`, as the core knows no clock."""

    message: float = 0.0
    """Messages to heads and pieces: checks, msgpack."""
    encrypt: float = 0.0
    """Pieces to envelopes of TLS records."""
    decrypt: float = 0.0
    """Envelopes to messages: decrypted, checked, tensors put together."""
    blocked: float = 0.0
    """Envelopes that waited for room in the carrier's queue."""
