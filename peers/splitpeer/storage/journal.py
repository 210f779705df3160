"""A journal: JSON lines of what was promised, each on the medium before its writer continues.

The writer stops where a line cannot be kept (`lines.py` is the opposite: it never stops its writer). A last line torn
by a crash is of something that did not happen yet, and does not count; any other damage is refused.
"""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from splitpeer.errors import DataError
from splitpeer.storage import descriptors, durable, reading

_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class Journal:
    """One file, for one writer, which calls `read` first.

    Args:
        path: it need not exist; its folder must, once something is added.
        most_mib: largest size in MiB, of reading and of writing.
        lost: what follows for the operator where the file is damaged: one clause.
    """

    def __init__(self, path: Path, most_mib: int, lost: str) -> None:
        self.path = path
        self._most_mib, self._lost = most_mib, lost
        self._size: int | None = None
        """Octets of whole lines."""
        self._named = False
        """Whether the file's name is on the medium."""

    def read(self, take: Callable[[Mapping[str, Any]], None]) -> None:
        """Hand over each line, the oldest first.

        Args:
            take: raises ValueError, TypeError or LookupError at a line that is none of its own.

        Raises:
            DataError: the file cannot be read, is larger than allowed, or damaged.
        """
        path = self.path
        try:
            octets = reading.read(path, self._most_mib << 20)
        except FileNotFoundError:
            octets = b""
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise self._full() from None
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); check the file and whose it is"
            ) from None
        self._size = _whole(octets)
        try:
            for line in io.BytesIO(octets[: self._size]):
                said = reading.parse(line)
                if not isinstance(said, dict):
                    raise TypeError
                take(said)
        except (ValueError, TypeError, LookupError):
            raise DataError(f"{path}: damaged, {self._lost}; restore the file from a backup") from None

    def add(self, **said: Any) -> None:
        """One line, which is on the medium once this returns.

        Raises:
            DataError: it cannot be written, and nothing of it stays; or the journal would be larger than allowed.
        """
        line = json.dumps(said, separators=(",", ":")).encode() + b"\n"
        if self._size is None:
            raise ValueError("a journal is read before something is added")
        if self._size + len(line) > self._most_mib << 20:
            raise self._full()
        try:
            self._append(line, self._size)
        except OSError as error:
            raise durable.refusal(error, f"{self.path}:", "[peer] state") from None
        self._size += len(line)

    # --- inside ----------------------------------------------------------------------------------------

    def _append(self, line: bytes, size: int) -> None:
        file = descriptors.spared(lambda: os.open(self.path, _APPEND, 0o600))
        try:
            there = os.fstat(file).st_size
            if there < size:
                raise OSError(errno.EIO, "it was cut or removed while this process used it")
            if there > size:
                # A line that was torn by a crash, or could neither be written nor be taken back.
                os.ftruncate(file, size)
            try:
                left = memoryview(line)
                while left:
                    left = left[os.write(file, left) :]
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)
        if not self._named:
            # Even if the file was there: the process that made it may have died before this.
            durable.sync_folder(self.path.parent)
            self._named = True

    def _full(self) -> DataError:
        return DataError(
            f"{self.path}: reaches {self._most_mib} MiB, and nothing leaves that it does not hold: raise [policy] "
            "max_record_mib (reading it takes up to twenty times as much memory)"
        )


def _whole(octets: bytes) -> int:
    """Up to the end of the last line that is whole: after a loss of power it may lack its end, or hold zeros."""
    end = octets.rfind(b"\n") + 1
    last = octets.rfind(b"\n", 0, max(end - 1, 0)) + 1
    return last if b"\0" in octets[last:end] else end
