"""Who is trained on, and who is scored, in one run at the site of the labels: nobody is both (SP-11.20-13).

The gradient of a loss tells the mask, so it would tell that of somebody held out. A score of somebody who was trained
on is not that of a patient whom the network has not seen.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from splitpeer.errors import DataError
from splitpeer.site.budgets import BudgetSpent
from splitpeer.storage import durable, reading

FILE = "sides.json"
"""In the folder of a run."""


class Sides:
    """The persons on either side; several scans of one are one person.

    Args:
        folder: of the run; None: nothing is written.

    Raises:
        DataError: what an earlier process wrote cannot be read.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / FILE
        self._trained, self._scored = self._read()

    def train(self, persons: Collection[bytes]) -> None:
        """A loss's gradient is about to leave; durable when this returns.

        Raises:
            BudgetSpent: one of these was scored in this run.
            ConfigError, DiskTrouble: it cannot be written down.
        """
        if not self._scored.isdisjoint(persons):
            raise BudgetSpent("a loss was asked for of a patient whom this run has scored as held out")
        self._note(self._trained, persons)

    def score(self, person: bytes) -> None:
        """A prediction is about to be scored; durable when this returns.

        Raises:
            BudgetSpent: the run has trained on this one.
            ConfigError, DiskTrouble: it cannot be written down.
        """
        if person in self._trained:
            raise BudgetSpent("a prediction came of a patient on whom this run has trained")
        self._note(self._scored, (person,))

    # --- inside ----------------------------------------------------------------------------------------

    def _note(self, side: set[bytes], persons: Collection[bytes]) -> None:
        new = {*persons} - side
        if not new:
            return
        side |= new
        if self._path is None:
            return
        said = {"trained": _written(self._trained), "scored": _written(self._scored)}
        try:
            durable.make_folder(self._path.parent)
            durable.replace(self._path, (json.dumps(said, indent=1) + "\n").encode())
        except OSError as error:
            side -= new
            raise durable.refusal(error, f"{self._path}:", "[peer] state") from None

    def _read(self) -> tuple[set[bytes], set[bytes]]:
        if self._path is None:
            return set(), set()
        try:
            said = reading.document(self._path)
            return _persons(said["trained"]), _persons(said["scored"])
        except FileNotFoundError:
            return set(), set()
        except (OSError, ValueError, TypeError, LookupError):
            raise DataError(
                f"{self._path}: cannot be read, so nobody knows who was held out: restore it, or begin a new run"
            ) from None


def _written(persons: Collection[bytes]) -> list[str]:
    return sorted(person.hex() for person in persons)


def _persons(written: Collection[str]) -> set[bytes]:
    """The inverse. Raises ValueError or TypeError."""
    return {bytes.fromhex(person) for person in written}
