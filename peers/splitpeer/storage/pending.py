"""What waits to be written while the disk is full: in order, with a bound, and with one warning for all of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

MOST = 10_000
"""Items that wait at most; the oldest are given up first."""
Item = TypeVar("Item")


class Pending(Generic[Item]):
    """A queue in front of a file.

    Args:
        write: takes out of the queue what it has written, in order; raises one of `trouble` when there is no room.
        trouble: errors that may pass.
        most: items that wait at most.
    """

    def __init__(
        self, write: Callable[[deque[Item]], None], trouble: tuple[type[Exception], ...], most: int = MOST
    ) -> None:
        self._write, self._trouble, self._most = write, trouble, most
        self._waiting: deque[Item] = deque()
        self.failing = False
        """The last attempt failed."""
        self.lost = 0
        """Items that were given up since all of it could last be written."""
        self.last_lost: Item | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: Item) -> None:
        """Behind all that waits; nothing is written yet."""
        self._waiting.append(item)

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting.clear()

    def flush(self) -> Exception | None:
        """Write what waits, as far as there is room; what stood in the way, or None: all of it is out."""
        try:
            self._write(self._waiting)
        except self._trouble as error:
            self.failing = True
            while len(self._waiting) > self._most:
                self.last_lost = self._waiting.popleft()
                self.lost += 1
            return error
        self.failing = False
        return None
