"""The networks, their settings, and the cuts that follow. Torch is imported only to build one.

A new network is a module with the classes `Encoder` and `Decoder` (see `backbone`) and an entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from splitpeer.models import swin_size
from splitpeer.models.cut import MAX_LEVELS, OUT_CHANNELS, Backbone, Cut, level_name
from splitproto.records import Job, Level, Setting

if TYPE_CHECKING:
    from splitpeer.models.backbone import Decoder, Encoder, Fusion, SplitNetwork

Settings = Mapping[str, tuple[int, ...]]
DEFAULT: Final = "basic-unet"
MAX_WIDTH = 4096
WIDTHS: Final = "widths"
"""On the wire, a setting of every network (SP-11.8-6)."""


@dataclass(frozen=True)
class Network:
    """One entry."""

    title: str
    module: str
    """Where `Encoder` and `Decoder` are."""
    defaults: Settings
    """All its settings; each a list of whole numbers."""
    levels: Callable[[int, Settings], tuple[Level, ...]]
    """From dimensions and settings to the encoder's levels. Raises ValueError: impossible settings."""
    parameters: Callable[[Backbone, int], int] | None = None
    """Backbone and channels of the image to the encoder's weights; None: torch's meta device counts them."""
    kept: Callable[[Backbone, Sequence[int]], int] | None = None
    """Backbone and window to the values of one sample that an encoder keeps for `backward`, besides its levels."""
    passing: Callable[[Backbone, Sequence[int]], int] | None = None
    """As `kept`: those that are held at once where nothing is kept."""


def _basic_unet(dimensions: int, settings: Settings) -> tuple[Level, ...]:
    features = settings["features"]
    if len(features) != 6 or not all(1 <= width <= MAX_WIDTH for width in features):
        raise ValueError(f"features must be six positive widths as in BasicUNet, not {list(features)}")
    if any(width % 2 for width in features[2:5]):
        raise ValueError(f"features of levels 2 to 4 must be even, the decoder halves them: {list(features)}")
    return tuple(
        Level(level_name(level), width, (2**level,) * dimensions) for level, width in enumerate(features[:5])
    )


def _residual_unet(dimensions: int, settings: Settings) -> tuple[Level, ...]:
    features, strides = settings["features"], settings["strides"]
    count = len(features)
    if not 2 <= count <= MAX_LEVELS or not all(1 <= width <= MAX_WIDTH for width in features):
        raise ValueError(
            f"features must be 2 to {MAX_LEVELS} positive widths, one a level, not {list(features)}"
        )
    strides = strides or (1, *[2] * (count - 1))
    if len(strides) == count:
        strides = tuple(step for step in strides for _ in range(dimensions))
    if len(strides) != count * dimensions or not set(strides) <= {1, 2}:
        raise ValueError(
            f"strides must be 1 or 2, one a level or {dimensions} a level, not {list(settings['strides'])}"
        )
    levels, whole = [], (1,) * dimensions
    for level, width in enumerate(features):
        steps = strides[level * dimensions : (level + 1) * dimensions]
        whole = tuple(stride * step for stride, step in zip(whole, steps, strict=True))
        levels.append(Level(level_name(level), width, whole))
    return tuple(levels)


NETWORKS: dict[str, Network] = {
    "basic-unet": Network(
        "BasicUNet", "splitpeer.models.basic_unet", {"features": (32, 32, 64, 128, 256, 32)}, _basic_unet
    ),
    "residual-unet": Network(
        "Residual U-Net (DynUNet)",
        "splitpeer.models.residual_unet",
        {"features": (32, 32, 64, 128, 256), "strides": ()},
        _residual_unet,
    ),
    "swin-unetr": Network(
        "Swin UNETR",
        "splitpeer.models.swin_unetr",
        {"feature_size": (24,), "depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24), "window_size": (7,)},
        swin_size.levels,
        swin_size.encoder_parameters,
        swin_size.kept_values,
        swin_size.passing_values,
    ),
}


def make_backbone(
    network: str,
    dimensions: int,
    settings: Mapping[str, Sequence[int]] | None = None,
    levels: Sequence[int] | None = None,
    widths: Sequence[int] = (),
) -> Backbone:
    """A network by name.

    Args:
        network: of `NETWORKS`.
        dimensions: 2 (slices) or 3 (volumes).
        settings: those that are not the default.
        levels: those that are sent; None: all.
        widths: channels to which the levels that are sent are narrowed, finest first; empty: none is.

    Raises:
        ValueError: no such network, no such setting, or impossible settings.
    """
    if network not in NETWORKS:
        raise ValueError(f"network {network!r} is unknown; known are {', '.join(NETWORKS)}")
    if dimensions not in (2, 3):
        raise ValueError(f"dimensions must be 2 or 3, not {dimensions}")
    kind = NETWORKS[network]
    given = {name: tuple(values) for name, values in (settings or {}).items()}
    if strange := sorted(given.keys() - kind.defaults.keys()):
        raise ValueError(f"{network} has no setting {strange[0]!r}; it has {', '.join(kind.defaults)}")
    whole = {**kind.defaults, **given}
    every = kind.levels(dimensions, whole)
    sent = tuple(range(len(every))) if levels is None else tuple(sorted(levels))
    cut = Cut(every, sent)
    return Backbone(network, whole, _narrowed(cut, widths), tuple(widths))


def _narrowed(cut: Cut, widths: Sequence[int]) -> Cut:
    if not widths:
        return cut
    if len(widths) != len(cut.sent) or not all(1 <= width <= MAX_WIDTH for width in widths):
        raise ValueError(f"widths must be positive, one for each of the {len(cut.sent)} levels that are sent")
    # SP-11.8-6: "one value for each of the job's `levels`, ascending"
    narrow = dict(zip(cut.sent, widths, strict=True))
    return Cut(
        tuple(replace(one, channels=narrow.get(n, one.channels)) for n, one in enumerate(cut.levels)),
        cut.sent,
    )


def native(backbone: Backbone) -> Backbone:
    """The same network with its levels as wide as it yields them."""
    return make_backbone(backbone.network, backbone.dimensions, backbone.settings, backbone.levels)


def unet_backbone(dimensions: int, features: Sequence[int], levels: Sequence[int] | None = None) -> Backbone:
    """`make_backbone` of a BasicUNet with these six widths: of its five levels, then of the decoder's last block."""
    return make_backbone("basic-unet", dimensions, {"features": features}, levels)


def backbone_of(job: Job) -> Backbone:
    """The network that a job names, with the job's own cut.

    Raises:
        ValueError: SP-11.8-4: unknown or impossible, or the cut is not the one that follows.
    """
    cut = Cut(job.cut, job.levels)
    settings = {setting.name: setting.values for setting in job.settings}
    widths = settings.pop(WIDTHS, ())
    meant = make_backbone(job.network, job.dimensions, settings, job.levels, widths)
    if meant.cut.levels != cut.levels:
        raise ValueError(f"the cut that the job lists is not that of a {job.network} with these settings")
    return replace(meant, cut=cut)


def cut_of(job: Job) -> Cut:
    """The cut that a job lists, whatever yields it. Raises ValueError: no network could."""
    return Cut(job.cut, job.levels)


def own_backbone(network: str, settings: Mapping[str, Sequence[int]], job: Job) -> Backbone:
    """SP-11.8-4: another network than the job names, with the job's cut.

    Raises:
        ValueError: it is impossible, or its cut is another.
    """
    cut = cut_of(job)
    widths = next((setting.values for setting in job.settings if setting.name == WIDTHS), ())
    own = make_backbone(network, job.dimensions, settings)
    if widths and [one.stride for one in own.cut.levels] == [one.stride for one in cut.levels]:
        own = make_backbone(network, job.dimensions, settings, job.levels, widths)
    if own.cut.levels != cut.levels:
        raise ValueError(f"{network} yields {_in_words(own.cut)}, the job wants {_in_words(cut)}")
    return replace(own, cut=cut)


def _in_words(cut: Cut) -> str:
    return " ".join(f"{one.channels}@{'x'.join(map(str, one.stride))}" for one in cut.levels)


def on_wire(backbone: Backbone) -> dict[str, Any]:
    """The fields by which a job names it."""
    settings = {**backbone.settings, WIDTHS: backbone.widths}
    return {
        "dimensions": backbone.dimensions,
        "network": backbone.network,
        "settings": tuple(Setting(name, values) for name, values in sorted(settings.items()) if values),
        "cut": backbone.cut.levels,
        "levels": backbone.cut.sent,
    }


def encoder_parameters(backbone: Backbone, in_channels: int = 1) -> int:
    """How many weights an encoder has, without making one. Raises ValueError: it cannot be made."""
    import torch

    wide = native(backbone)
    added = sum((wide.cut.channels[name] + 1) * width for name, width in backbone.cut.channels.items())
    added = added if backbone.widths else 0
    if counted := NETWORKS[backbone.network].parameters:
        return added + counted(wide, in_channels)
    try:
        with torch.device("meta"):
            encoder = _module(backbone).Encoder(wide, in_channels)
    except (AssertionError, RuntimeError) as error:
        # The libraries check their arguments by these; settings come from others.
        raise ValueError(f"{backbone.network} cannot be made with these settings: {error}") from error
    return added + sum(int(parameter.numel()) for parameter in encoder.parameters())


def kept_values(backbone: Backbone, window: Sequence[int]) -> int:
    """Values of one sample that an encoder keeps for `backward`, besides its levels; 0 where they are few."""
    kept = NETWORKS[backbone.network].kept
    return kept(native(backbone), window) if kept else 0


def passing_values(backbone: Backbone, window: Sequence[int]) -> int:
    """Values of one sample that an encoder holds at once in an evaluation, besides its levels; 0 where they are few."""
    passing = NETWORKS[backbone.network].passing
    return passing(native(backbone), window) if passing else 0


def averaged_tensors(backbone: Backbone, in_channels: int = 1) -> dict[str, tuple[int, ...]]:
    """SP-11.16-3: names and shapes of an encoder's parameters and buffers that are floating-point numbers."""
    state = build_encoder(backbone, in_channels, seed=0).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}


def build_encoder(backbone: Backbone, in_channels: int = 1, *, seed: int | None) -> Encoder:
    """An `Encoder` with parameters from `seed`, or (None: what a real site wants) from private entropy."""
    from splitpeer.models.narrow import Narrow
    from splitpeer.models.seeding import seeded

    def build() -> Encoder:
        encoder: Encoder = _module(backbone).Encoder(native(backbone), in_channels)
        return Narrow(encoder, backbone) if backbone.widths else encoder

    return seeded(build, seed)


def build_decoder(
    backbone: Backbone,
    seats: Sequence[str],
    fusion: Fusion = "concat",
    out_channels: int = OUT_CHANNELS,
    *,
    exclusive: bool = False,
    seed: int | None,
) -> Decoder:
    """A `Decoder` with parameters from `seed`, or from private entropy if None."""
    from splitpeer.models.narrow import Widen
    from splitpeer.models.seeding import seeded

    def build() -> Decoder:
        make: type[Decoder] = _module(backbone).Decoder
        if not backbone.widths:
            return make(backbone, seats, fusion, out_channels)
        return Widen(make(native(backbone), seats[:1], "concat", out_channels), backbone, seats, fusion)

    decoder = seeded(build, seed)
    decoder.rare_foreground(exclusive=exclusive)
    return decoder


def build_split_network(
    backbone: Backbone,
    seats: Sequence[str],
    fusion: Fusion = "concat",
    out_channels: int = OUT_CHANNELS,
    *,
    exclusive: bool = False,
    job_seed: int,
) -> SplitNetwork:
    """The whole network with the weights that the parties of a seeded job start from, each on its own.

    Encoders take `site_seed(job_seed, seat)`, the decoder `site_seed(job_seed, "coordinator")`.
    """
    from splitpeer.models.backbone import SplitNetwork
    from splitpeer.models.seeding import site_seed

    encoders = {seat: build_encoder(backbone, seed=site_seed(job_seed, seat)) for seat in seats}
    seed = site_seed(job_seed, "coordinator")
    decoder = build_decoder(backbone, seats, fusion, out_channels, exclusive=exclusive, seed=seed)
    return SplitNetwork(encoders, decoder)


def _module(backbone: Backbone) -> Any:
    return import_module(NETWORKS[backbone.network].module)
