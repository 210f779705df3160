"""What sites with frozen encoders released for requests (SP-11.19-14): next to the run's bank, one for each patient and
site, named by pseudonym. It is kept for good: a window that has left once is not asked for again.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from splitpeer.storage import durable
from splitpeer.storage.bank import ALL_SITES, Bank, Contents

FOLDER = "inference"
"""In the coordinator's folder of a run."""


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
        for folder in sorted((self.folder / patient.hex()).glob("*")):
            if (bank := Bank.open(folder, self._key)) is not None:
                found[bank.contents.releases[0].site] = bank
        return found

    def create(self, site: str, patient: bytes, contents: Contents) -> Bank:
        """An empty one. Raises DiskTrouble, ConfigError: see `Bank.create`."""
        folder = self.folder / patient.hex() / ("all" if site == ALL_SITES else site)
        return Bank.create(folder, contents, self._key)

    def last_number(self) -> int:
        """The highest that a question of a bank here has, removed or not; -1: there is none. Raises DataError."""
        banks = (bank for patient in self.patients() for bank in self.of(patient).values())
        return max((one.number for bank in banks for one in bank.contents.releases), default=-1)

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
