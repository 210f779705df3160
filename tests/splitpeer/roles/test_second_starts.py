"""What a second start finds, and must not lose: checkpoints, patience, the news that the job is over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from splitpeer.coordinator import coordinator
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.data.sampling import batch_digest
from splitpeer.errors import ConfigError, DataError, DeadlinePassed, JobFailed
from splitpeer.site.client import Client
from splitpeer.storage import checkpoint
from splitproto import Listener, Session
from splitproto.identity import AllowList
from splitproto.messages import Activations, Applied, Forward, Gradients, Message
from splitproto.records import Sample
from tests.splitpeer.roles.scene import JOINT

from .test_live_links import hub_of_one

WAITING_S = 1.5


def state_of(scene, who: str) -> Path:
    (run,) = [path for path in (scene.folder / who / "state").iterdir() if [*path.glob("step-*")]]
    return run


async def stopped_after(scene, steps: int) -> None:
    """All are asked to stop in the middle of the run."""
    async with scene.running() as on, asyncio.timeout(60):
        while len(scene.losses()) < steps:  # noqa: ASYNC110 (the metrics are a file)
            await asyncio.sleep(0.005)
        for stop in on.stops.values():
            stop.set()
        await asyncio.wait(on.tasks.values())


async def test_one_that_is_stopped_before_it_has_gone_back_keeps_its_checkpoints(scene, monkeypatch) -> None:
    """Until then its half is that of step 0, and not to be saved."""
    scene.cast("flair", "t1", training={"steps": 400, "checkpoint_every": 5})
    await stopped_after(scene, 12)
    before = checkpoint.available(state_of(scene, "hub"))
    assert max(before) >= 10
    reached = asyncio.Event()

    async def stuck(self: RemoteSite, step: int) -> None:
        reached.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(coordinator, "DRAIN_S", 0.2)
    monkeypatch.setattr(coordinator, "STRAGGLER_S", 0.1)
    monkeypatch.setattr(RemoteSite, "roll_back", stuck)
    async with scene.running(resume=None) as on, asyncio.timeout(60):
        await reached.wait()
        on.stops["hub"].set()
        await asyncio.wait([on.tasks["hub"]])
    assert checkpoint.available(state_of(scene, "hub")) == before


async def test_a_run_of_which_no_checkpoint_is_left_is_not_begun_again_in_silence(scene) -> None:
    """SP-11-39: its steps are not made a second time under the same name."""
    scene.cast("flair", "t1", training={"steps": 60, "checkpoint_every": 5, "keep_checkpoints": 1})
    await stopped_after(scene, 12)
    lines = scene.metrics()
    for path in state_of(scene, "hub").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-10])
    ran = await scene.together(resume=None)
    assert isinstance(ran.error, DataError)
    assert "no whole checkpoint of the run is left" in str(ran.error)
    assert "--fresh" in str(ran.error)
    assert scene.metrics() == lines
    told = str(ran.clients["site-t1"])
    assert "the coordinator cannot continue: its data cannot be used" in told
    assert str(scene.folder) not in told


@pytest.fixture
def alone(scene):
    """A site whose coordinator is played by the test."""
    scene.cast("t1")
    here = f"tcp://127.0.0.1:{scene.port}"
    scene.client("t1", network={"coordinator": here, "reconnect_s": 2 * WAITING_S})
    allowed = AllowList({"client": ("site-t1",)}, "the test")
    return lambda: Listener(here, scene.config("hub").credentials(), allowed, JOINT)


async def test_a_site_that_waited_for_others_has_all_its_patience(scene, alone) -> None:
    """SP-11-40: time with a link is no time without."""
    async with alone() as listener:
        client = asyncio.create_task(Client(scene.config("site-t1"), asyncio.Event()).run())
        await listener.accept(20)
        await asyncio.sleep(2 * WAITING_S)
    await asyncio.sleep(WAITING_S / 2)
    assert not client.done()
    # A site that comes back within its patience has it.
    async with alone() as listener:
        await listener.accept(20)
    client.cancel()
    await asyncio.gather(client, return_exceptions=True)


async def test_a_site_tries_until_its_patience_is_over(scene, alone) -> None:
    """SP-11-40: pauses grow, but the last one ends with the patience and not the patience with the last one."""
    clock = asyncio.get_running_loop().time
    began = clock()
    with pytest.raises(
        DeadlinePassed, match=f"gave up on tcp://.* after {2 * WAITING_S:g} s: nothing listens"
    ):
        await Client(scene.config("site-t1"), asyncio.Event()).run()
    assert clock() - began >= 2 * WAITING_S


async def test_the_end_of_a_job_that_crosses_a_drain_is_heard(scene, alone) -> None:
    """SP-11-20: nobody says it again."""
    async with alone() as listener:
        stop = asyncio.Event()
        client = asyncio.create_task(Client(scene.config("site-t1"), stop).run())
        session = await hub_of_one(scene, listener)
        stop.set()
        await asyncio.sleep(0.3)
        await session.close("failed", "it went wrong")
        with pytest.raises(JobFailed, match="it went wrong"):
            await asyncio.wait_for(client, 20)


async def test_a_site_that_is_asked_to_stop_while_it_sends_finishes_the_step(
    scene, alone, monkeypatch
) -> None:
    """SP-11-12: what is queued arrives, so the others make the step: without it they would be a step ahead."""
    stop, send = asyncio.Event(), Session.send

    async def slow(self: Session, message: Message, timeout: float = 60.0) -> None:
        await send(self, message, timeout)
        if isinstance(message, Activations):
            # The last octet is on its way, and the caller does not know it yet.
            stop.set()
            await asyncio.sleep(0.5)

    monkeypatch.setattr(Session, "send", slow)
    async with alone() as listener:
        client = asyncio.create_task(Client(scene.config("site-t1"), stop).run())
        session = await hub_of_one(scene, listener)
        job, keys = scene.settings, list(scene.images("t1").keys())
        samples = tuple(Sample(key, (0, 0, 4)) for key in keys[: job.training.batch])
        await session.send(Forward("train", 1, 0, samples, batch_digest(1, samples, None), None))
        sent = await session.receive(20)
        assert isinstance(sent, Activations) and stop.is_set()
        await session.send(Gradients(1, {name: np.zeros_like(array) for name, array in sent.tensors.items()}))
        assert await session.receive(20) == Applied(1)
        assert (await session.receive(20)).reason == "drain"
        await session.close("drain")
        await asyncio.wait_for(client, 20)
    assert 1 in checkpoint.available(state_of(scene, "site-t1"))


async def test_a_certificate_without_its_key_is_looked_at_again(scene, tmp_path) -> None:
    """Two files are renewed one after the other."""
    scene.federation = scene.federation.copy(tmp_path / "federation")
    scene.cast("t1")
    here = f"tcp://127.0.0.1:{scene.port}"
    scene.client("t1", network={"coordinator": here, "reconnect_s": 30})
    keys = scene.federation.pki
    key, other = keys / "site-t1.key", (keys / "site-flair.key").read_bytes()
    async with Listener(
        here,
        scene.config("hub").credentials(),
        AllowList({"client": ("site-t1",)}, "it"),
        JOINT,
    ) as hub:
        client = asyncio.create_task(Client(scene.config("site-t1"), asyncio.Event()).run())
        session = await hub_of_one(scene, hub)
        right = key.read_bytes()
        key.write_bytes(other)
        await session.close("rotate")
        await asyncio.sleep(1.0)
        assert not client.done()
        key.write_bytes(right)
        await (await hub.accept(20)).close("complete")
        await asyncio.wait_for(client, 20)
    # One that is so at a start is a mistake, and final.
    key.write_bytes(other)
    with pytest.raises(ConfigError, match="the key does not belong to the certificate"):
        Client(scene.config("site-t1"), asyncio.Event())
