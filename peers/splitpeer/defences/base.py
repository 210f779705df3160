"""What a defence is, how it is written, and where its randomness comes from.

A defence is written `name:value,parameter=value@levels`: `dropout:0.5`, `gaussian:1.0,kept=true@0,1`. Several
are joined by `+` on a command line and by commas of a TOML list; they act in the order written. Each is one
class; `CATALOGUE` in `catalogue.py` lists them.

Randomness is a function, not a state: every number is derived from the party's secret key and from what is
released (run, step, batch, sample, level), so a step repeated after a crash sends the same octets, and a
defence applied to a recorded capture with the same key gives what the live defence would have sent.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from splitpeer.errors import ConfigError
from splitproto.messages import Sample

Place = Literal["image", "activations", "gradients"]
Tensors = dict[str, Tensor]
"""Level name to [batch, channels, *spatial], as in {"x0": ..., "x4": ...}."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a defence: its default and the range that is accepted."""

    default: float | int | bool
    low: float = 0.0
    high: float = math.inf
    meaning: str = ""


@dataclass(frozen=True)
class Release:
    """What is about to leave, and of whom: all that randomness may depend on beside the key."""

    run: bytes
    mode: str
    step: int
    batch: int
    samples: tuple[Sample, ...]
    """The batch's samples, in order; their count is the first dimension of every tensor."""
    target: np.ndarray | None = None
    """uint8 or float32 [batch, regions, *spatial], where a label holder defends gradients."""


class Draw:
    """Independent random generators for one release, derived from `key` (32 octets)."""

    def __init__(self, key: bytes, release: Release) -> None:
        self._key, self.release = key, release

    def fresh(self, purpose: str, index: int) -> np.random.Generator:
        """For sample `index` of this very release: another step, mode or batch number gives other numbers."""
        release, sample = self.release, self.release.samples[index]
        return self._generator(
            b"fresh", purpose.encode(), release.run, release.mode.encode(), b"%d" % release.step,
            b"%d" % release.batch, b"%d" % index, sample.key, repr(sample.origin).encode(),
        )  # fmt: skip

    def kept(self, purpose: str, index: int) -> np.random.Generator:
        """For sample `index` wherever and whenever it is released: the same numbers every time, so that there
        is nothing to average (compare RAPPOR's permanent randomised response, Erlingsson et al. 2014)."""
        sample = self.release.samples[index]
        return self._generator(b"kept", purpose.encode(), sample.key, repr(sample.origin).encode())

    def generator(self, purpose: str, index: int, *, kept: bool) -> np.random.Generator:
        """`kept` or `fresh`."""
        return self.kept(purpose, index) if kept else self.fresh(purpose, index)

    def _generator(self, *parts: bytes) -> np.random.Generator:
        digest = hashlib.blake2b(key=self._key, digest_size=16, person=b"splitpeer defnc")
        for part in parts:
            digest.update(len(part).to_bytes(4, "big") + part)
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest.digest(), "big")))


class Defence(nn.Module):
    """One defence. Subclasses state what they are as class attributes and override what they need.

    Trainable parts are ordinary parameters: they are trained by the encoder's own optimiser and saved in the
    same checkpoints. Differentiable in its input, so that the encoder trains through it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """A few words for tables."""
    promise: ClassVar[str]
    """One sentence for a privacy officer: what is guaranteed, or that nothing is."""
    guarantee: ClassVar[bool] = False
    """Whether the promise is a theorem (differential privacy) and not an observation."""
    places: ClassVar[frozenset[Place]] = frozenset({"activations"})
    offline: ClassVar[bool] = True
    """Whether it can be applied to recorded clean traffic; what changes the training cannot."""
    parameters: ClassVar[Mapping[str, Parameter]] = {}
    """In order; the first is the one that may be written without its name."""

    def __init__(self, levels: tuple[int, ...] | None = None, **values: float | int | bool) -> None:
        super().__init__()
        self.levels = levels
        self.values = {name: values.get(name, p.default) for name, p in self.parameters.items()}

    def prepare(self, channels: Mapping[str, int], dimensions: int) -> None:
        """Told once, before use: channels of each level ("x0": 8, ...) and 2 or 3. Makes trainable parts."""

    def begin(self, step: int) -> None:
        """A training step with this number follows."""

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        """`tensors` as they may leave. Levels that are not covered pass unchanged."""
        return tensors

    def penalty(self, image: Tensor, sent: Tensors) -> Tensor | None:
        """A local loss by which the site trains its encoder, beside the gradients that arrive: a scalar."""
        return None

    def covers(self, name: str) -> bool:
        """Whether level `name` ("x0") is to be changed."""
        return self.levels is None or int(name[1:]) in self.levels

    @property
    def spec(self) -> str:
        """As it is written, every parameter named."""
        values = ",".join(f"{n}={_written(v)}" for n, v in self.values.items())
        levels = "@" + ",".join(map(str, self.levels)) if self.levels is not None else ""
        return self.name + (f":{values}" if values else "") + levels


class Stack(nn.Module):
    """Several defences in order, with the key of whoever applies them.

    Args:
        defences: in the order in which they act.
        key: 32 octets; secret, or the defences' randomness is none.
    """

    def __init__(self, defences: Sequence[Defence], key: bytes) -> None:
        super().__init__()
        self.defences = nn.ModuleList(defences)
        self._key = key

    def __bool__(self) -> bool:
        return len(self.defences) > 0

    def forward(self, tensors: Tensors, release: Release) -> Tensors:
        """What may leave instead of `tensors`."""
        for number, defence in enumerate(self.defences):
            # Numbered: two of the same kind draw independently.
            tensors = defence(tensors, Draw(hashlib.sha256(self._key + bytes([number])).digest(), release))
        return tensors

    def begin(self, step: int) -> None:
        """See `Defence.begin`."""
        for defence in self.defences:
            defence.begin(step)

    def penalty(self, image: Tensor, sent: Tensors) -> Tensor | None:
        """The sum of all penalties, or None."""
        terms = [term for d in self.defences if (term := d.penalty(image, sent)) is not None]
        return sum(terms[1:], terms[0]) if terms else None

    @property
    def specs(self) -> tuple[str, ...]:
        """Each as it is written."""
        return tuple(defence.spec for defence in self.defences)


_WRITTEN = re.compile(r"(?P<name>[a-z0-9-]+)(?::(?P<values>[^@+]*))?(?:@(?P<levels>[0-4](?:,[0-4])*))?")


def parse(written: str, place: Place, catalogue: Mapping[str, type[Defence]]) -> Defence:
    """One defence from its text.

    Raises:
        ConfigError: unknown name, parameter or level, a value out of range, or not for this place.
    """
    match = _WRITTEN.fullmatch(written.strip())
    if match is None:
        raise ConfigError(
            f"{written!r} is no defence: write name:value, such as dropout:0.5 or gaussian:1@0,1"
        )
    name = match["name"]
    if name not in catalogue:
        raise ConfigError(f"defence {name!r} is unknown; known are {', '.join(sorted(catalogue))}")
    kind = catalogue[name]
    if place not in kind.places:
        raise ConfigError(f"{name} defends {' and '.join(sorted(kind.places))}, not {place}")
    values: dict[str, float | int | bool] = {}
    given = [part for part in (match["values"] or "").split(",") if part]
    for number, part in enumerate(given):
        key, equals, text = part.partition("=")
        if not equals:
            if number > 0 or not kind.parameters:
                raise ConfigError(f"{written!r}: write {part!r} as parameter=value")
            key, text = next(iter(kind.parameters)), part
        if key not in kind.parameters:
            known = ", ".join(kind.parameters) or "none"
            raise ConfigError(f"{written!r}: {name} has no parameter {key!r} (known: {known})")
        values[key] = _value(written, key, text, kind.parameters[key])
    levels = tuple(sorted({int(level) for level in match["levels"].split(",")})) if match["levels"] else None
    return kind(levels, **values)


def _value(written: str, key: str, text: str, parameter: Parameter) -> float | int | bool:
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


def _written(value: float | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def make_stack(
    written: Sequence[str] | str,
    *,
    key: bytes,
    channels: Mapping[str, int],
    dimensions: int,
    place: Place = "activations",
) -> Stack:
    """A stack from its text: a list, or one string joined by `+`. Empty text is an empty stack.

    Raises:
        ConfigError: see `parse`; or a level that the job does not send.
    """
    from splitpeer.defences.catalogue import CATALOGUE

    parts = written.split("+") if isinstance(written, str) else list(written)
    defences = [parse(part, place, CATALOGUE) for part in parts if part.strip()]
    for defence in defences:
        defence.prepare(channels, dimensions)
    return Stack(defences, key)
