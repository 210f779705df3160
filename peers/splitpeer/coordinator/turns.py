"""Gradients to one site after the other, where that is faster than to all at once.

A site that has its gradients computes, and sends its next activations while the others still receive. Where the
coordinator's own line is the narrowest, that uses both of its directions; where the sites' lines are, it only makes the
others wait. Nobody knows which line is narrow, so both ways are tried, and the faster one is kept.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Literal

from splitpeer.daemon import happenings as h

TRIALS = 5
"""Exchanges that are made each way before one is chosen, and of each way the newest that count."""
AGAIN = 100
"""After so many exchanges one way, one is made the other way; and trials begin at most once in so many, so that a noisy
line, or a site that comes and goes, costs the others one exchange in twenty."""
GAIN = 0.9
"""Turns are taken up if they need less than this share of the time that all at once needs, and kept while they need
less than all of it."""
CHANGED = 1.5
"""By which factor exchanges, two in a row, differ from those before if a link has changed: then both are tried anew."""


class Turns:
    """One step's: each site waits until all before it have half of their gradients.

    Half, so that the line is busy for the round trip, and for the slow start of the next site's connection.

    Args:
        sites: in their order.
        most_s: after so many seconds all that still wait are sent to, whatever those before them do.
    """

    def __init__(self, sites: Sequence[Hashable], most_s: float) -> None:
        self._passed = {site: asyncio.Event() for site in sites}
        self._ends = asyncio.get_running_loop().time() + most_s

    @asynccontextmanager
    async def of(self, site: Hashable) -> AsyncIterator[Callable[[], None]]:
        """In the block it is the site's turn, until what is returned is called, or the block is left."""
        sites = list(self._passed)
        passed = self._passed[site]
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._ends):
                    for before in sites[: sites.index(site)]:
                        await self._passed[before].wait()
            yield passed.set
        finally:
            passed.set()


class Exchanges:
    """Decides for each exchange, from gradients that leave to the last of the next activations, whether in turns.

    Args:
        setting: `[wire] gradients_in_turns`.
        most_s: how long a site waits for its turn at most, where it is not known how long an exchange at once takes.
        report: told what was chosen.
    """

    def __init__(
        self, setting: Literal["auto", "always", "never"], most_s: float, report: h.Reporter
    ) -> None:
        self._setting, self._most_s, self._report = setting, most_s, report
        self.in_turns = False
        """Whether the newest one is."""
        self._step, self._began = 0, 0.0
        self._present: frozenset[Hashable] = frozenset()
        self._took: dict[bool, deque[float]] = {way: deque(maxlen=TRIALS) for way in (False, True)}
        self._chosen = False
        self._told: bool | None = None
        self._since = 0  # exchanges as chosen, since one was made the other way
        self._odd = 0  # of these, how many in a row took another time than those before
        self._count = 0  # exchanges since the trials began
        self._stale = False  # what they found may hold no longer

    def begin(self, step: int, sites: Sequence[Hashable], present: Iterable[Hashable]) -> Turns | None:
        """Gradients of `step` are about to leave; None: to all at once.

        Args:
            sites: that are sent some.
            present: all that take part in the run now: without one, or with another, times are others.
        """
        if len(sites) < 2:
            self.none()
            return None
        if (here := frozenset(present)) != self._present:
            self._stale = bool(self._present)
            self._present = here
        self.in_turns = self.next()
        self._step, self._began = step, time.monotonic()
        return Turns(sites, self.most_s) if self.in_turns else None

    def end(self, step: int) -> None:
        """The activations of `step` are here."""
        if self._step and step == self._step + 1:
            self.note(self.in_turns, time.monotonic() - self._began)
        self._step = 0

    def none(self) -> None:
        """What was begun does not count: something else is done before activations are asked for."""
        self._step, self.in_turns = 0, False

    @property
    def most_s(self) -> float:
        """How long sites wait for their turns at most, in seconds: as long as a whole exchange at once takes."""
        # Where all are in turns, such an exchange has to do. One of few may have been an outage.
        took = self._took[False] or self._took[True]
        typical = statistics.median(took) if len(took) == TRIALS else min(took, default=math.inf)
        return min(self._most_s, typical)

    def next(self) -> bool:
        """Whether the next exchange is made in turns."""
        if self._setting != "auto":
            return self._setting == "always"
        at_once, in_turns = (len(self._took[way]) for way in (False, True))
        if min(at_once, in_turns) < TRIALS:
            return in_turns < at_once
        return self._chosen != (self._since >= AGAIN)

    def note(self, turns: bool, seconds: float) -> None:
        """An exchange took so long."""
        took = self._took[turns]
        self._stale = self._stale or self._changed(turns, seconds)
        if self._stale and self._count >= AGAIN:
            self._begin_trials()
        self._count += 1
        took.append(seconds)
        self._since = self._since + 1 if turns == self._chosen else 0
        tried = all(len(one) == TRIALS for one in self._took.values())
        # Between two looks at the other way nothing is known of it: only its old times would be compared.
        if self._setting == "auto" and tried and (turns != self._chosen or self._count == 2 * TRIALS):
            self._choose()

    def _changed(self, turns: bool, seconds: float) -> bool:
        took = self._took[turns]
        if turns == self._chosen and len(took) == TRIALS:
            before = statistics.median(took)
            self._odd = 0 if before / CHANGED < seconds < before * CHANGED else self._odd + 1
        return self._odd > 1

    def _choose(self) -> None:
        at_once, in_turns = (statistics.median(self._took[way]) for way in (False, True))
        self._chosen = in_turns < (1.0 if self._chosen else GAIN) * at_once
        if self._chosen != self._told:
            self._told = self._chosen
            how = "to one site after the other" if self._chosen else "to all sites at once"
            self._report(h.TurnsChosen(how, round(at_once, 3), round(in_turns, 3)))

    def _begin_trials(self) -> None:
        for took in self._took.values():
            took.clear()
        self._since = self._odd = self._count = 0
        self._stale = False
