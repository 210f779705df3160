"""Noise on what would leave, and a price on what gets through it: encoders learn to show the task and little else.

A variational information bottleneck (Alemi et al., ICLR 2017, arXiv 1612.00410). The noise is that of the defence
`gaussian`: as wide as `noise` times the root mean square of a sample's level. A value z is charged
log(1 + z^2 / (noise * rms)^2) / 2 nats, as if it used a Gaussian channel of its own (Shannon 1948). `rate` is the
price of a nat per voxel of the window. As the noise follows the rms, values become cheaper only by being zero in most
places: those where the task does not need them. This is a price and no bound: rare values tell more than they are
charged, as their places tell too. A level of n values passes at most n log(1 + 1 / noise^2) / 2 nats in one release.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from splitpeer.defences.network import Defended
from splitpeer.defences.randomness import Release
from splitpeer.models.backbone import Encoder
from splitpeer.training.optimiser import Schedule
from splitpeer.training.split_step import Arrays, ClientHalf

FREE, FULL = 0.1, 0.4
"""Shares of the steps until which nothing is paid, and from which on the whole price is: a network first finds its
task."""
_LEAST = 1e-8
"""Mean square below which a level counts as silent."""


@dataclass(frozen=True)
class InformationBottleneck:
    """How narrow it is."""

    noise: float
    """In root mean squares of a sample's level, as in `gaussian:NOISE`; above 0."""
    rate: float
    """Loss per nat and voxel, averaged over encoders."""

    def through(self, sent: Mapping[str, np.ndarray], source: np.random.Generator) -> Arrays:
        """What comes out: with noise, float32 [B, C, *spatial] by level."""
        return {
            name: array
            + np.sqrt(_mean_square(array)).astype(np.float32)
            * np.float32(self.noise)
            * source.standard_normal(array.shape, np.float32)
            for name, array in sent.items()
        }

    def nats(self, sent: Mapping[str, np.ndarray]) -> float:
        """What is charged, all samples and levels together."""
        return float(sum(np.log1p(self._signal(array)).sum() / 2 for array in sent.values()))

    def slope(self, sent: Mapping[str, np.ndarray]) -> Arrays:
        """The gradient of `nats`, float32, by level; across the rms too."""
        slopes = {}
        for name, array in sent.items():
            signal, square = self._signal(array), _mean_square(array)
            # Of each value for itself, less what all pay for the rms that it raises.
            axes, share = tuple(range(1, array.ndim)), signal / (1 + signal)
            own = 1 / (self.noise**2 * (1 + signal))
            slopes[name] = (array / square * (own - share.mean(axis=axes, keepdims=True))).astype(np.float32)
        return slopes

    def price(self, progress: float) -> float:
        """What a nat costs after this share of the steps."""
        return self.rate * min(1.0, max(0.0, (progress - FREE) / (FULL - FREE)))

    def _signal(self, array: np.ndarray) -> np.ndarray:
        """Squares, in variances of the noise."""
        squared: np.ndarray = np.square(array, dtype=np.float64) / (self.noise**2 * _mean_square(array))
        return squared


def _mean_square(array: np.ndarray) -> np.ndarray:
    """Of each sample: float64 [B, 1, ..., 1]."""
    axes = tuple(range(1, array.ndim))
    square: np.ndarray = np.square(array, dtype=np.float64).mean(axis=axes, keepdims=True)
    return square.clip(_LEAST)


class PricedHalf(ClientHalf):
    """An encoder whose decoder sees what gets through a bottleneck, and that pays for it with each step.

    Args:
        steps: of the whole training.
        encoders: that are trained together; each pays its share.
        entropy: of the noise, another for each encoder; a step that is made again has the same.
    """

    def __init__(
        self,
        encoder: Encoder | Defended,
        optimiser: Optimizer,
        schedule: Schedule,
        device: str = "cpu",
        *,
        bottleneck: InformationBottleneck,
        steps: int,
        encoders: int,
        entropy: int,
    ) -> None:
        super().__init__(encoder, optimiser, schedule, device)
        self._bottleneck, self._steps = bottleneck, steps
        self._encoders, self._entropy = encoders, entropy
        self._sent: Arrays = {}
        self._voxels = 0

    def forward(self, x: np.ndarray | Tensor, release: Release | None = None) -> Arrays:
        """As at an encoder without a price, with noise on what is sent."""
        self._sent = super().forward(x, release)
        self._voxels = math.prod((x.shape[0], *x.shape[2:]))
        return self._bottleneck.through(self._sent, np.random.default_rng([self._entropy, self.steps_done]))

    def accumulate(self, gradients: Mapping[str, np.ndarray]) -> None:
        """The decoder's gradients, to which the noise is a constant, and those of what is paid."""
        price = self._bottleneck.price(self.steps_done / self._steps)
        each = np.float32(price / (self._voxels * self._encoders))
        slopes = self._bottleneck.slope(self._sent)
        super().accumulate({name: array + each * slopes[name] for name, array in gradients.items()})
