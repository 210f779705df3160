"""Opens a capture with all its parts, verifies it, and gives out its messages. Files are mapped, not read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from splitpeer.errors import DataError
from splitproto.capture import (
    CaptureError,
    CaptureReader,
    CaptureTruncated,
    End,
    Gap,
    Header,
    Record,
    Recorded,
)

from .parts import mapped, part_path


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    whole: bool
    """Every record fits the chain, nothing is cut off within a record, and no part is missing in between."""
    ended: bool | None
    """Whether the last part has its end. False: a crash, or later records were removed, which the chain alone
    cannot tell; compare `last_chain` with the audit trail. None: encrypted, and the key was not given."""
    records: int
    """Messages that can be read; in an encrypted capture without the key: records of any kind but the header."""
    gaps: int
    """Places where messages are missing."""
    lost: int
    """How many."""
    last_chain: bytes
    """Chain of the last good record, which the recorder noted in its audit trail when it closed."""
    problem: str | None
    """One line, where the capture is not whole."""
    cut_off: bool = False
    """Only the end is missing; everything present is good."""


def _check_codings(path: Path, header: Header) -> None:
    """SP-11.21-8. Raises DataError."""
    if (job := header.job) is None:
        return
    for coding in (job.activations, job.gradients):
        if isinstance(coding, tuple) and len(coding) != len(job.levels):
            raise DataError(
                f"{path.name}: its job lists {len(coding)} codings for {len(job.levels)} levels: no recorder wrote that"
            )


class CapturePart:
    """One file of a capture."""

    def __init__(self, path: Path, key: bytes | None) -> None:
        self.path, self._key = path, key
        self._view = mapped(path)
        # Only the header is read.
        reader = self._reader(verify=True, blind=True)
        try:
            header = next(reader.over(self._view))
        except CaptureError as error:
            raise DataError(f"{path.name}: {error}") from error
        if not isinstance(header, Header):
            raise DataError(f"{path.name}: it does not begin with a header")
        _check_codings(path, header)
        self.has_key = key is not None
        self.header = header
        """What the recorder said of itself and of its peers."""

    def records(self, *, verify: bool = False) -> Iterator[Record]:
        """All records in order, the header first. Ends silently where the file is cut off within a record.

        Raises:
            DataError: what the file holds is not a capture's; or it is encrypted and the key is missing.
        """
        try:
            yield from self._reader(verify=verify, blind=False).over(self._view)
        except CaptureTruncated:
            return
        except CaptureError as error:
            raise DataError(f"{self.path.name}: {error}") from error

    def checked(self) -> tuple[CaptureReader, CaptureError | None]:
        """The reader after the whole file, and what was wrong with that."""
        reader = self._reader(verify=True, blind=self._key is None)
        try:
            for record in reader.over(self._view):
                if isinstance(record, Recorded):
                    record.message  # noqa: B018  (its seal and its tensors' heads are checked when it is made)
        except CaptureError as error:
            return reader, error
        return reader, None

    def _reader(self, *, verify: bool, blind: bool) -> CaptureReader:
        return CaptureReader(self._key, verify=verify, blind=blind)


class Capture:
    """One recording: its first part and those that follow."""

    def __init__(self, parts: list[CapturePart], missing: str | None = None) -> None:
        self.parts = parts
        self._missing = missing

    @property
    def header(self) -> Header:
        """Header of the first part."""
        return self.parts[0].header

    @property
    def encrypted(self) -> bool:
        """Whether a key is needed to read messages."""
        return self.header.encryption != "none"

    def records(self) -> Iterator[Recorded]:
        """The messages in order, of all parts; the chain is not computed (see `verify`).

        Raises:
            DataError: what a file holds is not a capture's; or it is encrypted and the key is missing.
        """
        for part in self.parts:
            for record in part.records():
                if isinstance(record, Recorded):
                    yield record

    def gaps(self) -> list[Gap]:
        """Where messages are missing."""
        return [record for part in self.parts for record in part.records() if isinstance(record, Gap)]

    @property
    def end(self) -> End | None:
        """The last part's end, if it has one."""
        return next((record for record in self.parts[-1].records() if isinstance(record, End)), None)

    def verify(self) -> Verdict:
        """Read all octets and check them: the chain, the links between parts and, with the key, the seals.

        Never raises for what a file holds.
        """
        records = gaps = lost = 0
        problem, former, cut_off = None, self.parts[0], False
        chain, ended = b"", False
        for part in self.parts:
            if part is not former and part.header.previous != chain:
                problem = f"{part.path.name} does not continue where {former.path.name} ends: one of them was changed"
                break
            reader, error = part.checked()
            former, chain, ended = part, reader.chain, reader.end is not None
            records += reader.records - 1 if self._blind else reader.messages
            gaps, lost = gaps + reader.gaps, lost + reader.lost
            if isinstance(error, CaptureTruncated) and part is not self.parts[-1]:
                # A crash, after which the recording continued: the next part names the chain of the last whole record
                # here.
                gaps += 1
            elif error is not None:
                problem, cut_off = f"{part.path.name}: {error}", isinstance(error, CaptureTruncated)
                break
        else:
            problem = self._missing or self._missing_last(reader)
        whole = problem is None
        return Verdict(whole, None if self._blind else ended, records, gaps, lost, chain, problem, cut_off)

    @property
    def _blind(self) -> bool:
        return self.encrypted and not self.parts[0].has_key

    def _missing_last(self, reader: CaptureReader) -> str | None:
        if reader.end is None or reader.end.reason != "rotated":
            return None
        return f"the file after {self.parts[-1].path.name} is missing: put it next to that one"


def open_capture(path: Path, key: bytes | None = None) -> Capture:
    """Open a capture by its first file, together with the parts in the same folder.

    Args:
        path: the first file, or a later one to read from there on.
        key: 32 octets, where it is encrypted; see `recorder.read_key`.

    Raises:
        DataError: no such file, not a capture, another version, a damaged header, or a key that does not fit.
    """
    parts = [CapturePart(path, key)]
    number = parts[0].header.part
    first = path
    if number:
        stem = path.stem.removesuffix(f".{number}")
        first = path.with_name(stem + path.suffix)
    while (following := part_path(first, number + 1)).exists() and following != path:
        parts.append(CapturePart(following, key))
        number += 1
    form = re.compile(re.escape(first.stem) + r"\.(\d{1,7})" + re.escape(first.suffix))
    numbers = [int(match[1]) for other in first.parent.iterdir() if (match := form.fullmatch(other.name))]
    missing = None
    if any(other > number for other in numbers):
        missing = f"{following.name} is missing, though later parts exist: put it next to them"
    return Capture(parts, missing)
