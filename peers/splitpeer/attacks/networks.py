"""Networks of an adversary: from activations back to an image, critics of what looks real, a copy of the site's own.

Its own are fully convolutional, 2-D and 3-D, without normalisation over a batch: a recovered image must not
depend on the other patients in the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitpeer.errors import AttackImpossible
from splitpeer.models.cut import Cut, level_name, level_number
from splitpeer.models.seeding import seeded
from splitproto.records import Level

_CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}
_MODE = {2: "bilinear", 3: "trilinear"}


class ImageDecoder(nn.Module):
    """{"x0": [B, C, *spatial], ...} to images [B, images, *window]: from the deepest level up, each joining in turn.

    Args:
        cut: of the network that is inverted.
        channels: level name to channels, of the levels that were sent.
        width: channels at the finest level; twice that below.
        images: channels of an image.
    """

    def __init__(self, cut: Cut, channels: Mapping[str, int], width: int = 16, images: int = 1) -> None:
        super().__init__()
        self.dimensions, self.channels = cut.dimensions, dict(channels)
        convolution = _CONVOLUTION[cut.dimensions]
        self.blocks = nn.ModuleDict()
        self._growth = {one.name: cut.step(level) for level, one in enumerate(cut.levels)}
        arriving = 0
        for level in range(max(map(level_number, channels)), -1, -1):
            wide = width if level == 0 else 2 * width
            name = cut.levels[level].name
            coming = arriving + self.channels.get(name, 0)
            self.blocks[name] = nn.Sequential(
                convolution(coming, wide, 3, padding=1), nn.LeakyReLU(0.1),
                convolution(wide, wide, 3, padding=1), nn.LeakyReLU(0.1),
            )  # fmt: skip
            arriving = wide
        self.last = convolution(arriving, images, 1)

    def forward(self, levels: Mapping[str, Tensor]) -> Tensor:
        """Levels that the network was not made for are ignored."""
        x: Tensor | None = None
        for name, block in self.blocks.items():
            x = self._grown(
                block(_met(x, levels[name] if name in self.channels else None)), self._growth[name]
            )
        image: Tensor = self.last(x)
        return image

    def _grown(self, x: Tensor, step: tuple[int, ...]) -> Tensor:
        if set(step) == {1}:
            return x
        grown = tuple(float(factor) for factor in step)
        return functional.interpolate(x, scale_factor=grown, mode=_MODE[self.dimensions], align_corners=False)


def _met(x: Tensor | None, level: Tensor | None) -> Tensor:
    """What came so far, and the level that joins here."""
    return torch.cat([part for part in (x, level) if part is not None], dim=1)


class Critic(nn.Module):
    """{"x0": [B, C, *spatial], ...} to one number per sample [B]; an image is the level "x0" with one channel.

    Strided convolutions from the shallowest level down, the others joining where their resolution is reached.
    """

    def __init__(self, cut: Cut, channels: Mapping[str, int], width: int = 16) -> None:
        super().__init__()
        self.channels = dict(channels)
        convolution: Any = _CONVOLUTION[cut.dimensions]
        self.blocks = nn.ModuleDict()
        first, arriving = min(map(level_number, channels)), 0
        for level in range(first, max(3, *map(level_number, channels)) + 1):
            coming = arriving + self.channels.get(level_name(level), 0)
            arriving = min(width * 2 ** (level - first), 4 * width)
            step = cut.step(level + 1) if level < cut.bottleneck else (2,) * cut.dimensions
            self.blocks[level_name(level)] = nn.Sequential(
                convolution(coming, arriving, 3, stride=step, padding=1), nn.LeakyReLU(0.2)
            )
        self.last = convolution(arriving, 1, 1)

    def forward(self, levels: Mapping[str, Tensor]) -> Tensor:
        """Levels that the network was not made for are ignored."""
        x: Tensor | None = None
        for name, block in self.blocks.items():
            x = block(_met(x, levels[name] if name in self.channels else None))
        scores: Tensor = self.last(x).flatten(1).mean(dim=1)
        return scores


def image_decoder(
    cut: Cut, channels: Mapping[str, int], seed: int, width: int = 16, images: int = 1
) -> ImageDecoder:
    """An `ImageDecoder` with parameters from `seed`."""
    return seeded(lambda: ImageDecoder(cut, channels, width, images), seed)


def critic(cut: Cut, channels: Mapping[str, int], seed: int, width: int = 16) -> Critic:
    """A `Critic` with parameters from `seed`."""
    return seeded(lambda: Critic(cut, channels, width), seed)


def image_cut(dimensions: int, channels: int = 1) -> Cut:
    """An image itself as the only level, for a `critic` of images."""
    return Cut((Level(level_name(0), channels, (1,) * dimensions),), (0,))


def frozen(model: nn.Module | None, device: str) -> nn.Module:
    """A copy of `model` for evaluation on `device`, its weights without gradients: only images are optimised.

    Raises:
        AttackImpossible: there is no model.
    """
    if model is None:
        raise AttackImpossible("it needs the site's weights")
    return copy.deepcopy(model).to(device).eval().requires_grad_(False)
