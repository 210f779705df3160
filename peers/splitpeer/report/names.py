"""Names of defences as people write them: "dropout:0.5" and not every parameter with its default."""

from __future__ import annotations

from functools import lru_cache

from splitpeer.defences.kinds import KINDS
from splitpeer.defences.specs import parse, place_of, placed
from splitpeer.errors import ConfigError

SUM = "secure sum"
"""How a configuration is named in which the coordinator reads sums (SP-11.18): this, and over whom."""


@lru_cache(maxsize=1024)
def brief(configuration: str) -> str:
    """Defences joined by " + ", each without the parameters that have their default; unknown ones as they are."""
    return " + ".join(map(_brief, configuration.split(" + ")))


def key(configuration: str) -> tuple[str, ...]:
    """The same for two names of one set of defences, in whatever order and at whatever length they are written."""
    return tuple(sorted(brief(configuration).split(" + ")))


def kind(spec: str) -> str:
    """The defence's own name: "dropout" of "image/dropout:0.5@0"."""
    return place_of(spec)[1].partition(":")[0].partition("@")[0]


def _brief(written: str) -> str:
    place, text = place_of(written)
    try:
        (one,) = placed(place, [parse(text, place, KINDS).brief])
    except ConfigError:
        return written
    return one
