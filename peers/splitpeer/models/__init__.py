"""The network that several sites own together: encoders at the sites, fusion and decoder at the coordinator.

Importing this brings no torch: settings and captures ask for the cut alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from splitpeer.models.cut import OUT_CHANNELS, Backbone, Cut, level_name, level_number
from splitpeer.models.registry import (
    NETWORKS,
    build_decoder,
    build_encoder,
    build_split_network,
    encoder_parameters,
    make_backbone,
    unet_backbone,
)
from splitproto.records import Level

if TYPE_CHECKING:
    from splitpeer.models.backbone import Decoder, Encoder, SplitNetwork
    from splitpeer.models.seeding import site_seed

_WITH_TORCH = {
    "Decoder": "backbone", "Encoder": "backbone", "SplitNetwork": "backbone",
    "site_seed": "seeding",
}  # fmt: skip

__all__ = [
    "NETWORKS",
    "OUT_CHANNELS",
    "Backbone",
    "Cut",
    "Decoder",
    "Encoder",
    "Level",
    "SplitNetwork",
    "build_decoder",
    "build_encoder",
    "build_split_network",
    "encoder_parameters",
    "level_name",
    "level_number",
    "make_backbone",
    "site_seed",
    "unet_backbone",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
