"""The connections at a door, below links: which are ended, and when (SP-5-13).

A connection costs a descriptor and memory before it says a word. So one without an admitted link is ended when
there are too many of them at all lanes together, when it has had its time, or when its lane holds more for it than
it may.
"""

from __future__ import annotations

from .admission import one_too_many
from .errors import DeadlineExceeded, LocalError, TooManyLinks
from .lanes.base import Visitor

MAX_FAULTS = 4
"""Messages without a link that one connection may send."""


class Visitors:
    """All connections at one door, of any lane.

    Args:
        patience: seconds that a connection may be without an admitted link.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        # Dictionaries for their order: the oldest first.
        self._all: dict[Visitor, None] = {}
        self._strangers: dict[Visitor, None] = {}

    def __len__(self) -> int:
        return len(self._all)

    @property
    def strangers(self) -> list[Visitor]:
        """Those without an admitted link, the oldest first."""
        return list(self._strangers)

    def came(self, visitor: Visitor) -> list[tuple[str, LocalError]]:
        """A connection was accepted. Returns those ended to make room for it, and why."""
        self._all[visitor] = self._strangers[visitor] = None
        return self._thin_out()

    def left(self, visitor: Visitor) -> None:
        """A connection is over."""
        self._all.pop(visitor, None)
        self._strangers.pop(visitor, None)

    def admitted(self, visitor: Visitor) -> None:
        """One of its links was admitted."""
        visitor.links += 1
        visitor.known = True
        self._strangers.pop(visitor, None)

    def parted(self, visitor: Visitor, now: float) -> None:
        """One of its admitted links has ended."""
        visitor.links -= 1
        if not visitor.links and not visitor.ended and visitor in self._all:
            visitor.since = now
            self._strangers[visitor] = None

    def look(self, now: float) -> list[tuple[str, LocalError]]:
        """End the connections that are over a limit. Returns those that this refuses, and why."""
        told: list[tuple[str, LocalError]] = []
        for visitor in list(self._all):
            if visitor.ended:
                continue
            if visitor.refused:
                self.end(visitor)
            elif (error := visitor.excess()) is not None:
                self.end(visitor)
                told.append((visitor.source, error))
            elif not visitor.links and now - visitor.since >= self._patience:
                error = DeadlineExceeded(f"a connection without an admitted link for {self._patience:g} s")
                told += self._end_idle(visitor, error)
        return told + self._thin_out()

    def end(self, visitor: Visitor) -> None:
        """End a connection now."""
        if not visitor.ended:
            visitor.refused = visitor.ended = True
            self._strangers.pop(visitor, None)
            visitor.hang_up()

    def clear(self) -> None:
        """Forget all; the lanes are closing."""
        self._all.clear()
        self._strangers.clear()

    # --- inside -----------------------------------------------------------------------------------------

    def _thin_out(self) -> list[tuple[str, LocalError]]:
        told: list[tuple[str, LocalError]] = []
        while (victim := one_too_many(self._strangers, lambda one: one.network)) is not None:
            told += self._end_idle(
                victim, TooManyLinks("too many connections without an admitted link: the oldest is closed")
            )
        return told

    def _end_idle(self, visitor: Visitor, error: LocalError) -> list[tuple[str, LocalError]]:
        """End a connection without a link. That refuses it, unless it has had one, as when many sites leave at once."""
        self.end(visitor)
        return [] if visitor.known else [(visitor.source, error)]
