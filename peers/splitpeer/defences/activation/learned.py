"""What a site adds to its own training so that less can be recovered: nothing of it is coordinated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from splitpeer.defences import kinds
from splitpeer.defences.activation.noise import rms, standard_laplace
from splitpeer.defences.base import Defence, Tensors
from splitpeer.defences.randomness import Draw
from splitpeer.models.seeding import seeded

_CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}
_POOL = {2: functional.avg_pool2d, 3: functional.avg_pool3d}
_TINY = 1e-12


def distance_correlation(x: Tensor, z: Tensor) -> Tensor:
    """Distance correlation of the rows of [batch, ...] and [batch, ...]: 0 to 1, a scalar.

    From double-centred Euclidean distances, not their squares (Székely, Rizzo, Bakirov, Annals of Statistics
    35, 2769-2794, 2007): dCor^2 = <A, B> / (|A| |B|). Biased upwards for small batches.
    """
    a, b = _centred_distances(x), _centred_distances(z)
    square = (a * b).sum() / (a.norm() * b.norm()).clamp_min(_TINY)
    correlation: Tensor = square.clamp_min(_TINY).sqrt()
    return correlation


def _centred_distances(x: Tensor) -> Tensor:
    flat = x.flatten(1).float()
    # Not through a matrix product: its rounding is larger than small distances.
    d = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return d - d.mean(0, keepdim=True) - d.mean(1, keepdim=True) + d.mean()


def structural_similarity(a: Tensor, b: Tensor, span: float = 6.0, window: int = 7) -> Tensor:
    """Mean SSIM of images [batch, 1, *spatial]: a scalar (Wang et al. 2004, uniform windows).

    `span` is the data range: normalised intensities lie within about three standard deviations.
    """
    pool = _POOL[a.ndim - 2]
    steep, flat = (0.01 * span) ** 2, (0.03 * span) ** 2
    mean_a, mean_b = pool(a, window, 1), pool(b, window, 1)
    variance_a = pool(a * a, window, 1) - mean_a**2
    variance_b = pool(b * b, window, 1) - mean_b**2
    covariance = pool(a * b, window, 1) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + steep) * (2 * covariance + flat)
    return (similarity / ((mean_a**2 + mean_b**2 + steep) * (variance_a + variance_b + flat))).mean()


class NoPeek(Defence):
    """Penalise the distance correlation between the images of a batch and what is sent of them: `weight`
    times its mean over the covered levels. Needs batches of two or more."""

    kind = kinds.NOPEEK

    def penalty(self, image: Tensor, sent: Tensors) -> Tensor | None:
        covered = [t for name, t in sent.items() if self.covers(name) and t.requires_grad]
        if len(image) < 2 or not covered:
            return None
        correlations = torch.stack([distance_correlation(image, tensor) for tensor in covered])
        return float(self.values["weight"]) * correlations.mean()


class Shredder(Defence):
    """Laplace noise whose width is learned, per channel, as a multiple of the channel's root mean square.

    The widths are rewarded for growing (`reward` times their mean) and held back by the loss alone; none
    exceeds `most`. Unlike the paper, encoder and widths train together, and every release draws afresh.
    """

    kind = kinds.SHREDDER

    def prepare(self, channels: Mapping[str, int], dimensions: int) -> None:
        super().prepare(channels, dimensions)
        most = float(self.values["most"])
        share = min(float(self.values["start"]) / most, 0.5)
        level = float(np.log(share / (1 - share)))
        self.logits = nn.ParameterDict(
            {
                name: nn.Parameter(torch.full((n,), level))
                for name, n in channels.items()
                if self.covers(name) and n
            }
        )

    def width(self, name: str) -> Tensor:
        """The learned widths of a level's carrying channels: [channels]."""
        widths: Tensor = float(self.values["most"]) * self.logits[name].sigmoid()
        return widths

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        def noisy(name: str, tensor: Tensor) -> Tensor:
            flat = tensor.detach().flatten(0, 1)
            size = rms(flat).reshape(*tensor.shape[:2], *[1] * (tensor.ndim - 2))
            drawn = np.stack(
                [standard_laplace(draw.fresh(name, i), tensor.shape[1:]) for i in range(len(tensor))]
            )
            width = self.width(name).reshape(1, -1, *[1] * (tensor.ndim - 2))
            return tensor + width * size * torch.from_numpy(drawn).to(tensor)

        return self.each(tensors, noisy)

    def penalty(self, image: Tensor, sent: Tensors) -> Tensor | None:
        widths = [self.width(name) for name in self.logits if name in sent]
        return -float(self.values["reward"]) * torch.cat(widths).mean() if widths else None


class _Reverse(torch.autograd.Function):
    """Forward nothing, backward the gradient times -weight (Ganin & Lempitsky 2015, arXiv 1409.7495)."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradient, None


class InverseNetwork(nn.Module):
    """A small decoder from what is sent back to the image, deepest level first.

    Args:
        channels: of the levels it sees ("x0": 8, ...).
        dimensions: 2 or 3.
        width: its feature maps.
    """

    def __init__(self, channels: Mapping[str, int], dimensions: int, width: int) -> None:
        super().__init__()
        self._levels = sorted(channels, reverse=True)
        convolution = _CONVOLUTION[dimensions]
        self.stages = nn.ModuleDict(
            {
                name: convolution(channels[name] + (width if number else 0), width, 3, padding=1)
                for number, name in enumerate(self._levels)
            }
        )
        self.last = convolution(width, 1, 3, padding=1)

    def forward(self, sent: Tensors, size: tuple[int, ...]) -> Tensor:
        """`sent` to an image [batch, 1, *size]."""
        x: Tensor | None = None
        for name in self._levels:
            level = sent[name]
            if x is not None:
                level = torch.cat([functional.interpolate(x, level.shape[2:], mode="nearest"), level], dim=1)
            x = functional.leaky_relu(self.stages[name](level), 0.1)
        if x is None:
            raise ValueError("an inverse network needs a level")
        image: Tensor = self.last(functional.interpolate(x, size, mode="nearest"))
        return image


class Adversary(Defence):
    """Train inverse networks with the encoder, and the encoder to make them fail.

    Each of `networks` small networks rebuilds the image from what is sent (loss 1 - SSIM); gradient reversal
    turns their success into the encoder's loss, `weight` times. All train in the encoder's own optimiser. A
    single one would only be outrun, so there are several, and they are reinitialised in turn: each every
    `restart` steps. What this buys is to be judged by attackers trained afterwards.
    """

    kind = kinds.ADVERSARY

    def prepare(self, channels: Mapping[str, int], dimensions: int) -> None:
        super().prepare(channels, dimensions)
        self._seen = {name: n for name, n in channels.items() if self.covers(name) and n}
        width = int(self.values["width"])
        count = int(self.values["networks"]) if self._seen else 0
        self.networks = nn.ModuleList(
            seeded(lambda: InverseNetwork(self._seen, dimensions, width), _seed(number, 0))
            for number in range(count)
        )

    def begin(self, step: int) -> list[nn.Parameter]:
        period, drawn = int(self.values["restart"]), []
        for number, network in enumerate(self.networks):
            # Staggered, so that one has always trained for long.
            if step > 1 and (step + number * period // len(self.networks)) % period == 0:
                seeded(partial(_itself, network), _seed(number, step))
                drawn += list(network.parameters())
        return drawn

    def penalty(self, image: Tensor, sent: Tensors) -> Tensor | None:
        seen = {name: sent[name][:, :n] for name, n in self._seen.items() if name in sent}
        if not seen or len(seen) < len(self._seen):
            return None
        weight = float(self.values["weight"]) / len(self.networks)
        turned = {
            name: _Reverse.apply(tensor, weight)  # type: ignore[no-untyped-call]
            for name, tensor in seen.items()
        }
        size = tuple(image.shape[2:])
        losses = [1 - structural_similarity(network(turned, size), image) for network in self.networks]
        return torch.stack(losses).sum()


def _seed(number: int, step: int) -> int:
    """The seed of a network's parameters: not a secret, but the same after a crash."""
    text = f"splitpeer adversary\0{number}\0{step}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _itself(network: nn.Module) -> nn.Module:
    return network
