"""Levels that are narrowed to a few bounded channels before they leave a site, and what the decoder makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from splitpeer.models.backbone import Decoder, Encoder, Fusion
from splitpeer.models.blocks import CONVOLUTION
from splitpeer.models.cut import Backbone


class Narrow(Encoder):
    """A network's encoder, and for each level that is sent a convolution of size 1 and a tanh.

    The convolution is the site's own, learned and secret like the encoder. Values lie between -1 and 1, so that a sum
    over sites has a known range and noise a known worth.

    Args:
        encoder: yields the levels at their full widths.
        backbone: the network with `widths`.
    """

    def __init__(self, encoder: Encoder, backbone: Backbone) -> None:
        super().__init__(backbone, encoder.in_channels)
        self.encoder = encoder
        wide, narrow = encoder.backbone.cut, backbone.cut
        convolution = CONVOLUTION[backbone.dimensions]
        self.narrow = nn.ModuleDict(
            {
                name: convolution(wide.channels[name], width, kernel_size=1)
                for name, width in narrow.channels.items()
            }
        )

    def pyramid(self, x: Tensor) -> Iterator[Tensor]:
        """Image [B, in_channels, *spatial] to all levels; those that are sent have their narrow widths."""
        for one, tensor in zip(self.backbone.cut.levels, self.encoder.pyramid(x), strict=True):
            if one.name in self.narrow:
                # In plain order, as a gradient from the wire is: sums over it then add up in the same order.
                tensor = torch.tanh(self.narrow[one.name](tensor.contiguous()))
            yield tensor


class Widen(Decoder):
    """The coordinator's half of it: fused levels get the network's own widths back, then the network decodes.

    Args:
        decoder: of the network with one seat and its own widths.
        backbone: the network with `widths`.
        seats, fusion: see `Decoder`.
    """

    def __init__(self, decoder: Decoder, backbone: Backbone, seats: Sequence[str], fusion: Fusion) -> None:
        super().__init__(backbone, seats, fusion, decoder.out_channels)
        self.decoder = decoder
        wide, convolution = decoder.backbone.cut, CONVOLUTION[backbone.dimensions]
        self.widen = nn.ModuleDict(
            {
                one.name: convolution(self.fused_channels(level), one.channels, kernel_size=1)
                for level, one in enumerate(wide.levels)
                if level in wide.sent
            }
        )

    @property
    def last(self) -> nn.Conv2d | nn.Conv3d:
        """The convolution that gives the logits."""
        return self.decoder.last

    def decode(self, fused: Mapping[int, Tensor]) -> Tensor:
        """Fused levels [B, `fused_channels`, *spatial] to logits [B, out_channels, *window]."""
        names = {level: self.backbone.cut.levels[level].name for level in fused}
        return self.decoder.decode(
            {level: self.widen[names[level]](tensor) for level, tensor in fused.items()}
        )
