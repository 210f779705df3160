"""From the hospital's id of a patient to the study's: through a list, or as it is."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from splitpeer.data.patient_list import delimiter, text_of
from splitpeer.data.patients import patient_id
from splitpeer.errors import DataError

COLUMNS = ("hospital", "study")
LONGEST = 100
"""Bytes of an id as a file's name."""


def read_ids(path: Path) -> dict[str, str]:
    """The list of a hospital whose ids are not the study's: a CSV file with the columns hospital,study.

    Raises:
        DataError: it cannot be read, or a line of it is wrong; the text tells its number.
    """
    text = text_of(path)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter(text), strict=True)
    out: dict[str, str] = {}
    taken: dict[str, int] = {}
    places: list[int] = []
    try:
        for row in rows:
            if not any(cell.strip() for cell in row) or row[0].lstrip().startswith("#"):
                continue
            if not places:
                places = _places(path, rows.line_num, row)
                continue
            hospital, study = _cells(path, rows.line_num, row, places)
            if hospital in out or study in taken:
                raise DataError(
                    f"{path}, line {rows.line_num}: an id that another line has already: keep one of them, or join the "
                    "patient's ids in the PACS first"
                )
            out[hospital], taken[study] = study, rows.line_num
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: not CSV ({error}): correct the line") from None
    if not out:
        raise DataError(f"{path}: names no patient: begin it with {','.join(COLUMNS)}")
    return out


def study_id(hospital: str, ids: Mapping[str, str] | None) -> str:
    """The name of a patient's files. Raises DataError: not in the list, or no name for a file."""
    if not hospital:
        raise DataError("its files name no patient: set patient_id to the attribute that does, or to folder")
    if ids is not None:
        if hospital not in ids:
            raise DataError("its id is not in the list of ids: add a line, or remove its files")
        hospital = ids[hospital]
    name = patient_id(hospital)
    if (
        name.startswith(".")
        or any(c in "/\\\0" or not c.isprintable() for c in name)
        or len(name.encode()) > LONGEST
    ):
        raise DataError("its id is no name for a file: give it another with --ids")
    return name


def _places(path: Path, line: int, row: list[str]) -> list[int]:
    names = [cell.strip().lower() for cell in row]
    if any(names.count(column) != 1 for column in COLUMNS):
        raise DataError(f"{path}, line {line}: needs the columns {' and '.join(COLUMNS)}: begin it with them")
    return [names.index(column) for column in COLUMNS]


def _cells(path: Path, line: int, row: list[str], places: list[int]) -> tuple[str, str]:
    cells = [row[place].strip() if place < len(row) else "" for place in places]
    if not all(cells):
        raise DataError(f"{path}, line {line}: an empty id: fill it in, or remove the line")
    return cells[0], cells[1]
