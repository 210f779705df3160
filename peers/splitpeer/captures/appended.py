"""A new file that only grows, if wanted past the system's page cache.

What is recorded is read much later, if ever. Bringing its pages into the cache can cost more CPU time than its digest,
and pushes out what others need. The price is one copy, into a buffer that the device reads from.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from splitproto.capture import Buffer
from splitproto.tensors import Array

BLOCK = 4096
"""What is written past the cache begins and ends at a multiple of this, which no file system in use exceeds."""
_PIECE = 2 << 20
"""Written at once past the cache: one large page, so that the system looks up one address and not 512."""
_IOV = 512
"""Buffers given to the system at once; POSIX allows 1024 everywhere that matters."""


class AppendedFile:
    """Not thread-safe.

    Args:
        path: made here, readable by its owner alone.

    Raises:
        OSError: the file exists, or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.octets = 0
        """Bytes of the file."""
        self._direct = False
        self._refused = False
        self._piece: Array | None = None

    def append(self, buffers: Sequence[Buffer], *, direct: bool = False) -> None:
        """All of the buffers, or none of them.

        Args:
            direct: past the cache, if the file system can. The buffers' length, and the file's before them, are
                multiples of `BLOCK`.

        Raises:
            OSError: the file is as it was before.
        """
        try:
            size = self._write_directly(buffers) if self._set_direct(direct) else self._write_cached(buffers)
        except OSError:
            os.ftruncate(self._file, self.octets)
            os.lseek(self._file, self.octets, os.SEEK_SET)
            raise
        self.octets += size

    @property
    def free(self) -> int:
        """Octets that the disk has left for us."""
        disk = os.fstatvfs(self._file)
        return disk.f_bavail * disk.f_frsize

    def sync(self) -> None:
        """Wait until the disk has everything."""
        os.fsync(self._file)

    def close(self) -> None:
        """Idempotent."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def _set_direct(self, wanted: bool) -> bool:
        """Whether what is written next goes past the cache."""
        wanted = wanted and not self._refused
        if wanted != self._direct:
            flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~os.O_DIRECT
            try:
                fcntl.fcntl(self._file, fcntl.F_SETFL, flags | (os.O_DIRECT if wanted else 0))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._refused, wanted = True, False
            self._direct = wanted
        return wanted

    def _write_directly(self, buffers: Sequence[Buffer]) -> int:
        if self._piece is None:
            self._piece = _large_page()
        piece, total, filled = self._piece, 0, 0
        for buffer in buffers:
            # numpy copies without the interpreter's lock; a slice of a memoryview would keep it.
            source, at = np.frombuffer(buffer, np.uint8), 0
            while at < len(source):
                size = min(len(source) - at, _PIECE - filled)
                piece[filled : filled + size] = source[at : at + size]
                at, filled = at + size, filled + size
                if filled == _PIECE:
                    total, filled = total + self._write_piece(piece), 0
        return total + self._write_piece(piece[:filled])

    def _write_piece(self, piece: Array) -> int:
        at = 0
        while at < len(piece):
            try:
                at += os.write(self._file, piece[at:].data)
            except OSError as error:
                # Some file systems refuse it only now, or only what a full disk left unaligned.
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._refused = True
                self._set_direct(wanted=False)
        return at

    def _write_cached(self, buffers: Sequence[Buffer]) -> int:
        """Without joining or copying them."""
        waiting = [memoryview(buffer) for buffer in buffers]
        total, at = 0, 0
        while at < len(waiting):
            written = os.writev(self._file, waiting[at : at + _IOV])
            total += written
            while at < len(waiting) and written >= len(waiting[at]):
                written -= len(waiting[at])
                at += 1
            if written:
                waiting[at] = waiting[at][written:]
        return total


def _large_page() -> Array:
    """`_PIECE` octets, at an address that devices can read from."""
    room = mmap.mmap(-1, 2 * _PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system that has no large pages
        room.madvise(mmap.MADV_HUGEPAGE)
    octets = np.frombuffer(room, np.uint8)
    start = -octets.ctypes.data % _PIECE
    return octets[start : start + _PIECE]
