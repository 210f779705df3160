"""A sweep on several ranks: each plays its share, and the first one joins what all have found.

Ranks need no folder in common: what the first one needs of a point is its record, and that is sent to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from splitpeer.ranks.group import Ranks, within
from splitpeer.ranks.torchrun import Rank

PREPARE_S = 3600.0
"""The first rank has rendered the phantom within so many seconds."""
SHARE_S = 24 * 3600.0
"""Longest that a rank waits for the others to end their shares; one that dies is noticed at once."""
Point = dict[str, Any]


class SweepShare:
    """One rank's part of a sweep.

    Args:
        ranks: all of them; None: this process plays everything.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self._ranks = ranks
        self.number = ranks.rank.number if ranks else 0
        self.of = ranks.rank.world if ranks else 1

    @property
    def leads(self) -> bool:
        """Whether this rank prepares, and joins what is found."""
        return self.number == 0

    def begin(self) -> None:
        """The first rank has prepared what all read: the others wait for it. Raises RankLost."""
        if self._ranks is None:
            return
        if not self.leads:
            within(PREPARE_S, partial(self._ranks.ordered, PREPARE_S), "rank 0 to prepare the sweep")
            return
        for number in self._ranks.others:
            self._ranks.order(number, {"do": "begin"})
        self._ranks.flush()

    def joined(self, own: list[Point]) -> list[Point]:
        """At the first rank, the points of all; elsewhere none, once the first has its own.

        Raises:
            RankLost: another rank ended before its share was done.
        """
        ranks = self._ranks
        if ranks is None:
            return own
        if self.leads:
            what = "the shares of the other ranks"
            for number in ranks.others:
                own += within(SHARE_S, partial(ranks.ordered, SHARE_S, number), what)["points"]
            return own
        within(SHARE_S, lambda: self._hand_in(ranks, own), "the share of rank 0")
        return []

    def _hand_in(self, ranks: Ranks, own: list[Point]) -> None:
        ranks.order(0, {"points": own})
        ranks.flush(SHARE_S)


@contextmanager
def share_of(rank: Rank | None, terms: str) -> Iterator[SweepShare]:
    """This process's share, once all ranks have met.

    Args:
        rank: None: it is the only one.
        terms: a digest of the sweep.

    Raises:
        RankLost, ConfigError: see `Ranks.met`.
    """
    if rank is None:
        yield SweepShare(None)
        return
    with Ranks(rank, PREPARE_S).met(terms) as ranks:
        yield SweepShare(ranks)
