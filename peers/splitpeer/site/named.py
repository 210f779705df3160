"""The patients that a site has named to the coordinator of a run: only these does it report as withdrawn later."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from splitpeer.errors import DataError
from splitpeer.storage import durable, reading

NAME = "named.json"


class Named:
    """Keys in the folder of a run, as every inventory adds to them; no name of a patient.

    Args:
        folder: of the run.

    Raises:
        DataError: what an earlier process wrote cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self.people: Mapping[bytes, bytes] = self._read()
        """By patient, the key of the person, who may have several time points."""

    def __contains__(self, key: object) -> bool:
        return key in self.people

    def add(self, patients: Iterable[tuple[bytes, bytes]]) -> None:
        """These are about to be named: patient and person. Raises ConfigError or DiskTrouble: not written."""
        people = {**dict(patients), **self.people}
        if len(people) == len(self.people):
            return
        written = json.dumps({key.hex(): person.hex() for key, person in people.items()}, indent=1)
        try:
            durable.replace(self._path, (written + "\n").encode())
        except OSError as error:
            raise durable.refusal(error, f"{self._path}:", "[peer] state") from None
        self.people = people

    def _read(self) -> dict[bytes, bytes]:
        try:
            found = reading.document(self._path)
            return {bytes.fromhex(key): bytes.fromhex(person) for key, person in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError):
            raise DataError(f"{self._path}: cannot be read: remove the run's folder, or restore it") from None
