"""All attacks by name. A module is imported when one of its attacks is asked for."""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any

from splitpeer.attacks.base import Attack
from splitpeer.errors import ConfigError

CATALOGUE: dict[str, str] = {
    "pca": "splitpeer.attacks.image.pca:PrincipalComponent",
    "whitebox": "splitpeer.attacks.image.whitebox:WhiteBox",
    "inverse": "splitpeer.attacks.image.inverse:InverseNetwork",
    "refined": "splitpeer.attacks.image.inverse:Refined",
    "first-step": "splitpeer.attacks.image.first_step:FirstStep",
    "kept-noise": "splitpeer.attacks.image.kept_noise:KeptNoise",
    "query-free": "splitpeer.attacks.image.query_free:QueryFree",
    "unsplit": "splitpeer.attacks.image.unsplit:UnSplit",
    "pcat": "splitpeer.attacks.image.sdar:PCAT",
    "sdar": "splitpeer.attacks.image.sdar:SDAR",
    "fora": "splitpeer.attacks.image.fora:FORA",
    "fsha": "splitpeer.attacks.hijack.fsha:FSHA",
    "cafe": "splitpeer.attacks.refusals:CAFE",
    "gradient-inversion": "splitpeer.attacks.refusals:GradientInversion",
    "gradient-norm": "splitpeer.attacks.label.gradients:GradientNorm",
    "gradient-cosine": "splitpeer.attacks.label.gradients:GradientCosine",
    "gradient-slice": "splitpeer.attacks.label.gradients:GradientSlice",
    "schedule": "splitpeer.attacks.label.gradients:Schedule",
}
"""Name to module and class."""


def attack_class(name: str) -> type[Attack]:
    """The class behind a name.

    Raises:
        ConfigError: no attack has this name.
    """
    if name not in CATALOGUE:
        raise ConfigError(f"attack {name!r} is unknown; known are {', '.join(CATALOGUE)}")
    module, _, attribute = CATALOGUE[name].partition(":")
    found: type[Attack] = getattr(importlib.import_module(module), attribute)
    return found


def make_attack(name: str, **settings: Any) -> Attack:
    """An attack with settings, each as its constructor has it.

    Raises:
        ConfigError: an attack, setting or value that does not exist.
    """
    kind = attack_class(name)
    known = [p for p in inspect.signature(kind).parameters if p != "self"]
    if unknown := set(settings) - set(known):
        raise ConfigError(f"attack {name} has no setting {sorted(unknown)[0]!r} (known: {', '.join(known)})")
    signature = inspect.signature(kind).parameters
    settings = {key: _checked(name, key, value, signature[key]) for key, value in settings.items()}
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"attack {name}: {error}") from None


def _checked(name: str, key: str, value: Any, parameter: inspect.Parameter) -> Any:
    """A setting as its constructor wants it; text comes from a command line or a TOML file.

    Lists are written with `+`: `schedules=joint+shallow`, `levels=0+1`.
    """
    wanted = str(parameter.annotation)
    if not isinstance(value, str):
        made = value
    elif wanted == "str":
        return value.replace("+", ",")
    else:
        try:
            if "tuple" in wanted:
                made = tuple(int(part) for part in value.split("+"))
            else:
                made = int(value) if "int" in wanted else float(value)
        except ValueError:
            raise ConfigError(f"attack {name}: {key} must be a {_KINDS[wanted[:3]]}, not {value!r}") from None
    numbers = made if isinstance(made, tuple) else (made,)
    least = 0 if "float" in wanted or "tuple" in wanted or key == "seed" else 1
    for number in numbers:
        if isinstance(number, int | float) and not (math.isfinite(number) and number >= least):
            raise ConfigError(f"attack {name}: {key} must be {least} or more, not {number}")
    return made


_KINDS = {"int": "whole number", "flo": "number", "tup": "list of whole numbers joined by +"}
