"""New files, each complete or not there, none in the place of another."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

__all__ = ["write_new", "write_temporary"]

_NO_LINKS = frozenset((errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EINVAL))
"""What file systems without hard links answer: exFAT, vfat, BeeGFS, many network shares."""


def write_temporary(path: Path, data: bytes, mode: int) -> Path:
    """Write `data` under a temporary name next to `path`, never readable by more people than `mode` allows.

    Raises OSError, and leaves nothing behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_new(files: Mapping[Path, tuple[bytes, int]]) -> None:
    """Write all files, each with its mode, or none of them.

    Raises:
        OSError: `filename` says which one; FileExistsError where one is there already.
    """
    made: list[Path] = []
    try:
        for path, (data, mode) in files.items():
            try:
                _place(write_temporary(path, data, mode), path)
            except OSError as error:
                error.filename, error.filename2 = str(path), None
                raise
            made.append(path)
    except OSError:
        for earlier in made:
            earlier.unlink()
        raise


def _place(temporary: Path, path: Path) -> None:
    """Give a finished file its name, unless that is taken."""
    try:
        # Unlike a rename, a link fails if somebody else was first.
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _reserve_and_rename(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _reserve_and_rename(temporary: Path, path: Path) -> None:
    """The same without links: a process that creates the name may be overwritten. A crash in between leaves an empty
    file."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        os.replace(temporary, path)
    except OSError:
        path.unlink()
        raise
