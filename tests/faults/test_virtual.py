"""The loop whose time is virtual, and processes that end, stand still or have another clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from .virtual import Hang, Life, VirtualLoop, bury


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    made = VirtualLoop()
    yield made
    bury(made)


def start(loop: VirtualLoop, life: Life, coroutine) -> asyncio.Task:
    return loop.create_task(coroutine, context=life.context)


def test_hours_cost_nothing(loop) -> None:
    async def wait() -> float:
        for _ in range(3600):
            await asyncio.sleep(1)
        return asyncio.get_running_loop().time()

    began = time.monotonic()
    assert loop.run_until_complete(wait()) == pytest.approx(3600)
    assert time.monotonic() - began < 5


def test_timers_of_one_moment_keep_their_order(loop) -> None:
    order: list[int] = []
    for number in range(50):
        loop.call_at(1.0, order.append, number)
    loop.run_until_complete(asyncio.sleep(2))
    assert order == list(range(50))


def test_nobody_who_could_wake_anybody_is_an_error(loop) -> None:
    async def forgotten() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Hang, match=r"forgotten.*wait"):
        loop.run_until_complete(forgotten())


def test_time_that_passes_without_an_end_is_an_error(loop) -> None:
    async def patient() -> None:
        for _ in range(10**6):
            await asyncio.sleep(60)

    with pytest.raises(Hang, match="have passed"):
        loop.run_until_complete(patient())


def test_whoever_spins_is_an_error(loop) -> None:
    async def spin() -> None:
        for _ in range(10**9):
            await asyncio.sleep(0)

    with pytest.raises(Hang, match="no time has passed"):
        loop.run_until_complete(spin())


def test_nothing_of_a_life_that_ended_ever_runs(loop) -> None:
    """Not its timers, not its tasks, not what it would do at the end."""
    said: list[str] = []
    life = Life("one")

    async def live() -> None:
        loop.call_later(2, said.append, "timer")
        try:
            said.append("begins")
            await asyncio.sleep(2)
            said.append("wakes")
        finally:
            said.append("ends")

    task = start(loop, life, live())
    loop.call_later(1, setattr, life, "alive", False)
    loop.run_until_complete(asyncio.sleep(10))
    assert said == ["begins"]
    assert not task.done()
    # Only when the loop is taken down; writes must be refused then (`disk`).
    bury(loop)
    assert said == ["begins", "ends"]


def test_a_life_that_stands_still_goes_on_late(loop) -> None:
    said: list[tuple[str, float]] = []
    stopped, other = Life("stopped"), Life("other")

    async def tick(life: Life) -> None:
        for _ in range(4):
            await asyncio.sleep(1)
            said.append((life.name, loop.now))

    tasks = [start(loop, life, tick(life)) for life in (stopped, other)]
    loop.call_later(1.5, setattr, stopped, "stopped", True)
    loop.call_later(10, loop.resume, stopped)
    loop.run_until_complete(asyncio.wait(tasks))
    assert [at for name, at in said if name == "other"] == [1, 2, 3, 4]
    assert [at for name, at in said if name == "stopped"] == [1, 10, 11, 12]


def test_a_clock_that_leaps_makes_timers_late_for_one_life_only(loop) -> None:
    said: list[tuple[str, float, float]] = []
    leaping, other = Life("leaping"), Life("other")

    async def tick(life: Life) -> None:
        for _ in range(2):
            await asyncio.sleep(100)
            said.append((life.name, loop.now, loop.time()))

    tasks = [start(loop, life, tick(life)) for life in (leaping, other)]
    loop.call_later(10, loop.jump, leaping, 60)
    loop.run_until_complete(asyncio.wait(tasks))
    assert [entry for entry in said if entry[0] == "leaping"] == [("leaping", 40, 100), ("leaping", 140, 200)]
    assert [entry for entry in said if entry[0] == "other"] == [("other", 100, 100), ("other", 200, 200)]


def test_what_a_thread_does_happens_at_the_end_of_its_time_and_in_order(loop) -> None:
    loop.cost = lambda life, function: 5.0
    done: list[tuple[int, float]] = []
    pool = object()

    async def ask() -> None:
        await asyncio.gather(
            *(loop.run_in_executor(pool, lambda n=n: done.append((n, loop.now))) for n in range(3))
        )

    loop.run_until_complete(ask())
    assert done == [(0, 5.0), (1, 10.0), (2, 15.0)]


def test_sets_of_tasks_are_walked_in_the_same_order() -> None:
    """`asyncio.wait` gives sets; hashed by address, no replay would be like the first time."""

    def walk() -> list[str]:
        loop = VirtualLoop()

        async def several() -> list[str]:
            tasks = [asyncio.create_task(asyncio.sleep(1), name=f"t{n}") for n in range(200)]
            done, _ = await asyncio.wait(tasks)
            return [task.get_name() for task in done]

        try:
            return loop.run_until_complete(several())
        finally:
            bury(loop)

    held = [object() for _ in range(1000)]
    first = walk()
    del held[::3]
    assert walk() == first


def test_failures_of_callbacks_are_kept(loop) -> None:
    life = Life("clumsy")

    async def fail() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.sleep(1)

    loop.run_until_complete(start(loop, life, fail()))
    assert [type(context["exception"]) for _, context in loop.complaints] == [ZeroDivisionError]
