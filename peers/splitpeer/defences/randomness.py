"""Where a defence's randomness comes from: a function of the party's secret key and of what is released, not a state.

Every number is derived from the key and from mode, step, batch, sample, level and the tensors themselves. So a step
repeated after a crash sends the same octets, and a defence applied to a recorded capture with the same key gives what
the live defence would have sent. The tensors enter because a peer that has a step repeated with other weights, or
another augmentation, must not meet the same noise twice: it would subtract the one from the other (compare the
synthetic initialisation vectors of RFC 5297).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from splitproto.records import Sample

if TYPE_CHECKING:  # images are defended without torch
    from torch import Tensor


@dataclass(frozen=True)
class Release:
    """What is about to leave, and whose it is: all that randomness may depend on in addition to the key."""

    run: bytes
    mode: str
    step: int
    batch: int
    samples: tuple[Sample, ...]
    """The batch's samples, in order; their count is the first dimension of every tensor."""
    target: np.ndarray | None = None
    """uint8 or float32 [batch, regions, *spatial], where a label holder defends gradients."""
    nonce: bytes = b""
    """Never the same twice, for `Draw.once`; empty: everything repeats."""


class Draw:
    """Independent random generators for one release.

    Args:
        key: 32 octets.
        release: what is about to leave.
        tensors: as they arrive at the defence; `fresh` numbers are bound to them.
    """

    def __init__(self, key: bytes, release: Release, tensors: Mapping[str, Tensor] | None = None) -> None:
        self._key, self.release = key, release
        self._tensors = tensors or {}
        self._digests: dict[int, bytes] = {}

    def fresh(self, purpose: str, index: int) -> np.random.Generator:
        """For sample `index` of this very release: another step, mode, batch number or content gives other
        numbers."""
        return generator(self._key, b"fresh", *self._release(purpose, index))

    def kept(self, purpose: str, index: int) -> np.random.Generator:
        """For sample `index` wherever and whenever it is released: the same numbers every time, so that there
        is nothing to average (compare RAPPOR's permanent randomised response, Erlingsson et al. 2014)."""
        sample = self.release.samples[index]
        return generator(self._key, b"kept", purpose.encode(), sample.key, repr(sample.origin).encode())

    def once(self, purpose: str, index: int) -> bytes:
        """32 octets for sample `index`, as `fresh`, and of this computation: a second release of the same
        content gets other numbers. Equal noise would reveal that two tensors are equal, which differential
        privacy does not allow."""
        return _keyed(self._key, (b"once", *self._release(purpose, index), self.release.nonce), 32)

    def fixed(self, purpose: str) -> np.random.Generator:
        """The same for all samples and steps."""
        return generator(self._key, b"fixed", purpose.encode())

    def generator(self, purpose: str, index: int, *, kept: bool) -> np.random.Generator:
        """`kept` or `fresh`."""
        return self.kept(purpose, index) if kept else self.fresh(purpose, index)

    def _release(self, purpose: str, index: int) -> tuple[bytes, ...]:
        # Not the run's number, which is chance: a demonstration repeats, and the content tells real runs apart.
        release, sample = self.release, self.release.samples[index]
        return (
            purpose.encode(), release.mode.encode(), b"%d" % release.step, b"%d" % release.batch,
            b"%d" % index, sample.key, repr(sample.origin).encode(), self._content(index),
        )  # fmt: skip

    def _content(self, index: int) -> bytes:
        if index not in self._digests:
            digest = hashlib.blake2b(digest_size=16)
            for name in sorted(self._tensors):
                digest.update(name.encode())
                digest.update(self._tensors[name][index].detach().float().cpu().contiguous().numpy().data)
            self._digests[index] = digest.digest()
        return self._digests[index]


def generator(key: bytes, *parts: bytes) -> np.random.Generator:
    """A generator that is a function of `key` and `parts`: keyed BLAKE2b (RFC 7693) gives Philox its key. Of
    PCG64, someone who knows a part of what was drawn may compute the rest; of Philox, no such attack is known."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_keyed(key, parts, 16), "big")))


def _keyed(key: bytes, parts: Sequence[bytes], octets: int) -> bytes:
    digest = hashlib.blake2b(key=key, digest_size=octets, person=b"splitpeer defnc")
    for part in parts:
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()
