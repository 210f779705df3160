"""What a defence does: one class each, of which `kinds` says how it is written and what it promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from splitpeer.defences.randomness import Draw
from splitpeer.defences.specs import DefenceKind, Spec

Tensors = dict[str, Tensor]
"""Level name to [batch, channels, *spatial], as in {"x0": ..., "x4": ...}."""


class Defence(nn.Module):
    """One defence at work. Subclasses name their kind and override what they need.

    Trainable parts are ordinary parameters: they are trained by the encoder's own optimiser and saved in the
    same checkpoints. Differentiable in its input, so that the encoder trains through it.
    """

    kind: ClassVar[DefenceKind]

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.values = spec, spec.values
        self.channels: dict[str, int] = {}
        """How many of each level's first channels carry; the rest is exactly zero and stays so."""

    def prepare(self, channels: Mapping[str, int], dimensions: int) -> None:
        """Called once, before use, with the `channels` that carry data of each level ("x0": 8, ...), and 2 or 3
        dimensions. Makes trainable parts."""
        self.channels = dict(channels)

    def carried(self, channels: Mapping[str, int]) -> dict[str, int]:
        """How many channels of each level carry after this defence, if `channels` did before it."""
        return dict(channels)

    def begin(self, step: int) -> list[nn.Parameter]:
        """A training step with this number follows, perhaps again. Returns the parameters that were
        reinitialised: an optimiser's state for them is void."""
        return []

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        """`tensors` as they may leave. Levels that are not covered pass unchanged."""
        return tensors

    def structure(self, tensors: Tensors) -> Tensors:
        """If `structural`: `forward`, which then needs no draw."""
        return tensors

    def penalty(self, image: Tensor, sent: Tensors) -> Tensor | None:
        """A local loss on which the site also trains its encoder, in addition to the gradients that arrive: a
        scalar."""
        return None

    def covers(self, name: str) -> bool:
        """Whether level `name` ("x0") is to be changed."""
        return self.spec.covers(name)

    def each(self, tensors: Tensors, change: Callable[[str, Tensor], Tensor]) -> Tensors:
        """`tensors` where the carrying channels of every covered level are `change(name, channels)`."""
        changed = dict(tensors)
        for name, tensor in tensors.items():
            carrying = self.channels.get(name, tensor.shape[1])
            if self.covers(name) and carrying:
                changed[name] = padded(change(name, tensor[:, :carrying]), tensor.shape[1])
        return changed


def padded(tensor: Tensor, channels: int) -> Tensor:
    """`tensor` [B, c, *spatial] with zeros behind, up to `channels`."""
    missing = channels - tensor.shape[1]
    if missing == 0:
        return tensor
    nothing = tensor.new_zeros((tensor.shape[0], missing, *tensor.shape[2:]))
    return torch.cat([tensor, nothing], dim=1)
