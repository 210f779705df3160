"""What sites with frozen encoders released for requests (SP-11.19-14): next to the run's bank, one for each patient and
site, named by pseudonym.

Releases that nobody has asked about for long, or that room is needed for, are cleared; their indices stay, so that a
site which is asked again is asked the same question, and answers as it did (SP-11.17-5). A folder's time of change is
when somebody asked about its patient last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from splitpeer.storage import durable, reading
from splitpeer.storage.bank import ALL_SITES, Bank, Contents

FOLDER = "inference"
"""In the coordinator's folder of a run."""
LAST = "last.json"
"""In that folder: the highest number of a question so far."""


@dataclass(frozen=True)
class Cleared:
    """What was removed, and may be released again."""

    patients: frozenset[bytes] = frozenset()
    octets: int = 0


class RequestBanks:
    """Those of one run.

    Args:
        run: the coordinator's folder of the run.
        key: of the banks; empty: they are not encrypted.
    """

    def __init__(self, run: Path, key: bytes = b"") -> None:
        self.folder, self._key = run / FOLDER, key

    def patients(self) -> frozenset[bytes]:
        """Of whom there is a bank, also one of which everything is removed."""
        found = set()
        for path in self.folder.glob("*/"):
            with suppress(ValueError):
                found.add(bytes.fromhex(path.name))
        return frozenset(found)

    def of(self, patient: bytes) -> dict[str, Bank]:
        """By site, or `ALL_SITES`. Raises DataError: an index is damaged, or of another key."""
        found = {}
        for folder in sorted(self._of(patient).glob("*")):
            if (bank := Bank.open(folder, self._key)) is not None:
                found[bank.contents.releases[0].site] = bank
        return found

    def create(self, site: str, patient: bytes, contents: Contents) -> Bank:
        """An empty one. Raises DiskTrouble, ConfigError: see `Bank.create`; DataError: see `last_number`."""
        folder = self._of(patient) / ("all" if site == ALL_SITES else site)
        # Before the bank: a crash between the two skips numbers, and gives none twice (SP-11.17-3).
        self._note_last(max([self.last_number(), *(one.number for one in contents.releases)]))
        return Bank.create(folder, contents, self._key)

    def last_number(self) -> int:
        """The highest that a question of a bank here has, removed or not; -1: there is none.

        Raises:
            DataError: it is not noted, as by earlier versions, and an index is damaged, or of another key.
        """
        if (noted := self._noted_last()) is not None:
            return noted
        banks = (bank for patient in self.patients() for bank in self.of(patient).values())
        return max((one.number for bank in banks for one in bank.contents.releases), default=-1)

    # --- room, and the end of life ---------------------------------------------------------------------------

    def note_asked(self, patient: bytes) -> None:
        """Somebody asks about this patient now. Raises DiskTrouble, ConfigError."""
        folder = self._of(patient)
        try:
            os.utime(folder)
        except FileNotFoundError:
            return  # nothing is kept of the patient yet
        except OSError as error:
            raise durable.refusal(error, f"{folder}: a bank of requests", "[peer] state") from None

    def octets(self) -> int:
        """Bytes of all files, indices included."""
        return _octets(self.folder.glob("*/*/**/*"))

    def unasked(self, before: float) -> list[bytes]:
        """Patients of whom there are releases, and nobody has asked since `before` (of `time.time`)."""
        return [
            patient
            for patient in self.patients()
            if self._asked(patient) < before and any(self._releases(patient))
        ]

    def make_room(self, octets: int, most: int, patient: bytes) -> Cleared | None:
        """Clear those who were asked about longest ago until there is room for `octets` more of `patient`, who stays.

        Args:
            most: bytes of all files.

        Returns:
            None: there would be too little room without all others, so nothing was done.

        Raises:
            DiskTrouble, ConfigError: something cannot be removed.
        """
        others = sorted(self.patients() - {patient}, key=self._asked)
        free = {other: _octets(self._releases(other)) for other in others}
        excess = self.octets() + octets - most
        if excess > sum(free.values()):
            return None
        go = []
        for other in others:
            if excess <= 0:
                break
            go.append(other)
            excess -= free[other]
        return self.clear(go)

    def clear(self, patients: Collection[bytes]) -> Cleared:
        """Remove the releases of these, not their indices. Raises DiskTrouble, ConfigError: something is left."""
        gone, octets = set(), 0
        for patient in sorted(self.patients().intersection(patients)):
            if there := _octets(self._releases(patient)):
                octets += there
                gone.add(patient)
            for releases in self._of(patient).glob("*/*/"):
                try:
                    shutil.rmtree(releases)
                    durable.sync_folder(releases.parent)
                except OSError as error:
                    raise durable.refusal(error, f"{releases}: banks of requests", "[peer] state") from None
        return Cleared(frozenset(gone), octets)

    def clear_unfinished(self, patient: bytes) -> Cleared:
        """The same with a patient of whom something is missing. Raises as `clear`; DataError: see `of`."""
        if any(bank.missing() for bank in self.of(patient).values()):
            return self.clear([patient])
        return Cleared()

    def drop(self, patients: Collection[bytes]) -> frozenset[bytes]:
        """SP-11.17-7: remove what was released of these, for good; indices stay, since no number stands for something
        else later (SP-11.17-3).

        Returns:
            Of whom there was something.

        Raises:
            DiskTrouble, ConfigError: something is left; the next to open the banks removes it.
            DataError: an index is damaged, or of another key.
        """
        gone = set()
        for patient in sorted(self.patients().intersection(patients)):
            for bank in self.of(patient).values():
                if patient not in bank.dropped:
                    gone.add(patient)
                bank.drop([patient])
        return frozenset(gone)

    def remove(self) -> None:
        """All of them, readable or not. Raises DiskTrouble, ConfigError: something is left."""
        if not self.folder.exists():
            return
        try:
            shutil.rmtree(self.folder)
            durable.sync_folder(self.folder.parent)
        except OSError as error:
            raise durable.refusal(error, f"{self.folder}: banks of requests", "[peer] state") from None

    # --- inside ----------------------------------------------------------------------------------------------

    def _note_last(self, number: int) -> None:
        path = self.folder / LAST
        try:
            durable.make_folder(self.folder)
            durable.replace(path, json.dumps({"number": number}).encode())
        except OSError as error:
            raise durable.refusal(error, f"{path}: the number of a release", "[peer] state") from None

    def _noted_last(self) -> int | None:
        """None: nothing that can be read."""
        try:
            number = reading.document(self.folder / LAST)["number"]
        except (OSError, ValueError, LookupError):
            return None
        return number if type(number) is int and number >= 0 else None

    def _of(self, patient: bytes) -> Path:
        return self.folder / patient.hex()

    def _asked(self, patient: bytes) -> float:
        return self._of(patient).stat().st_mtime

    def _releases(self, patient: bytes) -> Iterator[Path]:
        """Their files; indices lie one folder above."""
        return self._of(patient).glob("*/*/*")


def _octets(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files if path.is_file())
