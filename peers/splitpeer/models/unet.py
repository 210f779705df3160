"""MONAI's BasicUNet (after Falk et al., Nature Methods 16, 67-70, 2019), cut between encoder and decoder.

Every site holds an encoder for its own contrast; the coordinator fuses what the encoders send, level by
level, and decodes (Split-U-Net, arXiv 2208.10553). With one site, all levels and concatenation it is exactly
BasicUNet.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from splitpeer.models.blocks import CONVOLUTION, Down, TwoConv, UpCat
from splitpeer.models.seeding import seeded, site_seed

ALL_LEVELS = (0, 1, 2, 3, 4)
BOTTLENECK = 4
STRIDE = 16  # four poolings halve every axis
OUT_CHANNELS = 3  # of the decoder, where nobody says how many: the regions of a glioma
RARE_FOREGROUND_BIAS = -2.0  # sigmoid(-2) = .12: the first steps need not unlearn a half-full foreground

Fusion = Literal["concat", "mean"]
Activations = Mapping[str, Mapping[str, Tensor]]


def level_name(level: int) -> str:
    """The name under which a level's tensor travels: "x0" (full resolution) to "x4" (bottleneck)."""
    return f"x{level}"


def cut_shapes(
    dimensions: int, features: Sequence[int], levels: Sequence[int], batch: int, window: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Shapes [batch, channels, *spatial] of the float32 tensors that one encoder sends, without running it.

    Raises:
        ValueError: the window does not fit the network, or the settings are impossible.
    """
    features, levels = _check(dimensions, features, levels)
    _check_window(dimensions, window)
    return {
        level_name(level): (batch, features[level], *(size // 2**level for size in window))
        for level in levels
    }


class Encoder(nn.Module):
    """A site's half: one contrast in, the feature maps that may leave the site out.

    Args:
        dimensions: 2 (slices) or 3 (volumes).
        features: BasicUNet's six widths: levels 0-4, then the decoder's last.
        levels: the levels whose tensors may leave; the bottleneck (4) always must.
        in_channels: channels of the site's image.
    """

    def __init__(
        self,
        dimensions: int,
        features: Sequence[int],
        levels: Sequence[int] = ALL_LEVELS,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        widths, self.levels = _check(dimensions, features, levels)
        self.dimensions, self.features = dimensions, widths
        self.conv_0 = TwoConv(dimensions, in_channels, widths[0])
        self.down_1 = Down(dimensions, widths[0], widths[1])
        self.down_2 = Down(dimensions, widths[1], widths[2])
        self.down_3 = Down(dimensions, widths[2], widths[3])
        self.down_4 = Down(dimensions, widths[3], widths[4])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Image [B, in_channels, *spatial] to {"x0": [B, features[0], *spatial], ...}, in order of level.

        Raises:
            ValueError: a spatial size is not a multiple of 16.
        """
        _check_window(self.dimensions, x.shape[2:])
        sent: dict[str, Tensor] = {}
        for level, block in enumerate((self.conv_0, self.down_1, self.down_2, self.down_3, self.down_4)):
            x = block(x)
            if level in self.levels:
                sent[level_name(level)] = x
        return sent


class Decoder(nn.Module):
    """The coordinator's half: fuses the sites' tensors at every level, then BasicUNet's decoder.

    Args:
        dimensions: 2 or 3.
        features: the encoders' six widths. Only the blocks' inputs widen with the number of sites.
        modalities: the sites' contrasts; their order is the order of concatenation.
        levels: the levels that arrive; a stage whose level does not arrive decodes without a skip.
        fusion: "concat" over channels, or the "mean" over sites.
        out_channels: regions, each an independent sigmoid; or classes, of which the first is the background.
    """

    def __init__(
        self,
        dimensions: int,
        features: Sequence[int],
        modalities: Sequence[str],
        levels: Sequence[int] = ALL_LEVELS,
        fusion: Fusion = "concat",
        out_channels: int = OUT_CHANNELS,
    ) -> None:
        super().__init__()
        widths, self.levels = _check(dimensions, features, levels)
        if not modalities or len(set(modalities)) != len(modalities):
            raise ValueError(f"modalities must be distinct and at least one, not {list(modalities)}")
        if fusion not in ("concat", "mean"):
            raise ValueError(f'fusion must be "concat" or "mean", not {fusion!r}')
        self.dimensions, self.features, self.modalities = dimensions, widths, tuple(modalities)
        self.fusion, self.out_channels = fusion, out_channels
        wider = len(self.modalities) if fusion == "concat" else 1

        def skip(level: int) -> int:
            return wider * widths[level] if level in self.levels else 0

        self.upcat_4 = UpCat(dimensions, wider * widths[4], skip(3), widths[3])
        self.upcat_3 = UpCat(dimensions, widths[3], skip(2), widths[2])
        self.upcat_2 = UpCat(dimensions, widths[2], skip(1), widths[1])
        self.upcat_1 = UpCat(dimensions, widths[1], skip(0), widths[5], halves=False)
        self.final_conv = CONVOLUTION[dimensions](widths[5], out_channels, kernel_size=1)
        self.rare_foreground()

    def rare_foreground(self, *, exclusive: bool = False) -> None:
        """Set the last bias so that the network starts from "almost no tumour".

        With classes that exclude each other, the first, the background, keeps a bias of 0.
        """
        nn.init.constant_(self.final_conv.bias, RARE_FOREGROUND_BIAS)
        if exclusive:
            with torch.no_grad():
                self.final_conv.bias[0] = 0

    def forward(self, activations: Activations, absent: Collection[str] = ()) -> Tensor:
        """{modality: {"x0": [B, C, *spatial], ...}} to logits [B, out_channels, *spatial].

        SP-11-38: a modality named in `absent` counts as zeros when concatenating and not at all in a mean. One that is
        missing without being named is an error: training without a site must be somebody's decision.

        Raises:
            ValueError: modalities or levels are missing, or unknown.
        """
        present = [modality for modality in self.modalities if modality not in absent]
        if not present or set(activations) != set(present):
            raise ValueError(f"activations of {sorted(activations)}, expected exactly {sorted(present)}")
        names = {level_name(level) for level in self.levels}
        for modality in present:
            if set(activations[modality]) != names:
                raise ValueError(f"{modality} sent {sorted(activations[modality])}, expected {sorted(names)}")
        fused = {level: self._fuse(activations, level, present) for level in self.levels}
        x = self.upcat_4(fused[BOTTLENECK], fused.get(3))
        x = self.upcat_3(x, fused.get(2))
        x = self.upcat_2(x, fused.get(1))
        x = self.upcat_1(x, fused.get(0))
        return self.final_conv(x)

    def _fuse(self, activations: Activations, level: int, present: Sequence[str]) -> Tensor:
        arrived = {modality: activations[modality][level_name(level)] for modality in present}
        if self.fusion == "mean":
            return torch.stack(list(arrived.values())).mean(dim=0)
        nothing = torch.zeros_like(arrived[present[0]]) if len(present) < len(self.modalities) else None
        return torch.cat([arrived.get(modality, nothing) for modality in self.modalities], dim=1)


class SplitNetwork(nn.Module):
    """All encoders and the decoder in one process: the measure of exactness, and the centralised baseline."""

    def __init__(self, encoders: Mapping[str, Encoder], decoder: Decoder) -> None:
        super().__init__()
        if set(encoders) != set(decoder.modalities):
            raise ValueError(f"encoders for {sorted(encoders)}, decoder for {sorted(decoder.modalities)}")
        self.encoders = nn.ModuleDict({modality: encoders[modality] for modality in decoder.modalities})
        self.decoder = decoder

    def forward(self, images: Mapping[str, Tensor]) -> Tensor:
        """{modality: [B, in_channels, *spatial]} to logits [B, out_channels, *spatial]."""
        return self.decoder(
            {modality: encoder(images[modality]) for modality, encoder in self.encoders.items()}
        )


def build_encoder(
    dimensions: int,
    features: Sequence[int],
    levels: Sequence[int] = ALL_LEVELS,
    in_channels: int = 1,
    *,
    seed: int | None,
) -> Encoder:
    """An `Encoder` with parameters from `seed`, or (None: what a real site wants) from private entropy."""
    return seeded(lambda: Encoder(dimensions, features, levels, in_channels), seed)


def build_decoder(
    dimensions: int,
    features: Sequence[int],
    modalities: Sequence[str],
    levels: Sequence[int] = ALL_LEVELS,
    fusion: Fusion = "concat",
    out_channels: int = OUT_CHANNELS,
    *,
    exclusive: bool = False,
    seed: int | None,
) -> Decoder:
    """A `Decoder` with parameters from `seed`, or from private entropy if None."""
    decoder = seeded(lambda: Decoder(dimensions, features, modalities, levels, fusion, out_channels), seed)
    decoder.rare_foreground(exclusive=exclusive)
    return decoder


def build_split_network(
    dimensions: int,
    features: Sequence[int],
    modalities: Sequence[str],
    levels: Sequence[int] = ALL_LEVELS,
    fusion: Fusion = "concat",
    out_channels: int = OUT_CHANNELS,
    *,
    exclusive: bool = False,
    job_seed: int,
) -> SplitNetwork:
    """The whole network with the weights that the parties of a seeded job start from, each on its own.

    Encoders take `site_seed(job_seed, modality)`, the decoder `site_seed(job_seed, "coordinator")`.
    """
    encoders = {
        m: build_encoder(dimensions, features, levels, seed=site_seed(job_seed, m)) for m in modalities
    }
    seed = site_seed(job_seed, "coordinator")
    decoder = build_decoder(
        dimensions, features, modalities, levels, fusion, out_channels, exclusive=exclusive, seed=seed
    )
    return SplitNetwork(encoders, decoder)


def _check(
    dimensions: int, features: Sequence[int], levels: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if dimensions not in (2, 3):
        raise ValueError(f"dimensions must be 2 or 3, not {dimensions}")
    if len(features) != 6 or min(features) < 1:
        raise ValueError(f"features must be six positive widths as in BasicUNet, not {list(features)}")
    if any(width % 2 for width in features[2:5]):
        raise ValueError(f"features of levels 2-4 must be even, the decoder halves them: {list(features)}")
    if not set(levels) <= set(ALL_LEVELS) or len(set(levels)) != len(levels):
        raise ValueError(f"levels must be distinct and among {list(ALL_LEVELS)}, not {list(levels)}")
    if BOTTLENECK not in levels:
        raise ValueError(
            "level 4, the bottleneck, must leave the site: without it there is nothing to decode"
        )
    return tuple(features), tuple(sorted(levels))


def _check_window(dimensions: int, window: Sequence[int]) -> None:
    sizes = list(window)
    if len(sizes) != dimensions or any(size < STRIDE or size % STRIDE for size in sizes):
        raise ValueError(f"window {sizes} must have {dimensions} sizes, each divisible by {STRIDE}")
    if math.prod(size // STRIDE for size in sizes) < 2:
        raise ValueError(f"window {sizes} leaves one value at level 4, too few to normalise: use 32 or more")
