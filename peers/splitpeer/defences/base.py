"""What a defence is, how it is written, and where its randomness comes from.

A defence is written `name:value,parameter=value@levels`: `dropout:0.5`, `gaussian:1.0,kept=true@0,1`. Several
are joined by `+` on a command line and by commas of a TOML list; they act in the order written. Each is one
class; `CATALOGUE` in `catalogue.py` lists them.

Randomness is a function, not a state: every number is derived from the party's secret key and from what is
released (mode, step, batch, sample, level and the tensors themselves), so a step repeated after a crash sends
the same octets, and a defence applied to a recorded capture with the same key gives what the live defence
would have sent. The tensors enter because a peer that has a step repeated with other weights, or another
augmentation, must not meet the same noise twice: it would subtract the one from the other (compare the
synthetic initialisation vectors of RFC 5297).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import torch
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
    nonce: bytes = b""
    """Never the same twice, for `Draw.once`; empty: everything repeats."""


class Draw:
    """Independent random generators for one release.

    Args:
        key: 32 octets.
        release: what is about to leave.
        tensors: as they arrive at the defence; `fresh` numbers are bound to them.
    """

    def __init__(self, key: bytes, release: Release, tensors: Tensors | None = None) -> None:
        self._key, self.release = key, release
        self._tensors = tensors or {}
        self._digests: dict[int, bytes] = {}

    def fresh(self, purpose: str, index: int) -> np.random.Generator:
        """For sample `index` of this very release: another step, mode, batch number or content gives other
        numbers."""
        return generator(self._key, b"fresh", *self._release(purpose, index))

    def kept(self, purpose: str, index: int) -> np.random.Generator:
        """For sample `index` wherever and whenever it is released: the same numbers every time, so that there
        is nothing to average (compare RAPPOR's permanent randomised response, Erlingsson et al. 2014)."""
        sample = self.release.samples[index]
        return generator(self._key, b"kept", purpose.encode(), sample.key, repr(sample.origin).encode())

    def once(self, purpose: str, index: int) -> bytes:
        """32 octets for sample `index`, as `fresh`, and of this very computation: even what is released a second
        time gets others. Equal noise would already tell that two tensors were equal, which no differential
        privacy allows."""
        return _keyed(self._key, (b"once", *self._release(purpose, index), self.release.nonce), 32)

    def fixed(self, purpose: str) -> np.random.Generator:
        """The same for all samples and steps."""
        return generator(self._key, b"fixed", purpose.encode())

    def generator(self, purpose: str, index: int, *, kept: bool) -> np.random.Generator:
        """`kept` or `fresh`."""
        return self.kept(purpose, index) if kept else self.fresh(purpose, index)

    def _release(self, purpose: str, index: int) -> tuple[bytes, ...]:
        # Not the run's number, which is chance: a demonstration repeats, and the content tells real runs apart.
        release, sample = self.release, self.release.samples[index]
        return (
            purpose.encode(), release.mode.encode(), b"%d" % release.step, b"%d" % release.batch,
            b"%d" % index, sample.key, repr(sample.origin).encode(), self._content(index),
        )  # fmt: skip

    def _content(self, index: int) -> bytes:
        if index not in self._digests:
            digest = hashlib.blake2b(digest_size=16)
            for name in sorted(self._tensors):
                digest.update(name.encode())
                digest.update(self._tensors[name][index].detach().float().cpu().contiguous().numpy())
            self._digests[index] = digest.digest()
        return self._digests[index]


def generator(key: bytes, *parts: bytes) -> np.random.Generator:
    """A generator that is a function of `key` and `parts`: keyed BLAKE2b (RFC 7693) gives Philox its key. Of
    PCG64, whoever knows a part of what was drawn may compute the rest; of Philox, no such attack is known."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_keyed(key, parts, 16), "big")))


def _keyed(key: bytes, parts: Sequence[bytes], octets: int) -> bytes:
    digest = hashlib.blake2b(key=key, digest_size=octets, person=b"splitpeer defnc")
    for part in parts:
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


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
    structural: ClassVar[bool] = False
    """Whether it is a part of the network (trained, and known to whoever knows the weights): written first."""
    source: ClassVar[str] = ""
    """Paper, or what it derives from."""
    options: ClassVar[Mapping[str, Parameter]] = {}
    """In order; the first is the one that may be written without its name."""

    def __init__(self, levels: tuple[int, ...] | None = None, **values: float | int | bool) -> None:
        super().__init__()
        self.levels = levels
        self.values = {name: values.get(name, p.default) for name, p in self.options.items()}
        self.channels: dict[str, int] = {}
        """How many of each level's first channels carry; what lies beyond is exactly zero and stays so."""

    def prepare(self, channels: Mapping[str, int], dimensions: int) -> None:
        """Told once, before use: `channels` that carry of each level ("x0": 8, ...), and 2 or 3 dimensions.
        Makes trainable parts."""
        self.channels = dict(channels)

    def carried(self, channels: Mapping[str, int]) -> dict[str, int]:
        """How many channels of each level carry after this defence, if `channels` did before it."""
        return dict(channels)

    def begin(self, step: int) -> list[nn.Parameter]:
        """A training step with this number follows, perhaps again. Returns the parameters that were drawn
        anew: what an optimiser remembers of them is void."""
        return []

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        """`tensors` as they may leave. Levels that are not covered pass unchanged."""
        return tensors

    def structure(self, tensors: Tensors) -> Tensors:
        """Where `structural`: `forward`, which then needs no draw."""
        return tensors

    def penalty(self, image: Tensor, sent: Tensors) -> Tensor | None:
        """A local loss by which the site trains its encoder, beside the gradients that arrive: a scalar."""
        return None

    def covers(self, name: str) -> bool:
        """Whether level `name` ("x0") is to be changed."""
        return self.levels is None or int(name[1:]) in self.levels

    def each(self, tensors: Tensors, change: Callable[[str, Tensor], Tensor]) -> Tensors:
        """`tensors` where the carrying channels of every covered level are `change(name, channels)`."""
        changed = dict(tensors)
        for name, tensor in tensors.items():
            carrying = self.channels.get(name, tensor.shape[1])
            if self.covers(name) and carrying:
                changed[name] = padded(change(name, tensor[:, :carrying]), tensor.shape[1])
        return changed

    @property
    def spec(self) -> str:
        """As it is written, every parameter named."""
        values = ",".join(f"{n}={_written(v)}" for n, v in self.values.items())
        levels = "@" + ",".join(map(str, self.levels)) if self.levels is not None else ""
        return self.name + (f":{values}" if values else "") + levels


def padded(tensor: Tensor, channels: int) -> Tensor:
    """`tensor` [B, c, *spatial] with zeros behind, up to `channels`."""
    missing = channels - tensor.shape[1]
    if missing == 0:
        return tensor
    nothing = tensor.new_zeros((tensor.shape[0], missing, *tensor.shape[2:]))
    return torch.cat([tensor, nothing], dim=1)


class Stack(nn.Module):
    """Several defences in order, with the key of whoever applies them.

    Args:
        defences: in the order in which they act.
        key: 32 octets; secret, or the defences' randomness is none.
        first: the number of defences[0], where others have acted before.
    """

    def __init__(self, defences: Sequence[Defence], key: bytes, first: int = 0) -> None:
        super().__init__()
        self.defences = nn.ModuleList(defences)
        self._key, self._first = key, first

    def __bool__(self) -> bool:
        return len(self.defences) > 0

    def forward(self, tensors: Tensors, release: Release) -> Tensors:
        """What may leave instead of `tensors`.

        Raises:
            ValueError: the release names another number of samples.
        """
        if any(len(tensor) != len(release.samples) for tensor in tensors.values()):
            raise ValueError(
                f"the release names {len(release.samples)} samples, the tensors hold another number"
            )
        for number, defence in enumerate(self.defences, self._first):
            # Numbered: two of the same kind draw independently. Named with all parameters: a site that raises its
            # noise in the middle of a run must not send the same draw at two widths, which gives the content away.
            key = hashlib.sha256(self._key + number.to_bytes(4, "big") + defence.spec.encode()).digest()
            tensors = defence(tensors, Draw(key, release, tensors))
        return tensors

    def structure(self, tensors: Tensors) -> Tensors:
        """`tensors` after the parts of the network alone: what is there before any other defence acts."""
        for defence in self.defences:
            if defence.structural:
                tensors = defence.structure(tensors)
        return tensors

    def begin(self, step: int) -> list[nn.Parameter]:
        """See `Defence.begin`."""
        return [parameter for defence in self.defences for parameter in defence.begin(step)]

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
            if number > 0 or not kind.options:
                raise ConfigError(f"{written!r}: write {part!r} as parameter=value")
            key, text = next(iter(kind.options)), part
        if key not in kind.options:
            known = ", ".join(kind.options) or "none"
            raise ConfigError(f"{written!r}: {name} has no parameter {key!r} (known: {known})")
        values[key] = _value(written, key, text, kind.options[key])
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
    # Shortest text that reads back as the same number, and without a plus: that joins defences.
    return repr(value).lower().removesuffix(".0").replace("e+", "e")


def make_stack(
    written: Sequence[str] | str,
    *,
    key: bytes,
    channels: Mapping[str, int],
    dimensions: int,
    place: Place = "activations",
    after: Sequence[str] = (),
    strict: bool = True,
) -> Stack:
    """A stack from its text: a list, or one string joined by `+`. Empty text is an empty stack.

    Args:
        written: the defences.
        key: see `Stack`.
        channels: of each level that is sent ("x0": 8, ...).
        dimensions: 2 or 3.
        place: what is defended.
        after: what the tensors have been through already (a capture's announced defences): they are not
            applied again, but say which channels carry, and count. Those of images are passed over.
        strict: False: a level that is not sent needs no defence, and is no error.

    Raises:
        ConfigError: see `parse`; a level that is not sent; or a part of the network after a defence.
    """
    earlier = parse_all([part for part in after if not part.startswith(IMAGE)], place)
    defences = parse_all(written, place)
    carried = dict(channels)
    for number, defence in enumerate([*earlier, *defences]):
        unsent = [level for level in defence.levels or () if f"x{level}" not in channels]
        if unsent and strict:
            raise ConfigError(
                f"{defence.spec}: level {unsent[0]} is not sent; sent are {', '.join(channels)}"
            )
        if number >= len(earlier):
            defence.prepare(carried, dimensions)
        carried = defence.carried(carried)
    return Stack(defences, key, len(earlier))


IMAGE = "image/"
"""Before the name of a defence of the image, where defences of image and activations stand in one list."""


def parse_all(written: Sequence[str] | str, place: Place) -> list[Defence]:
    """Several defences from their text, in order.

    Raises:
        ConfigError: see `parse`; or a part of the network is written after another defence.
    """
    from splitpeer.defences.catalogue import CATALOGUE

    parts = written.split("+") if isinstance(written, str) else list(written)
    defences = [parse(part, place, CATALOGUE) for part in parts if part.strip()]
    for before, defence in pairwise(defences):
        if defence.structural and not before.structural:
            raise ConfigError(f"{defence.name} is a part of the network: write it before {before.name}")
    return defences
