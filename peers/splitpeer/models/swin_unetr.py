"""MONAI's SwinUNETR (after Hatamizadeh et al., arXiv 2201.01266), cut where its decoder begins.

A site has the transformer and the convolution blocks that MONAI puts behind its hidden states. With one site, all
levels and concatenation it is exactly MONAI's network. Nothing is dropped at random, as exactness requires.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
from monai.networks.nets.swin_unetr import SwinTransformer, WindowAttention
from torch import Tensor, nn

from splitpeer.models import backbone as halves
from splitpeer.models.cut import OUT_CHANNELS, Backbone
from splitpeer.models.swin_size import PLAIN, attention_window
from splitpeer.models.up_blocks import UpDecoder

_BLOCKS = {0: "encoder1", 1: "encoder2", 2: "encoder3", 3: "encoder4", 5: "encoder10"}
_NORM = "instance"


class Encoder(halves.Encoder):
    """The transformer, and one residual block per level that is sent (level 4 needs none)."""

    def __init__(self, backbone: Backbone, in_channels: int = 1) -> None:
        super().__init__(backbone, in_channels)
        cut, settings = backbone.cut, backbone.settings
        self.swinViT = SwinTransformer(
            in_channels,
            settings["feature_size"][0],
            attention_window(backbone),
            (2,) * cut.dimensions,
            settings["depths"],
            settings["num_heads"],
            spatial_dims=cut.dimensions,
        )
        for level, name in _BLOCKS.items():
            wide = cut.levels[level].channels
            arriving = wide if level else in_channels
            block = UnetrBasicBlock(cut.dimensions, arriving, wide, 3, 1, _NORM, res_block=True)
            self.add_module(name, block if level in cut.sent else nn.Identity())
        _share_index(self.swinViT)

    def pyramid(self, x: Tensor) -> Iterator[Tensor]:
        """Image [B, in_channels, *spatial] to six levels; one that is not sent is not refined by its block."""
        for level, tensor in enumerate((x, *self.swinViT(x))):
            yield tensor if level == PLAIN else getattr(self, _BLOCKS[level])(tensor)


class Decoder(UpDecoder, halves.Decoder):
    """Five stages: a transposed convolution, the level, a residual block."""

    def __init__(
        self,
        backbone: Backbone,
        seats: Sequence[str],
        fusion: halves.Fusion = "concat",
        out_channels: int = OUT_CHANNELS,
    ) -> None:
        super().__init__(backbone, seats, fusion, out_channels)
        cut, arriving = backbone.cut, self.fused_channels(backbone.cut.bottleneck)
        for level in range(cut.bottleneck - 1, -1, -1):
            wide = cut.levels[level].channels
            stage = UnetrUpBlock(cut.dimensions, arriving, wide, 3, 2, _NORM, res_block=True)
            self.fit(stage, level, _NORM)
            self.add_module(f"decoder{level + 1}", stage)
            arriving = wide
        self.out = UnetOutBlock(cut.dimensions, arriving, out_channels)
        self.rare_foreground()

    @property
    def stages(self) -> list[nn.Module]:
        """The deepest first."""
        return [
            getattr(self, f"decoder{level + 1}") for level in range(self.backbone.cut.bottleneck - 1, -1, -1)
        ]

    @property
    def out_block(self) -> UnetOutBlock:
        """The one that gives the logits."""
        return self.out


def _share_index(transformer: nn.Module) -> None:
    """All blocks have one window: keep the index of its table once, and out of checkpoints, since it is no weight."""
    index: Tensor | None = None
    for module in transformer.modules():
        if isinstance(module, WindowAttention):
            index = module.get_buffer("relative_position_index") if index is None else index
            module.register_buffer("relative_position_index", index, persistent=False)
