"""The log of who was turned away at the door."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

from splitpeer.logs import event
from splitproto import SplitprotoError
from splitproto.errors import CarrierVersionError, EnvelopeError, LinkReset, SequenceGap

log = logging.getLogger(__name__)
REMEMBERED = 1000
NOTED = 1000


class Refusals:
    """Logs who was turned away: at most a line a second for each source and cause, so that nobody can flood
    the log, and nobody is hidden by another site behind the same address.

    Args:
        note: also told, `NOTED` times at most: the audit trail is kept for years.
    """

    def __init__(self, note: Callable[..., None] | None = None) -> None:
        self._note, self._noted = note, 0
        self._last: dict[tuple[str, str], float] = {}
        self._unsaid: Counter[tuple[str, str]] = Counter()

    def __call__(self, source: str, error: SplitprotoError) -> None:
        # Before admission the text holds what a stranger chose, so its kind alone counts.
        stranger = isinstance(error, EnvelopeError | CarrierVersionError | SequenceGap | LinkReset)
        now, what = time.monotonic(), (source, error.name if stranger else str(error))
        if now - self._last.get(what, -1.0) < 1.0:
            self._unsaid[what] += 1
            return
        if len(self._last) > REMEMBERED:
            self._last.clear()
            self._unsaid.clear()
        self._last[what] = now
        more = {"not_shown": self._unsaid.pop(what)} if what in self._unsaid else {}
        event(log, "link.refused", logging.WARNING, source=source, cause=str(error), **more)
        if self._note is not None and self._noted < NOTED:
            self._noted += 1
            last = {"and_more": "these are not noted"} if self._noted == NOTED else {}
            self._note("link.refused", source=source, cause=str(error), **last)
