"""The Gaussian mechanism on what leaves: the one defence here whose promise is a theorem.

Each record (one window of one patient) is one vector: all its levels together. It is clipped to L2 norm <= clip, a
constant that does not follow the data, and every value gets independent noise N(0, (noise * clip)^2). Exchanging the
record for any other then moves it by at most 2 * clip (`splitpeer.privacy.accounting`). What acts before does not
matter, as long as it treats samples one by one; what acts after is post-processing.

What the theorem is about, and what it is not:

- Of one release, given the encoder's weights. Weights that learn carry the images they learned from, so with
  `frozen=false` every later release counts for every patient of an earlier batch (`privacy/ledger.py` counts them
  all). `frozen=true` lets no gradient through: the encoder keeps its initial weights, and a patient pays for its
  own windows alone.
- The noise comes from ChaCha20 under the site's secret key and a nonce that never repeats, so it is as good as the
  key is secret. With `initial_weights` a seed, everybody can compute it: for demonstrations.
- The theorem is about real numbers; computers have gaps between theirs, and by the gaps Mironov (2012, "On
  significance of the least significant bits") and Haney et al. (2022, arXiv 2207.13793) tell true values apart. So the
  sum, computed in float64, is rounded to a grid before anything else is done with it: multiples of the power of two
  at or below 2^-20 sigma, the same for every record. What is left: the normals have 53 uniform bits, and errors of
  some 2^-50 of themselves, by which the probability of a point of the grid is off by some 2^-28 of itself; and none is
  beyond 8.57 sigma, which happens to a pair of values with probability 2^-53 and so adds 2^-53 (1 + e^epsilon) to
  delta for each pair that leaves (2e-7 for a million values at epsilon 8).
- With `shared=n` this site adds sigma / sqrt(n) only, and n sites of a secure sum complete it (SP-11.18): a site takes
  no other job. What counts is the noise of the `honest` ones among them, who add theirs at the same settings and tell
  nobody; the default, 1, counts on nobody else. Each part is rounded to integers before the sum. For this site's own
  noise that is post-processing; that the sum of rounded noises is as good as the rounded sum is exact only as steps
  vanish, so they are at most a sixteenth of a site's own sigma.
- Values that are not finite count as 0: they must not betray a record either.
- Outside it: how many patients there are, their keys and grids, the time a step takes, and the labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from splitpeer.defences import kinds
from splitpeer.defences.activation.shape import clip_records
from splitpeer.defences.base import Defence, Tensors
from splitpeer.defences.randomness import Draw
from splitpeer.errors import ConfigError
from splitpeer.privacy.accounting import unknown_noise

GRID_BITS = 20
"""The grid is at most 2^-GRID_BITS sigma wide."""
_PIECE = 1 << 20  # normals made at a time: 16 MiB of uniform numbers


class DPGaussian(Defence):
    """Clip each record over all its levels to `clip`, add N(0, (noise * clip)^2) to every value."""

    kind = kinds.DP_GAUSSIAN

    def prepare(self, channels: Mapping[str, int], dimensions: int) -> None:
        super().prepare(channels, dimensions)
        if bare := [name for name, width in channels.items() if width and not self.covers(name)]:
            raise ConfigError(
                f"{self.spec}: {', '.join(bare)} would leave without noise, and nothing is guaranteed: "
                "name no levels, or withhold these first"
            )

        if self.values["honest"] > self.values["shared"]:
            raise ConfigError(
                f"{self.spec}: of {self.values['shared']} sites no {self.values['honest']} can be honest"
            )

    @property
    def noise(self) -> float:
        """sigma / clip that counts: of all sites that share it and are honest."""
        values = self.values
        return unknown_noise(float(values["noise"]), int(values["shared"]), int(values["honest"]))

    @property
    def own_noise(self) -> float:
        """sigma / clip that this site adds, and that counts if all others work with the coordinator."""
        return unknown_noise(float(self.values["noise"]), int(self.values["shared"]), 1)

    @property
    def frozen(self) -> bool:
        """Whether no gradient reaches what comes before."""
        return bool(self.values["frozen"])

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        clip = float(self.values["clip"])
        known = {
            name: torch.nan_to_num(t.detach() if self.frozen else t, 0.0, 0.0, 0.0)
            for name, t in tensors.items()
        }

        def noisy(name: str, tensor: Tensor) -> Tensor:
            drawn = [normals(draw.once(name, index), tuple(tensor.shape[1:])) for index in range(len(tensor))]
            sigma = self.own_noise * clip
            noised = tensor.double() + sigma * torch.from_numpy(np.stack(drawn)).to(tensor.device)
            return snapped(noised, sigma).to(tensor.dtype)

        return self.each(clip_records(known, clip), noisy)


def snapped(values: Tensor, sigma: float) -> Tensor:
    """Float64 rounded to the grid of noise of that sigma, ties to even; the gradient passes as it is."""
    grid = 2.0 ** (math.floor(math.log2(sigma)) - GRID_BITS)
    # Dividing by a power of two is exact, and so is the product.
    with torch.no_grad():
        moved = torch.round(values / grid) * grid - values
    return values + moved


def mechanism(defences: Iterable[Defence]) -> DPGaussian | None:
    """The one of several defences whose guarantee counts: the one with most noise."""
    found = [defence for defence in defences if isinstance(defence, DPGaussian)]
    return max(found, key=lambda defence: defence.noise, default=None)


def normals(key: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Independent standard normals, float64 of `shape`: ChaCha20 (RFC 8439) under `key` (32 octets, used once),
    through Box and Muller. Not numpy's generators: anyone who knows some of their output can compute the rest."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
    count = math.prod(shape)
    made = np.empty(count + count % 2)
    for first in range(0, len(made), _PIECE):
        pairs = len(made[first : first + _PIECE]) // 2
        bits = np.frombuffer(stream.update(bytes(16 * pairs)), "<u8").reshape(2, pairs) >> np.uint64(11)
        # (0, 1], so that the logarithm is finite; the angle from [0, 1) turns.
        radius = np.sqrt(-2 * np.log((bits[0] + np.uint64(1)) * 2.0**-53))
        angle = 2 * np.pi * (bits[1] * 2.0**-53)
        made[first : first + 2 * pairs] = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return made[:count].reshape(shape)
