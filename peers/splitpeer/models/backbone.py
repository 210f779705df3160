"""Both halves of any network: a site's encoder, the coordinator's fusion and decoder, and all of them in one process.

Every site holds an encoder for each seat that it fills; the coordinator fuses what the encoders send, level by
level, and decodes (Split-U-Net, arXiv 2208.10553). A network of `registry.NETWORKS` fills in `pyramid` and `decode`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from splitpeer.models.cut import OUT_CHANNELS, Backbone

RARE_FOREGROUND_BIAS = -2.0  # sigmoid(-2) = .12: the first steps need not unlearn a half-full foreground

Fusion = Literal["concat", "mean", "sum"]
Activations = Mapping[str, Mapping[str, Tensor]]


class Encoder(nn.Module):
    """A site's half: an image in, the feature maps that may leave the site out.

    Args:
        backbone: the network.
        in_channels: channels of the site's image.
    """

    def __init__(self, backbone: Backbone, in_channels: int = 1) -> None:
        super().__init__()
        self.backbone, self.in_channels = backbone, in_channels

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that are sent."""
        return self.backbone.levels

    @property
    def dimensions(self) -> int:
        """2 (slices) or 3 (volumes)."""
        return self.backbone.dimensions

    def pyramid(self, x: Tensor) -> Iterable[Tensor]:
        """Image [B, in_channels, *spatial] to all levels of the cut in order."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Image [B, in_channels, *spatial] to {"x0": [B, C, *spatial], ...}: the levels that are sent, in order.

        Raises:
            ValueError: the spatial size is no window of this network.
        """
        cut = self.backbone.cut
        cut.check_window(x.shape[2:])
        return {
            one.name: tensor
            for level, (one, tensor) in enumerate(zip(cut.levels, self.pyramid(x), strict=True))
            if level in cut.sent
        }


class Decoder(nn.Module):
    """The coordinator's half: fuses the seats' tensors at every level, then decodes.

    Args:
        backbone: the network. Only the blocks' inputs widen with the number of seats.
        seats: the network's inputs; their order is the order of concatenation.
        fusion: "concat" over channels, or the "mean" or "sum" over seats.
        out_channels: regions, each an independent sigmoid; or classes, of which the first is the background.
    """

    def __init__(
        self,
        backbone: Backbone,
        seats: Sequence[str],
        fusion: Fusion = "concat",
        out_channels: int = OUT_CHANNELS,
    ) -> None:
        super().__init__()
        if not seats or len(set(seats)) != len(seats):
            raise ValueError(f"seats must be distinct and at least one, not {list(seats)}")
        if fusion not in get_args(Fusion):
            raise ValueError(f"fusion must be one of {', '.join(get_args(Fusion))}, not {fusion!r}")
        self.backbone, self.seats = backbone, tuple(seats)
        self.fusion, self.out_channels = fusion, out_channels

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that arrive."""
        return self.backbone.levels

    def fused_channels(self, level: int) -> int:
        """Channels of a level after fusion; 0 where it does not arrive."""
        if level not in self.levels:
            return 0
        wider = len(self.seats) if self.fusion == "concat" else 1
        return wider * self.backbone.cut.levels[level].channels

    @property
    def last(self) -> nn.Conv2d | nn.Conv3d:
        """The convolution that gives the logits."""
        raise NotImplementedError

    def decode(self, fused: Mapping[int, Tensor]) -> Tensor:
        """Fused levels [B, `fused_channels`, *spatial] to logits [B, out_channels, *window]."""
        raise NotImplementedError

    def rare_foreground(self, *, exclusive: bool = False) -> None:
        """Set the last bias so that the network starts from "almost no tumour".

        With classes that exclude each other, the first, the background, keeps a bias of 0.
        """
        bias = self.last.bias
        if bias is None:
            raise TypeError(
                f"{type(self).__name__}.last has no bias: the network would start from half foreground"
            )
        nn.init.constant_(bias, RARE_FOREGROUND_BIAS)
        if exclusive:
            with torch.no_grad():
                bias[0] = 0

    def forward(
        self, activations: Activations, absent: Collection[str] = (), have: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """{seat: {"x0": [B, C, *spatial], ...}} to logits [B, out_channels, *spatial].

        SP-11-38: what is missing counts as zeros when concatenating and adding, and not at all in a mean. A seat that
        is missing without being named is an error: somebody must have decided to train without it.

        Args:
            absent: seats that no sample has.
            have: by seat that some samples have and others not, bool [B]; the others' rows are zeros.

        Raises:
            ValueError: seats or levels are missing, or unknown.
        """
        present = [seat for seat in self.seats if seat not in absent]
        if not present or set(activations) != set(present):
            raise ValueError(f"activations of {sorted(activations)}, expected exactly {sorted(present)}")
        names = self.backbone.cut.names
        for seat in present:
            if set(activations[seat]) != set(names):
                raise ValueError(f"{seat} sent {sorted(activations[seat])}, expected {sorted(names)}")
        return self.decode(
            {
                level: self._fuse(activations, name, present, have or {})
                for level, name in zip(self.levels, names, strict=True)
            }
        )

    def _fuse(
        self, activations: Activations, name: str, present: Sequence[str], have: Mapping[str, Tensor]
    ) -> Tensor:
        arrived = {seat: activations[seat][name] for seat in present}
        if self.fusion == "sum":
            return torch.stack(list(arrived.values())).sum(dim=0)
        if self.fusion == "mean":
            stacked = torch.stack(list(arrived.values()))
            return _mean_of_those(stacked, present, have) if have else stacked.mean(dim=0)
        if len(present) < len(self.seats):
            nothing = torch.zeros_like(arrived[present[0]])
            return torch.cat([arrived.get(seat, nothing) for seat in self.seats], dim=1)
        return torch.cat([arrived[seat] for seat in self.seats], dim=1)


def _mean_of_those(stacked: Tensor, present: Sequence[str], have: Mapping[str, Tensor]) -> Tensor:
    """For each sample, the mean over the seats that it has; zeros if it has none.

    Args:
        stacked: [seats, B, C, *spatial], zeros where a sample lacks the seat.
        present: the seats.
        have: bool [B] by seat; missing: all samples have it.
    """
    everyone = torch.ones(stacked.shape[1], device=stacked.device)
    held = torch.stack([have[seat].to(everyone) if seat in have else everyone for seat in present]).sum(dim=0)
    return stacked.sum(dim=0) / held.clamp(min=1).view(-1, *[1] * (stacked.ndim - 2))


def joined(x: Tensor, skipped: Tensor | None) -> Tensor:
    """Channels of a level behind those that come from below; as they are where the level does not arrive."""
    return x if skipped is None else torch.cat((x, skipped), dim=1)


class SplitNetwork(nn.Module):
    """All encoders and the decoder in one process: the measure of exactness, and the centralised baseline."""

    def __init__(self, encoders: Mapping[str, Encoder], decoder: Decoder) -> None:
        super().__init__()
        if set(encoders) != set(decoder.seats):
            raise ValueError(f"encoders for {sorted(encoders)}, decoder for {sorted(decoder.seats)}")
        self.encoders = nn.ModuleDict({seat: encoders[seat] for seat in decoder.seats})
        self.decoder = decoder

    def forward(self, images: Mapping[str, Tensor]) -> Tensor:
        """{seat: [B, in_channels, *spatial]} to logits [B, out_channels, *spatial]."""
        logits: Tensor = self.decoder(
            {seat: encoder(images[seat]) for seat, encoder in self.encoders.items()}
        )
        return logits
