"""MONAI's DynUNet with residual blocks (after Isensee et al., Nature Methods 18, 203-211, 2021), cut like the U-Net.

Strided convolutions instead of pooling, so every level may have a stride of its own on every axis. With one site, all
levels and concatenation it is exactly MONAI's network, `deep_supervision` off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock, UnetUpBlock
from torch import Tensor, nn

from splitpeer.models import backbone as halves
from splitpeer.models.cut import OUT_CHANNELS, Backbone
from splitpeer.models.up_blocks import UpDecoder

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


class Decoder(UpDecoder, halves.Decoder):
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
            self.fit(stage, level, _NORM)
            self.upsamples.append(stage)
            arriving = wide
        self.output_block = UnetOutBlock(cut.dimensions, arriving, out_channels)
        self.rare_foreground()

    @property
    def stages(self) -> list[nn.Module]:
        """The deepest first."""
        return list(self.upsamples)

    @property
    def out_block(self) -> UnetOutBlock:
        """The one that gives the logits."""
        return self.output_block
