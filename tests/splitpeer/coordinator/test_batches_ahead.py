"""Reading ahead: one batch, in a thread of its own, and never one of patients who have left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from splitpeer.coordinator.frozen.ahead import THREAD, BatchesAhead
from splitpeer.errors import DataError
from splitpeer.federation.compute import Compute

STEPS = 4


class Stream:
    """Of patients who may leave."""

    def __init__(self) -> None:
        self.patients = [b"a", b"b", b"c"]

    def __len__(self) -> int:
        return STEPS


class Ahead(BatchesAhead):
    """Batches that are a step and its patients; `spoilt` patients cannot be read."""

    def __init__(self, stream: Stream, compute: Compute) -> None:
        run = SimpleNamespace(compute=compute, job=SimpleNamespace(seconds_per_step=20.0))
        super().__init__(run, None, stream)  # type: ignore[arg-type]
        self.stream, self.spoilt, self.free = stream, b"", threading.Event()
        self.free.set()
        self.read: list[tuple[int, str]] = []

    def _made(self, step: int) -> Any:
        patients = list(self.stream.patients)
        self.read.append((step, threading.current_thread().name))
        assert self.free.wait(20)
        if self.spoilt in patients:
            raise DataError("spoilt")
        return step, patients


@pytest.fixture
async def ahead() -> AsyncIterator[Ahead]:
    compute = Compute(1)
    made = Ahead(Stream(), compute)
    yield made
    made.free.set()
    await made.close()
    compute.close()


async def test_the_next_is_read_meanwhile(ahead: Ahead) -> None:
    for step in range(1, STEPS + 1):
        assert await ahead.take(step) == (step, [b"a", b"b", b"c"])
        ahead.begin(step + 1)
        await ahead.settled()
        assert ahead.read == [(one, THREAD) for one in range(1, min(step + 1, STEPS) + 1)]


async def test_settled_waits_for_what_is_read(ahead: Ahead) -> None:
    ahead.free.clear()
    ahead.begin(1)
    waiting = asyncio.create_task(ahead.settled())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    ahead.free.set()
    await waiting
    assert await ahead.take(1) == (1, [b"a", b"b", b"c"])


async def test_what_cannot_be_read_is_told_in_its_turn(ahead: Ahead) -> None:
    await ahead.take(1)
    ahead.spoilt = b"c"
    ahead.begin(2)
    await ahead.settled()
    with pytest.raises(DataError, match="spoilt"):
        await ahead.take(2)


@pytest.mark.parametrize("spoilt", [False, True])
async def test_a_batch_of_patients_who_left_is_drawn_again(ahead: Ahead, spoilt: bool) -> None:
    await ahead.take(1)
    ahead.spoilt = b"c" if spoilt else b""
    ahead.begin(2)
    await ahead.settled()
    ahead.stream.patients.remove(b"c")
    assert await ahead.take(2) == (2, [b"a", b"b"])
    assert [step for step, _ in ahead.read] == [1, 2, 2]
