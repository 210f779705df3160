"""The building blocks of MONAI's BasicUNet, made of torch alone, under the same parameter names.

Importing any part of MONAI imports all of it: more than a second of CPU in every process. A test loads these weights
into MONAI's own network and compares outputs and gradients bit for bit.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

CONVOLUTION: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOLING = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_SLOPE = 0.1


class TwoConv(nn.Sequential):
    """Twice: convolution of width 3, instance norm with parameters, leaky ReLU."""

    def __init__(self, dimensions: int, in_channels: int, out_channels: int) -> None:
        super().__init__(
            OrderedDict(
                conv_0=_convolved(dimensions, in_channels, out_channels),
                conv_1=_convolved(dimensions, out_channels, out_channels),
            )
        )


class Down(nn.Sequential):
    """Half the size by the maximum, then `TwoConv`."""

    def __init__(self, dimensions: int, in_channels: int, out_channels: int) -> None:
        super().__init__(
            OrderedDict(
                max_pooling=_POOLING[dimensions](2),
                convs=TwoConv(dimensions, in_channels, out_channels),
            )
        )


class UpCat(nn.Module):
    """Twice the size by a transposed convolution, behind the skipped level's channels; then `TwoConv`.

    Args:
        skip_channels: of the level that skips; 0: none does.
        halves: whether doubling the size halves the channels.
    """

    def __init__(
        self, dimensions: int, in_channels: int, skip_channels: int, out_channels: int, *, halves: bool = True
    ) -> None:
        super().__init__()
        up = in_channels // 2 if halves else in_channels
        self.upsample = nn.Sequential(
            OrderedDict(deconv=_TRANSPOSED[dimensions](in_channels, up, 2, stride=2))
        )
        self.convs = TwoConv(dimensions, skip_channels + up, out_channels)

    def forward(self, x: Tensor, skipped: Tensor | None) -> Tensor:
        """[B, in_channels, *spatial] and, twice as large, [B, skip_channels, *spatial] or None."""
        x = self.upsample(x)
        convolved: Tensor = self.convs(x if skipped is None else torch.cat([skipped, x], dim=1))
        return convolved


def _convolved(dimensions: int, in_channels: int, out_channels: int) -> nn.Sequential:
    after = OrderedDict(N=_NORM[dimensions](out_channels, affine=True), A=nn.LeakyReLU(_SLOPE, inplace=True))
    convolution = CONVOLUTION[dimensions](in_channels, out_channels, 3, padding=1)
    return nn.Sequential(OrderedDict(conv=convolution, adn=nn.Sequential(after)))
