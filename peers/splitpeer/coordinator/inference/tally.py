"""How often each site asked for a segmentation, and what became of it; kept with the run."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from splitpeer.errors import DataError
from splitpeer.storage import durable, reading

FILE = "requests.json"
"""In the coordinator's folder of a run."""
OUTCOMES = ("segmented", "refused", "cancelled", "failed")
"""What becomes of a request."""
GIVEN_UP = "given-up"
"""In place of a code: its site did not come back in time."""
_OUTCOME_OF = {
    "segmented": "segmented",
    "cancelled": "cancelled",
    GIVEN_UP: "cancelled",
    "failed": "failed",
    "site-lost": "failed",
    "deadline": "failed",
}
"""By code of `unsegmented`; all others are refusals."""
FLUSH_S = 10.0
"""Between two times that it is written: a crash forgets at most so much."""


class RequestTally:
    """By site and outcome.

    Args:
        folder: of the run.
        clock: seconds since 1970.

    Raises:
        DataError: what an earlier process wrote cannot be read.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = folder / FILE, clock
        self._counts, self.last = self._read()
        """When a request ended last; None: none has."""
        self._written_at = clock()
        self._changed = False

    @property
    def by_site(self) -> Mapping[str, Mapping[str, int]]:
        """All outcomes of each site that has asked."""
        return {site: {one: counts[one] for one in OUTCOMES} for site, counts in sorted(self._counts.items())}

    @property
    def ended(self) -> int:
        """Requests in all."""
        return sum(counts.total() for counts in self._counts.values())

    def add(self, site: str, code: str) -> None:
        """A request of `site` has ended.

        Args:
            code: segmented, one of `unsegmented`, or `GIVEN_UP`.
        """
        self._counts.setdefault(site, Counter())[_OUTCOME_OF.get(code, "refused")] += 1
        self.last, self._changed = self._clock(), True

    @property
    def due(self) -> bool:
        """Whether it should be written now."""
        return self._changed and self._clock() - self._written_at >= FLUSH_S

    def flush(self) -> None:
        """Have it on disk. A full one costs the counts, not the service."""
        if not self._changed:
            return
        self._written_at, self._changed = self._clock(), False
        said = {"version": 1, "last": self.last, "sites": self.by_site}
        try:
            durable.replace(self._path, (json.dumps(said, indent=1) + "\n").encode())
        except OSError:
            self._changed = True

    def _read(self) -> tuple[dict[str, Counter[str]], float | None]:
        try:
            said = reading.document(self._path)
            last = said["last"]
            counts = {
                str(site): Counter({one: int(of[one]) for one in OUTCOMES})
                for site, of in said["sites"].items()
            }
            return counts, None if last is None else float(last)
        except FileNotFoundError:
            return {}, None
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            raise DataError(
                f"{self._path}: cannot be read: remove it, and these counts start at zero"
            ) from None
