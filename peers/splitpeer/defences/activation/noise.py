"""Noise without a guarantee: Gaussian, Laplace, and a width taken from a percentile.

Widths follow the data, so none of this is differential privacy, which clips to a bound first. Channels that carry
nothing stay exactly zero.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from splitpeer.defences import kinds
from splitpeer.defences.base import Defence, Tensors
from splitpeer.defences.randomness import Draw


class _Noise(Defence):
    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        widths = self.widths(tensors)
        kept = self.spec.kept

        def noisy(name: str, tensor: Tensor) -> Tensor:
            drawn = np.stack(
                [self.draw(draw.generator(name, i, kept=kept), tensor.shape[1:]) for i in range(len(tensor))]
            )
            width = widths[name].reshape(-1, *[1] * (tensor.ndim - 1))
            return tensor + width * torch.from_numpy(drawn).to(tensor)

        return self.each(tensors, noisy)

    def draw(self, source: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """float32 of standard deviation 1."""
        return source.standard_normal(shape, dtype=np.float32)

    def widths(self, tensors: Tensors) -> dict[str, Tensor]:
        """The noise's standard deviation of every sample of each covered level: [batch], without a graph."""
        scale = float(self.values["scale"])
        return {name: scale * rms(tensor) for name, tensor in self.carrying(tensors).items()}

    def carrying(self, tensors: Tensors) -> Tensors:
        """The covered levels' channels that carry, without a graph."""
        return {
            name: tensor[:, : self.channels.get(name, tensor.shape[1])].detach()
            for name, tensor in tensors.items()
            if self.covers(name)
        }


def rms(tensor: Tensor) -> Tensor:
    """Root mean square of every sample of [batch, ...]: [batch]."""
    return tensor.flatten(1).square().mean(1).sqrt()


class Gaussian(_Noise):
    """Add Gaussian noise to each sample's level, as wide as `scale` times the root mean square there.

    Fresh noise can be averaged away by an observer of many releases. Kept noise cannot, as long as the
    encoder does not change; two releases under different weights differ by no noise at all.
    """

    kind = kinds.GAUSSIAN


class Laplace(_Noise):
    """As `Gaussian`, with heavier tails; `scale` is the standard deviation here too (the width b is that by
    the root of 2)."""

    kind = kinds.LAPLACE

    def draw(self, source: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return standard_laplace(source, shape)


def standard_laplace(source: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """float32, standard deviation 1."""
    size = source.standard_exponential(shape, dtype=np.float32) * np.float32(0.5**0.5)
    return np.where(source.random(shape, dtype=np.float32) < 0.5, -size, size)


class Percentile(_Noise):
    """Gaussian noise as wide as `scale` times a percentile of the magnitudes of all covered levels of a
    sample, exact zeros left out first."""

    kind = kinds.PERCENTILE

    def widths(self, tensors: Tensors) -> dict[str, Tensor]:
        covered = self.carrying(tensors)
        if not covered:
            return {}
        together = torch.cat([tensor.flatten(1) for tensor in covered.values()], dim=1).abs().cpu().numpy()
        found = [
            np.percentile(values[values > 0], self.values["percentile"]) if values.any() else 0.0
            for values in together
        ]
        width = float(self.values["scale"]) * torch.tensor(found, dtype=torch.float32)
        return {name: width.to(tensor) for name, tensor in covered.items()}
