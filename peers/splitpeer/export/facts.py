"""What a bundle says of itself, checked: it is whole, and nothing in it makes MONAI run anything.

The `configs/inference.json` of a joined bundle is made of the facts of other parties. MONAI calls what `_target_`
names, wherever it stands, and evaluates every text that begins with "$", "@" or "%". The names of seats and a task's
`exclusive` are written into such texts. `whole` is the one place that lets facts in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from splitpeer.data.modalities import canonical_modality
from splitpeer.errors import DataError
from splitpeer.export import networks
from splitpeer.export.half import DECODER, DECODER_FILE, ENCODERS, WHOLE, encoder_file
from splitproto.codings import LEVEL_FORMS

_Check = Callable[[Any], bool]
DEEPEST = 16
"""Levels of lists and maps in each other; the parser allows some 500."""


def whole(facts: Any) -> bool:
    """Whether all facts are there that this program reads, each of its type, and all are `safe`.

    Args:
        facts: from a bundle's metadata; `kind` is known.
    """
    if not isinstance(facts, dict) or not safe(facts):
        return False
    kind = facts["kind"]
    wanted = {
        **_OF_ALL,
        **(_OF_ENCODERS if kind in (ENCODERS, WHOLE) else {}),
        **(_OF_DECODER if kind in (DECODER, WHOLE) else {}),
        "sum": _SUM_OF_SITES if kind == WHOLE else _SUM,
    }
    if not all(name in facts and check(facts[name]) for name, check in wanted.items()):
        return False
    if not _is_precision(facts.get("precision"), facts["cut"]):
        return False
    if kind in (ENCODERS, WHOLE) and facts["encoders"].keys() != facts["seats"].keys():
        return False
    holds = [encoder_file(seat) for seat in facts["seats"]] if kind != DECODER else []
    holds += [DECODER_FILE] if kind in (DECODER, WHOLE) else []
    return set(facts["weights"]) == set(holds)


def safe(value: Any, depth: int = 0) -> bool:
    """Whether MONAI makes nothing of it but the networks that a bundle brings with it, and it can be signed."""
    if depth > DEEPEST:
        return False
    if isinstance(value, dict):
        return all(
            networks.known(inner) if key == "_target_" else safe(key) and safe(inner, depth + 1)
            for key, inner in value.items()
        )
    if isinstance(value, list):
        return all(safe(inner, depth + 1) for inner in value)
    if isinstance(value, float):
        # Python reads NaN and Infinity, which are not JSON.
        return math.isfinite(value)
    return not isinstance(value, str) or _SAFE.fullmatch(value) is not None


def _is_precision(value: Any, cut: Mapping[str, Any]) -> bool:
    """One form for all levels, or one for each that is sent."""
    if isinstance(value, dict):
        return value.keys() == cut.keys() and all(form in LEVEL_FORMS for form in value.values())
    return value in LEVEL_FORMS


def _is(*kinds: type) -> _Check:
    """Of exactly one of these types: True is no number."""
    return lambda value: type(value) in kinds


def _each(check: _Check) -> _Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _by(key: _Check, check: _Check) -> _Check:
    return lambda value: (
        isinstance(value, dict) and all(key(name) and check(inner) for name, inner in value.items())
    )


def _table(**checks: _Check) -> _Check:
    """Exactly these keys."""
    return lambda value: (
        isinstance(value, dict)
        and value.keys() == checks.keys()
        and all(check(value[name]) for name, check in checks.items())
    )


def _or_none(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


def _seat(name: Any) -> bool:
    try:
        return isinstance(name, str) and canonical_modality(name) == name
    except DataError:
        return False


def _component(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _level(value: Any) -> bool:
    """Channels, and the shape of one channel."""
    return isinstance(value, list) and len(value) == 2 and _whole_number(value[0]) and _shape(value[1])


_SAFE = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9 ._:,;+=/@()-]{0,255})?", re.ASCII)
_text, _flag, _whole_number, _number = _is(str), _is(bool), _is(int), _is(int, float)
_shape, _texts = _each(_whole_number), _each(_text)
_seats = _by(_seat, _texts)
_SUM = _or_none(_table(range=_number, greatest=_whole_number))
_SUM_OF_SITES = _or_none(_table(range=_number, greatest=_whole_number, sites=_by(_text, _each(_seat))))
_OF_ALL: Mapping[str, _Check] = {
    **dict.fromkeys(("federation", "party", "job", "run", "terms"), _text),
    **dict.fromkeys(("edition", "step", "steps", "dimensions"), _whole_number),
    **dict.fromkeys(("frozen", "secret"), _flag),
    "window": _shape,
    "spacing": _each(_number),
    "defences": _texts,
    "seats": _seats,
    "normalisation": _by(_text, _text),
    "cut": _by(_text, _level),
    "weights": _by(_text, _text),
}
_OF_ENCODERS: Mapping[str, _Check] = {"encoders": _by(_seat, _component)}
_OF_DECODER: Mapping[str, _Check] = {
    "decoder": _component,
    "sites": _by(_text, _each(_seat)),
    "task": _table(
        values=_by(_text, _whole_number),
        regions=_by(_text, _shape),
        exclusive=_flag,
        convention=_text,
    ),
    "overlap": _number,
}
