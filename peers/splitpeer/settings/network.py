"""Which network, and its settings: in `job.toml` that of all, in `peer.toml` a site's own encoder."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from splitpeer.models.cut import MAX_LEVELS
from splitpeer.models.registry import DEFAULT, NETWORKS
from splitpeer.settings.loading import Section
from splitpeer.settings.values import Width


def listed(value: Any) -> Any:
    """A single number may stand without brackets."""
    return (value,) if isinstance(value, int) else value


Numbers = Annotated[tuple[Width, ...], BeforeValidator(listed), Field(min_length=1, max_length=MAX_LEVELS)]


class NetworkChoice(Section):
    """Settings that are not written are the network's defaults."""

    network: str = DEFAULT
    """A name of `models.registry.NETWORKS`."""
    features: Annotated[tuple[Width, ...], Field(min_length=1, max_length=MAX_LEVELS)] | None = None
    """Channels. basic-unet: of levels 0 to 4 and of the decoder's last block; residual-unet: one a level."""
    strides: Annotated[tuple[Annotated[int, Field(ge=1, le=4)], ...], Field(max_length=48)] | None = None
    """residual-unet: of each level, or of each axis of each level; without it 1, then 2."""
    feature_size: Numbers | None = None
    """swin-unetr, with MONAI's names and defaults, as all that follow: channels of the finest level."""
    depths: Numbers | None = None
    """Blocks of each of the four stages."""
    num_heads: Numbers | None = None
    """Attention heads of each stage."""
    window_size: Numbers | None = None
    """Side of the windows in which attention works, in tokens of two voxels; one number, or one per axis."""

    @property
    def given(self) -> dict[str, tuple[int, ...]]:
        """The settings that are written, by name."""
        names = {name for network in NETWORKS.values() for name in network.defaults}
        return {name: value for name in sorted(names) if (value := getattr(self, name)) is not None}
