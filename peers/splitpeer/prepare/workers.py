"""Work on many patients by several processes: what comes out is the same whatever their number."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

from splitpeer.errors import JobFailed

Work = Callable[..., Any]
GRACE_S = 10.0
"""For a process that was told to end; it may be in a library that hears nothing, and is then killed."""


def spread(
    work: Work, items: Sequence[tuple[Any, ...]], workers: int
) -> Generator[tuple[int, Any], None, None]:
    """The place of each item and what `work(*item)` made of it, as they are done.

    With one worker, here and in order. Others are processes of their own, each with a copy of `work`. Whatever ends the
    caller ends them and what they had begun: an error of one, Ctrl-C, or a signal that nobody hears.

    Raises:
        JobFailed: a process went away.
        Exception: what `work` raises.
    """
    if min(workers, len(items)) < 2:
        yield from ((place, work(*item)) for place, item in enumerate(items))
        return
    left = deque(enumerate(items))
    crew = [_Worker(work) for _ in range(min(workers, len(items)))]
    try:
        for one in crew:
            one.begin(left)
        while busy := {one.link: one for one in crew if one.place is not None}:
            for link in wait(list(busy)):
                one = busy[link]  # type: ignore[index]  # what it was given
                place, answer = one.place, one.answer()
                one.begin(left)
                yield place or 0, answer
    finally:
        for one in crew:
            one.process.terminate()
        for one in crew:
            one.end()


# --- inside ------------------------------------------------------------------------------------------------


class _Worker:
    """A process, which does one thing at a time."""

    def __init__(self, work: Work) -> None:
        context = get_context("spawn")
        self.link, other = context.Pipe()
        self.place: int | None = None
        """Of the item that it works on."""
        self.process = context.Process(target=_serve, args=(other, work), daemon=True)
        self.process.start()
        # Only the process has it now: when that goes away, the link ends.
        other.close()

    def begin(self, left: deque[tuple[int, tuple[Any, ...]]]) -> None:
        """The next item, if there is one."""
        self.place = None
        if left:
            self.place, item = left.popleft()
            try:
                self.link.send(item)
            except OSError:
                raise _gone() from None

    def answer(self) -> Any:
        """What was made of it. Raises JobFailed, and what `work` raised."""
        try:
            fine, answer = self.link.recv()
        except (EOFError, OSError):
            raise _gone() from None
        if not fine:
            raise answer
        return answer

    def end(self) -> None:
        """Once it was told to."""
        self.link.close()
        self.process.join(GRACE_S)
        if self.process.is_alive():
            self.process.kill()


def _gone() -> JobFailed:
    return JobFailed(
        "a process that prepared patients was killed (out of memory?): those that are done are kept; run it again with "
        "fewer --workers"
    )


def _serve(link: Connection[Any, Any], work: Work) -> None:
    """In each process."""
    # The terminal sends Ctrl-C to all; the caller ends us, and says so once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # As an exception, so that an outside program ends with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_follow, daemon=True).start()
    while True:
        try:
            item = link.recv()
        except EOFError:
            return
        try:
            answer = True, work(*item)
        except Exception as error:  # the caller raises it
            answer = False, error
        link.send(answer)


def _follow() -> None:
    """End where the caller was killed: nobody would take what we make."""
    if (caller := parent_process()) is not None:
        caller.join()
        os.kill(os.getpid(), signal.SIGTERM)
