"""The networks of a bundle exported by splitproto: MONAI's own blocks, cut between encoder and decoder.

A site's encoder turns an image into levels; the decoder fuses the levels of all seats and gives logits. No class of
MONAI returns or takes levels, so the blocks of BasicUNet, DynUNet and SwinUNETR are put together here, under the
parameter names of the checkpoints. With one seat, all levels and concatenation each is MONAI's network.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock, UnetUpBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
from monai.networks.nets.basic_unet import Down, TwoConv, UpCat
from monai.networks.nets.swin_unetr import SwinTransformer, WindowAttention
from torch import Tensor, nn

Levels = dict[str, Tensor]
"""By name, the finest ("x0") first: [B, channels, *spatial]."""

_ACT = ("LeakyReLU", {"negative_slope": 0.1, "inplace": True})
_NORM = ("instance", {"affine": True})
_CONVOLUTION: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


def load(network: nn.Module, file: str | Path) -> nn.Module:
    """Give a network the weights of a safetensors file; all of them must fit. In evaluation mode."""
    network.load_state_dict(safetensors.torch.load_file(str(file)))
    return network.eval()


# --- encoders ------------------------------------------------------------------------------------------------


class BasicUNetEncoder(nn.Module):
    """Of MONAI's BasicUNet: two convolutions per level, the maximum in between."""

    def __init__(
        self, dimensions: int, in_channels: int, features: Sequence[int], sent: Sequence[str]
    ) -> None:
        super().__init__()
        self.sent = tuple(sent)
        self.conv_0 = TwoConv(dimensions, in_channels, features[0], _ACT, _NORM, True)
        for level in range(1, 5):
            block = Down(dimensions, features[level - 1], features[level], _ACT, _NORM, True)
            self.add_module(f"down_{level}", block)

    def forward(self, x: Tensor) -> Levels:
        """Image [B, in_channels, *spatial] to the levels that are sent."""
        found = {}
        for level, block in enumerate(self.children()):
            x = block(x)
            found[f"x{level}"] = x
        return {name: found[name] for name in self.sent}


class ResidualUNetEncoder(nn.Module):
    """Of MONAI's DynUNet with residual blocks.

    Args:
        channels: of each level, the finest first.
        steps: how much coarser each level is than the one before, per axis.
    """

    def __init__(
        self,
        dimensions: int,
        in_channels: int,
        channels: Sequence[int],
        steps: Sequence[Sequence[int]],
        sent: Sequence[str],
    ) -> None:
        super().__init__()
        self.sent = tuple(sent)
        blocks, arriving = [], in_channels
        for wide, step in zip(channels, steps, strict=True):
            blocks.append(UnetResBlock(dimensions, arriving, wide, 3, tuple(step), _NORM))
            arriving = wide
        self.input_block = blocks[0]
        self.downsamples = nn.ModuleList(blocks[1:-1])
        self.bottleneck = blocks[-1]

    def forward(self, x: Tensor) -> Levels:
        """Image [B, in_channels, *spatial] to the levels that are sent."""
        found = {}
        for level, block in enumerate((self.input_block, *self.downsamples, self.bottleneck)):
            x = block(x)
            found[f"x{level}"] = x
        return {name: found[name] for name in self.sent}


class SwinEncoder(nn.Module):
    """Of MONAI's SwinUNETR: the transformer, and a residual block for each level that is sent but x4."""

    blocks: ClassVar[dict[str, str]] = {
        "x0": "encoder1",
        "x1": "encoder2",
        "x2": "encoder3",
        "x3": "encoder4",
        "x5": "encoder10",
    }

    def __init__(
        self,
        dimensions: int,
        in_channels: int,
        channels: Sequence[int],
        feature_size: int,
        attention_window: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        sent: Sequence[str],
    ) -> None:
        super().__init__()
        self.sent = tuple(sent)
        self.swinViT = SwinTransformer(
            in_channels, feature_size, tuple(attention_window), (2,) * dimensions, tuple(depths),
            tuple(num_heads), spatial_dims=dimensions,
        )  # fmt: skip
        for level, (name, module) in enumerate(self.blocks.items()):
            wide = channels[int(name[1:])]
            block = UnetrBasicBlock(
                dimensions, wide if level else in_channels, wide, 3, 1, "instance", res_block=True
            )
            self.add_module(module, block if name in self.sent else nn.Identity())
        for attention in self.swinViT.modules():
            if isinstance(attention, WindowAttention):
                # No weight, and the same in all blocks: not in the files.
                index = attention.get_buffer("relative_position_index")
                attention.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor) -> Levels:
        """Image [B, in_channels, *spatial] to the levels that are sent."""
        found = {f"x{level}": tensor for level, tensor in enumerate((x, *self.swinViT(x)))}
        return {
            name: getattr(self, self.blocks[name])(found[name]) if name in self.blocks else found[name]
            for name in self.sent
        }


class Narrow(nn.Module):
    """An encoder, and for each level a convolution to a few channels with values between -1 and 1."""

    def __init__(
        self, dimensions: int, encoder: nn.Module, wide: Mapping[str, int], narrow: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.narrow = nn.ModuleDict(
            {name: _CONVOLUTION[dimensions](wide[name], width, 1) for name, width in narrow.items()}
        )

    def forward(self, x: Tensor) -> Levels:
        """Image [B, in_channels, *spatial] to the narrow levels."""
        return {
            name: torch.tanh(self.narrow[name](tensor.contiguous()))
            for name, tensor in self.encoder(x).items()
        }


# --- decoders ------------------------------------------------------------------------------------------------


class BasicUNetDecoder(nn.Module):
    """Of MONAI's BasicUNet; a stage whose level does not arrive decodes without a skip.

    Args:
        features: six widths.
        fused: channels of each level that arrives, after fusion.
    """

    def __init__(
        self, dimensions: int, features: Sequence[int], fused: Mapping[str, int], out_channels: int
    ) -> None:
        super().__init__()
        arriving = fused["x4"]
        for level, wide in ((4, features[3]), (3, features[2]), (2, features[1]), (1, features[5])):
            stage = UpCat(
                dimensions, arriving, fused.get(f"x{level - 1}", 0), wide, _ACT, _NORM, True,
                halves=level > 1, is_pad=False,
            )  # fmt: skip
            self.add_module(f"upcat_{level}", stage)
            arriving = wide
        self.final_conv = _CONVOLUTION[dimensions](arriving, out_channels, kernel_size=1)

    def forward(self, fused: Levels) -> Tensor:
        """Fused levels to logits [B, out_channels, *window]."""
        x = fused["x4"]
        for level in (3, 2, 1, 0):
            x = getattr(self, f"upcat_{level + 1}")(x, fused.get(f"x{level}"))
        logits: Tensor = self.final_conv(x)
        return logits


class ResidualUNetDecoder(nn.Module):
    """Of MONAI's DynUNet: per level a transposed convolution, the level, two convolutions."""

    def __init__(
        self,
        dimensions: int,
        channels: Sequence[int],
        steps: Sequence[Sequence[int]],
        fused: Mapping[str, int],
        out_channels: int,
    ) -> None:
        super().__init__()
        arriving = fused[f"x{len(channels) - 1}"]
        self.upsamples = nn.ModuleList()
        for level in range(len(channels) - 2, -1, -1):
            wide = channels[level]
            stage = UnetUpBlock(
                dimensions, arriving, wide, 3, 1, tuple(steps[level + 1]), _NORM, trans_bias=False
            )
            _fit(stage, dimensions, wide, fused.get(f"x{level}", 0), _NORM)
            self.upsamples.append(stage)
            arriving = wide
        self.output_block = UnetOutBlock(dimensions, arriving, out_channels)

    def forward(self, fused: Levels) -> Tensor:
        """Fused levels to logits [B, out_channels, *window]."""
        logits: Tensor = self.output_block(_up(self.upsamples, fused))
        return logits


class SwinDecoder(nn.Module):
    """Of MONAI's SwinUNETR: five stages with residual blocks."""

    def __init__(
        self, dimensions: int, channels: Sequence[int], fused: Mapping[str, int], out_channels: int
    ) -> None:
        super().__init__()
        arriving = fused[f"x{len(channels) - 1}"]
        for level in range(len(channels) - 2, -1, -1):
            wide = channels[level]
            stage = UnetrUpBlock(dimensions, arriving, wide, 3, 2, "instance", res_block=True)
            _fit(stage, dimensions, wide, fused.get(f"x{level}", 0), "instance")
            self.add_module(f"decoder{level + 1}", stage)
            arriving = wide
        self.stages = tuple(f"decoder{level}" for level in range(len(channels) - 1, 0, -1))
        self.out = UnetOutBlock(dimensions, arriving, out_channels)

    def forward(self, fused: Levels) -> Tensor:
        """Fused levels to logits [B, out_channels, *window]."""
        logits: Tensor = self.out(_up([getattr(self, name) for name in self.stages], fused))
        return logits


class Widen(nn.Module):
    """Gives narrow levels the network's own widths back, then decodes."""

    def __init__(
        self, dimensions: int, decoder: nn.Module, fused: Mapping[str, int], wide: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.widen = nn.ModuleDict(
            {name: _CONVOLUTION[dimensions](channels, wide[name], 1) for name, channels in fused.items()}
        )

    def forward(self, fused: Levels) -> Tensor:
        """Fused levels to logits [B, out_channels, *window]."""
        logits: Tensor = self.decoder({name: self.widen[name](tensor) for name, tensor in fused.items()})
        return logits


def _fit(stage: Any, dimensions: int, wide: int, skipped: int, norm: Any) -> None:
    """MONAI's up blocks want as many channels from the skip as they give; here several seats' arrive, or none."""
    stage.conv_block = type(stage.conv_block)(dimensions, wide + skipped, wide, 3, 1, norm)


def _up(stages: Any, fused: Levels) -> Tensor:
    bottleneck = len(stages)
    x = fused[f"x{bottleneck}"]
    for level, stage in zip(range(bottleneck - 1, -1, -1), stages, strict=True):
        x, skipped = stage.transp_conv(x), fused.get(f"x{level}")
        x = stage.conv_block(x if skipped is None else torch.cat((x, skipped), dim=1))
    return x


# --- what a party holds, and all of it -------------------------------------------------------------------------


class Encoders(nn.Module):
    """The encoders of a site, by seat.

    Args:
        encoders: a network for each seat.
        channels: of each seat's image; the input is all of them, one seat after another.
        weights: a safetensors file for each seat; None: as they were made.
        absent: seats that are left out.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        channels: Mapping[str, int],
        weights: Mapping[str, str] | None = None,
        absent: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.seats = tuple(seat for seat in encoders if seat not in absent)
        self.encoders = nn.ModuleList(encoders[seat] for seat in self.seats)
        self.channels = [channels[seat] for seat in self.seats]
        if weights is not None:
            for seat in self.seats:
                load(encoders[seat], weights[seat])

    def forward(self, image: Tensor) -> Levels:
        """Image [B, channels of all seats, *spatial] to {"SEAT/x0": [B, C, *spatial], ...}."""
        parts = image.split(self.channels, dim=1)
        return {
            f"{seat}/{name}": tensor
            for seat, encoder, part in zip(self.seats, self.encoders, parts, strict=True)
            for name, tensor in encoder(part).items()
        }


class Decoder(nn.Module):
    """The coordinator's half.

    Args:
        seats: in the order of concatenation.
        levels: names of those that arrive from each seat.
        fusion: "concat" over channels, or the "mean" or "sum" over seats.
        network: decodes fused levels.
        weights: a safetensors file of `network`.
        absent: seats that are left out: zeros when concatenated, nothing in a mean or sum.
    """

    def __init__(
        self,
        seats: Sequence[str],
        levels: Sequence[str],
        fusion: str,
        network: nn.Module,
        weights: str | None = None,
        absent: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.seats, self.levels, self.fusion, self.network = tuple(seats), tuple(levels), fusion, network
        self.absent = frozenset(absent)
        if weights is not None:
            load(network, weights)

    def forward(self, levels: Levels) -> Tensor:
        """{"SEAT/x0": [B, C, *spatial], ...} to logits [B, channels, *window]."""
        logits: Tensor = self.network({name: self._fused(levels, name) for name in self.levels})
        return logits

    def _fused(self, levels: Levels, name: str) -> Tensor:
        there = {seat: levels[f"{seat}/{name}"] for seat in self.seats if seat not in self.absent}
        tensors = list(there.values())
        if self.fusion == "concat":
            nothing = torch.zeros_like(tensors[0]) if len(tensors) < len(self.seats) else tensors[0]
            return torch.cat([there.get(seat, nothing) for seat in self.seats], dim=1)
        stacked = torch.stack(tensors)
        return stacked.mean(dim=0) if self.fusion == "mean" else stacked.sum(dim=0)


def as_read(level: Tensor, precision: str) -> Tensor:
    """A level [B, channels, *spatial] as the coordinator reads it, sample by sample (splitproto 1, section 11.21)."""
    if precision == "f32":
        return level
    if precision == "bf16":
        return level.to(torch.bfloat16).float()
    samples, values = len(level), level[0].numel()
    rows = level.reshape(samples, values)
    if precision == "f16":
        exponents = rows.abs().amax(1, keepdim=True).view(torch.int32) >> 23
        scales = ((exponents - 14).clamp(min=1) << 23).view(torch.float32)
        return ((rows / scales).half().float() * scales).reshape(level.shape)
    greatest = {"int8": 127, "int4": 7}[precision]
    blocks = nn.functional.pad(rows, (0, -values % 64)).reshape(samples, -1, 64)
    # Rounded up to the next bfloat16.
    quotients = blocks.abs().amax(2, keepdim=True) / greatest
    scales = ((quotients.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)
    integers = (blocks / scales.where(scales > 0, 1)).round()
    return (integers * scales).reshape(samples, -1)[:, :values].reshape(level.shape)


class SplitNetwork(nn.Module):
    """All encoders and the decoder.

    Args:
        encoders: of all seats that are not absent.
        decoder: the coordinator's half.
        precision: of the levels on the wire, or their coding, by level ("x0") where it differs: they are rounded here
            as they were there.
        summed: of a secure sum: {"sites": {site: seats}, "range": greatest value, "greatest": its integer}; None: the
            decoder has each seat's own levels.
    """

    def __init__(
        self,
        encoders: Encoders,
        decoder: Decoder,
        precision: str | Mapping[str, str] = "f32",
        summed: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoders, self.decoder, self.precision, self.summed = encoders, decoder, precision, summed

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, channels of all seats, *spatial] to logits [B, channels, *spatial]."""
        levels: Levels = self.encoders(image)
        if self.summed is not None:
            levels = self._sums(levels, self.summed)
        elif self.precision != "f32":
            levels = {name: as_read(tensor, self._precision_of(name)) for name, tensor in levels.items()}
        logits: Tensor = self.decoder(levels)
        return logits

    def _precision_of(self, name: str) -> str:
        """Of "SEAT/x0"."""
        return self.precision if isinstance(self.precision, str) else self.precision[name.rpartition("/")[2]]

    def _sums(self, levels: Levels, terms: Mapping[str, Any]) -> Levels:
        """Of each site the whole numbers that it adds, as a coordinator reads their sum."""
        scale, found = terms["greatest"] / terms["range"], {}
        for name in self.decoder.levels:
            words = [
                torch.round(
                    sum(levels[f"{seat}/{name}"] for seat in seats)  # type: ignore[union-attr]
                    .double().clamp(-terms["range"], terms["range"]) * scale
                )
                for seats in terms["sites"].values()
            ]  # fmt: skip
            found[f"{self.decoder.seats[0]}/{name}"] = (torch.stack(words).sum(0) / scale).float()
        return found
