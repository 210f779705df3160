"""The files of one capture: `coord.cap`, `coord.1.cap`, `coord.2.cap`, each naming the last chain of the one before."""

from __future__ import annotations

import mmap
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from splitpeer.errors import DataError
from splitproto.capture import (
    Buffer,
    CaptureError,
    CaptureReader,
    CaptureTruncated,
    CaptureWriter,
    Header,
)
from splitproto.capture_records import SALT_BYTES
from splitproto.messages import Message

from .appended import AppendedFile


def part_path(first: Path, part: int) -> Path:
    """The file of one part: `coord.cap`, 2 -> `coord.2.cap`."""
    return first if part == 0 else first.with_name(f"{first.stem}.{part}{first.suffix}")


def mapped(path: Path) -> memoryview:
    """The bytes of a file, read on access.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            # An empty file cannot be mapped.
            size = os.fstat(file.fileno()).st_size
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def continued(asked: Path, header: Header) -> tuple[Path, int, bytes | None]:
    """Where a recording goes that is to be called `asked`: first file, number of the new part, chain before it.

    A recording of the same run by the same peer continues in a new part; any other is left alone, and the
    run's first digits are added to the name.

    Raises:
        DataError: both names are taken by something else.
    """
    run = header.run.hex()[:8] if header.run else "other"
    for first in (asked, asked.with_name(f"{asked.stem}-{run}{asked.suffix}")):
        if not first.exists():
            return first, 0, None
        part = 0
        while part_path(first, part + 1).exists():
            part += 1
        # What the parts hold was or will be verified by their readers; here only the way to the last chain.
        reader = CaptureReader(verify=False, blind=True)
        try:
            for _ in reader.over(mapped(part_path(first, part))):
                pass
        except CaptureTruncated:
            pass  # cut off by a crash: the new part continues after the last whole record
        except CaptureError:
            continue
        former = reader.header
        if former is not None and _origin(former) == _origin(header):
            return first, part + 1, reader.chain
    raise DataError(f"{asked}: exists and belongs to another run: move it away, or record to another file")


def _origin(header: Header) -> tuple[bytes | None, str, str, str]:
    return header.run, header.role, header.site, header.federation


class PartWriter:
    """One file of a capture, from its header to its end. Not thread-safe.

    A method that raises OSError has left the file as it was before.

    Raises:
        OSError: the file exists, or cannot be written.
    """

    def __init__(
        self, first: Path, part: int, previous: bytes | None, header: Header, key: bytes | None
    ) -> None:
        self.path, self.part = part_path(first, part), part
        salt = secrets.token_bytes(SALT_BYTES) if key is not None else None
        self._writer = CaptureWriter(replace(header, part=part, previous=previous), key, salt)
        self._encrypted = key is not None
        self._file = AppendedFile(self.path)
        try:
            self._append(self._writer.start())
        except OSError:
            # It is ours and holds nothing.
            self.close()
            self.path.unlink(missing_ok=True)
            raise

    @property
    def octets(self) -> int:
        """Bytes of the file, whole records only."""
        return self._file.octets

    @property
    def chain(self) -> bytes:
        """Chain of the newest whole record."""
        return self._writer.chain

    @property
    def messages(self) -> int:
        """Written so far."""
        return self._writer.messages

    def packed(self, message: Message, when: float, peer: str, direction: str) -> list[Buffer]:
        """The octets of a message's record; follow with `append` or `take_back`."""
        return self._writer.message(message, time=when, peer=peer, direction=direction)

    def append(self, buffers: Sequence[Buffer], *, direct: bool = False) -> None:
        """Write what `packed` made; `direct`: past the system's cache, for a header whose `block` is `BLOCK`."""
        self._append(buffers, direct)

    def take_back(self) -> None:
        """Do not write what `packed` made."""
        self._writer.take_back()

    def gap(self, reason: str, records: int, octets: int) -> None:
        """Note that messages are missing here."""
        self._append(self._writer.gap(time=time.time(), reason=reason, records=records, octets=octets))

    def end(self, reason: str, text: str) -> None:
        """Write the end, make the file durable and close it."""
        self._append(self._writer.end(time=time.time(), reason=reason, text=text))
        self._file.sync()
        self.close()

    @property
    def can_end(self) -> bool:
        """Whether an end may follow a record that could not be written (a nonce must not be used twice)."""
        return not self._encrypted

    def close(self) -> None:
        """Give up the file as it is. Idempotent."""
        self._file.close()

    @property
    def free(self) -> int:
        """Octets that the disk has left for us."""
        return self._file.free

    def _append(self, buffers: Sequence[Buffer], direct: bool = False) -> None:
        """One whole record, or none of it."""
        try:
            self._file.append(buffers, direct=direct)
        except OSError:
            self._writer.take_back()
            raise
