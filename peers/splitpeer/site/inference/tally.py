"""How many segmentations a site was asked for and answered, and how many its own people asked for: numbers only."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from splitpeer.daemon import happenings as h

ANSWERS = ("answered", "refused", "unable")
"""What a site says when it is asked: it takes part, its policy forbids it, or it has no image that can be used."""
OUTCOMES = ("segmented", "cancelled", "failed")
"""What becomes of a request of people here."""
OTHERS = "others"
"""Sites that the policy does not name: who asks is the coordinator's word, which could be any number of names."""
MOST_KNOWN = 256
"""Requests that are recognized when a site is asked about them again, as after a lost link."""


@dataclass
class SiteTally:
    """Counts since the daemon started.

    Args:
        policy: [policy] inference: own or listed.
        names: sites that are counted by name.
        report: told whenever something has changed.
        clock: seconds since 1970.
    """

    policy: str
    names: Collection[str]
    report: Callable[[h.Happening], None]
    clock: Callable[[], float] = time.time
    _serves: bool | None = None
    _waiting: int = 0
    _running: int = 0
    _ended: Counter[str] = field(default_factory=Counter)
    _ended_last: float | None = None
    _answered: dict[str, Counter[str]] = field(default_factory=dict)
    _answered_last: float | None = None
    _known: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    """What was answered to the newest requests."""
    _told: h.SiteRequestsStand | None = None

    def link(self, serves: bool | None) -> None:
        """Whether the job on the present link has inference; None: there is no link."""
        self._serves = serves
        self.tell()

    def own(self, waiting: int, running: int) -> None:
        """How many requests of people here there are."""
        self._waiting, self._running = waiting, running
        self.tell()

    def ended(self, outcome: str) -> None:
        """One of them is over: one of `OUTCOMES`."""
        self._ended[outcome] += 1
        self._ended_last = self.clock()

    def answered(self, request: bytes, asker: str, cause: str | None) -> None:
        """The site was asked whether it has a patient.

        Args:
            request: its id; asked again, it counts once, as it was answered last.
            asker: the coordinator's word.
            cause: why the site takes no part; None: it does.
        """
        who = asker if asker in self.names else OTHERS
        answer = "answered" if cause is None else "refused" if cause == "refused" else "unable"
        if (before := self._known.pop(request, None)) is not None:
            self._answered[before[0]][before[1]] -= 1
        self._known[request] = who, answer
        if len(self._known) > MOST_KNOWN:
            del self._known[next(iter(self._known))]
        self._answered.setdefault(who, Counter())[answer] += 1
        self._answered_last = self.clock()
        self.tell()

    def tell(self) -> None:
        """Report how it stands, unless that was reported already."""
        stands = h.SiteRequestsStand(
            self.policy,
            self._serves,
            self._waiting,
            self._running,
            {one: self._ended[one] for one in OUTCOMES},
            self._ended_last,
            self._by_asker(),
            self._answered_last,
        )
        if stands != self._told:
            self._told = stands
            self.report(stands)

    def _by_asker(self) -> Mapping[str, Mapping[str, int]]:
        return {who: {one: counts[one] for one in ANSWERS} for who, counts in sorted(self._answered.items())}
