"""Log and audit lines that a peer can cause, as many as it likes: the log's rate and the trail's number are bounded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from splitpeer.logs import event
from splitproto.admission import Bucket

log = logging.getLogger(__name__)

NOTED = 100
"""Lines of the audit trail at most, per process: a trail is kept for years."""


class LineBudget:
    """What is left out of the log is counted in its next line; the trail's last line says that it is the last.

    Args:
        note: writes a line of the audit trail.
        a_second: lines of the log.
        at_once: so many in a row, after a quiet time.
        clock: seconds.
    """

    def __init__(
        self,
        note: Callable[..., None],
        *,
        a_second: float,
        at_once: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._note, self._clock = note, clock
        self._bucket = Bucket(a_second, at_once, clock())
        self._noted, self._unsaid = 0, 0

    def say(self, name: str, **fields: Any) -> None:
        """Warn of the event `name` in log and trail, as far as the budget goes."""
        if self._bucket.take(1.0, self._clock()):
            more = {"not_shown": self._unsaid} if self._unsaid else {}
            self._unsaid = 0
            event(log, name, logging.WARNING, **fields, **more)
        else:
            self._unsaid += 1
        if self._noted < NOTED:
            self._noted += 1
            last = {"and_more": "further ones are not noted"} if self._noted == NOTED else {}
            self._note(name, **fields, **last)
