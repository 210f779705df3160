"""Sites that kept requests waiting: after a few in a row they are left out for a while, or one would hold up all."""

from __future__ import annotations

TIMES = 2
"""Requests in a row that a site may keep waiting until their deadline, or until its own."""
LEFT_OUT_S = 300.0
"""For so long it is left out then; the next request may wait for it once more."""


class LateSites:
    """Which these are; times are of the event loop's clock."""

    def __init__(self) -> None:
        self._times: dict[str, int] = {}
        self._until: dict[str, float] = {}

    def includes(self, site: str, now: float) -> bool:
        """Whether a site is left out."""
        return now < self._until.get(site, float("-inf"))

    def note_late(self, site: str, now: float) -> bool:
        """It kept a request waiting; whether it is left out from now on."""
        self._times[site] = self._times.get(site, 0) + 1
        if self._times[site] >= TIMES:
            self._until[site] = now + LEFT_OUT_S
        return self.includes(site, now)

    def note_in_time(self, site: str) -> None:
        """It was asked for a request, and answered: what was before does not count any more."""
        self._times.pop(site, None)
