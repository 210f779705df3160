"""Stand-ins for clocks, threads, files and logs while a laboratory runs; and what its peers say, as moments."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import numpy as np

from splitpeer.daemon.console import RunView
from splitpeer.data import volumes
from splitpeer.errors import DataError
from splitproto.messages import Message
from splitproto.session import Session

from .virtual import LIFE, Dead, VirtualLoop

if TYPE_CHECKING:
    from .laboratory import Laboratory


Told = Literal["send", "sent", "got"]


@dataclass
class Moment:
    """Something that the application says or hears."""

    who: str
    peer: str
    told: Told
    message: str
    step: int | None
    at: float

    @property
    def key(self) -> tuple[str, str, str, str, int | None]:
        return self.who, self.peer, self.told, self.message, self.step


class Blind(RunView):
    """Sees nothing."""

    def _nothing(self, *_: Any) -> None:
        return

    waiting = begin = step = evaluating = evaluated = close = _nothing


class Clock:
    """`time` as the roles use it."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._epoch = time.time()

    def monotonic(self) -> float:
        return 1000.0 + self._loop.time()

    def time(self) -> float:
        return self._epoch + self._loop.time()

    def __getattr__(self, name: str) -> Any:
        assert name not in ("sleep", "perf_counter"), name
        return getattr(time, name)


def compute_class(real: type) -> type:
    if "_asked" not in real.__init__.__code__.co_names:
        return real  # it goes through run_in_executor

    class InlineCompute(real):  # type: ignore[misc]
        def __init__(self, threads: int) -> None:
            loop = asyncio.get_running_loop() if _in_loop() else None
            self._hangs = ""
            self._asked = _Lane(loop, self)

        def beside(self, name: str) -> Any:
            return InlineCompute(1)

        def close(self) -> None:
            self._asked.closed = True

    return InlineCompute


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class _Lane:
    """The queue of a thread that computes."""

    def __init__(self, loop: VirtualLoop | None, owner: object) -> None:
        self._loop, self._owner = loop, owner
        self.closed = False

    def put(self, work: Callable[[], None] | None) -> None:
        if work is None or self.closed:
            return
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.lane(self).put(work, work)


class InlinePrefetcher:
    """Reads when it is asked for the result."""

    def __init__(self, make: Callable[[Any], Any], *, depth: int = 2, pending: int = 1024) -> None:
        self._make = make
        self._asked: list[Any] = []

    def submit(self, asked: Any, timeout: float) -> None:
        self._asked.append(asked)

    def get(self, timeout: float) -> Any:
        return self._make(self._asked.pop(0))

    def close(self, timeout: float = 0.0) -> None:
        self._asked.clear()


class InlineExecutor:
    """Does it at once."""

    def __init__(self, *_: Any) -> None:
        return

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        function(*args)

    def shutdown(self) -> None:
        return


class InlinePen:
    """Nobody looks at the status."""

    def __init__(self, path: Path) -> None:
        return

    def write(self, text: bytes) -> None:
        return

    def close(self, timeout: float) -> None:
        return


def patched_modules() -> list[Any]:
    return [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith(
            ("splitpeer.site.", "splitpeer.coordinator.", "splitpeer.federation.", "splitproto.")
        )
        or name
        in (
            "splitpeer.daemon.board",
            "splitpeer.daemon.clerk",
            "splitpeer.daemon.console",
            "splitpeer.daemon.duty",
            "splitpeer.daemon.witness",
            "splitpeer.daemon.refusals",
            "splitpeer.daemon.sinks.board",
            "splitpeer.daemon.sinks.budgets",
            "splitpeer.daemon.sinks.progress",
            "splitpeer.daemon.sinks.sparing",
            "splitpeer.timeline.spans",
        )
    ]


@contextmanager
def moments_of(lab: Laboratory) -> Iterator[None]:
    """Every message of the application, at both ends."""
    real_send, real_receive = Session.send, Session.receive

    def note(session: Session, told: Told, message: Message) -> None:
        life = LIFE.get()
        assert life is not None
        step = getattr(message, "step", None)
        moment = Moment(life.name, session.peer.site, told, message.name, step, lab.loop.now)
        lab.moments.append(moment)
        if told != "sent":
            arrow = "->" if told == "send" else "<-"
            lab.tell(f"{life.name} {arrow} {moment.peer}: {message.name} {'' if step is None else step}")
        for watcher in lab.watchers:
            watcher(moment)
        if not life.alive:
            raise Dead

    async def send(self: Session, message: Message, *args: Any, **options: Any) -> None:
        note(self, "send", message)
        await real_send(self, message, *args, **options)
        note(self, "sent", message)

    async def receive(self: Session, *args: Any, **options: Any) -> Message:
        message = await real_receive(self, *args, **options)
        note(self, "got", message)
        return message

    with mock.patch.object(Session, "send", send), mock.patch.object(Session, "receive", receive):
        yield


@contextmanager
def bad_files_of(lab: Laboratory) -> Iterator[None]:
    """Files of `lab.bad_files` are truncated: a peer that has one reads to its end, in vain."""
    volume = volumes.Volumes._volume

    def check(case: Any) -> None:
        life = LIFE.get()
        if life is not None and (life.name, case.patient) in lab.bad_files:
            raise DataError(f"{case.path}: truncated or corrupt (by the laboratory)", "truncated")

    def guarded(self: Any, key: bytes) -> np.ndarray:
        # Also what is in the cache: most schedules are over before a cache is full.
        with volumes._blaming(key):
            check(self.case(key))
        return volume(self, key)

    def read_header(case: Any, *args: Any) -> Any:
        check(case)
        return header(case, *args)

    header = volumes.read_header
    with (
        mock.patch.object(volumes.Volumes, "_volume", guarded),
        mock.patch.object(volumes, "read_header", read_header),
    ):
        yield


class _Story(logging.Handler):
    def __init__(self, lab: Laboratory) -> None:
        super().__init__()
        self._lab = lab

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "fields", {})
        life = LIFE.get()
        if life is not None and not life.alive:
            return
        shown = " ".join(f"{name}={_short(value)}" for name, value in fields.items() if name not in _VARYING)
        mark = "" if record.levelno < logging.WARNING else " (warning)"
        self._lab.tell(
            f"    {life or 'laboratory'} logs {record.getMessage()} {shown}{mark}".replace(
                str(self._lab.folder), ""
            )
        )


_VARYING = ("digest", "tls")


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@contextmanager
def story_of_logs(lab: Laboratory) -> Iterator[None]:
    handler = _Story(lab)
    loggers = [logging.getLogger(name) for name in ("splitpeer", "splitproto")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
