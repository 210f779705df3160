"""Settings from TOML, environment and command line, and their errors in words. Which settings: `config`.

Precedence: command line > environment (``SPLITPEER_SECTION__KEY``) > file > default. Relative paths count
from the file's folder; those from environment and command line from the working directory.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

from splitpeer.errors import ConfigError
from splitpeer.storage import reading

PREFIX = "SPLITPEER_"
_SHOWN_PROBLEMS = 5
MAX_TOML = 1 << 20
"""Bytes of one peer.toml or job.toml."""


class Section(BaseModel):
    """One ``[section]``: immutable; an unknown key is an error."""

    # Validators are built once, for the file as a whole, and not for each section first: a tenth of a start.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class Settings(Section):
    """One file: its fields are sections."""

    PATHS: ClassVar[frozenset[str]] = frozenset()
    """The ``section.key`` that are paths."""

    _source: Path = PrivateAttr()

    @property
    def source(self) -> Path:
        """The file these settings came from."""
        return self._source

    @classmethod
    def path_defaults(cls, raw: Mapping[str, Any]) -> dict[str, str]:
        """Defaults of keys that are paths; they count from the file's folder, like paths in the file."""
        return {}

    def resolved(self) -> dict[str, dict[str, Any]]:
        """Every setting as it holds, with plain TOML values; those without a value are left out."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def read(
        cls, path: Path, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
    ) -> Self:
        """Read and check one file.

        Args:
            path: the TOML file.
            overrides: ``section.key`` to value, from the command line.
            environ: the environment; only ``SPLITPEER_SECTION__KEY`` count.

        Raises:
            ConfigError: one line that names file (or variable), key and fix.
        """
        return cls.of_table(_table(path), path, overrides, environ)

    @classmethod
    def of_table(
        cls,
        raw: dict[str, Any],
        path: Path,
        overrides: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """The same of a table that was read, or of none, as if it were in the file `path`."""
        origins: dict[str, str] = {}
        base = path.absolute().parent
        for key, value in cls.path_defaults(raw).items():
            _put(raw, key, value, replace=False)
        for key in cls.PATHS:
            _resolve(raw, key, base)
        for key, value, origin in (*_from_environment(environ or {}), *_from_flags(overrides or {})):
            _put(raw, key, value)
            origins[key] = origin
            if key in cls.PATHS:
                _resolve(raw, key, Path.cwd())
        try:
            settings = cls.model_validate(raw)
        except ValidationError as error:
            raise ConfigError(_in_words(cls, error, path, origins)) from None
        settings._source = path
        return settings


def has_section(path: Path, name: str) -> bool:
    """Whether a TOML file has ``[name]``: tells a job.toml from a peer.toml. Raises ConfigError."""
    return name in _table(path)


def parse_override(text: str) -> tuple[str, Any]:
    """``section.key=value`` of a command line as (``section.key``, value). Raises ConfigError."""
    dotted, separator, value = text.partition("=")
    section, _, key = dotted.strip().partition(".")
    if not (separator and section and key):
        raise ConfigError(f"--set {_one_line(text)!r}: write it as section.key=value")
    return f"{section}.{key}", _from_text(value.strip(), f"--set {dotted}")


def to_toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """TOML text of sections of plain values, as `Settings.resolved` returns them."""
    blocks = []
    for name, values in sections.items():
        lines = [f"{_key(key)} = {_value(value)}" for key, value in values.items()]
        blocks.append("\n".join([f"[{_key(name)}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if bare else _value(key)


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(held)}" for key, held in value.items()) + " }"
    # JSON's strings, numbers and booleans are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")


# --------------------------------------------------------------------------------------------------------
# Where settings come from


def _table(path: Path) -> dict[str, Any]:
    try:
        text = reading.read(path, MAX_TOML, follow=True).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file: make one with splitpeer init, or correct the path"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text: save it as UTF-8") from None
    try:
        return parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}{_backslash_hint(text, str(error))}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML document.

    Raises:
        ValueError: not TOML, nested too deeply, or an integer of thousands of digits; the text is one line.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(_one_line(str(error))) from None
    except ValueError:
        raise ValueError("an integer has too many digits") from None


def _backslash_hint(text: str, problem: str) -> str:
    """What to do if a Windows path was written in double quotes; empty if that is not the cause."""
    place = re.search(r"\(at line (\d+), column", problem)
    lines = text.splitlines()
    if place is None or int(place[1]) > len(lines) or "\\" not in lines[int(place[1]) - 1]:
        return ""
    return ": in double quotes a backslash starts an escape: write paths with /, or in single quotes"


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    for name, text in sorted(environ.items()):
        section, separator, key = name.removeprefix(PREFIX).partition("__")
        if not (name.startswith(PREFIX) and separator):
            continue
        yield f"{section}.{key}".lower(), _from_text(text, f"environment {name}"), f"environment {name}"


def _from_text(text: str, origin: str) -> Any:
    """Lists are read as TOML, all else stays text: the model knows whether it wants a number."""
    if not text.lstrip().startswith("["):
        return text
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        raise ConfigError(f"{origin}: not a TOML list: {_one_line(text)}") from None


def _from_flags(overrides: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    return ((key, value, "command line") for key, value in overrides.items() if value is not None)


def _put(raw: dict[str, Any], dotted: str, value: Any, *, replace: bool = True) -> None:
    section, _, key = dotted.partition(".")
    table = raw.setdefault(section, {})
    if isinstance(table, dict) and (replace or key not in table):
        table[key] = value


def _resolve(raw: dict[str, Any], dotted: str, base: Path) -> None:
    section, _, key = dotted.partition(".")
    table = raw.get(section)
    if not isinstance(table, dict) or key not in table:
        return
    value = table[key]
    table[key] = (
        {name: _at(one, base) for name, one in value.items()} if isinstance(value, dict) else _at(value, base)
    )


def _at(value: Any, base: Path) -> Any:
    # A value that is not text, or empty, is left for the model to refuse.
    return base / Path(value).expanduser() if isinstance(value, str) and value else value


# --------------------------------------------------------------------------------------------------------
# Errors in words


def _in_words(cls: type[Settings], error: ValidationError, path: Path, origins: Mapping[str, str]) -> str:
    problems = dict.fromkeys(_problem(cls, detail, path, origins) for detail in error.errors())
    shown = list(problems)[:_SHOWN_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    # The file is named once, not before each of its problems.
    head = f"{path}: "
    return shown[0] + "".join("; " + problem.removeprefix(head) for problem in shown[1:])


def _problem(cls: type[Settings], detail: ErrorDetails, path: Path, origins: Mapping[str, str]) -> str:
    place = [str(part) for part in detail["loc"]]
    wanted = ".".join(place[:2])
    # The source of an unknown section is that of a key in it.
    source = next(
        (o for key, o in origins.items() if key == wanted or key.startswith(wanted + ".")), str(path)
    )
    if len(place) == 1 and detail["type"] != "extra_forbidden":
        source = str(path)
    kind, given = detail["type"], _one_line(repr(detail["input"]))
    if len(place) == 0:  # a rule over several sections, written by us
        return f"{source}: {_message(detail)}"
    name = f"[{place[0]}]" if len(place) == 1 else f"[{place[0]}] {place[1]}"
    if len(place) > 2 and place[2] != "[key]":
        name += f", {place[2]}" if not place[2].isdigit() else f", item {int(place[2]) + 1}"
    if kind == "extra_forbidden":
        if len(place) > 2:
            name = f"[{'.'.join(place[:-1])}] {place[-1]}"
        return f"{source}: {_one_line(name)} is unknown: {_alternatives(cls, place)}"
    if kind == "missing":
        return f"{source}: {name} is missing: add {'the section' if len(place) == 1 else 'it'}"
    if kind == "value_error":
        return f"{source}: {name}: {_message(detail)}"
    if kind in ("model_type", "dict_type"):
        return f"{source}: {name} is a section: write [{place[0]}] and its keys below, not {given}"
    return f"{source}: {name} {_message(detail)}, not {given}"


def _message(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "value_error":
        return _one_line(str(context["error"]))
    if detail["type"] == "literal_error":
        return f"must be {context['expected']}"
    text = (
        detail["msg"].replace("Input should be", "must be").replace("Input", "value").replace("tuple", "list")
    )
    return _one_line(text.split(", unable to parse")[0])


def _alternatives(cls: type[Settings], place: list[str]) -> str:
    model: type[BaseModel] = cls
    for name in place[:-1]:
        if name in model.model_fields:  # else a key of a table of sections
            model = _section_in(model.model_fields[name].annotation) or model
    known = list(model.model_fields)
    close = difflib.get_close_matches(place[-1], known, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field is, may be, or holds by name."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for one in get_args(annotation) if (found := _section_in(one))), None)


def _one_line(text: str) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 200 else text[:197] + "..."
