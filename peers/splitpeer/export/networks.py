"""A backbone in the words of a bundle: what `scripts/network.py` builds, as MONAI's configs write components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from splitpeer.export.scripts import network as built
from splitpeer.models.cut import Backbone
from splitpeer.models.registry import native
from splitpeer.models.swin_size import attention_window

PLACE = "scripts.network"
Component = dict[str, Any]
"""`_target_` and its arguments."""


def encoder(backbone: Backbone, in_channels: int) -> Component:
    """The encoder of a seat whose image has so many channels."""
    wide, sent = native(backbone), list(backbone.cut.names)
    common = {"dimensions": backbone.dimensions, "in_channels": in_channels}
    made = {**_ENCODERS[backbone.network](wide), "sent": sent}
    whole = {"_target_": made.pop("_target_"), **common, **made}
    if not backbone.widths:
        return whole
    return _component(
        "Narrow",
        dimensions=backbone.dimensions,
        encoder=whole,
        wide=wide.cut.channels,
        narrow=backbone.cut.channels,
    )


def decoder(backbone: Backbone, seats: Sequence[str], fusion: str, out_channels: int) -> Component:
    """The coordinator's half, which takes the levels of `seats`."""
    wide, times = native(backbone), len(seats) if fusion == "concat" else 1
    fused = {name: times * channels for name, channels in backbone.cut.channels.items()}
    inside = wide.cut.channels if backbone.widths else fused
    network = _DECODERS[backbone.network](wide) | {"fused": inside, "out_channels": out_channels}
    network = {
        "_target_": network.pop("_target_"), "dimensions": backbone.dimensions, **network,
    }  # fmt: skip
    if backbone.widths:
        network = _component(
            "Widen", dimensions=backbone.dimensions, decoder=network, fused=fused, wide=wide.cut.channels
        )
    return _component(
        "Decoder", seats=list(seats), levels=list(backbone.cut.names), fusion=fusion, network=network
    )


def make(component: Mapping[str, Any]) -> nn.Module:
    """What MONAI's `ConfigParser` makes of a component. Raises KeyError, TypeError, ValueError: it is none of ours."""
    arguments = {name: _made(value) for name, value in component.items() if name != "_target_"}
    if not known(component["_target_"]):
        raise ValueError(f"{component['_target_']} is no network of a bundle")
    made: nn.Module = getattr(built, component["_target_"].rpartition(".")[2])(**arguments)
    return made


def known(target: object) -> bool:
    """Whether a `_target_` is a network of a bundle's `scripts/network.py`."""
    module, _, name = str(target).rpartition(".")
    kind = getattr(built, name, None)
    return module == PLACE and isinstance(kind, type) and issubclass(kind, nn.Module)


def _made(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return make(value) if "_target_" in value else {name: _made(inner) for name, inner in value.items()}


def _component(name: str, **arguments: Any) -> Component:
    return {"_target_": f"{PLACE}.{name}", **arguments}


def _widths(wide: Backbone) -> list[int]:
    return [one.channels for one in wide.cut.levels]


def _steps(wide: Backbone) -> list[list[int]]:
    return [list(wide.cut.step(level)) for level in range(len(wide.cut.levels))]


_ENCODERS = {
    "basic-unet": lambda wide: _component("BasicUNetEncoder", features=list(wide.settings["features"])),
    "residual-unet": lambda wide: _component(
        "ResidualUNetEncoder", channels=_widths(wide), steps=_steps(wide)
    ),
    "swin-unetr": lambda wide: _component(
        "SwinEncoder",
        channels=_widths(wide),
        feature_size=wide.settings["feature_size"][0],
        attention_window=list(attention_window(wide)),
        depths=list(wide.settings["depths"]),
        num_heads=list(wide.settings["num_heads"]),
    ),
}
_DECODERS = {
    "basic-unet": lambda wide: _component("BasicUNetDecoder", features=list(wide.settings["features"])),
    "residual-unet": lambda wide: _component(
        "ResidualUNetDecoder", channels=_widths(wide), steps=_steps(wide)
    ),
    "swin-unetr": lambda wide: _component("SwinDecoder", channels=_widths(wide)),
}
"""By the names of `registry.NETWORKS`, all of which a bundle can hold."""
