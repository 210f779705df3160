"""Kinds of value that settings are made of: what a name, an address, a file or a list of levels must look like.

Each is a type for a pydantic model; a wrong value raises ValueError, one line that says what to write instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, GetCoreSchemaHandler, PlainSerializer
from pydantic_core import CoreSchema, core_schema

from splitpeer.data.layouts import checked_layout
from splitpeer.data.modalities import canonical_modality
from splitpeer.data.pattern import checked
from splitpeer.defences.kinds import parse_all
from splitpeer.defences.specs import Place, Spec
from splitpeer.errors import ConfigError, DataError
from splitpeer.models.cut import MAX_LEVELS
from splitproto.codings import CODINGS, LEVEL_FORMS, Coding
from splitproto.errors import IdentityError
from splitproto.identity import check_name
from splitproto.lanes.addresses import dialled_address, format_address, served_address

MAX_SEED = 2**63 - 1
MAX_COUNT = 2**31 - 1
"""Largest whole number in settings without a bound of their own."""
AUTO = "auto"
_WINDOWS = re.compile(r"(^|/)[A-Za-z]:[\\/]|(^|/)\\\\[^\\]+\\")
"""``C:\\`` or ``\\\\server\\``, also where it was taken for a relative path."""


def _name(value: str) -> str:
    try:
        return check_name("name", value)
    except IdentityError as error:
        raise ValueError(error.reason) from None


def _modality(value: str) -> str:
    try:
        return canonical_modality(value)
    except DataError as error:
        raise ValueError(str(error)) from None


def _held(value: Any) -> Any:
    """One modality, or a list of them, each once."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{value!r} is neither a modality nor a list of modalities")
    return _distinct(tuple(map(_modality, names)))


def _as_written(held: tuple[str, ...]) -> str | list[str]:
    return held[0] if len(held) == 1 else list(held)


def _layout(value: str) -> str:
    try:
        return checked_layout(value)
    except DataError as error:
        raise ValueError(str(error)) from None


def _pattern(value: str) -> str:
    try:
        return checked(value)
    except DataError as error:
        raise ValueError(str(error)) from None


def _address(value: str) -> str:
    """The same address with the host's ASCII form."""
    return format_address(*served_address(value))


def _remote_address(value: str) -> str:
    return format_address(*dialled_address(value))


def _levels(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(value)) != len(value):
        raise ValueError(f"must be distinct levels, not {list(value)}")
    return tuple(sorted(value))


def _distinct(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(value)) != len(value):
        raise ValueError(f"the same twice in {list(value)}: name each once")
    return value


def _count_or_fraction(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{value!r} is neither a number of patients nor a fraction of them")
    if isinstance(value, float) and not value < 1:
        raise ValueError(
            f"the fraction {value} leaves no patient to train on: write a whole number of patients"
        )
    return value


def _weights(value: Any) -> Any:
    if value == "private":
        return value
    try:
        seed = -1 if isinstance(value, bool) else int(str(value))
    except ValueError:
        seed = -1
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(
            f'{value!r} is neither "private" nor a seed (a whole number, for demonstrations only)'
        )
    return seed


def _wire_coding(value: Any) -> Any:
    """One for all levels, or a list with one for each."""
    if isinstance(value, list | tuple):
        if AUTO in value:
            raise ValueError(f'"{AUTO}" chooses one coding for all levels: write it alone, not in a list')
        if not value or (strange := [one for one in value if one not in LEVEL_FORMS]):
            raise ValueError(f"{strange[0] if value else []!r} is not one of {', '.join(LEVEL_FORMS)}")
        return tuple(value)
    if value not in (*CODINGS, AUTO):
        raise ValueError(
            f"{value!r} is not one of {', '.join((*CODINGS, AUTO))}, nor a list with one for each level"
        )
    return value


def _location(value: Any) -> Any:
    if value == "":
        raise ValueError("is empty: name a file or folder, or remove the key")
    name = str(value)
    if any(c in "\b\t\n\f\r" for c in name):
        raise ValueError(
            f"{name!r} holds a control character: in double quotes a backslash starts an escape such as \\t or \\n: "
            "write the path with / or in single quotes"
        )
    if _WINDOWS.search(name):
        raise ValueError(
            f"{name!r} is a Windows path, but this program runs on Linux: write it as Linux sees it "
            "(under WSL, C:\\data is /mnt/c/data)"
        )
    return value


def _weight_files(value: Any) -> Any:
    """One file, or a table of them by seat."""
    if isinstance(value, dict) and value and all(isinstance(file, str | Path) for file in value.values()):
        return {_modality(str(seat)): Path(_location(file)) for seat, file in value.items()}
    if isinstance(value, str | Path):
        return Path(_location(value))
    raise ValueError(f"{value!r} is neither a file nor a table {{ seat = file }}")


@dataclass(frozen=True)
class _Defences:
    """A list of texts in the file, checked and read once; written again as it was."""

    place: Place

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            self._read,
            handler.generate_schema(tuple[str, ...]),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda specs: [spec.written for spec in specs]
            ),
        )

    def _read(self, value: tuple[str, ...]) -> tuple[Spec, ...]:
        try:
            return parse_all(value, self.place)
        except ConfigError as error:
            raise ValueError(str(error)) from None


Name = Annotated[str, AfterValidator(_name)]
Modality = Annotated[str, AfterValidator(_modality)]
Modalities = Annotated[tuple[str, ...], BeforeValidator(_held), PlainSerializer(_as_written)]
"""Written as one text or as a list."""
Layout = Annotated[str, AfterValidator(_layout)]
FilePattern = Annotated[str, AfterValidator(_pattern)]
Location = Annotated[Path, BeforeValidator(_location)]
WeightFiles = Annotated[Path | dict[str, Path], BeforeValidator(_weight_files)]
Address = Annotated[str, AfterValidator(_address)]
RemoteAddress = Annotated[str, AfterValidator(_remote_address)]
Distinct = AfterValidator(_distinct)
CountOrFraction = Annotated[int | float, BeforeValidator(_count_or_fraction)]
InitialWeights = Annotated[Literal["private"] | int, BeforeValidator(_weights)]
Levels = Annotated[tuple[Annotated[int, Field(ge=0, lt=MAX_LEVELS)], ...], AfterValidator(_levels)]
Defences = Annotated[tuple[Spec, ...], _Defences("activations")]
ImageDefences = Annotated[tuple[Spec, ...], _Defences("image")]
GradientDefences = Annotated[tuple[Spec, ...], _Defences("gradients")]
Precision = Literal["f32", "bf16"]
LevelForm = Literal["f32", "bf16", "f16", "int8", "int4"]
"""How a level may travel: a precision, or a coding in fewer bytes (SP-11.21)."""
WireCoding = Annotated[Coding, BeforeValidator(_wire_coding)]
"""For all levels or for each; or AUTO: what the sites' links can carry, as the coordinator measures when a run is
started for the first time."""
NormalisationKind = Literal["zscore-nonzero", "zscore", "percentile", "window", "none"]
Seconds = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveInt = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Width = Annotated[int, Field(ge=1, le=4096)]
