"""Layout "csv": a list that says which file is whose and what it shows, for names that no rule can read."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from splitpeer.data.files import SUFFIXES
from splitpeer.data.listing import Listing
from splitpeer.data.modalities import ANY, MASK, MASK_NAMES, canonical_modality
from splitpeer.errors import DataError
from splitpeer.storage import reading

MAX_LIST_BYTES = 16 * 2**20
"""A longer list is refused: it would name more patients than an inventory may hold."""
NEEDED, OPTIONAL = ("patient", "path"), ("modality", "channel")
_MAX_CHANNEL = 4095


def read_list(path: Path, wanted: str = ANY) -> Listing:
    """The files of a CSV file with the columns `patient`, `path` and, if it names several kinds, `modality`.

    `modality` is a name or, for masks, `seg`; `channel` picks from the last axis of a 4-D file, from 0 on. Other
    columns and lines that begin with `#` are passed over. Paths are relative to the list's folder and stay below it.
    UTF-8, with or without a byte-order mark; separated by commas or, as a German Excel writes it, by semicolons.

    A line that names no volume, or one twice, is a problem that tells its number.

    Raises:
        DataError: the file cannot be read, or is no such list.
    """
    text = text_of(path)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter(text), strict=True)
    lines = _Lines(path)
    try:
        for row in rows:
            if any(cell.strip() for cell in row) and not row[0].lstrip().startswith("#"):
                lines.take(rows.line_num, row)
    except csv.Error as error:
        lines.complain(rows.line_num, f"not CSV ({error}): correct or remove the line")
    return lines.listing


class _Lines:
    """What the lines of a list say, one after the other."""

    def __init__(self, path: Path) -> None:
        self._path, self._columns = path, dict[str, int]()
        self._patients: dict[tuple[str, str], int] = {}
        self._files: dict[tuple[Path, int | None], int] = {}
        self.listing = Listing(path.parent)

    def complain(self, line: int, text: str) -> None:
        """Line `line` cannot be used."""
        self.listing.problems.append((ANY, f"{self._path}, line {line}: {text}"))

    def take(self, line: int, row: list[str]) -> None:
        """A line that is neither empty nor a comment. Raises DataError where the header is none."""
        if not self._columns:
            self._columns = _columns(f"{self._path}, line {line}", row)
            return
        try:
            self._add(line, [cell.strip() for cell in row])
        except DataError as error:
            self.complain(line, str(error))

    def _add(self, line: int, row: list[str]) -> None:
        if len(row) <= max(self._columns.values()):
            raise DataError(f"{len(row)} columns: write {' and '.join(self._columns)}")
        cells = {name: row[place] for name, place in self._columns.items()}
        if empty := [name for name in cells if not cells[name] and name != "channel"]:
            raise DataError(f"the {empty[0]} is empty: fill it in")
        kind, channel = _kind(cells.get("modality")), _channel(cells.get("channel", ""))
        path = _volume(self._path.parent, cells["path"])
        place = (Path(os.path.realpath(path)), channel)
        if place in self._files:
            raise DataError(f"{path.name} is the file of line {self._files[place]} already: keep one of them")
        self.listing.add(kind, cells["patient"], path, channel)
        if self.listing.left_out:
            raise DataError(self.listing.left_out.pop().reason)
        patient = self.listing.kinds[-1][1].patient
        if (kind, patient) in self._patients:
            self.listing.kinds.pop()
            first = self._patients[kind, patient]
            raise DataError(f"patient {patient!r} is in line {first} already: keep one of them")
        self._patients[kind, patient] = self._files[place] = line


def text_of(path: Path) -> str:
    """All of a list. Raises DataError: unreadable, too long, not UTF-8."""
    try:
        content = reading.read(path, MAX_LIST_BYTES, follow=True)
    except OSError as error:
        if path.is_file() and path.stat().st_size > MAX_LIST_BYTES:
            raise DataError(
                f"{path}: more than {MAX_LIST_BYTES >> 20} MiB: this is not a list of patients"
            ) from None
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8: save the file as CSV UTF-8") from None


def delimiter(text: str) -> str:
    """What separates its columns: commas or, as a German Excel writes it, semicolons."""
    said = (line for line in text.splitlines() if line.strip(" ,;") and not line.lstrip().startswith("#"))
    header = next(said, "")
    return ";" if header.count(";") > header.count(",") else ","


def _columns(where: str, row: list[str]) -> dict[str, int]:
    names = [cell.strip().lower() for cell in row]
    if missing := [name for name in NEEDED if names.count(name) != 1]:
        raise DataError(
            f"{where}: needs one column {' and one column '.join(missing)}: begin it with patient,path"
        )
    if twice := [name for name in OPTIONAL if names.count(name) > 1]:
        raise DataError(f"{where}: the column {twice[0]} is there twice: keep one of them")
    return {name: names.index(name) for name in (*NEEDED, *OPTIONAL) if name in names}


def _kind(written: str | None) -> str:
    if written is None:
        return ANY
    return MASK if written.lower() in MASK_NAMES else canonical_modality(written)


def _channel(written: str) -> int | None:
    if not written:
        return None
    if not (written.isascii() and written.isdigit() and int(written) <= _MAX_CHANNEL):
        raise DataError(
            f"channel {written!r} is not a whole number: count from 0, or leave it empty for 3-D files"
        )
    return int(written)


def _volume(folder: Path, written: str) -> Path:
    """The file that a line names, anywhere: the list is its owner's. Raises DataError, without the line: it is none."""
    if "\0" in written:
        raise DataError("the path holds a NUL character: correct it")
    path = folder / written
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{written}: name a .nii or .nii.gz file")
    try:
        there = path.is_file()
    except OSError as error:
        raise DataError(f"{written}: cannot be looked up ({error.strerror}): correct the path") from None
    if not there:
        hint = "; write / instead of \\" if "\\" in written else ""
        raise DataError(f"{written}: no such file: paths are relative to the list's folder{hint}")
    return path
