"""MONAI's DynUNet with residual blocks (after Isensee et al., Nature Methods 18, 203-211, 2021), cut like the U-Net.

Strided convolutions instead of pooling, so every level may have a stride of its own on every axis. With one site, all
levels and concatenation it is exactly MONAI's network, `deep_supervision` off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock, UnetUpBlock
from torch import Tensor, nn

from splitpeer.models import backbone as halves
from splitpeer.models.cut import OUT_CHANNELS, Backbone

_NORM = ("INSTANCE", {"affine": True})


class Encoder(halves.Encoder):
    """One residual block per level; its first convolution has the level's step as stride."""

    def __init__(self, backbone: Backbone, in_channels: int = 1) -> None:
        super().__init__(backbone, in_channels)
        cut = backbone.cut
        blocks, arriving = [], in_channels
        for level, one in enumerate(cut.levels):
            blocks.append(UnetResBlock(cut.dimensions, arriving, one.channels, 3, cut.step(level), _NORM))
            arriving = one.channels
        self.input_block = blocks[0]
        self.downsamples = nn.ModuleList(blocks[1:-1])
        self.bottleneck = blocks[-1]

    def pyramid(self, x: Tensor) -> Iterator[Tensor]:
        """Image [B, in_channels, *spatial] to all levels."""
        for block in (self.input_block, *self.downsamples, self.bottleneck):
            x = block(x)
            yield x


class Decoder(halves.Decoder):
    """One stage per level above the bottleneck: a transposed convolution, the level, two convolutions."""

    def __init__(
        self,
        backbone: Backbone,
        seats: Sequence[str],
        fusion: halves.Fusion = "concat",
        out_channels: int = OUT_CHANNELS,
    ) -> None:
        super().__init__(backbone, seats, fusion, out_channels)
        cut, arriving = backbone.cut, self.fused_channels(backbone.cut.bottleneck)
        self.upsamples = nn.ModuleList()
        for level in range(cut.bottleneck - 1, -1, -1):
            wide, step = cut.levels[level].channels, cut.step(level + 1)
            stage = UnetUpBlock(cut.dimensions, arriving, wide, 3, 1, step, _NORM, trans_bias=False)
            stage.conv_block = type(stage.conv_block)(
                cut.dimensions, wide + self.fused_channels(level), wide, 3, 1, _NORM
            )
            self.upsamples.append(stage)
            arriving = wide
        self.output_block = UnetOutBlock(cut.dimensions, arriving, out_channels)
        self.rare_foreground()

    @property
    def last(self) -> nn.Conv2d | nn.Conv3d:
        """The convolution that gives the logits."""
        convolution: nn.Conv2d | nn.Conv3d = self.output_block.conv.conv
        return convolution

    def decode(self, fused: Mapping[int, Tensor]) -> Tensor:
        """Fused levels to logits [B, out_channels, *window]."""
        bottleneck = self.backbone.cut.bottleneck
        x = fused[bottleneck]
        for level, stage in zip(range(bottleneck - 1, -1, -1), self.upsamples, strict=True):
            block = cast("UnetUpBlock", stage)
            x = block.conv_block(halves.joined(block.transp_conv(x), fused.get(level)))
        logits: Tensor = self.output_block(x)
        return logits
