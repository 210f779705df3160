"""Which network, and its settings: in `job.toml` that of all, in `peer.toml` a site's own encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, create_model

from splitpeer.models.cut import MAX_LEVELS
from splitpeer.models.registry import NETWORKS
from splitpeer.settings.loading import Section
from splitpeer.settings.values import Width

SETTINGS = tuple(dict.fromkeys(name for network in NETWORKS.values() for name in network.defaults))
"""The names of the settings of all networks. What each means: docs/networks.md."""


def listed(value: Any) -> Any:
    """A single number may be written without brackets."""
    return (value,) if isinstance(value, int) else value


# The network itself checks how many there may be, and their ranges.
Numbers = Annotated[tuple[Width, ...], BeforeValidator(listed), Field(max_length=3 * MAX_LEVELS)]


class _NetworkSettings(Section):
    """What all networks share."""

    @property
    def given(self) -> dict[str, tuple[int, ...]]:
        """The settings that are written, by name."""
        return {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}


if TYPE_CHECKING:
    NetworkSettings = _NetworkSettings
else:
    NetworkSettings = create_model(
        "NetworkSettings",
        __base__=_NetworkSettings,
        __doc__="A key for each of `SETTINGS`; by default those of `registry.NETWORKS`.",
        **dict.fromkeys(SETTINGS, (Numbers | None, None)),
    )
