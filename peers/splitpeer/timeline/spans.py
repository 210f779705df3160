"""What a peer does when: spans on a monotonic clock, taken once per step.

Recording costs two readings of the clock and one entry in a queue for each span. Several threads may record.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar

from splitproto.cost import LinkCost

Returned = TypeVar("Returned")

MOST = 512
"""Spans that wait to be taken: of a peer that makes no steps, the newest."""
ANSWERS = 16
"""For each of them, answers of sites."""
SET_S = 0.1
"""A wall clock that is off by more was set, or the machine slept: it is read again. Less would be the reading's own."""
_READINGS = 3
"""Of the two clocks: the process may be interrupted between them."""
_DIGITS = 6
LOOP = "loop"
"""The thread of the event loop, in rows."""


@dataclass(frozen=True)
class StepTiming:
    """Where the time of one step went, at one peer."""

    party: str
    """The peer's name."""
    process: int
    """Its process id."""
    at: float
    """Wall clock when the step began, seconds since 1970 (UTC)."""
    spans: Mapping[str, Mapping[str, list[float]]]
    """By thread and part, when each span began, in seconds after `at` (before it: negative), and its seconds."""
    link: Mapping[str, float] = field(default_factory=dict)
    """Seconds by name in `parts.LINK`, over all links."""
    answers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By part in which several sites are asked, and by site, when its answer was there, in seconds after `at`."""

    def row(self) -> dict[str, Any]:
        """As JSON; `answers` only where there are any."""
        return {name: value for name, value in vars(self).items() if name != "answers" or value}


class Spans:
    """Of one process.

    Args:
        party: the peer's name.
        most: spans that wait to be taken; 0: none is kept.
    """

    def __init__(self, party: str = "", most: int = MOST) -> None:
        self._party = party
        self._ended: deque[tuple[str, str, float, float]] = deque(maxlen=most)
        self._answered: deque[tuple[str, str, float]] = deque(maxlen=ANSWERS * most)
        self._ahead = -float("inf")  # seconds by which the wall clock is ahead of the monotonic one

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """The time in the block is spent on `part`, on this thread."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._ended.append((_thread(), part, began, time.monotonic()))

    def timed(self, part: str, function: Callable[..., Returned]) -> Callable[..., Returned]:
        """`function`, whose time is spent on `part`, on the thread that calls it."""

        def call(*args: Any) -> Returned:
            with self.of(part):
                return function(*args)

        return call

    async def answer(self, part: str, site: str, question: Awaitable[Returned]) -> Returned:
        """The answer of one of the sites that are asked in `part`."""
        answer = await question
        self._answered.append((part, site, time.monotonic()))
        return answer

    def take(self, began: float, link: Mapping[str, float] | None = None) -> StepTiming:
        """What has ended since it was taken last, of a step that began at `began` (`time.monotonic`)."""
        spans: dict[str, dict[str, list[float]]] = {}
        # One at a time: another thread may add to it.
        for _ in range(len(self._ended)):
            thread, part, first, last = self._ended.popleft()
            held = spans.setdefault(thread, {}).setdefault(part, [])
            held += [round(first - began, _DIGITS), round(last - first, _DIGITS)]
        answers: dict[str, dict[str, float]] = {}
        while self._answered:
            part, site, at = self._answered.popleft()
            answers.setdefault(part, {})[site] = round(at - began, _DIGITS)
        at = round(began + self._anchor(), _DIGITS)
        return StepTiming(self._party, os.getpid(), at, spans, link or {}, answers)

    def _anchor(self) -> float:
        """Seconds to add to the monotonic clock: the same as long as nobody sets the wall clock, so that a step cannot
        begin before the one before it has ended."""
        # An interruption between the two readings makes it less.
        ahead = max(time.time() - time.monotonic() for _ in range(_READINGS))
        if abs(ahead - self._ahead) > SET_S:
            self._ahead = ahead
        return self._ahead


UNRECORDED = Spans(most=0)
"""For what is not part of a step."""


class Linked(Protocol):
    """What a `splitproto` session shows of its work."""

    @property
    def cost(self) -> LinkCost:
        """Seconds so far."""


class LinkTimes:
    """What links cost from one reading to the next."""

    def __init__(self) -> None:
        self._before: dict[Linked, tuple[float, ...]] = {}

    def take(self, sessions: Iterable[Linked]) -> dict[str, float]:
        """Seconds by name, of the links that are there now; what a link cost that has ended since is not counted."""
        now = {session: tuple(getattr(session.cost, name) for name in _NAMES) for session in sessions}
        nothing = (0.0,) * len(_NAMES)
        spent = [0.0] * len(_NAMES)
        for session, seconds in now.items():
            before = self._before.get(session, nothing)
            spent = [sum(three) for three in zip(spent, seconds, (-b for b in before), strict=True)]
        self._before = now
        return {name: round(value, _DIGITS) for name, value in zip(_NAMES, spent, strict=True)}


_NAMES = tuple(one.name for one in fields(LinkCost))


def _thread() -> str:
    thread = threading.current_thread()
    return LOOP if thread is threading.main_thread() else thread.name
