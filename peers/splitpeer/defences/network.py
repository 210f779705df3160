"""An encoder and its defences as one network."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from splitpeer.defences.base import Tensors
from splitpeer.defences.randomness import Release
from splitpeer.defences.specs import Written
from splitpeer.defences.stack import Stack, make_stack
from splitpeer.models.backbone import Encoder
from splitpeer.models.cut import Backbone
from splitpeer.models.registry import build_encoder
from splitpeer.models.seeding import seeded, site_seed


class Defended(nn.Module):
    """An encoder with its defences: its parameters are the encoder's and the defences' trained parts.

    `model(image)` is the network proper, before any defence that clips or draws: what an adversary that holds
    the weights can compute. `model(image, release)` is what leaves.
    """

    def __init__(self, encoder: Encoder, stack: Stack) -> None:
        super().__init__()
        self.encoder, self.stack = encoder, stack

    def forward(self, x: Tensor, release: Release | None = None) -> Tensors:
        """Image [B, in_channels, *spatial] to {"x0": [B, C, *spatial], ...} in order of level."""
        tensors = self.encoder(x)
        # In full precision, whatever the encoder computes in on a GPU.
        with torch.autocast(x.device.type, enabled=False):
            tensors = {name: tensor.float() for name, tensor in tensors.items()}
            return self.stack.structure(tensors) if release is None else self.stack(tensors, release)


def build_network(
    backbone: Backbone,
    written: Written = (),
    *,
    key: bytes,
    seed: int | None,
    strict: bool = True,
    in_channels: int = 1,
) -> Encoder | Defended:
    """A site's network: the bare encoder where nothing is written, else `Defended`.

    Args:
        backbone: the network.
        written: the defences, see `make_stack`; those of the image are not meant.
        key: 32 octets, for the defences' randomness.
        seed: of all initial weights; None: private entropy. The encoder's weights do not depend on `written`.
        strict: see `make_stack`.
        in_channels: of the image.

    Raises:
        ConfigError: see `make_stack`.
    """
    encoder = build_encoder(backbone, in_channels, seed=seed)
    channels, dimensions = backbone.cut.channels, backbone.dimensions
    stack = make_stack(written, key=key, channels=channels, dimensions=dimensions, strict=strict)
    if not stack:
        return encoder
    if seed is not None:
        for number, defence in enumerate(stack.defences):
            if defence.kind.structural:
                seeded(partial(_itself, defence), site_seed(seed, f"defence {number}"))
    return Defended(encoder, stack)


def _itself(defence: nn.Module) -> nn.Module:
    return defence
