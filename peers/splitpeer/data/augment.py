"""Augmentation that every site computes alike from a seed (SP-11.7-1, SP-11.7-2): SHA-256, flips and quarter turns.

All modalities of a sample and its mask must be augmented alike, though no site sees another's pixels. So nothing is
drawn from a library's random generator; every decision is read from octets:

    base  = SHA-256( "splitproto augment v1" | seed, 8 octets | index, 4 octets )
    grey  = SHA-256( "splitproto augment v1" | seed, 8 octets | index, 4 octets | modality in UTF-8 )

Numbers are unsigned and big-endian; the text is its 21 ASCII octets, without length or terminator; `index`
is the place of the sample in its batch, from 0; `modality` is the canonical name (`flair`, `t1`, `t1ce`,
`t2`).

    base[0] bit 0 (least significant), 1, 2   flip axis x, y, z: out[i] = in[n - 1 - i]; z is ignored in 2-D
    base[1] bits 0 and 1                      k = 0..3 quarter turns in the x-y plane, after the flips,
                                              only where sx == sy; one turn: out[i, j] = in[j, n - 1 - i]
    grey[2..3] as a number u                  scale = 0.9 + 0.2 * u / 65535
    grey[4..5] as a number v                  shift = -0.1 + 0.2 * v / 65535

Images only: each voxel that is not zero becomes x * scale + shift, with scale and shift computed in float64
and rounded to float32, the product and then the sum each rounded to float32. Zero (outside the head) stays
zero.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

CONTEXT = b"splitproto augment v1"


@dataclass(frozen=True)
class Augmentation:
    """What the octets of one sample decide. `scale` and `shift` are 1 and 0 without a modality."""

    flips: tuple[bool, bool, bool]
    turns: int
    scale: float = 1.0
    shift: float = 0.0


def derive(seed: int, index: int, modality: str | None) -> Augmentation:
    """The decisions for sample `index` of a batch under `seed` (0 to 2**64 - 1); see the module's text."""
    material = CONTEXT + seed.to_bytes(8, "big") + index.to_bytes(4, "big")
    base = hashlib.sha256(material).digest()
    flips, turns = (bool(base[0] & 1), bool(base[0] & 2), bool(base[0] & 4)), base[1] & 3
    if modality is None:
        return Augmentation(flips, turns)
    grey = hashlib.sha256(material + modality.encode()).digest()
    return Augmentation(
        flips,
        turns,
        scale=0.9 + 0.2 * int.from_bytes(grey[2:4], "big") / 65535,
        shift=-0.1 + 0.2 * int.from_bytes(grey[4:6], "big") / 65535,
    )


def posed(array: np.ndarray, plan: Augmentation) -> np.ndarray:
    """`array` [C, x, y] or [C, x, y, z], flipped and turned: a contiguous copy of the same shape and dtype."""
    axes = tuple(axis for axis in range(1, array.ndim) if plan.flips[axis - 1])
    out = np.flip(array, axes)
    if array.shape[1] == array.shape[2]:
        out = np.rot90(out, plan.turns, axes=(1, 2))
    return np.array(out, order="C")


def augment(array: np.ndarray, seed: int, index: int, modality: str | None) -> np.ndarray:
    """`array` [C, x, y] or [C, x, y, z], turned and, for an image (`modality` given), rescaled.

    Returns a contiguous copy of the same shape and dtype. Masks are given with `modality` None.
    """
    plan = derive(seed, index, modality)
    out = posed(array, plan)
    if modality is not None:
        changed = out * np.float32(plan.scale) + np.float32(plan.shift)
        out = np.where(out != 0, changed, out).astype(array.dtype, copy=False)
    return out
