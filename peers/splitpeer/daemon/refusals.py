"""The log of peers and strangers that were turned away at the coordinator's port."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from splitpeer.logs import event
from splitproto import SplitprotoError
from splitproto.admission import Bucket, network_of
from splitproto.errors import BindingMismatch, IdentityError, NotAuthorised, RemoteError

log = logging.getLogger(__name__)
REMEMBERED = 1000
"""Pairs of source and cause whose last line is remembered; the oldest is forgotten."""
APART = 1.0
"""Seconds between two lines of one such pair."""
LINES_A_SECOND, LINES_AT_ONCE = 1.0, 30.0
"""Of all sources together: 86,400 a day, 15 MB."""
NOTED = 1000
IDENTIFIED = (NotAuthorised, IdentityError, BindingMismatch, RemoteError)
"""Only a peer with a certificate of our CA can cause these."""


class Refusals:
    """Logs who was turned away (SP-14-5): a line a second for each source and cause, and for all together a budget.

    Peers that hold a certificate of our CA have a budget of their own, so that no flood of strangers hides the line
    of a hospital. What is left out is counted in the next line. An IPv6 source is its /64.

    Args:
        note: also told, `NOTED` times at most: the audit trail is kept for years.
        clock: seconds.
    """

    def __init__(
        self, note: Callable[..., None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._note, self._noted = note, 0
        self._clock = clock
        self._last: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._budgets = [Bucket(LINES_A_SECOND, LINES_AT_ONCE, clock()) for _ in range(2)]
        self._unsaid = 0

    def __call__(self, source: str, error: SplitprotoError) -> None:
        now, identified = self._clock(), isinstance(error, IDENTIFIED)
        # A stranger chooses what the text holds, so there the kind alone counts.
        what = (network_of(source), str(error) if identified else error.name)
        if now - self._last.get(what, -APART) < APART or not self._budgets[identified].take(1.0, now):
            self._unsaid += 1
            return
        self._last[what] = now
        self._last.move_to_end(what)
        if len(self._last) > REMEMBERED:
            self._last.popitem(last=False)
        more = {"not_shown": self._unsaid} if self._unsaid else {}
        self._unsaid = 0
        event(log, "link.refused", logging.WARNING, source=source, cause=str(error), **more)
        if self._note is not None and self._noted < NOTED:
            self._noted += 1
            last = {"and_more": "these are not noted"} if self._noted == NOTED else {}
            self._note("link.refused", source=source, cause=str(error), **last)
