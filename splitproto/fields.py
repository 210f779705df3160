"""What a message field may hold: one small class per kind, each checks on reading and on writing (SP-8.2).

`read` turns a decoded msgpack value into the Python value of a message; `write` is its inverse. Both raise
`CodecError` naming the field. Limits are arguments, so every message states its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Protocol, cast

from .constants import MAX_TEXT
from .errors import CodecError
from .text import is_printable

_FIGURE = re.compile(r"[A-Za-z0-9_.-]{1,32}")


class FieldKind(Protocol):
    """A kind of field: how its values look in Python and as MessagePack."""

    def read(self, value: Any, where: str) -> Any:
        """The value of a decoded one. Raises CodecError, which names the field by `where`: it breaks a rule."""
        ...

    def write(self, value: Any, where: str) -> Any:
        """What is encoded for a value. Raises CodecError as `read` does."""
        ...


def wire(kind: FieldKind, **options: Any) -> Any:
    """A dataclass field that travels; with `default=None` it may be absent."""
    return field(metadata={"wire": kind}, **options)


def kinds_of(cls: type) -> dict[str, tuple[FieldKind, bool]]:
    """name -> (kind, required?) of a message or record class."""
    return {f.name: (f.metadata["wire"], f.default is MISSING) for f in fields(cls) if "wire" in f.metadata}


def read_map(cls: type, value: Any, where: str) -> dict[str, Any]:
    """The fields of `cls` from a map: all required ones, no unknown ones."""
    if type(value) is not dict:
        raise CodecError(f"{where} is not a map")
    kinds = kinds_of(cls)
    # SP-8.2-2: "An unknown key is an error", except inside a field of kind Extensions.
    for key in value:
        if key not in kinds:
            raise CodecError(f"{where} has an unknown field {key[:40]!r}")
    result = {}
    for name, (kind, required) in kinds.items():
        if name in value:
            result[name] = kind.read(value[name], f"{where}.{name}")
        elif required:
            raise CodecError(f"{where} lacks the field {name!r}")
    return result


def write_map(message: Any, where: str) -> dict[str, Any]:
    """The map of a message or record; absent optional fields are left out."""
    result = {}
    for name, (kind, required) in kinds_of(type(message)).items():
        value = getattr(message, name)
        if value is not None or required:
            result[name] = kind.write(value, f"{where}.{name}")
    return result


@dataclass(frozen=True)
class Int(FieldKind):
    """An integer from `low` to `high`, both included."""

    low: int = 0
    high: int = (1 << 53) - 1
    """JSON-safe by default."""

    def read(self, value: Any, where: str) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise CodecError(f"{where} is not an integer from {self.low} to {self.high}")
        return value

    write = read


@dataclass(frozen=True)
class Real(FieldKind):
    """A finite float64; written as float even when it is whole."""

    def read(self, value: Any, where: str) -> float:
        if type(value) is not float or not math.isfinite(value):
            raise CodecError(f"{where} is not a finite float64")
        return value

    def write(self, value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CodecError(f"{where} is not a number")
        return self.read(float(value), where)


@dataclass(frozen=True)
class Bool(FieldKind):
    """true or false."""

    def read(self, value: Any, where: str) -> bool:
        if type(value) is not bool:
            raise CodecError(f"{where} is not a boolean")
        return value

    write = read


@dataclass(frozen=True)
class Text(FieldKind):
    """UTF-8 text of at most `limit` characters; `one_of` makes it an enumeration."""

    limit: int = 256
    one_of: tuple[str, ...] = ()

    def read(self, value: Any, where: str) -> str:
        if type(value) is not str or len(value) > min(self.limit, MAX_TEXT):
            raise CodecError(f"{where} is not text of at most {self.limit} characters")
        # SP-8.2-5: what people will read forges no lines and steers no terminal.
        if not is_printable(value):
            raise CodecError(f"{where} holds characters that cannot be printed")
        if self.one_of and value not in self.one_of:
            raise CodecError(f"{where} is not one of {', '.join(self.one_of)}")
        return value

    write = read


@dataclass(frozen=True)
class Octets(FieldKind):
    """Exactly `length` octets."""

    length: int

    def read(self, value: Any, where: str) -> bytes:
        if type(value) is not bytes or len(value) != self.length:
            raise CodecError(f"{where} is not {self.length} octets")
        return value

    write = read


@dataclass(frozen=True)
class OctetsUpTo(FieldKind):
    """At most `limit` octets."""

    limit: int

    def read(self, value: Any, where: str) -> bytes:
        if type(value) is not bytes or len(value) > self.limit:
            raise CodecError(f"{where} is not at most {self.limit} octets")
        return value

    write = read


@dataclass(frozen=True)
class ListOf(FieldKind):
    """A list of `low` to `high` items of one kind; a tuple in Python."""

    item: FieldKind
    high: int
    low: int = 0

    def _check(self, value: Any, where: str) -> None:
        if not self.low <= len(value) <= self.high:
            raise CodecError(f"{where} does not have {self.low} to {self.high} entries")

    def read(self, value: Any, where: str) -> tuple[Any, ...]:
        if type(value) is not list:
            raise CodecError(f"{where} is not a list")
        self._check(value, where)
        return tuple(self.item.read(item, f"{where}[{n}]") for n, item in enumerate(value))

    def write(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list | tuple):
            raise CodecError(f"{where} is not a list")
        self._check(value, where)
        return [self.item.write(item, f"{where}[{n}]") for n, item in enumerate(value)]


@dataclass(frozen=True)
class OneOrList(FieldKind):
    """One value, or a list; which of them is told by what is there."""

    one: FieldKind
    many: ListOf

    def read(self, value: Any, where: str) -> Any:
        return (self.many if type(value) is list else self.one).read(value, where)

    def write(self, value: Any, where: str) -> Any:
        return (self.many if isinstance(value, list | tuple) else self.one).write(value, where)


@dataclass(frozen=True)
class Record(FieldKind):
    """A nested map with the fields of `cls`."""

    cls: type

    def read(self, value: Any, where: str) -> Any:
        return self.cls(**read_map(self.cls, value, where))

    def write(self, value: Any, where: str) -> dict[str, Any]:
        if type(value) is not self.cls:
            raise CodecError(f"{where} is not a {self.cls.__name__}")
        return write_map(value, where)


@dataclass(frozen=True)
class Numbers(FieldKind):
    """A map of at most `limit` names to finite float64: figures for people."""

    limit: int = 64

    def read(self, value: Any, where: str) -> dict[str, float]:
        if type(value) is not dict or len(value) > self.limit:
            raise CodecError(f"{where} is not a map of at most {self.limit} numbers")
        if not all(type(key) is str and _FIGURE.fullmatch(key) for key in value):
            raise CodecError(f"{where} names a figure with other characters than letters, digits, _ . -")
        return {key: Real().read(number, f"{where}.{key}") for key, number in value.items()}

    def write(self, value: Mapping[str, float], where: str) -> dict[str, float]:
        if not isinstance(value, Mapping):
            raise CodecError(f"{where} is not a map")
        return self.read({key: Real().write(number, where) for key, number in value.items()}, where)


@dataclass(frozen=True)
class Extensions(FieldKind):
    """A map of which unknown keys are ignored: the one place where a later minor revision may add."""

    limit: int = 16

    def read(self, value: Any, where: str) -> dict[str, Any]:
        if type(value) is not dict or len(value) > self.limit:
            raise CodecError(f"{where} is not a map of at most {self.limit} entries")
        return cast("dict[str, Any]", value)

    write = read
