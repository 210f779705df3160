"""`metrics.jsonl` in a run's folder at a site: a row for each step that its encoders made here."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from splitpeer.storage.lines import Lines

NAME, OLDER = "metrics.jsonl", "metrics.older.jsonl"
MOST_OCTETS = 4 << 20
"""Of either file: some eight thousand steps. How many are made, and how often, is the coordinator's word."""


class StepRows:
    """Of one run.

    Args:
        folder: of the run.
        most: octets of the file; then it takes the place of the older one.
    """

    opened = True

    def __init__(self, folder: Path, most: int = MOST_OCTETS) -> None:
        self._path, self._older, self._most = folder / NAME, folder / OLDER, most
        self._lines = Lines(self._path)

    def metric(self, **values: Any) -> None:
        """One row; on a full disk it waits, and the run continues."""
        # A file that is not there yet, or cannot be moved, is the next line's trouble.
        with suppress(OSError):
            if self._path.lstat().st_size >= self._most:
                os.replace(self._path, self._older)
        self._lines.add(**values)
