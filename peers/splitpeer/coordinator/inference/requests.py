"""Requests for segmentations: what state each is in, and whose turn it is (SP-11.19-13). Knows no links."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from splitproto.messages import Segment, Segmented, Unsegmented

MOST_KEPT = 4
"""Results of one site that wait for its return; older ones are computed again if they are asked for."""


class RequestState(Enum):
    """Of a request."""

    QUEUED = "queued"
    WORKING = "working"
    ANSWERED = "answered"
    """What came of it waits to be sent, or its site's return."""
    OVER = "over"
    """Nothing is known of it any more."""


class RequestChange(Enum):
    """What moves a request from one state to another."""

    TURN = "its turn"
    PUT_BACK = "put back"
    """The work was broken off, and not because of the request."""
    OUTCOME = "outcome"
    SENT = "sent"
    LAPSED = "lapsed"
    """Its site did not come back in time, or has given it up."""


S, C = RequestState, RequestChange
TRANSITIONS: Mapping[RequestState, Mapping[RequestChange, RequestState]] = MappingProxyType(
    {
        S.QUEUED: {C.TURN: S.WORKING, C.OUTCOME: S.ANSWERED, C.LAPSED: S.OVER},
        S.WORKING: {C.PUT_BACK: S.QUEUED, C.OUTCOME: S.ANSWERED},
        S.ANSWERED: {C.SENT: S.OVER, C.LAPSED: S.OVER},
        S.OVER: {},
    }
)


@dataclass(eq=False)
class InferenceRequest:
    """One `segment`."""

    site: str
    """Who asked."""
    asked: Segment
    state: RequestState = RequestState.QUEUED
    cancelled: bool = False
    outcome: Segmented | Unsegmented | None = None
    since: float = 0.0
    """When it came into its state, or its site was last here; by the event loop's clock."""
    windows: int = 0
    """That were computed for it."""
    causes: Mapping[str, str] = field(default_factory=dict)
    """By site, why it takes no part: not for the site that asked (SP-11.19-7)."""

    def move(self, change: RequestChange, now: float) -> None:
        """Raises KeyError: the table does not allow it, which is a bug."""
        self.state, self.since = TRANSITIONS[self.state][change], now


@dataclass
class Requests:
    """Those of all sites: each site's in order, sites in turn."""

    most: int
    """Of one site that may wait."""
    _of: dict[str, list[InferenceRequest]] = field(default_factory=dict)
    _turns: deque[str] = field(default_factory=deque)

    def __iter__(self) -> Iterator[InferenceRequest]:
        return iter([request for mine in self._of.values() for request in mine])

    def find(self, site: str, name: bytes) -> InferenceRequest | None:
        """A request by its id; one of another site is not found."""
        return next((one for one in self._of.get(site, ()) if one.asked.request == name), None)

    def add(self, request: InferenceRequest) -> bool:
        """Whether there was room for it."""
        mine = self._of.setdefault(request.site, [])
        if sum(one.state is S.QUEUED for one in mine) >= self.most:
            return False
        if request.site not in self._turns:
            self._turns.append(request.site)
        mine.append(request)
        return True

    def remove(self, request: InferenceRequest) -> None:
        """It is over."""
        mine = self._of[request.site]
        mine.remove(request)
        if not mine:
            del self._of[request.site]
            self._turns.remove(request.site)

    def queued(self, site: str) -> list[InferenceRequest]:
        """Those of a site that wait, in order."""
        return [one for one in self._of.get(site, ()) if one.state is S.QUEUED]

    def next(self, is_here: Callable[[str], bool]) -> InferenceRequest | None:
        """Whose turn it is, among sites that are here; that site is last from now on."""
        for site in list(self._turns):
            if (mine := self.queued(site)) and is_here(site):
                self._turns.remove(site)
                self._turns.append(site)
                return mine[0]
        return None

    def ahead(self, request: InferenceRequest) -> int:
        """How many are worked on before it, if nothing changes."""
        place = self.queued(request.site).index(request) if request.state is S.QUEUED else 0
        turns = list(self._turns)
        mine = turns.index(request.site)
        working = sum(one.state is S.WORKING for one in self)
        # In each round before its own, one of every other site; in its own, of those whose turn is earlier.
        return (
            working
            + place
            + sum(
                min(len(self.queued(site)), place + (turn < mine))
                for turn, site in enumerate(turns)
                if site != request.site
            )
        )

    def crowded(self, site: str) -> list[InferenceRequest]:
        """Answers of a site beyond those that are kept, the oldest first."""
        answered = [one for one in self._of.get(site, ()) if one.state is S.ANSWERED]
        return answered[: max(0, len(answered) - MOST_KEPT)]
