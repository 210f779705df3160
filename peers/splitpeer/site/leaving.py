"""Withdrawn consent in a run that knows the patients: a few at once are told, many only once the operator agrees.

What a coordinator keeps of a withdrawn patient it deletes for good (SP-11.17-7), and where a patient may be shown in
one run only (SP-11.17-11) it cannot be collected again: a list that was exported wrongly must not cost that.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path

from splitpeer.errors import DataError
from splitpeer.settings.peer import PeerData
from splitpeer.site.named import Named
from splitpeer.storage import durable, reading

NAME = "leaving.json"


class Leaving:
    """Of one run. What was let through is kept in its folder, so that a restart does not count it again.

    Args:
        folder: of the run.
        named: its patients.
        data: how many may leave at once.

    Raises:
        DataError: what an earlier process wrote cannot be read.
    """

    def __init__(self, folder: Path, named: Named, data: PeerData) -> None:
        self._path, self._named, self._data = folder / NAME, named, data
        self._through = self._read()

    def check(self, listed: Collection[bytes]) -> None:
        """These are on the list now; those of them that the run knows and was not told of are about to leave it.

        Args:
            listed: keys of patients.

        Raises:
            DataError: too many at once, so the list may be wrong; nothing may leave, as it may as well be right.
            ConfigError, DiskTrouble: that they leave cannot be written down.
        """
        new = {key for key in listed if key in self._named} - self._through
        # Consent is a person's: all their time points leave with one line of the list.
        leaving, known = len(self._persons(new)), len(self._persons(self._named.people))
        if leaving > (most := self._data.most_leaving(known)):
            raise DataError(
                f"{self._data.withdrawn}: withdraws {leaving} of the run's {known} persons at once, more than {most} "
                "([data] max_withdrawn_at_once), so nothing is sent: if it is wrong, correct it; if it is right, raise "
                "the limit; then start again"
            )
        if new:
            written = json.dumps({"patients": sorted(key.hex() for key in self._through | new)}, indent=1)
            try:
                durable.replace(self._path, (written + "\n").encode())
            except OSError as error:
                raise durable.refusal(error, f"{self._path}:", "[peer] state") from None
            self._through |= new

    def _persons(self, keys: Iterable[bytes]) -> set[bytes]:
        return {self._named.people[key] for key in keys}

    def _read(self) -> set[bytes]:
        try:
            return {bytes.fromhex(key) for key in reading.document(self._path)["patients"]}
        except FileNotFoundError:
            return set()
        except (OSError, ValueError, TypeError, LookupError):
            raise DataError(f"{self._path}: cannot be read: restore it, or remove it") from None
