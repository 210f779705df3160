"""What a listener grants to strangers: how many of them, and how much of its work (SP-5-8, SP-5-12).

A cap that refuses newcomers would let the first stranger lock out everybody else, so the one that has waited
longest is ended instead: an honest handshake takes a fraction of a second. A budget that all share would do
the same, so each source has its own, and sources from which a peer was admitted do not draw on the one of all
strangers.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from .constants import MAX_HALF_OPEN, MAX_HALF_OPEN_PER_SOURCE

HANDSHAKE_RATE = 256 * 1024
"""TLS bytes a second taken from one source before its peers are admitted; four times as many from all strangers."""
HANDSHAKE_BURST = 1 << 20
"""TLS bytes taken at once."""
OPEN_COST = 4096
"""What an OPEN costs in addition to its own bytes: about the work of an honest handshake."""
HANDSHAKE_SOURCES = 1024
"""Sources whose budgets are remembered."""
Waiting = TypeVar("Waiting")


@lru_cache(HANDSHAKE_SOURCES)
def network_of(address: str) -> str:
    """What counts as one source: an IPv4 address, or an IPv6 /64, of which anybody has all addresses."""
    try:
        at = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(at, ipaddress.IPv4Address):
        return str(at)
    if at.ipv4_mapped is not None:
        return str(at.ipv4_mapped)
    return str(ipaddress.ip_network((int(at) >> 64 << 64, 64)))


def one_too_many(waiting: Iterable[Waiting], source: Callable[[Waiting], str]) -> Waiting | None:
    """The one to end: the oldest of the source that has most, if there are more than the caps allow."""
    waiting = list(waiting)
    if not waiting:
        return None
    counted = Counter(source(one) for one in waiting)
    (biggest, most), *_ = counted.most_common(1)
    if most <= MAX_HALF_OPEN_PER_SOURCE and len(waiting) <= MAX_HALF_OPEN:
        return None
    return next(one for one in waiting if source(one) == biggest)


@dataclass(slots=True)
class Bucket:
    """Tokens that come back at a rate.

    Args:
        rate: tokens a second.
        burst: tokens at most, and at the beginning.
    """

    rate: float
    burst: float
    since: float
    tokens: float = -1.0

    def __post_init__(self) -> None:
        self.tokens = self.burst

    def take(self, cost: float, now: float) -> bool:
        """Take `cost` tokens; False if there are not as many."""
        self.tokens = min(self.burst, self.tokens + (now - self.since) * self.rate)
        self.since = now
        if self.tokens < cost:
            return False
        self.tokens -= cost
        return True


class HandshakeBudget:
    """Limits the TLS octets taken from peers before they are admitted, as work grows with them.

    Args:
        now: the owner's clock, in seconds.
    """

    def __init__(self, now: float) -> None:
        self._all = Bucket(4 * HANDSHAKE_RATE, 4 * HANDSHAKE_BURST, now)
        self._sources: OrderedDict[str, Bucket] = OrderedDict()
        self._known: OrderedDict[str, None] = OrderedDict()

    def take(self, source: str, octets: int, now: float, *, opens: bool = False) -> bool:
        """Whether `octets` from `source` may be processed.

        Args:
            opens: they open a link, which costs something however few they are.
        """
        cost = octets + OPEN_COST if opens else octets
        if source not in self._sources:
            self._sources[source] = Bucket(HANDSHAKE_RATE, HANDSHAKE_BURST, now)
            _forget_oldest(self._sources)
        self._sources.move_to_end(source)
        if not self._sources[source].take(cost, now):
            return False
        return source in self._known or self._all.take(cost, now)

    def admitted(self, source: str) -> None:
        """A peer was admitted from there."""
        self._known[source] = None
        self._known.move_to_end(source)
        _forget_oldest(self._known)


def _forget_oldest(table: OrderedDict[str, Bucket] | OrderedDict[str, None]) -> None:
    while len(table) > HANDSHAKE_SOURCES:
        table.popitem(last=False)
