"""How a defence is written, and what a kind declares: no torch, so that settings can be checked without it.

A defence is written `name:value,parameter=value@levels`: `dropout:0.5`, `gaussian:1.0,kept=true@0,1`. Several
are joined by `+` on a command line and by commas of a TOML list; they act in the order written. `kinds` lists
which there are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from typing import Any, Literal

from splitpeer.errors import ConfigError
from splitpeer.models.cut import level_number

Place = Literal["image", "activations", "gradients"]
Value = float | int | bool

_PREFIX: Mapping[Place, str] = {"activations": "", "image": "image/", "gradients": "gradients/"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a defence: its default and the range that is accepted."""

    default: Value
    low: float = 0.0
    high: float = math.inf
    meaning: str = ""


@dataclass(frozen=True)
class Noise:
    """Independent noise of mean zero that is added to every value: what an attacker can average or subtract."""

    law: Literal["gaussian", "laplace"]
    width: Literal["rms", "percentile", "clip"]
    """What its standard deviation is a multiple of: of the tensor, or of a bound that does not follow the data."""


@dataclass(frozen=True)
class DefenceKind:
    """What can be known of a defence before it is made: how it is written, what it promises, and its traits.

    Attacks, reports and settings read traits here and never ask which class a defence is.
    """

    name: str
    made: str
    """The class that implements it: "module:Class", the module below `splitpeer.defences`."""
    title: str
    """A few words for tables."""
    promise: str
    """One sentence for a privacy officer: what is guaranteed, or that nothing is."""
    source: str
    """Paper, or what it derives from."""
    options: Mapping[str, Parameter] = field(default_factory=dict, hash=False)
    """In order; the first is the one that may be written without its name."""
    places: frozenset[Place] = frozenset({"activations"})
    guarantee: bool = False
    """Whether the promise is a theorem and not an observation."""
    private: bool = False
    """Whether the theorem is differential privacy, so that a budget can be kept."""
    offline: bool = True
    """Whether it can be applied to recorded clean traffic; what changes the training cannot."""
    structural: bool = False
    """Whether it is a part of the network (trained, and known to anyone who knows the weights): written first."""
    needs_levels: bool = False
    """Whether it means nothing without levels."""
    additive_noise: Noise | None = None
    channel_mixing: bool = False
    """Whether channels go through a secret matrix, the same for all samples."""
    needs_labels: bool = False
    """Whether it acts on what the masks say."""
    sparse: bool = False
    """Whether values are left out: exact zeros, which show unless noise follows."""
    drops: str = ""
    """The option with the share of values that are left out at random, each by itself; empty: none is."""
    rounds: str = ""
    """The option with the bits to which values are rounded, between minus and plus the largest of their channel."""

    def load(self) -> type[Any]:
        """The class that implements it: a `base.Defence`, or an image defence (see `image.stack`).

        Imports its module, and torch with it unless it is an image defence.
        """
        module, _, name = self.made.partition(":")
        made: type[Any] = getattr(import_module(f"splitpeer.defences.{module}"), name)
        return made


@dataclass(frozen=True)
class Spec:
    """One defence as it was written, checked: its kind with every parameter, and the levels it covers."""

    kind: DefenceKind
    parameters: tuple[tuple[str, Value], ...]
    """Every parameter of the kind, in its order."""
    levels: tuple[int, ...] | None = None
    """None: all that are sent."""
    written: str = field(default="", compare=False)
    """The text that it was read from."""

    @property
    def values(self) -> dict[str, Value]:
        """Parameter to value."""
        return dict(self.parameters)

    @property
    def kept(self) -> bool:
        """Whether what it draws is drawn once per sample and used every time, so that nothing can be averaged."""
        return bool(self.values.get("kept", False))

    def covers(self, name: str) -> bool:
        """Whether level `name` ("x0") is to be changed."""
        return self.levels is None or level_number(name) in self.levels

    @property
    def brief(self) -> str:
        """As people write it: without parameters that have their default, but for the first, which needs no name."""
        shown = [
            f"{name}={_text(value)}" if number else _text(value)
            for number, (name, value) in enumerate(self.parameters)
            if number == 0 or value != self.kind.options[name].default
        ]
        return self.kind.name + (":" + ",".join(shown) if shown else "") + self._levels

    def __str__(self) -> str:
        """With every parameter named: as it is announced, and as randomness is bound to it."""
        values = ",".join(f"{name}={_text(value)}" for name, value in self.parameters)
        return self.kind.name + (f":{values}" if values else "") + self._levels

    @property
    def _levels(self) -> str:
        return "@" + ",".join(map(str, self.levels)) if self.levels is not None else ""


Written = str | Sequence[str | Spec]
"""Several defences: one text joined by `+`, or a list of texts or of what was read already."""


@dataclass(frozen=True)
class ByPlace:
    """Defences of several places, as one list of texts names them."""

    activations: tuple[str, ...] = ()
    image: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()


def placed(place: Place, written: Iterable[object]) -> tuple[str, ...]:
    """Texts of defences with the prefix of their place ("image/voxel-noise:0.5"), for a list of several places."""
    return tuple(f"{_PREFIX[place]}{one}" for one in written)


def place_of(written: str) -> tuple[Place, str]:
    """The place that a text's prefix names, activations where it has none, and the text without it."""
    place = next(
        (place for place in _PREFIX if place != "activations" and written.startswith(_PREFIX[place])), None
    )
    return (place, written.removeprefix(_PREFIX[place])) if place else ("activations", written)


def by_place(written: Iterable[str]) -> ByPlace:
    """The opposite of `placed`: the texts of each place, without their prefix. An unknown prefix stays in the text."""
    found: dict[Place, list[str]] = {place: [] for place in _PREFIX}
    for one in written:
        place, text = place_of(one)
        found[place].append(text)
    return ByPlace(**{place: tuple(texts) for place, texts in found.items()})


_LEVEL = "(?:1[0-5]|[0-9])"  # SP-11.8-1: a cut has at most 16
_GRAMMAR = re.compile(
    rf"(?P<name>[a-z0-9-]+)(?::(?P<values>[^@+]*))?(?:@(?P<levels>{_LEVEL}(?:,{_LEVEL})*))?"
)


def parse(written: str, place: Place, kinds: Mapping[str, DefenceKind]) -> Spec:
    """One defence from its text.

    Raises:
        ConfigError: unknown name, parameter or level, a value out of range, or not for this place.
    """
    match = _GRAMMAR.fullmatch(written.strip())
    if match is None:
        raise ConfigError(
            f"{written!r} is not a defence: write name:value, such as dropout:0.5 or gaussian:1@0,1"
        )
    name = match["name"]
    if name not in kinds:
        raise ConfigError(f"defence {name!r} is unknown; known are {', '.join(sorted(kinds))}")
    kind = kinds[name]
    check_place(kind, place)
    levels = tuple(sorted({int(level) for level in match["levels"].split(",")})) if match["levels"] else None
    if kind.needs_levels and levels is None:
        raise ConfigError(f"{name} needs levels: write {name}@0 or {name}@0,1")
    given = _given(written, match["values"] or "", kind)
    parameters = tuple((key, given.get(key, option.default)) for key, option in kind.options.items())
    return Spec(kind, parameters, levels, written.strip())


def check_place(kind: DefenceKind, place: Place) -> None:
    """Raises ConfigError if `kind` is not for `place`."""
    if place not in kind.places:
        raise ConfigError(f"{kind.name} defends {' and '.join(sorted(kind.places))}, not {place}")


def check_order(specs: Sequence[Spec]) -> None:
    """Raises ConfigError where a part of the network is written after another defence."""
    for before, spec in pairwise(specs):
        if spec.kind.structural and not before.kind.structural:
            raise ConfigError(
                f"{spec.kind.name} is a part of the network: write it before {before.kind.name}"
            )


def _given(written: str, values: str, kind: DefenceKind) -> dict[str, Value]:
    """The parameters that `values` ("0.5,kept=true") names."""
    given: dict[str, Value] = {}
    for number, part in enumerate(part for part in values.split(",") if part):
        key, equals, text = part.partition("=")
        if not equals:
            if number > 0 or not kind.options:
                raise ConfigError(f"{written!r}: write {part!r} as parameter=value")
            key, text = next(iter(kind.options)), part
        if key not in kind.options:
            known = ", ".join(kind.options) or "none"
            raise ConfigError(f"{written!r}: {kind.name} has no parameter {key!r} (known: {known})")
        given[key] = _value(written, key, text, kind.options[key])
    return given


def _value(written: str, key: str, text: str, parameter: Parameter) -> Value:
    if isinstance(parameter.default, bool):
        if text not in ("true", "false"):
            raise ConfigError(f"{written!r}: {key} must be true or false, not {text!r}")
        return text == "true"
    kind = int if isinstance(parameter.default, int) else float
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and parameter.low <= value <= parameter.high):
        words = "a whole number" if kind is int else "a number"
        raise ConfigError(
            f"{written!r}: {key} must be {words} from {parameter.low:g} to {parameter.high:g}, not {text!r}"
        )
    return value


def _text(value: Value) -> str:
    # Shortest text that reads back as the same number, and without a plus: that joins defences.
    return repr(value).lower().removesuffix(".0").replace("e+", "e")
