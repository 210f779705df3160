"""The U-Net that several sites own together: encoders at the sites, fusion and decoder at the coordinator."""

from __future__ import annotations

from splitpeer.models.seeding import site_seed
from splitpeer.models.unet import (
    ALL_LEVELS,
    OUT_CHANNELS,
    Decoder,
    Encoder,
    SplitNetwork,
    build_decoder,
    build_encoder,
    build_split_network,
    cut_shapes,
    level_name,
)

__all__ = [
    "ALL_LEVELS",
    "OUT_CHANNELS",
    "Decoder",
    "Encoder",
    "SplitNetwork",
    "build_decoder",
    "build_encoder",
    "build_split_network",
    "cut_shapes",
    "level_name",
    "site_seed",
]
