"""Layout "csv": a list that says which file is whose, for names that no rule can read."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from splitpeer.data.files import SUFFIXES, Case, Found
from splitpeer.data.patients import patient_id
from splitpeer.errors import DataError

MAX_LIST_BYTES = 16 * 2**20
"""A longer list is refused: it would name more patients than an inventory may hold."""
COLUMNS = ("patient", "path")


def read_list(path: Path) -> Found:
    """The cases of a CSV file with the columns `patient` and `path`; others are ignored.

    Paths are relative to the file's folder. UTF-8, with or without a byte-order mark; separated by commas or, as a
    German Excel writes it, by semicolons.

    Raises:
        DataError: the file cannot be read, or a line of it names no volume, or one twice. It has the line's number.
    """
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=_delimiter(path), strict=True)
    cases: dict[str, tuple[int, Case]] = {}
    files: dict[Path, int] = {}
    columns: dict[str, int] = {}
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if not columns:
                columns = _columns(where, row)
                continue
            case = _case(where, path.parent, row, columns)
            if case.patient in cases:
                line = cases[case.patient][0]
                raise DataError(
                    f"{where}: patient {case.patient!r} is in line {line} already: keep one of them"
                )
            if case.path.resolve() in files:
                line = files[case.path.resolve()]
                raise DataError(
                    f"{where}: {case.path.name} is the file of line {line} already: keep one of them"
                )
            cases[case.patient], files[case.path.resolve()] = (reader.line_num, case), reader.line_num
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: not CSV ({error}): correct or remove the line"
        ) from None
    return Found(tuple(sorted(case for _, case in cases.values())))


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_LIST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    if len(content) > MAX_LIST_BYTES:
        raise DataError(f"{path}: more than {MAX_LIST_BYTES >> 20} MiB: this is not a list of patients")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8: save the file as CSV UTF-8") from None


def _delimiter(path: Path) -> str:
    header = next((line for line in _text(path).splitlines() if line.strip(" ,;")), "")
    return ";" if header.count(";") > header.count(",") else ","


def _columns(where: str, row: list[str]) -> dict[str, int]:
    names = [cell.strip().lower() for cell in row]
    if missing := [name for name in COLUMNS if names.count(name) != 1]:
        raise DataError(
            f"{where}: needs one column {' and one column '.join(missing)}: begin it with patient,path"
        )
    return {name: names.index(name) for name in COLUMNS}


def _case(where: str, folder: Path, row: list[str], columns: dict[str, int]) -> Case:
    if len(row) <= max(columns.values()):
        raise DataError(f"{where}: {len(row)} columns: write patient and path")
    patient, written = (row[columns[name]].strip() for name in COLUMNS)
    if not patient or not written:
        raise DataError(f"{where}: the {'patient' if not patient else 'path'} is empty: fill it in")
    if "\0" in written:
        raise DataError(f"{where}: the path holds a NUL character: correct it")
    path = folder / written
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{where}: {written}: name a .nii or .nii.gz file")
    try:
        there = path.is_file()
    except OSError as error:
        raise DataError(
            f"{where}: {written}: cannot be looked up ({error.strerror}): correct the path"
        ) from None
    if not there:
        hint = "; write / instead of \\" if "\\" in written else ""
        raise DataError(f"{where}: {written}: no such file: paths are relative to the list's folder{hint}")
    try:
        return Case(patient_id(patient), path)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
