"""Changing the form: clipped, coarser, turned, narrower."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from splitpeer.defences import kinds
from splitpeer.defences.base import Defence, Tensors, padded
from splitpeer.defences.randomness import Draw
from splitpeer.models.seeding import seeded

_CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}


def clip_records(tensors: Tensors, bound: float) -> Tensors:
    """Scale every sample down to an L2 norm of at most `bound` over all `tensors` together; differentiable.

    Shorter samples stay as they are. The bound holds for the float32 values that come out.
    """
    norm = torch.stack([t.flatten(1).double().square().sum(1) for t in tensors.values()]).sum(0)
    norm = norm.clamp_min(1e-300).sqrt()  # the root's slope at 0 is infinite
    # The rounding of the product would exceed the bound by a part in ten million.
    factor = torch.where(norm > bound, bound * (1 - 1e-6) / norm, torch.ones_like(norm))
    return {name: t * factor.to(t.dtype).reshape(-1, *[1] * (t.ndim - 1)) for name, t in tensors.items()}


class Clip(Defence):
    """Limit each sample's L2 norm over all covered levels together; gradients flow through the norm."""

    kind = kinds.CLIP

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        covered = {name: tensor for name, tensor in tensors.items() if self.covers(name)}
        return {**tensors, **clip_records(covered, float(self.values["norm"]))} if covered else tensors


class _StraightThrough(torch.autograd.Function):
    """`value` forward; backward as if it were `tensor` (Bengio et al. 2013, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Quantise(Defence):
    """Round each channel of a sample to `bits` bits between minus and plus its largest magnitude."""

    kind = kinds.QUANTISE

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        steps = 2 ** (int(self.values["bits"]) - 1) - 1

        def rounded(name: str, tensor: Tensor) -> Tensor:
            values = tensor.detach()
            most = values.flatten(2).abs().amax(2).reshape(*values.shape[:2], *[1] * (values.ndim - 2))
            unit = (most / steps).clamp_min(torch.finfo(torch.float32).tiny)
            # + 0: a value that is rounded to zero must not keep its sign.
            rounded: Tensor = _StraightThrough.apply(  # type: ignore[no-untyped-call]
                tensor, (values / unit).round() * unit + 0.0
            )
            return rounded

        return self.each(tensors, rounded)


class Projection(Defence):
    """Turn the channels by a secret random rotation and keep a `fraction` of them; the rest is zero.

    The rotation is a function of the key alone.
    """

    kind = kinds.PROJECTION

    def _width(self, channels: int) -> int:
        return max(1, round(float(self.values["fraction"]) * channels)) if channels else 0

    def carried(self, channels: Mapping[str, int]) -> dict[str, int]:
        return {name: self._width(n) if self.covers(name) else n for name, n in channels.items()}

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        def turned(name: str, tensor: Tensor) -> Tensor:
            channels = tensor.shape[1]
            drawn = torch.from_numpy(draw.fixed(name).standard_normal((channels, channels)))
            rotation, upper = torch.linalg.qr(drawn)
            # With a positive diagonal the rotation is uniform (Mezzadri 2007, arXiv math-ph/0609050).
            rotation = rotation * upper.diagonal().sign()
            kept = rotation[: self._width(channels)].to(tensor)
            return torch.einsum("kc,bc...->bk...", kept, tensor)

        return self.each(tensors, turned)


class Bottleneck(Defence):
    """Squeeze each level through a trained 1 x 1 convolution to `channels` channels and a tanh.

    They travel as the first channels of the level, the others are exactly zero: the schema stays. A level
    that is narrower keeps its width.
    """

    kind = kinds.BOTTLENECK

    def _width(self, channels: int) -> int:
        return min(int(self.values["channels"]), channels)

    def prepare(self, channels: Mapping[str, int], dimensions: int) -> None:
        super().prepare(channels, dimensions)
        self.squeeze = nn.ModuleDict(
            {
                name: seeded(partial(_CONVOLUTION[dimensions], n, self._width(n), kernel_size=1), None)
                for name, n in channels.items()
                if self.covers(name) and n
            }
        )

    def carried(self, channels: Mapping[str, int]) -> dict[str, int]:
        return {name: self._width(n) if self.covers(name) else n for name, n in channels.items()}

    def structure(self, tensors: Tensors) -> Tensors:
        squeezed = dict(tensors)
        for name, convolution in self.squeeze.items():
            if name in tensors:
                tensor = tensors[name]
                narrow = torch.tanh(convolution(tensor[:, : self.channels[name]]))
                squeezed[name] = padded(narrow, tensor.shape[1])
        return squeezed

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        return self.structure(tensors)
