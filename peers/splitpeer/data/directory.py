"""Which key is whose: for the people of the site that holds the files, never to be sent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from splitpeer.data.files import Case
from splitpeer.data.patients import patient_id
from splitpeer.data.pseudonym import keyed
from splitpeer.errors import DataError
from splitpeer.logs import handle

LEAST_DIGITS = 4
"""Least digits of a key's beginning: fewer could match by chance."""


@dataclass(frozen=True)
class DirectoryEntry:
    """One patient under all its names: `key` in captures, `handle` in logs, `patient` and `file` at the site."""

    key: str
    handle: str
    patient: str
    file: str


def directory(salt: bytes, *kinds: Iterable[Case]) -> list[DirectoryEntry]:
    """All patients, sorted by id, once for each of several kinds. Raises DataError where two files of a kind are one
    patient."""
    entries = [
        DirectoryEntry(key.hex(), handle(key), case.patient, str(Path(case.path)))
        for cases in kinds
        for key, case in keyed(salt, cases).items()
    ]
    return sorted(entries, key=lambda entry: entry.patient)


def look_up(entries: Sequence[DirectoryEntry], asked: str) -> list[DirectoryEntry]:
    """The patient that `asked` names: an id, a file name, a handle, a key or its beginning. Raises DataError if
    none."""
    name = patient_id(asked)
    found = [entry for entry in entries if name in (entry.patient, Path(entry.file).name)]
    digits = name.lower()
    if not found and re.fullmatch(rf"[0-9a-f]{{{LEAST_DIGITS},32}}", digits):
        found = [entry for entry in entries if entry.handle == digits or entry.key.startswith(digits)]
    if not found:
        raise DataError(
            f"{asked!r}: no patient of this site has this id, key or handle: give an id, or at least {LEAST_DIGITS} "
            "digits of a key"
        )
    return found


def named_in(text: str, cases: Mapping[bytes, Case]) -> dict[str, Path]:
    """Whose keys or handles stand in a text that others wrote: handle -> file of this site."""
    words = set(re.findall(r"[0-9a-f]{8,32}", text))
    return {
        handle(key): case.path for key, case in cases.items() if words.intersection((handle(key), key.hex()))
    }
