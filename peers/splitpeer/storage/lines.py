"""A file of JSON lines that never holds half a line and never stops its writer, however full the disk is.
Lines without room wait in memory and are written, in order, once there is some. A line torn by a crash is cut
off when the file is opened again.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from splitpeer.logs import event
from splitpeer.storage import durable, reading
from splitpeer.storage.pending import MOST, Pending

_SAFE = os.O_CLOEXEC | os.O_NOFOLLOW
log = logging.getLogger(__name__)


class Lines:
    """Appends to one file, for one writer.

    Args:
        path: opened again for each line, so that it may be moved or removed meanwhile.
        most: lines that wait at most.
    """

    def __init__(self, path: Path, most: int = MOST) -> None:
        self.path = path
        self._pending = Pending(self._write, (OSError,), most)
        self._warned = False

    @property
    def waiting(self) -> int:
        """Lines that are not in the file yet."""
        return len(self._pending)

    @property
    def lost(self) -> int:
        """Lines dropped since the file could last be written."""
        return self._pending.lost

    def begin(self) -> None:
        """Empty the file. Raises OSError."""
        self._pending.clear()
        self.path.write_bytes(b"")

    def resume(self) -> None:
        """Cut off a line torn by a crash, with a warning; a whole line without a line feed gets one."""
        try:
            self._mend()
        except FileNotFoundError:
            pass
        except OSError as error:
            self._warn(error)

    def add(self, **values: Any) -> None:
        """One line, now or when there is room. Raises nothing that has to do with the disk."""
        self._pending.add(json.dumps(values).encode() + b"\n")
        self.flush()

    def flush(self) -> bool:
        """Write the waiting lines, as far as there is room; whether all are written."""
        error = self._pending.flush()
        if isinstance(error, OSError):
            self._warn(error)
            return False
        if self._warned:
            event(log, "lines.written", file=self.path.name, lost=self.lost)
            self._warned, self._pending.lost = False, 0
        return True

    def sync(self) -> None:
        """Make what was written survive a loss of power; logs a warning if the disk cannot."""
        try:
            file = os.open(self.path, os.O_RDONLY | _SAFE)
            try:
                os.fsync(file)
            finally:
                os.close(file)
            durable.sync_folder(self.path.parent)
        except FileNotFoundError:
            # Nothing was written yet.
            return
        except OSError as error:
            self._warn(error)

    # --- inside ----------------------------------------------------------------------------------------

    def _write(self, waiting: deque[bytes]) -> None:
        if not waiting:
            return
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _SAFE, 0o666)
        try:
            if not _ends(file):
                self._mend()
            size = os.fstat(file).st_size
            octets = b"".join(waiting)
            done = 0
            try:
                while done < len(octets):
                    done += os.write(file, memoryview(octets)[done:])
            finally:
                # Half a line is removed at once, so that nobody reads it.
                whole = octets.rfind(b"\n", 0, done) + 1
                if whole < done:
                    os.ftruncate(file, size + whole)
                for _ in range(octets.count(b"\n", 0, whole)):
                    waiting.popleft()
        finally:
            with suppress(OSError):
                os.close(file)

    def _mend(self) -> None:
        octets = self.path.read_bytes()
        whole, lacks = _whole(octets)
        if whole < len(octets):
            os.truncate(self.path, whole)
            event(log, "lines.torn", logging.WARNING, file=self.path.name, octets=len(octets) - whole)
        if lacks:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | _SAFE)
            try:
                os.write(file, lacks)
            finally:
                os.close(file)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            event(log, "lines.waiting", logging.WARNING, file=str(self.path), cause=error.strerror,
                  fix="make room; lines wait to be written")  # fmt: skip
        self._warned = True


def _ends(file: int) -> bool:
    size = os.fstat(file).st_size
    return not size or os.pread(file, 1, size - 1) == b"\n"


def _whole(octets: bytes) -> tuple[int, bytes]:
    """(octets up to the end of the last whole line, what that line lacks)."""
    end = len(octets)
    while end:
        start = octets.rfind(b"\n", 0, end - 1) + 1
        # After a loss of power the last lines may be zeros.
        with suppress(ValueError):
            if isinstance(reading.parse(octets[start:end]), dict):
                return end, b"" if octets[end - 1 : end] == b"\n" else b"\n"
        end = start
    return 0, b""
