"""Names of defences as people write them: "dropout:0.5" and not every parameter with its default."""

from __future__ import annotations

import re
from functools import lru_cache

_SPEC = re.compile(r"(?P<place>(?:image|gradients)/)?(?P<name>[a-z0-9-]+):(?P<values>[^@]*)(?P<levels>@.*)?")


@lru_cache(maxsize=1024)
def brief(configuration: str) -> str:
    """Defences joined by " + ", each without the parameters that have their default; unknown ones as they are."""
    return " + ".join(map(_brief, configuration.split(" + ")))


def key(configuration: str) -> tuple[str, ...]:
    """The same for two names of one set of defences, in whatever order and at whatever length they are written."""
    return tuple(sorted(brief(configuration).split(" + ")))


def kind(spec: str) -> str:
    """The defence's own name: "dropout" of "image/dropout:0.5@0"."""
    return spec.rpartition("/")[2].partition(":")[0].partition("@")[0]


def _brief(spec: str) -> str:
    match = _SPEC.fullmatch(spec)
    if match is None or "=" not in match["values"]:
        return spec
    from splitpeer.defences.catalogue import CATALOGUE  # torch: only where a name needs it

    if match["name"] not in CATALOGUE:
        return spec
    options = CATALOGUE[match["name"]].options
    shown = []
    for number, part in enumerate(match["values"].split(",")):
        name, _, value = part.partition("=")
        if name not in options:
            return spec
        if number == 0 and name == next(iter(options)):
            shown.append(value)
        elif value != _written(options[name].default):
            shown.append(part)
    values = ":" + ",".join(shown) if shown else ""
    return f"{match['place'] or ''}{match['name']}{values}{match['levels'] or ''}"


def _written(value: float | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"
