"""Files that others may have written: no link is followed, sizes are checked before memory is taken.

A state folder, a run folder or a checkpoint may have been copied in from anywhere. What is wrong with a file is an
OSError or a ValueError here; callers turn it into one line that names the file.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from splitpeer.errors import ConfigError
from splitpeer.storage import descriptors
from splitproto.secretfile import how_to_close, open_to_others

MAX_JSON = 64 << 20
"""Bytes of one JSON document: run records, results, status, attack reports."""


def read(path: Path, most: int, *, follow: bool = False, growing: bool = False) -> bytes:
    """All bytes of a regular file.

    Args:
        path: the file.
        most: largest size in bytes; checked before memory is taken.
        follow: whether `path` itself may be a symbolic link.
        growing: the file may be a log that somebody writes to: what was there when it was opened is returned.

    Raises:
        OSError: missing, unreadable, a link (ELOOP), not a regular file (EINVAL), or larger than `most` (EFBIG).
    """
    # Without O_NONBLOCK, opening a named pipe would wait for its writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    with open(descriptors.spared(lambda: os.open(path, flags)), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"larger than {size(most)}", str(path))
        # One byte more: a file that grows meanwhile is refused, not cut.
        data = file.read(found.st_size + (not growing))
    if len(data) > found.st_size:
        raise OSError(errno.EFBIG, "it grew while it was read", str(path))
    return data


def secret(path: Path, most: int, what: str, cure: str) -> bytes:
    """The first bytes of a file that its owner alone can read.

    Args:
        most: so many bytes at most.
        what: that it holds, for a refusal.
        cure: of a file that cannot be read.

    Raises:
        ConfigError: it is missing, unreadable, or open to group or others.
    """
    try:
        shared = open_to_others(path)
        with path.open("rb") as file:
            content = file.read(most)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read {what} ({error.strerror}): {cure}") from None
    if shared:
        raise ConfigError(f"{path}: {what} is open to group or others: {how_to_close(path)}")
    return content


def parse(text: str | bytes) -> Any:
    """The JSON value in `text`.

    Raises:
        ValueError: not JSON, not UTF-8, nested too deeply for the parser, or an integer of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def document(path: Path, most: int = MAX_JSON, *, follow: bool = False) -> dict[str, Any]:
    """The JSON object in a file; see `read` and `parse`.

    Raises:
        OSError, ValueError: as those, and ValueError where the value is not an object.
    """
    found = parse(read(path, most, follow=follow))
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def size(count: int) -> str:
    """A number of bytes for people: "64 MiB"."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.4g} {unit}"
    return f"{count} bytes"
