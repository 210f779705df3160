"""An event loop whose time is virtual: when nobody has anything to do, it jumps ahead.

Hours of heartbeats, deadlines and back-off cost milliseconds, and the same inputs give the same order of
everything. Several processes share the loop as if each had its own: every callback belongs to the `Life` in whose
context it was made. What belongs to a life that has ended never runs, as after SIGKILL; what belongs to one that
is stopped waits, as after SIGSTOP; each life has its own clock.
"""

from __future__ import annotations

import asyncio
import heapq
import socket
from asyncio import events, tasks
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from itertools import count
from typing import Any

BUSY = 200_000
"""Callbacks at one moment: somebody spins."""


class Dead(BaseException):
    """Raised where a life that has ended would act: nobody catches it, nobody goes on."""


class Hang(Exception):
    """Nothing can happen any more, or far too much time has passed; the text says who waits for what."""


class Life:
    """One process, from its start to its end.

    Args:
        name: for the story.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.stopped = False
        self.ahead = 0.0
        """Seconds by which its clock is before the others'."""
        self.held: list[events.Handle] = []
        """What became due while it was stopped."""
        self.context: Context = copy_context()
        self.context.run(LIFE.set, self)

    def __repr__(self) -> str:
        return self.name


LIFE: ContextVar[Life | None] = ContextVar("LIFE", default=None)
"""Whose code is running; None: the laboratory's."""


class _Task(asyncio.Task):  # type: ignore[type-arg]
    """Hashed by number, not by address: `asyncio.wait` gives sets, and a replay must walk them in the same order."""

    number = 0
    life: Life | None = None

    def __hash__(self) -> int:
        return self.number


class _Future(asyncio.Future):  # type: ignore[type-arg]
    number = 0

    def __hash__(self) -> int:
        return self.number


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module.

    Args:
        limit: virtual seconds after which somebody must have hung.
    """

    def __init__(self, limit: float = 6 * 3600.0) -> None:
        super().__init__()
        self._now = 0.0
        self._limit = limit
        self._numbers = count(1)
        self._timers: list[tuple[float, int, events.TimerHandle]] = []
        self._lanes: dict[object, _Lane] = {}
        self.handled = 0
        """Callbacks run so far."""
        self._since = 0
        self.complaints: list[tuple[Life | None, dict[str, Any]]] = []
        """What was given to the exception handler: defects."""
        self.cost: Callable[[Life | None, Any], float] = lambda life, function: 0.001
        """Virtual seconds that a function takes in a thread."""
        self.reach: Callable[[str, int], Coroutine[Any, Any, None]] | None = None
        """Connects plain TCP to (host, port), or raises OSError."""
        self.descriptors: dict[int, Callable[[Callable[[], None] | None], None]] = {}
        """By number: takes what is to be called when something arrives, or None."""
        self.set_task_factory(self._make_task)

    # --- time ------------------------------------------------------------------------------------------

    def time(self) -> float:
        """The clock of the life that asks."""
        life = LIFE.get()
        return self._now if life is None else self._now + life.ahead

    @property
    def now(self) -> float:
        """The laboratory's clock, from 0."""
        return self._now

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> events.TimerHandle:
        timer = events.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (self._due(timer), next(self._numbers), timer))
        timer._scheduled = True
        return timer

    def _due(self, timer: events.TimerHandle) -> float:
        life = timer._context.get(LIFE)
        return timer._when - (life.ahead if life is not None else 0.0)

    def jump(self, life: Life, seconds: float) -> None:
        """The clock of `life` leaps: its timers find themselves so much later."""
        life.ahead += seconds
        self._timers = [
            (self._due(timer), number, timer) for _, number, timer in self._timers if not timer._cancelled
        ]
        heapq.heapify(self._timers)

    def resume(self, life: Life) -> None:
        """What was held back of a stopped life is due now."""
        life.stopped = False
        held, life.held = life.held, []
        self._ready.extend(held)

    # --- the loop --------------------------------------------------------------------------------------

    def _run_once(self) -> None:
        while not self._ready and not self._stopping:
            if not self._timers:
                raise Hang("nothing is ready and nothing is due:\n" + self.who_waits())
            due, _, timer = heapq.heappop(self._timers)
            timer._scheduled = False
            if timer._cancelled:
                continue
            if due > self._limit:
                raise Hang(f"{self._limit:g} s have passed:\n" + self.who_waits())
            if due > self._now:
                self._now, self._since = due, self.handled
            self._ready.append(timer)
            while self._timers and self._timers[0][0] <= self._now:
                _, _, other = heapq.heappop(self._timers)
                other._scheduled = False
                self._ready.append(other)
        if self.handled - self._since > BUSY:
            raise Hang(f"{BUSY} callbacks and no time has passed:\n" + self.who_waits())
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            if handle._cancelled:
                continue
            life = handle._context.get(LIFE)
            if life is not None:
                if not life.alive:
                    continue
                if life.stopped:
                    life.held.append(handle)
                    continue
            self.handled += 1
            handle._run()

    def who_waits(self) -> str:
        """Every task, whose it is, and where it stands."""
        lines = []
        for task in sorted(asyncio.all_tasks(self), key=hash):
            life = getattr(task, "life", None)
            if life is None or life.alive:
                lines.append(f"  {life or 'laboratory'}: {task.get_name()}: {_place(task)}")
        return "\n".join(lines)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        life = LIFE.get()
        if life is None or life.alive:
            self.complaints.append((life, context))

    def create_future(self) -> asyncio.Future[Any]:
        future = _Future(loop=self)
        future.number = next(self._numbers)
        return future

    def _make_task(self, loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        options.setdefault("name", f"{getattr(coroutine, '__qualname__', 'task')}")
        context = options.get("context")
        # Hashed while it is made.
        task = _Task.__new__(_Task)
        task.number = next(self._numbers)
        task.life = LIFE.get() if context is None else context.get(LIFE)
        task.__init__(coroutine, loop=loop, **options)  # type: ignore[misc]
        return task

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> events.Handle:
        # There is but one thread; what is inline here calls it as a thread would.
        return self.call_soon(callback, *args, context=context)

    def _process_events(self, event_list: list[object]) -> None:
        raise NotImplementedError

    def _write_to_self(self) -> None:
        raise NotImplementedError

    # --- threads -----------------------------------------------------------------------------------------

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                result = func(*args)
            except Exception as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        self.lane(executor).put(work, func)
        return future

    def lane(self, key: object | None) -> _Lane:
        """A thread that does one thing after the other; None: one of its own."""
        if key is None:
            return _Lane(self)
        return self._lanes.setdefault(key, _Lane(self))

    # --- the outer world ---------------------------------------------------------------------------------

    def add_reader(self, fd: Any, callback: Callable[..., object], *args: Any) -> None:  # type: ignore[override]
        context = copy_context()
        self.descriptors[fd](lambda: self.call_soon(callback, *args, context=context))

    def remove_reader(self, fd: Any) -> bool:  # type: ignore[override]
        if fd in self.descriptors:
            self.descriptors[fd](None)
        return True

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:  # type: ignore[override]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]

    async def create_connection(
        self, factory: Any, host: Any = None, port: Any = None, **options: Any
    ) -> Any:  # type: ignore[override]
        assert self.reach is not None
        await self.reach(host, port)
        return _Nowhere(), factory()


class _Lane:
    """Runs functions one after the other; each takes its virtual time, and its effects appear at the end."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._asked: deque[tuple[Callable[[], None], Any]] = deque()
        self._busy = False

    def put(self, work: Callable[[], None], function: Any = None) -> None:
        self._asked.append((work, function))
        if not self._busy:
            self._next()

    def _next(self) -> None:
        self._busy = bool(self._asked)
        if self._busy:
            work, function = self._asked.popleft()
            self._loop.call_later(self._loop.cost(LIFE.get(), function), self._do, work)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            self._next()


class _Nowhere(asyncio.Transport):
    """A TCP connection that only says that there is one."""

    def close(self) -> None:
        return

    def is_closing(self) -> bool:
        return True


def _place(task: asyncio.Task[Any]) -> str:
    """Where a suspended task stands: its innermost frames."""
    frames: list[str] = []
    at: Any = task.get_coro()
    while at is not None:
        frame = (
            getattr(at, "cr_frame", None) or getattr(at, "gi_frame", None) or getattr(at, "ag_frame", None)
        )
        if frame is not None:
            frames.append(
                f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
            )
        at = (
            getattr(at, "cr_await", None)
            or getattr(at, "gi_yieldfrom", None)
            or getattr(at, "ag_await", None)
        )
    return " > ".join(frames)


def bury(loop: VirtualLoop) -> None:
    """Take a loop down with all who still wait on it, without letting them say another word.

    Closing a coroutine runs its `finally` blocks: whatever they try must fail, so every life must have ended and
    what stands between them and the disk must refuse the dead.
    """
    # A `finally` may gather coroutines: without a loop they would never be awaited, which is a warning of its own.
    asyncio.set_event_loop(loop)
    try:
        buried: set[asyncio.Task[Any]] = set()
        while waiting := [task for task in tasks.all_tasks(loop) - buried if not task.done()]:
            for task in waiting:
                _close(task)
            buried.update(waiting)
    finally:
        asyncio.set_event_loop(None)
    loop._ready.clear()
    loop._timers.clear()
    if not loop.is_closed():
        loop.close()


def _close(task: asyncio.Task[Any]) -> None:
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine, context = task.get_coro(), Context()
    context.run(LIFE.set, _GONE)
    for _ in range(50):
        try:
            context.run(coroutine.close)  # type: ignore[union-attr]
        except (Exception, Dead):
            # It waits in a `finally`: close that as well.
            continue
        break


_GONE = Life("nobody")
_GONE.alive = False
