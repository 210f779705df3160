"""ZeroMQ in memory behaves as the real one does for `lanes.zeromq`: what holds on these lines holds on TCP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from splitproto import Listener, Offer, Session, SplitprotoError, dial
from splitproto.errors import LinkLost, LinkReset, NotAuthorised, SequenceGap
from splitproto.identity import AllowList, Credentials
from splitproto.lanes import zeromq
from splitproto.messages import Bye, Progress
from splitproto.records import Seat

from .federation import HUB, PORT, make_federation
from .memory import Network, Tamper, zmq_of
from .virtual import Life, VirtualLoop, bury

ADDRESS = f"tcp://127.0.0.1:{PORT}"
SITE = "site-t1"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    make_federation(folder)
    return folder / "pki"


class World:
    """A listener, those who dial, and the network between them."""

    def __init__(self, keys: Path) -> None:
        self.keys = keys
        self.loop = VirtualLoop()
        self.story: list[str] = []
        self.network = Network(self.loop, 1, self.story.append)
        self.hub, self.site = Life(HUB), Life(SITE)
        self.refused: list[SplitprotoError] = []
        self.accepted: asyncio.Queue[Session] = asyncio.Queue()
        self.allowed = {"client": [SITE]}

    def credentials(self, who: str) -> Credentials:
        return Credentials(self.keys / "ca.crt", self.keys / f"{who}.crt", self.keys / f"{who}.key")

    async def listen(self) -> None:
        async with Listener(
            ADDRESS,
            self.credentials(HUB),
            AllowList(self.allowed, "job"),
            Offer(),
            refused=lambda source, error: self.refused.append(error),
        ) as listener:
            while True:
                self.accepted.put_nowait(await listener.accept(3600))

    async def dial(self) -> Session:
        """As the site."""
        allow = AllowList({"coordinator": [HUB]}, "peer")
        return await self.of(self.site, dial(ADDRESS, self.credentials(SITE), allow, Offer()))

    def of(self, life: Life, coroutine: Any) -> asyncio.Task[Any]:
        """Let it run in this life."""
        return self.loop.create_task(coroutine, context=life.context)

    async def linked(self) -> tuple[Session, Session]:
        """A link, seen by the site and by the hub."""
        near = await self.dial()
        return near, await self.accepted.get()


@pytest.fixture
def play(keys: Path) -> Iterator[Callable[[Callable[[World], Any]], None]]:
    world = World(keys)

    def run(scene: Callable[[World], Any], listening: bool = True) -> None:
        async def main() -> None:
            if listening:
                world.of(world.hub, world.listen())
                await asyncio.sleep(0.01)
            await scene(world)

        with mock.patch.object(zeromq, "zmq", zmq_of(world.network)):
            world.loop.run_until_complete(main())
        assert world.loop.complaints == []

    yield run
    world.hub.alive = world.site.alive = False
    with mock.patch.object(zeromq, "zmq", zmq_of(world.network)):
        bury(world.loop)


def progress(number: int) -> Progress:
    return Progress(number, {"loss": 1.0})


async def begin(world: World, near: Session, far: Session) -> None:
    """Up to the state in which the hub may tell figures."""
    from splitproto.messages import Begin, Inventory, JobAccept, JobOffer
    from splitproto.records import Job
    from tests.cuts import unet

    job = Job(
        "try",
        2,
        *unet((2,) * 6).values(),
        (4,),
        "f32",
        (32, 32),
        (),
        False,
        1,
        9,
        "adam",
        0.1,
        0.0,
        "constant",
        30.0,
    )
    await world.of(world.hub, far.send(JobOffer(bytes(16), (Seat("t1", ("t1",)),), job, bytes(32))))
    assert (await world.of(world.site, near.receive(5))).name == "job-offer"
    await world.of(world.site, near.send(JobAccept(bytes(16), 0, (0,), 0)))
    await world.of(world.site, near.send(Inventory((), True, bytes(8))))
    for _ in range(2):
        await world.of(world.hub, far.receive(5))
    await world.of(world.hub, far.send(Begin(0, 1)))
    await world.of(world.site, near.receive(5))


def test_messages_arrive_in_order_and_byes_are_answered(play) -> None:
    async def scene(world: World) -> None:
        near, far = await world.linked()
        assert near.peer.site == HUB and far.peer.site == SITE
        await begin(world, near, far)
        for number in range(40):
            await world.of(world.hub, far.send(progress(number)))
        heard = [(await world.of(world.site, near.receive(5))).step for _ in range(40)]
        assert heard == list(range(40))
        closing = world.of(world.hub, far.close("complete"))
        assert isinstance(await world.of(world.site, near.receive(5)), Bye)
        await world.of(world.site, near.close("complete"))
        await closing
        assert near.ended.result() is None and far.ended.result() is None

    play(scene)


def test_nobody_listens(play) -> None:
    async def scene(world: World) -> None:
        with pytest.raises(LinkLost, match="nothing listens at"):
            await world.dial()

    play(scene, listening=False)


def test_a_stranger_is_refused(play) -> None:
    async def scene(world: World) -> None:
        world.allowed["client"] = ["site-flair"]
        world.of(world.hub, world.listen())
        await asyncio.sleep(0.01)
        with pytest.raises(SplitprotoError, match="not on our allow-list"):
            await world.dial()
        assert [type(error) for error in world.refused] == [NotAuthorised]

    play(scene, listening=False)


def test_the_newer_link_of_a_site_counts(play) -> None:
    async def scene(world: World) -> None:
        _, far = await world.linked()
        _, newer_far = await world.linked()
        assert await world.of(world.hub, far.answers(5.0)) and await world.of(
            world.hub, newer_far.answers(5.0)
        )
        world.network.cut(SITE, "site")
        assert not await world.of(world.hub, far.answers(5.0))

    play(scene)


@pytest.mark.parametrize("notice", ["both", "site", "hub"])
def test_a_line_that_breaks(play, notice: str) -> None:
    async def scene(world: World) -> None:
        near, far = await world.linked()
        began = world.loop.now
        world.network.cut(SITE, notice)
        await asyncio.sleep(0.1)
        assert (near.alive, far.alive) == (notice == "hub", notice == "site")
        await asyncio.wait((near.ended, far.ended))
        assert world.loop.now - began < 26
        await world.linked()

    play(scene)


def test_a_partition_is_noticed_by_silence_alone(play) -> None:
    async def scene(world: World) -> None:
        near, far = await world.linked()
        began = world.loop.now
        world.network.part(SITE, HUB, 60)
        await asyncio.wait((near.ended, far.ended))
        assert 15 < world.loop.now - began < 26
        again = asyncio.ensure_future(world.dial())
        with pytest.raises(LinkLost, match="no answer"):
            await again
        await asyncio.sleep(began + 61 - world.loop.now)
        await world.linked()

    play(scene)


def test_a_partition_that_heals_in_time_costs_nothing(play) -> None:
    async def scene(world: World) -> None:
        near, far = await world.linked()
        await begin(world, near, far)
        world.network.part(SITE, HUB, 10)
        await world.of(world.hub, far.send(progress(1)))
        await asyncio.sleep(9)
        waiting = world.of(world.site, near.receive(30))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        assert (await waiting).step == 1
        await asyncio.sleep(100)
        assert near.alive and far.alive

    play(scene)


@pytest.mark.parametrize("kind", ["lost", "twice", "cut", "flipped", "swapped", "reset"])
@pytest.mark.parametrize("up", [True, False])
def test_whoever_tampers_costs_a_link_and_no_more(play, kind, up: bool) -> None:
    async def scene(world: World) -> None:
        near, far = await world.linked()
        world.network.tampers.append(Tamper(kind, SITE, up))
        for session, life in ((near, world.site), (far, world.hub)) * 2:
            world.loop.call_soon(session.probe, context=life.context.copy())
            await asyncio.sleep(0.01)
        await asyncio.wait((near.ended, far.ended))
        ended = [session.ended.result() for session in (near, far)]
        assert all(error is not None and error.retry for error in ended), ended
        if kind in ("lost", "twice", "swapped"):
            assert any(isinstance(error, SequenceGap) for error in ended)
        if kind == "reset":
            assert any(isinstance(error, LinkReset) for error in ended)
        await world.linked()

    play(scene)


def test_a_process_that_is_killed_is_noticed_at_once_and_a_machine_without_power_is_not(play) -> None:
    async def scene(world: World) -> None:
        _, far = await world.linked()
        world.site.alive = False
        world.network.ended(world.site, power=False)
        began = world.loop.now
        assert isinstance(await far.ended, LinkLost)
        assert world.loop.now - began < 0.2
        world.site = Life(SITE)
        _, far = await world.linked()
        world.site.alive = False
        world.network.ended(world.site, power=True)
        began = world.loop.now
        assert isinstance(await far.ended, LinkLost)
        assert 14 < world.loop.now - began < 26

    play(scene)


def test_who_does_not_read_holds_up_the_sender_but_not_the_others(play) -> None:
    """Queue and window fill; the rest waits at the sender, until the reader goes on."""

    async def scene(world: World) -> None:
        from splitproto.messages import Gradients

        near, far = await world.linked()
        await begin(world, near, far)
        world.site.stopped = True
        world.network.stopped(world.site)
        tensors = {"x4": np.zeros((64, 1 << 17), np.float32)}
        sending = world.of(world.hub, far.send(Gradients(1, tensors), 60))
        await asyncio.sleep(5)
        assert not sending.done()
        pipe = next(far_end.out for _, far_end in world.network.of(SITE))
        assert pipe.full
        world.loop.resume(world.site)
        world.network.resumed(world.site, 5)
        await sending
        assert (await world.of(world.site, near.receive(30))).name == "gradients"

    play(scene)
