"""The audit trail: `audit.jsonl` in `[peer] state`, a line for everything that a data owner may ask about later.

Lines are only ever appended. Each ends in `"chain"`: SHA-256, in hexadecimal, of the chain of the line before
(64 zeros before the first) followed by the line's own text without its chain. A changed, missing or reordered
line breaks the chain; anybody who can rewrite the whole file can make a new one, so copy the last chain elsewhere.
A crash may leave half a line: it stays, and the next line, `trail.torn`, says so and chains on. A full disk leaves
nothing: what found no room is written when there is some, with the time at which it happened; a line `trail.lost`
counts what was given up.

Never in it: patient keys, tensor values, key material.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from splitpeer.errors import DataError
from splitpeer.storage import durable, reading
from splitproto.errors import printable

Value = str | int | float | bool | None | list[str] | tuple[str, ...]
NAME = "audit.jsonl"
FIRST = "0" * 64
TORN = "trail.torn"
LOST = "trail.lost"
_ENDING = re.compile(rb',"chain":"([0-9a-f]{64})"}\n?')
_TAIL = 1 << 16  # octets: longer than most lines


@dataclass(frozen=True)
class TrailVerdict:
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

    def note(self, event: str, at: float | None = None, **fields: Value) -> str:
        """Append a line, durably and whole; returns its chain.

        Args:
            at: when it happened, in seconds since the epoch; None: now.

        Raises:
            ConfigError, DiskTrouble: the file cannot be written. It is as it was.
        """
        try:
            with self._locked() as file:
                number, chain, torn = _end(file)
                lines = b"" if _ends_in_newline(file) else b"\n"
                if torn:
                    number, chain, line = _line(number + 1, chain, TORN, _of_torn(torn))
                    lines += line
                _, chain, line = _line(number + 1, chain, event, fields, at)
                self._append(file, lines + line)
                return chain
        except OSError as error:
            raise durable.refusal(error, f"{self.path}: the audit trail", "[peer] state") from None

    def _append(self, file: int, octets: bytes) -> None:
        size = os.fstat(file).st_size
        try:
            _write(file, octets)
            os.fsync(file)
        except OSError:
            # Half a line would tell of a crash that never was. Where even this fails, the next line says so.
            with suppress(OSError):
                os.ftruncate(file, size)
            raise

    @contextmanager
    def _locked(self) -> Iterator[int]:
        if not self.path.exists():
            durable.make_folder(self.path.parent)
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Its name too, which may be new.
            durable.sync_folder(self.path.parent)
            yield file
        finally:
            os.close(file)


def verify(path: Path) -> TrailVerdict:
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
            return TrailVerdict(count, chain, f"line {number} is not chained to the line before it")
        if torn and (entry.get("event") != TORN or entry.get("sha256") != _of_torn(torn)["sha256"]):
            return TrailVerdict(count, chain, f"line {number - 1} is none of the trail's")
        chain, count, torn = said, count + 1, b""
    # Half a line at the very end is a crash, and the next start will say so.
    if torn.endswith(b"\n"):
        return TrailVerdict(count, chain, "the last line is none of the trail's")
    return TrailVerdict(count, chain)


def entries(path: Path) -> list[dict[str, Value]]:
    """All whole lines. Raises DataError."""
    return [entry for line in _lines(path) if (entry := _entry(_parts(line)[0])) is not None]


# --- one line ----------------------------------------------------------------------------------------------


def _line(
    number: int, chain: str, event: str, fields: dict[str, Value], at: float | None = None
) -> tuple[int, str, bytes]:
    now = time.time() if at is None else at
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
    entry = {"n": number, "time": moment, "event": event, **{key: _clean(v) for key, v in fields.items()}}
    text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    new = _chain(chain, text)
    return number, new, text[:-1] + f',"chain":"{new}"}}\n'.encode()


def _clean(value: Value) -> Value:
    """Peers choose some of it: nothing that steers a terminal or forges a line."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [printable(str(item)) for item in value]
    # Anything else has no business here; a line that cannot be written would tell nothing at all.
    return printable(str(value))


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
        entry = reading.parse(text)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _end(file: int) -> tuple[int, str, bytes]:
    """Number and chain of the last whole line, and the bytes after it."""
    size, look = os.fstat(file).st_size, _TAIL
    while True:
        torn = b""
        for line in reversed(os.pread(file, look, max(0, size - look)).splitlines(keepends=True)):
            text, chain = _parts(line)
            entry = _entry(text) if chain else None
            if entry is not None and isinstance(number := entry.get("n"), int):
                return number, chain, torn
            torn = line + torn
        if look >= size:
            return 0, FIRST, torn
        # A loss of power may leave zeros for any length.
        look *= 4


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
