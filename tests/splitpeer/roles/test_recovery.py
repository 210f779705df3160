"""Stops, kills, cut lines: what is lost is repeated, and the end is the same, bit for bit."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from tests.faults.relays import TcpRelay

STEPS = 60
LONG = {"steps": STEPS, "checkpoint_every": 10}
BRISK = {"join_s": 40, "step_s": 20, "return_s": 40}


def test_a_coordinator_asked_to_stop_goes_on_with_resume(scene) -> None:
    """SP-11-13: asked to stop, it asks for a checkpoint of whatever step is committed."""
    scene.cast("flair", "t1", training=LONG, deadlines=BRISK)
    hub, clients = scene.start_all()
    scene.until_step(13)
    hub.signal(signal.SIGINT)
    assert hub.code() == 0, hub.said
    stopped = len(scene.losses())
    assert 13 <= stopped < STEPS
    assert f"stopped at step {stopped} of {STEPS}; started again, it resumes there" in hub.last
    assert (
        not scene.output.joinpath("result.json").exists()
        or '"complete": false' in (scene.output / "result.json").read_text()
    )
    for client in clients.values():
        client.until(r"link\.bye .*drain")
        assert scene.nursery.runs(client.pid)
    again = scene.start("hub", "--resume")
    assert again.code() == 0, again.said
    assert f"job.rollback step={stopped}" in again.said
    assert [client.code() for client in clients.values()] == [0, 0]
    scene.assert_exact()


def test_control_c_on_everybody_leaves_a_state_to_resume_from(scene) -> None:
    # Nobody may wait for the others' return: that would be an hour.
    scene.cast("flair", "t1", training=LONG, deadlines={**BRISK, "return_s": 3600})
    for modality in scene.modalities:
        scene.client(modality, network={"reconnect_s": 3600})
    hub = scene.start("hub")
    clients = [scene.start(f"site-{m}", group=hub.pid) for m in scene.modalities]
    scene.until_step(13)
    os.killpg(hub.pid, signal.SIGINT)
    assert [daemon.code() for daemon in (hub, *clients)] == [0, 0, 0], [d.said for d in (hub, *clients)]
    assert all("Traceback" not in daemon.said for daemon in (hub, *clients))
    hub, clients = scene.start_all("--resume")
    assert hub.code() == 0, hub.said
    assert [client.code() for client in clients.values()] == [0, 0]
    assert int(hub.until(r"job\.rollback step=(\d+)")[1]) >= 10
    scene.assert_exact()


def test_a_second_signal_does_not_wait(scene) -> None:
    """Not even for a step that takes long, or for sites that do not answer."""
    scene.cast("flair", "t1", training=LONG)
    hub, clients = scene.start_all()
    scene.until_step(2)
    for client in clients.values():
        client.signal(signal.SIGSTOP)
    hub.signal(signal.SIGINT)
    hub.until(r"job\.draining")
    time.sleep(0.2)
    assert scene.nursery.runs(hub.pid)
    hub.signal(signal.SIGINT)
    assert hub.code() == 130  # the first signal's way out ends with another
    assert "Traceback" not in hub.said


def test_a_client_asked_to_stop_and_started_again(scene) -> None:
    """SP-11-12."""
    scene.cast("flair", "t1", training=LONG, deadlines=BRISK)
    hub, clients = scene.start_all()
    scene.until_step(13)
    clients["t1"].signal(signal.SIGTERM)
    assert clients["t1"].code() == 0, clients["t1"].said
    assert "peer.stop" in clients["t1"].last
    hub.until(r"site\.(left|lost) .*site-t1")
    again = scene.start("site-t1")
    assert hub.code() == 0, hub.said
    assert (again.code(), clients["flair"].code()) == (0, 0)
    scene.assert_exact()


def test_a_client_killed_and_started_again_rolls_all_back(scene) -> None:
    """SP-11-3, SP-11-34, SP-11-14: what only its memory held is gone, so all go back."""
    scene.cast("flair", "t1", training=LONG, deadlines=BRISK)
    hub, clients = scene.start_all()
    scene.until_step(13)
    clients["t1"].signal(signal.SIGKILL)
    hub.until(r"site\.(left|lost) .*site-t1")
    again = scene.start("site-t1")
    assert hub.code() == 0, hub.said
    assert (again.code(), clients["flair"].code()) == (0, 0), clients["flair"].said
    assert int(hub.until(r"job\.rollback step=(\d+)")[1]) % 10 == 0
    assert any(line.get("rollback") for line in scene.metrics())
    scene.assert_exact()


def test_a_client_killed_for_good_ends_the_job_for_all(scene) -> None:
    """SP-11-35."""
    scene.cast("flair", "t1", training=LONG, deadlines={**BRISK, "return_s": 2})
    hub, clients = scene.start_all()
    scene.until_step(5)
    clients["t1"].signal(signal.SIGKILL)
    assert hub.code() == 3, hub.said
    assert "site site-t1 (t1) did not come back within 2 s" in hub.last
    # It heard so, and did not dial until its own patience was over (that would be code 3).
    assert clients["flair"].code() == 1
    assert "site site-t1 (t1) did not come back within 2 s" in clients["flair"].last
    assert "Traceback" not in hub.said + clients["flair"].said


def test_a_frozen_client_is_named(scene) -> None:
    """SP-11-19."""
    scene.cast("flair", "t1", training=LONG, deadlines={**BRISK, "step_s": 2})
    hub, clients = scene.start_all()
    scene.until_step(5)
    clients["t1"].signal(signal.SIGSTOP)
    assert hub.code() == 3, hub.said
    assert "site site-t1: waited 2 s for" in hub.last
    assert clients["flair"].code() == 1
    assert "site-t1" in clients["flair"].last
    clients["t1"].signal(signal.SIGCONT)
    # It hears late, and finds nobody to return to.
    assert clients["t1"].code() in (1, 3), clients["t1"].said
    assert "Traceback" not in hub.said + clients["flair"].said + clients["t1"].said


def test_a_coordinator_killed_leaves_clients_that_say_so_and_a_state_to_resume_from(scene) -> None:
    """SP-11-39, SP-11-40."""
    scene.cast("flair", "t1", training=LONG, deadlines=BRISK)
    scene.client("t1", network={"reconnect_s": 6})
    hub, clients = scene.start_all()
    scene.until_step(13)
    hub.signal(signal.SIGKILL)
    assert clients["t1"].code() == 3, clients["t1"].said
    assert f"gave up on tcp://127.0.0.1:{scene.port} after 6 s: nothing listens" in clients["t1"].last
    assert "Traceback" not in clients["t1"].said
    hub, back = scene.start("hub", "--resume"), scene.start("site-t1")
    assert hub.code() == 0, hub.said
    assert (back.code(), clients["flair"].code()) == (0, 0)
    scene.assert_exact()


# --- links that end while both sides live ----------------------------------------------------------------


async def until(true, on, timeout: float = 60.0) -> None:
    """Wait for `true()`; that somebody ended meanwhile is an answer too."""
    async with asyncio.timeout(timeout):
        while not true():
            ended = {name: task.exception() for name, task in on.tasks.items() if task.done()}
            assert not ended
            await asyncio.sleep(0.002)


@pytest.mark.parametrize(
    "far_side", [True, False], ids=["both ends notice", "the coordinator does not notice"]
)
async def test_a_cut_line_costs_no_step(scene, far_side: bool) -> None:
    """SP-11-16."""
    scene.cast("flair", "t1", training={"steps": 40, "checkpoint_every": 100})
    async with TcpRelay(scene.port) as relay:
        scene.client("t1", network={"coordinator": f"tcp://127.0.0.1:{relay.port}"})
        async with scene.running() as on:
            for step in (3, 11, 12, 20):
                await until(lambda step=step: len(scene.losses()) >= step, on)
                seen = relay.connections
                relay.cut(far_side=far_side)
                await until(lambda seen=seen: relay.connections > seen, on)
            await asyncio.wait(on.tasks.values(), timeout=60)
            assert [task.exception() for task in on.tasks.values()] == [None] * 3
        assert relay.connections >= 5
    assert not any(line.get("rollback") for line in scene.metrics())
    scene.assert_exact()


@pytest.mark.parametrize("delivered", [False, True], ids=["lost", "delivered"])
@pytest.mark.parametrize(
    ("message", "step", "mode"),
    [
        ("Activations", 3, "train"),
        ("Applied", 3, None),
        ("Saved", 5, None),
        ("Activations", 12, "evaluate"),
        ("JobAccept", None, None),
    ],
)
async def test_a_line_cut_at_the_worst_moment(
    scene, monkeypatch, message, step, mode, delivered: bool
) -> None:
    """SP-11-8, SP-11-11: just before, or just after, a certain message: nothing is lost and nothing is done twice."""
    from splitpeer.site import client
    from splitproto import dial
    from splitproto.errors import LinkLost

    scene.cast("flair", "t1")
    cuts = 0

    async def fragile(*arguments, **keywords):
        session = await dial(*arguments, **keywords)
        send = session.send

        async def cutting(sent, *arguments, **keywords):
            nonlocal cuts
            due = (type(sent).__name__, getattr(sent, "step", None), getattr(sent, "mode", None))
            if due != (message, step, mode) or cuts == 2:
                await send(sent, *arguments, **keywords)
                return
            cuts += 1
            if delivered:
                await send(sent, *arguments, **keywords)
                await asyncio.sleep(0.02)
            session.carrier_lost(LinkLost("cut by the test"))

        session.send = cutting
        return session

    monkeypatch.setattr(client, "dial", fragile)
    ran = await scene.together()
    assert ran.result is not None, ran.error
    assert set(ran.clients.values()) == {None}
    assert cuts == 2
    assert not any(line.get("rollback") for line in scene.metrics())
    scene.assert_exact()


@pytest.mark.parametrize("before", [True, False], ids=["admitted before", "never admitted"])
async def test_what_anybody_on_the_way_can_forge_ends_no_site(scene, monkeypatch, before: bool) -> None:
    """SP-4-6: damage while a site dials again is waited out, at a first dial a few times; bad certificates are not."""
    from splitpeer.errors import ConnectionRefused
    from splitpeer.site import client
    from splitproto import dial
    from splitproto.errors import CarrierVersionError, EnvelopeError, LinkLost, SecureChannelError

    scene.cast("flair", "t1")
    forged = [EnvelopeError("forged"), CarrierVersionError("forged"), SecureChannelError("forged")] * 3
    if before:
        forged.append(SecureChannelError("somebody else answers", refused="theirs"))
        forged.append(SecureChannelError("our certificate is refused", refused="ours"))
    links = 0

    async def fragile(address, credentials, *arguments, **keywords):
        nonlocal links
        if links == (2 if before else 0) and forged:
            raise forged.pop(0)
        session = await dial(address, credentials, *arguments, **keywords)
        links += 1
        if links <= 2:
            send = session.send

            async def cutting(sent, *arguments, **keywords):
                await send(sent, *arguments, **keywords)
                if type(sent).__name__ == "Applied":
                    session.carrier_lost(LinkLost("cut by the test"))

            session.send = cutting
        return session

    monkeypatch.setattr(client, "dial", fragile)
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.02)
    async with scene.running() as on, asyncio.timeout(30):
        clients = [on.tasks["site-flair"], on.tasks["site-t1"]]
        done, _ = await asyncio.wait(clients, return_when=asyncio.FIRST_COMPLETED)
        error = done.pop().exception()
    assert isinstance(error, ConnectionRefused)
    assert ("certificate" if before else "forged") in str(error)
    # Two sites dial: at their first link each hears some of them.
    assert len(forged) == 0 if before else 9 - 2 * 4 <= len(forged) <= 9 - 4


async def test_a_spent_key_is_replaced_without_a_trace(scene, monkeypatch) -> None:
    """SP-6-10: links retire after so many octets; the work does not notice."""
    from splitpeer.site import client
    from splitproto import Timing, dial

    scene.cast("flair", "t1", training={"steps": 20})
    links = 0

    async def counted(*arguments, **keywords):
        nonlocal links
        links += 1
        return await dial(*arguments, **{**keywords, "timing": Timing(byte_budget=300_000)})

    monkeypatch.setattr(client, "dial", counted)
    ran = await scene.together()
    assert ran.result is not None, ran
    assert links > 6
    assert not any(line.get("rollback") for line in scene.metrics())
    scene.assert_exact()
