"""All attacks by name. A module is imported when one of its attacks is asked for."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Protocol, get_args, get_origin, get_type_hints

from splitpeer.attacks.base import Attack, Goal
from splitpeer.attacks.not_applicable import NOT_APPLICABLE
from splitpeer.errors import AttackImpossible, ConfigError

CATALOGUE: dict[str, str] = {
    "pca": "image.pca:PrincipalComponent",
    "whitebox": "image.whitebox:WhiteBox",
    "inverse": "image.inverse:InverseAttack",
    "refined": "image.inverse:Refined",
    "sum-search": "image.sum_search:SumSearch",
    "first-step": "image.first_step:FirstStep",
    "kept-noise": "image.kept_noise:KeptNoise",
    "query-free": "image.query_free:QueryFree",
    "unsplit": "image.unsplit:UnSplit",
    "pcat": "image.sdar:PCAT",
    "sdar": "image.sdar:SDAR",
    "fora": "image.fora:FORA",
    "gradient-norm": "label.gradients:GradientNorm",
    "gradient-field": "label.field:GradientField",
    "gradient-projector": "label.field:GradientProjector",
    "gradient-network": "label.network:GradientNetwork",
    "gradient-cosine": "label.gradients:GradientCosine",
    "gradient-slice": "label.gradients:GradientSlice",
    "logit-gradient": "label.logits:LogitGradient",
    "membership": "membership:Membership",
    "schedule": "label.schedule:WindowOrder",
}
"""Name to module (below `splitpeer.attacks`) and class."""


class Described(Protocol):
    """What a report shows of an attack, whether it can run or not."""

    @property
    def title(self) -> str:
        """Its name for people."""
        ...

    @property
    def plain(self) -> str:
        """One sentence that a patient understands."""
        ...

    @property
    def goal(self) -> Goal:
        """What it recovers."""
        ...


def described(name: str) -> Described:
    """The words for an attack. Raises ConfigError: no attack has this name."""
    if name in NOT_APPLICABLE:
        return NOT_APPLICABLE[name]
    return attack_class(name)


def attack_class(name: str) -> type[Attack]:
    """The class behind a name.

    Raises:
        ConfigError: no attack has this name.
        AttackImpossible: no capture can feed it.
    """
    if name in NOT_APPLICABLE:
        raise AttackImpossible(f"{name}: {NOT_APPLICABLE[name].reason}")
    if name not in CATALOGUE:
        known = ", ".join((*CATALOGUE, *NOT_APPLICABLE))
        raise ConfigError(f"attack {name!r} is unknown; known are {known}")
    module, _, attribute = CATALOGUE[name].partition(":")
    found: type[Attack] = getattr(importlib.import_module(f"splitpeer.attacks.{module}"), attribute)
    return found


def reads_traffic(names: Iterable[str]) -> bool:
    """Whether any of these attacks, as written ("sdar:epochs=40"), learns from all traffic that was recorded."""
    found = (name.partition(":")[0] for name in names)
    return any(attack_class(name).reads_traffic for name in found if name in CATALOGUE)


def make_attack(name: str, **settings: Any) -> Attack:
    """An attack with settings: the fields of its class.

    Raises:
        ConfigError: an attack, setting or value that does not exist.
        AttackImpossible: no capture can feed it.
    """
    kind = attack_class(name)
    known = {field.name for field in fields(kind) if field.init}
    if unknown := sorted(set(settings) - known):
        raise ConfigError(f"attack {name} has no setting {unknown[0]!r} (known: {', '.join(sorted(known))})")
    hints = get_type_hints(kind)
    read = {key: _read(name, key, value, hints[key]) for key, value in settings.items()}
    try:
        return kind(**read)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"attack {name}: {error}") from None


def _read(name: str, key: str, value: Any, hint: Any) -> Any:
    """A setting converted to its field's type; text comes from a command line or a TOML file.

    Lists are written with `+`: `schedules=joint+shallow`, `levels=0+1`.
    """
    if hint is str:
        return value.replace("+", ",")
    # `int | None` is read as an int: leave a setting out to have its default.
    parts = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    wanted = next(part for part in parts if part is not NoneType)
    several = wanted not in (int, float)
    try:
        if not isinstance(value, str):
            made = (value,) if several and isinstance(value, int) else value
        elif several:
            made = tuple(int(part) for part in value.split("+"))
        else:
            made = wanted(value)
    except ValueError:
        kind = "list of whole numbers joined by +" if several else _KINDS[wanted]
        raise ConfigError(f"attack {name}: {key} must be a {kind}, not {value!r}") from None
    least = 0 if several or wanted is float or key in _FROM_ZERO else 1
    for number in made if isinstance(made, tuple) else (made,):
        if isinstance(number, int | float) and not (math.isfinite(number) and number >= least):
            raise ConfigError(f"attack {name}: {key} must be {least} or more, not {number}")
    return made


_KINDS = {int: "whole number", float: "number"}
_FROM_ZERO = ("seed", "level")
