"""The log of peers and strangers that were turned away at the coordinator's port."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.log import LogSink
from splitproto import SplitprotoError
from splitproto.admission import Bucket, network_of
from splitproto.errors import BindingMismatch, IdentityError, NotAuthorised, RemoteError

log = logging.getLogger(__name__)
REMEMBERED = 1000
"""Pairs of source and cause whose last line is remembered; the oldest is forgotten."""
APART = 1.0
"""Seconds between two lines of one such pair."""
LINES_A_SECOND, LINES_AT_ONCE = 1.0, 30.0
"""For all sources together: 86,400 lines a day, 15 MB."""
IDENTIFIED = (NotAuthorised, IdentityError, BindingMismatch, RemoteError)
"""Only a peer with a certificate of our CA can cause these."""


class Refusals:
    """Logs refused peers (SP-14-5): a line a second for each source and cause, within a budget for all
    together. Peers with a certificate of our CA have a budget of their own, so that a flood of strangers does
    not hide a hospital's line. Omitted lines are counted in the next one. An IPv6 source is its /64.

    Args:
        report: told of those; its log is this module's.
        clock: seconds.
    """

    def __init__(self, report: h.Reporter, clock: Callable[[], float] = time.monotonic) -> None:
        self._report, self._clock = report.to(LogSink(log)), clock
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
        unsaid, self._unsaid = self._unsaid, 0
        self._report(h.LinkRefused(source, str(error), unsaid))
