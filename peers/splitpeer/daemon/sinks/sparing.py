"""What a coordinator can cause as often as it likes has a budget: it must not fill a site's log and trail."""

from __future__ import annotations

import time

from splitpeer.daemon import happenings as h
from splitproto.admission import Bucket

LINES_A_SECOND, LINES_AT_ONCE = 1.0, 30.0
"""Lines of happenings that are `sparing`, such as figures, and of seats that come and go; one budget for all."""
NOTED_EACH = 8
"""Lines about withdrawn patients, for each patient of the site."""


class Sparing:
    """Passes on what is within the budget.

    Args:
        report: what it is passed to.
        patients: of the site.
    """

    def __init__(self, report: h.Reporter, patients: int) -> None:
        self._report = report
        self._bucket = Bucket(LINES_A_SECOND, LINES_AT_ONCE, time.monotonic())
        self._missing: frozenset[str] = frozenset()
        self._most = NOTED_EACH * patients
        self._out: set[tuple[str, bytes, int]] = set()

    def __call__(self, happening: h.Happening) -> None:
        match happening:
            case h.Happening(sparing=True):
                if self._bucket.take(1.0, time.monotonic()):
                    self._report(happening)
            case h.MissingTold(step, missing):
                self._missing_told(step, dict(missing))
            case h.PatientOut(by=by, key=key, step=step):
                # It may repeat itself after rollbacks: each is noted once.
                if (by, key, step) not in self._out and len(self._out) < self._most:
                    self._out.add((by, key, step))
                    self._report(happening)
            case _:
                self._report(happening)

    def _missing_told(self, step: int, missing: dict[str, str]) -> None:
        """SP-11-42: a line for each seat that is missing from now on, and for each that is back."""
        if missing.keys() != self._missing and not self._bucket.take(1.0, time.monotonic()):
            return
        gone = {name: missing[name] for name in sorted(missing.keys() - self._missing)}
        back = sorted(self._missing - missing.keys())
        self._missing = frozenset(missing)
        self._report(h.MissingChanged(step, gone, back, sorted(missing)))
