"""What decoders of MONAI's up blocks share: one stage per level above the bottleneck, which may be wide or missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.networks.blocks.dynunet_block import UnetOutBlock
from torch import Tensor, nn

from splitpeer.models import backbone as halves


class UpDecoder(halves.Decoder):
    """Stages from the bottleneck up, then the block that gives the logits."""

    @property
    def stages(self) -> Sequence[Any]:
        """MONAI's up blocks (`transp_conv`, `conv_block`), the deepest first."""
        raise NotImplementedError

    @property
    def out_block(self) -> UnetOutBlock:
        """The one that gives the logits."""
        raise NotImplementedError

    def fit(self, stage: Any, level: int, norm: Any) -> None:
        """Give an up block of `level` a convolution for what arrives there: several seats' channels, or no level."""
        cut = self.backbone.cut
        wide = cut.levels[level].channels
        stage.conv_block = type(stage.conv_block)(
            cut.dimensions, wide + self.fused_channels(level), wide, 3, 1, norm
        )

    @property
    def last(self) -> nn.Conv2d | nn.Conv3d:
        """The convolution that gives the logits."""
        convolution: nn.Conv2d | nn.Conv3d = self.out_block.conv.conv
        return convolution

    def decode(self, fused: Mapping[int, Tensor]) -> Tensor:
        """Fused levels to logits [B, out_channels, *window]."""
        bottleneck = self.backbone.cut.bottleneck
        x = fused[bottleneck]
        for level, stage in zip(range(bottleneck - 1, -1, -1), self.stages, strict=True):
            x = stage.conv_block(halves.joined(stage.transp_conv(x), fused.get(level)))
        logits: Tensor = self.out_block(x)
        return logits
