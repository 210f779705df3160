"""One site that makes trouble, in a run that can do without it: the others continue and lose nothing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable

import pytest

from splitpeer.errors import JobFailed
from splitpeer.storage import checkpoint
from splitproto.errors import LinkLost
from splitproto.messages import Activations, Applied, JobAccept, Message, Saved, Unsaved

from .test_misbehaviour import altered, nan, peer, replace

STEPS = 12
Twist = Callable[[Message], Iterable[Message]]


def cast(scene, mode: str = "drop", step_s: float = 20.0, steps: int = STEPS) -> None:
    scene.cast(
        "flair",
        "t1",
        training={"steps": steps, "checkpoint_every": 4},
        absence={"mode": mode, "least_sites": 1},
        deadlines={"step_s": step_s, "return_s": 5.0},
    )


async def beside(scene, twist: Twist):
    """The hub's task at its end, and how often the troublesome site dialled."""
    dialled = 0

    async def again_and_again() -> None:
        nonlocal dialled
        while True:
            dialled += 1
            with_it = await peer(scene, twist)
            if with_it.startswith("complete"):
                return
            await asyncio.sleep(0.02)

    async with scene.running(only=["hub", "site-flair"]) as on:
        await asyncio.sleep(0.05)
        trouble = asyncio.create_task(again_and_again())
        await asyncio.wait([on.tasks["hub"], trouble], timeout=80, return_when=asyncio.FIRST_COMPLETED)
        hub = on.tasks["hub"]
        await asyncio.wait([hub], timeout=20)
        trouble.cancel()
        await asyncio.gather(trouble, return_exceptions=True)
        assert hub.done(), f"after {dialled} links at {scene.metrics()[-1:]}"
        return hub, dialled


def rollbacks(scene) -> int:
    return sum(bool(line.get("rollback")) for line in scene.metrics())


def dies_after(kind: type[Message]) -> Twist:
    def change(message: Message) -> Iterable[Message]:
        yield message
        raise LinkLost("it died")

    return replace(kind, change)


async def test_checkpoints_that_it_never_writes_cost_nobody_else_the_training(scene) -> None:
    cast(scene)
    hub, _ = await beside(scene, replace(Saved, lambda saved: [Unsaved(saved.step, "full")]))
    result = hub.result()
    assert (result.complete, result.step) == (True, STEPS)
    (folder,) = [path for path in (scene.folder / "hub" / "state").iterdir() if [*path.glob("step-*")]]
    assert max(checkpoint.available(folder)) == STEPS


@pytest.mark.parametrize("mode", ["train", "evaluate"])
async def test_nan_costs_the_site_its_own_part_only(scene, mode: str) -> None:
    cast(scene)

    def spoil(sent: Activations) -> list[Message]:
        return list(altered(Activations, tensors=nan)(sent)) if sent.mode == mode else [sent]

    hub, _ = await beside(scene, replace(Activations, spoil))
    result = hub.result()
    assert (result.complete, result.step) == (True, STEPS)
    assert result.made_from == ["flair"]


async def test_a_memory_that_it_loses_each_time_does_not_hold_up_the_others_for_ever(scene) -> None:
    cast(scene)
    hub, _ = await beside(scene, dies_after(Applied))
    assert hub.result().complete
    assert 1 <= rollbacks(scene) <= 11


async def test_and_where_all_are_needed_it_ends_the_job_by_name(scene) -> None:
    cast(scene, "pause")
    hub, dialled = await beside(scene, dies_after(Applied))
    error = hub.exception()
    assert isinstance(error, JobFailed)
    assert str(error).startswith("site site-t1 has restarted 11 times since its last checkpoint")
    assert dialled >= 12


@pytest.mark.parametrize("mode", ["drop", "pause"])
async def test_one_without_any_checkpoint_is_gone_on_without_if_it_may_be(scene, mode: str) -> None:
    """Such as a hospital whose disk was replaced."""
    cast(scene, mode)
    forgets, first = altered(JobAccept, checkpoints=()), dies_after(Applied)

    def twist(message: Message) -> Iterable[Message]:
        return forgets(message) if isinstance(message, JobAccept) else first(message)

    hub, _ = await beside(scene, twist)
    if mode == "pause":
        told = str(hub.exception())
        assert re.search(r"no checkpoint in common \(steps: coordinator 0.*; .*site-t1 none\)", told), told
        assert 'mode = "drop" the run continues and readmits site-t1; --fresh' in told
        return
    assert hub.result().complete


async def test_one_that_comes_and_goes_is_welcomed_ever_more_rarely(scene) -> None:
    cast(scene, step_s=1.0, steps=40)
    joined = 0

    def count(accept: Message) -> Iterable[Message]:
        nonlocal joined
        joined += 1
        return [accept]

    def twist(message: Message) -> Iterable[Message]:
        if isinstance(message, Activations):
            return []
        return replace(JobAccept, count)(message)

    hub, _ = await beside(scene, twist)
    result = hub.result()
    assert result.complete
    assert result.absences["site-t1"] >= 30
