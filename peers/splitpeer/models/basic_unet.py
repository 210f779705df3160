"""MONAI's BasicUNet (after Falk et al., Nature Methods 16, 67-70, 2019), cut between encoder and decoder.

With one site, all levels and concatenation it is exactly BasicUNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from splitpeer.models import backbone as halves
from splitpeer.models.blocks import CONVOLUTION, Down, TwoConv, UpCat
from splitpeer.models.cut import OUT_CHANNELS, Backbone


class Encoder(halves.Encoder):
    """Two convolutions per level, the maximum in between."""

    def __init__(self, backbone: Backbone, in_channels: int = 1) -> None:
        super().__init__(backbone, in_channels)
        dimensions = backbone.dimensions
        widths = backbone.settings["features"]
        self.conv_0 = TwoConv(dimensions, in_channels, widths[0])
        self.down_1 = Down(dimensions, widths[0], widths[1])
        self.down_2 = Down(dimensions, widths[1], widths[2])
        self.down_3 = Down(dimensions, widths[2], widths[3])
        self.down_4 = Down(dimensions, widths[3], widths[4])

    def pyramid(self, x: Tensor) -> Iterator[Tensor]:
        """Image [B, in_channels, *spatial] to five levels, each half the size of the one before."""
        for block in (self.conv_0, self.down_1, self.down_2, self.down_3, self.down_4):
            x = block(x)
            yield x


class Decoder(halves.Decoder):
    """Four stages; one whose level does not arrive decodes without a skip."""

    def __init__(
        self,
        backbone: Backbone,
        seats: Sequence[str],
        fusion: halves.Fusion = "concat",
        out_channels: int = OUT_CHANNELS,
    ) -> None:
        super().__init__(backbone, seats, fusion, out_channels)
        dimensions = backbone.dimensions
        widths, skip = backbone.settings["features"], self.fused_channels
        self.upcat_4 = UpCat(dimensions, skip(4), skip(3), widths[3])
        self.upcat_3 = UpCat(dimensions, widths[3], skip(2), widths[2])
        self.upcat_2 = UpCat(dimensions, widths[2], skip(1), widths[1])
        self.upcat_1 = UpCat(dimensions, widths[1], skip(0), widths[5], halves=False)
        self.final_conv = CONVOLUTION[dimensions](widths[5], out_channels, kernel_size=1)
        self.rare_foreground()

    @property
    def last(self) -> nn.Conv2d | nn.Conv3d:
        """The convolution that gives the logits."""
        return self.final_conv

    def decode(self, fused: Mapping[int, Tensor]) -> Tensor:
        """Fused levels to logits [B, out_channels, *window]."""
        x = self.upcat_4(fused[4], fused.get(3))
        x = self.upcat_3(x, fused.get(2))
        x = self.upcat_2(x, fused.get(1))
        x = self.upcat_1(x, fused.get(0))
        logits: Tensor = self.final_conv(x)
        return logits
