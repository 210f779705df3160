"""What peers and strangers can cause as often as they like must not fill log and trail: these have a budget.

The log has a rate, and omitted lines are counted in its next line. The trail, which is kept for years, has a
number of lines for each process, and the last one says that it is the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from splitpeer.daemon import happenings as h
from splitproto.admission import Bucket


@dataclass(frozen=True)
class Limit:
    """For one kind of happening; each site has its own budget."""

    noted: int
    """Lines of the trail, at most."""
    a_second: float | None = None
    """Lines of the log per second; None: the reporter limits the rate itself."""
    at_once: float = 1.0
    """Lines in a row after a quiet time."""


LIMITS: Mapping[type[h.Happening], Limit] = {
    h.SiteRefused: Limit(noted=100, a_second=0.01, at_once=20.0),
    h.SecondLink: Limit(noted=100, a_second=0.1),
    h.LinkRefused: Limit(noted=1000),
    # An honest coordinator causes one for each request.
    h.ServiceKeyReplaced: Limit(noted=10_000, a_second=1.0, at_once=30.0),
    h.SegmentationCancelled: Limit(noted=1000, a_second=1.0, at_once=30.0),
}


class LogBudget:
    """What the log has room for.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[object, Bucket] = {}
        self._unsaid: dict[object, int] = {}

    def take(self, happening: h.Happening) -> dict[str, Any] | None:
        """What its line says in addition; None: there is none now."""
        limit = LIMITS.get(type(happening))
        if limit is None or limit.a_second is None:
            return {}
        whose, now = _whose(happening), self._clock()
        bucket = self._buckets.setdefault(whose, Bucket(limit.a_second, limit.at_once, now))
        if not bucket.take(1.0, now):
            self._unsaid[whose] = self._unsaid.get(whose, 0) + 1
            return None
        unsaid = self._unsaid.pop(whose, 0)
        return {"not_shown": unsaid} if unsaid else {}


class TrailBudget:
    """What the trail has room for."""

    def __init__(self) -> None:
        self._noted: dict[object, int] = {}

    def take(self, happening: h.Happening) -> dict[str, Any] | None:
        """What its line says in addition; None: there is none any more."""
        limit = LIMITS.get(type(happening))
        if limit is None:
            return {}
        whose = _whose(happening)
        noted = self._noted[whose] = min(self._noted.get(whose, 0), limit.noted) + 1
        if noted > limit.noted:
            return None
        return {"and_more": "further ones are not recorded"} if noted == limit.noted else {}


def _whose(happening: h.Happening) -> object:
    return type(happening), getattr(happening, "site", None)
