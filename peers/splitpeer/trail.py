"""The audit trail: `audit.jsonl` in `[peer] state`, a line for everything that a data owner may ask about later.

Lines are only ever appended. Each ends in `"chain"`: SHA-256, in hexadecimal, of the chain of the line before
(64 zeros before the first) followed by the line's own text without its chain. A changed, missing or reordered
line breaks the chain; whoever can rewrite the whole file can make a new one, so copy the last chain elsewhere.
A crash may leave half a line: it stays, and the next line, `trail.torn`, says so and chains on.

Never in it: patient keys, tensor values, key material.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from splitpeer.errors import ConfigError, DataError
from splitproto.errors import printable

Value = str | int | float | bool | None | list[str] | tuple[str, ...]
NAME = "audit.jsonl"
FIRST = "0" * 64
TORN = "trail.torn"
_ENDING = re.compile(rb',"chain":"([0-9a-f]{64})"}\n?')
_TAIL = 1 << 16  # octets: longer than any line


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    entries: int
    last_chain: str
    """Hexadecimal; compare it with a copy kept elsewhere."""
    problem: str = ""
    """Empty: every line is chained to the one before."""

    @property
    def whole(self) -> bool:
        """No line was changed, left out or moved."""
        return not self.problem


class Trail:
    """Appends to one file. Several processes may, in turns.

    Args:
        folder: `[peer] state`; made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def note(self, event: str, **fields: Value) -> str:
        """Append a line, durably; returns its chain.

        Raises:
            ConfigError: the file cannot be written.
        """
        try:
            with self._locked() as file:
                number, chain, torn = _end(file)
                lines = b"" if _ends_in_newline(file) else b"\n"
                if torn:
                    number, chain, line = _line(number + 1, chain, TORN, _of_torn(torn))
                    lines += line
                _, chain, line = _line(number + 1, chain, event, fields)
                _write(file, lines + line)
                os.fsync(file)
                return chain
        except OSError as error:
            raise ConfigError(
                f"{self.path}: the audit trail cannot be written ({error.strerror}): change [peer] state"
            ) from None

    @contextmanager
    def _locked(self) -> Iterator[int]:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def verify(path: Path) -> Verdict:
    """Follow the chain from the first line to the last.

    Raises:
        DataError: the file cannot be read.
    """
    chain, count, torn = FIRST, 0, b""
    for number, line in enumerate(_lines(path), start=1):
        text, said = _parts(line)
        entry = _entry(text) if said else None
        if entry is None:
            torn += line
            continue
        if said != _chain(chain, text) or entry.get("n") != count + 1:
            return Verdict(count, chain, f"line {number} is not chained to the line before it")
        if torn and (entry.get("event") != TORN or entry.get("sha256") != _of_torn(torn)["sha256"]):
            return Verdict(count, chain, f"line {number - 1} is none of the trail's")
        chain, count, torn = said, count + 1, b""
    # Half a line at the very end is a crash, and the next start will say so.
    if torn.endswith(b"\n"):
        return Verdict(count, chain, "the last line is none of the trail's")
    return Verdict(count, chain)


def entries(path: Path) -> list[dict[str, Value]]:
    """All whole lines. Raises DataError."""
    return [entry for line in _lines(path) if (entry := _entry(_parts(line)[0])) is not None]


# --- one line ----------------------------------------------------------------------------------------------


def _line(number: int, chain: str, event: str, fields: dict[str, Value]) -> tuple[int, str, bytes]:
    now = time.time()
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
    entry = {"n": number, "time": moment, "event": event, **{key: _clean(v) for key, v in fields.items()}}
    text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    new = _chain(chain, text)
    return number, new, text[:-1] + f',"chain":"{new}"}}\n'.encode()


def _clean(value: Value) -> Value:
    """Peers choose some of it: nothing that steers a terminal or forges a line."""
    if isinstance(value, str):
        return printable(value)
    return [printable(item) for item in value] if isinstance(value, list | tuple) else value


def _chain(before: str, text: bytes) -> str:
    return hashlib.sha256(before.encode() + text).hexdigest()


def _parts(line: bytes) -> tuple[bytes, str]:
    """(the entry's text, its chain); an empty chain where the line has none."""
    found = _ENDING.search(line, max(0, len(line) - 80))
    if found is None or found.end() != len(line):
        return line, ""
    return line[: found.start()] + b"}", found[1].decode()


def _entry(text: bytes) -> dict[str, Value] | None:
    try:
        entry = json.loads(text)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _end(file: int) -> tuple[int, str, bytes]:
    """Number and chain of the last whole line, and what lies behind it."""
    size = os.fstat(file).st_size
    octets = os.pread(file, _TAIL, max(0, size - _TAIL))
    torn = b""
    for line in reversed(octets.splitlines(keepends=True)):
        text, chain = _parts(line)
        entry = _entry(text) if chain else None
        if entry is not None and isinstance(number := entry.get("n"), int):
            return number, chain, torn
        torn = line + torn
    return 0, FIRST, torn


def _of_torn(octets: bytes) -> dict[str, Value]:
    return {"octets": len(octets), "sha256": hashlib.sha256(octets.rstrip(b"\n")).hexdigest()}


def _ends_in_newline(file: int) -> bool:
    size = os.fstat(file).st_size
    return not size or os.pread(file, 1, size - 1) == b"\n"


def _write(file: int, octets: bytes) -> None:
    while octets:
        octets = octets[os.write(file, octets) :]


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
