"""Seat dropout (SP-11-37): steps made without a seat, so that the network learns to do without it.

Decided by seed and step alone, so that a step repeated after a crash leaves out the same. A network that has
never missed an input cannot do without one (Feng et al. 2023, doi 10.1007/s10278-023-00860-7, "sequence dropout").
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

_DOMAIN = b"splitpeer modality dropout v1"  # as it was first called: a job keeps its steps


def left_out(seed: int, step: int, seats: Collection[str], chance: float) -> frozenset[str]:
    """Those of `seats` that step `step` is made without; never all of them.

    Args:
        seed: of the job, 0 to 2**64-1.
        step: 1 for the first.
        seats: whose sites are here.
        chance: of each, 0 to below 1, independently; where all would be left out, the one that came last stays.
    """
    if chance <= 0:
        return frozenset()
    drawn = {seat: _draw(seed, step, seat) for seat in seats}
    out = {seat for seat, value in drawn.items() if value < chance}
    if out and len(out) == len(drawn):
        out.remove(max(out, key=lambda seat: drawn[seat]))
    return frozenset(out)


def _draw(seed: int, step: int, seat: str) -> float:
    octets = _DOMAIN + seed.to_bytes(8, "big") + step.to_bytes(8, "big") + seat.encode()
    return int.from_bytes(hashlib.sha256(octets).digest()[:8], "big") / 2**64
