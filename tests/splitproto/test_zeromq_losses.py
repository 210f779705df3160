"""Links that are lost: peers that vanish, fall silent, never read; envelopes lost on the way."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.asyncio

from splitproto import Listener
from splitproto.connection import Timing
from splitproto.errors import (
    DeadlineExceeded,
    FlowControlError,
    LinkLost,
    LinkReset,
    LocalError,
    RemoteError,
    SplitprotoError,
)
from splitproto.lanes.zeromq import Dealer
from splitproto.messages import Activations, Applied, Gradients, Progress
from splitproto.negotiation import Offer
from splitproto.session import Session
from tests.splitproto.links import (
    CLIENTS,
    SOON,
    Example,
    Hub,
    hub_of,
    over,
    part,
    quiet,
    stall,
    work,
)

# --- losses ------------------------------------------------------------------------------------------------


def vanish(session: Session) -> None:
    """The process of a dialling peer is gone: its socket closes, nothing is said."""
    carrier = session._carrier
    carrier._socket.disable_monitor()  # type: ignore[attr-defined]
    carrier._monitor.close()  # type: ignore[attr-defined]
    carrier._reader.close(linger_ms=0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("stopped_s", [0.0, 1.6, 3.2])
async def test_a_process_that_was_stopped_does_not_blame_its_peer(federation, stopped_s: float) -> None:
    """Blocking the loop is to it what SIGSTOP is: time passes and nothing of this process runs."""
    async with hub_of(federation, timing=Timing(heartbeat=0.1)) as hub:
        client, coordinator = await hub.link(timing=Timing(heartbeat=0.1))
        coordinator.fail(DeadlineExceeded("the other side went on"))
        time.sleep(stopped_s)  # noqa: ASYNC251
        error = await over(client)
        assert error is not None
        cause = client.cause_of(error)
        assert ("this process did not run for" in cause) == (stopped_s > 0)
        assert "the other side went on" in cause
        assert client.slept == pytest.approx(stopped_s, abs=0.6)


async def test_a_message_to_a_vanished_peer_is_an_error_and_not_silence(hub: Hub) -> None:
    """What ROUTER_MANDATORY is for: without it, ZeroMQ drops the message and says nothing."""
    client, coordinator = await hub.link()
    (key,) = hub.listener._links
    vanish(client)
    error: LinkLost | None = None
    deadline = time.monotonic() + SOON
    while error is None and time.monotonic() < deadline:
        try:
            hub.listener.lanes[0].reply(key[1], b"x")
            await asyncio.sleep(0.01)
        except LinkLost as lost:
            error = lost
    assert error is not None, "messages to nobody were taken"
    assert isinstance(await over(coordinator), LinkLost)
    client._connection.lost(LinkLost("test"))
    client._after()


async def test_a_vanished_peer_is_noticed_without_sending(hub: Hub, example: Example) -> None:
    client, coordinator = await hub.link()
    await work(client, coordinator, example)
    waiting = asyncio.create_task(coordinator.receive(60))
    vanish(client)
    with pytest.raises(LinkLost):
        await asyncio.wait_for(waiting, SOON)
    client._connection.lost(LinkLost("test"))
    client._after()


def bind(socket: Any, address: str) -> None:
    """As soon as the port is free."""
    for _ in range(100):
        try:
            socket.bind(address)
            return
        except zmq.ZMQError:
            time.sleep(0.02)
    raise AssertionError(f"{address} stays in use")


async def test_a_listener_that_restarts_ends_the_session_and_receives_nothing_of_it(
    federation: Any, example: Example
) -> None:
    """Silent reconnect: a DEALER would send what is queued, under a new id, to the next process that binds the port."""
    listener = Listener("tcp://127.0.0.1:0", federation.credentials("hub"), CLIENTS)
    await listener.__aenter__()
    hub = Hub(federation, listener, [])
    client, coordinator = await hub.link()
    await work(client, coordinator, example)
    # The coordinator no longer reads, so that there is plenty in flight.
    stall(listener)
    big = Activations("train", 1, 0, bytes(32), {"x": np.zeros(64 << 20, np.uint8)})
    sending = asyncio.create_task(client.send(big))
    await asyncio.sleep(0.3)
    assert not sending.done()
    start = time.monotonic()
    lane: Any = listener.lanes[0]
    lane._socket.disable_monitor()
    lane._monitor.close()
    lane._socket.close(linger=0)
    impostor = hub.context.socket(zmq.ROUTER)
    try:
        bind(impostor, hub.address)
        # The dialler's event loop is busy meanwhile: nobody but libzmq itself decides what happens.
        time.sleep(0.5)  # noqa: ASYNC251
        with pytest.raises(LinkLost):
            await asyncio.wait_for(sending, SOON)
        assert isinstance(await over(client), LinkLost)
        assert time.monotonic() - start < SOON
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(impostor.recv_multipart(), 1.0)
    finally:
        impostor.close(linger=0)
        coordinator.carrier_lost(LinkLost("test"))
    await quiet()


async def test_a_link_that_the_listener_forgot_is_reset_and_the_dialler_learns(hub: Hub) -> None:
    client, coordinator = await hub.link()
    coordinator.carrier_lost(LinkLost("forgotten"))
    await over(coordinator)
    await quiet_but(client)
    client.probe()
    error = await over(client)
    assert isinstance(error, LinkReset) and error.retry
    await hub.works()


async def quiet_but(*sessions: Session) -> None:
    """Every writer but these has finished."""
    theirs = {session._writer for session in sessions}
    ours = {task for task in asyncio.all_tasks() if "Session._write" in repr(task)} - theirs
    if ours:
        await asyncio.wait(ours, timeout=SOON)


async def test_an_envelope_lost_on_the_way_ends_both_sides(hub: Hub, example: Example) -> None:
    client, coordinator = await hub.link()
    await work(client, coordinator, example)
    assert client._connection.next_envelope(0.0) is None
    client._connection.send(Applied(1))
    assert client._connection.next_envelope(0.0) is not None  # never sent
    await client.send(Applied(2))
    found, told = await over(coordinator), await over(client)
    assert isinstance(found, LocalError) and found.name == "sequence-gap"
    assert isinstance(told, RemoteError) and told.name == "sequence-gap" and told.retry


async def test_a_silent_peer_is_lost_after_the_time_out(federation: Any) -> None:
    timing = Timing(heartbeat=0.1, silence=0.4)
    async with hub_of(federation, timing=timing) as hub:
        client, coordinator = await hub.link(timing=timing)
        await asyncio.sleep(0.8)
        assert client.alive and coordinator.alive, "heartbeats keep a quiet link"
        client._carrier.try_send = lambda data: False  # type: ignore[method-assign]
        error = await over(coordinator)
        assert isinstance(error, LinkLost) and "silent for 0.4 s" in str(error)
        client.carrier_lost(LinkLost("test"))


async def test_a_peer_that_never_reads_does_not_delay_another(hub: Hub, example: Example) -> None:
    stalled, stalled_there = await hub.link("ukm")
    client, coordinator = await hub.link("charite")
    await work(stalled, stalled_there, example)
    await work(client, coordinator, example)
    stall(stalled)
    big = Gradients(1, {"x": np.zeros(96 << 20, np.uint8)})
    stuck = asyncio.create_task(stalled_there.send(big))
    await asyncio.sleep(0.3)
    for step in range(20):
        await coordinator.send(Progress(step, {}))
        assert (await client.receive(SOON)).step == step  # type: ignore[attr-defined]
    assert not stuck.done()
    await part(client, coordinator)
    stalled.carrier_lost(LinkLost("test"))
    with pytest.raises(LinkLost):
        await asyncio.wait_for(stuck, SOON)


async def test_an_application_that_never_receives_is_bounded_by_credit(
    federation: Any, example: Example
) -> None:
    async with hub_of(federation, offer=Offer(max_message=1 << 20)) as hub:
        client, coordinator = await hub.link()
        await work(client, coordinator, example)
        half = Activations("train", 1, 0, bytes(32), {"x": np.zeros(1 << 19, np.uint8)})
        sends = [asyncio.create_task(client.send(half)) for _ in range(4)]
        done, waiting = await asyncio.wait(sends, timeout=0.5)
        assert (len(done), len(waiting)) == (1, 3)
        assert sum(event.octets for event in coordinator._inbox) <= 1 << 20
        for _ in range(4):
            await coordinator.receive(SOON)
        await asyncio.wait_for(asyncio.gather(*sends), SOON)
        await part(client, coordinator)


async def test_an_application_that_never_receives_small_messages_is_bounded_too(
    hub: Hub, example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitproto.session.UNREAD", 100_000)
    client, coordinator = await hub.link(offer=Offer(max_message=100_000))
    await work(client, coordinator, example)
    forward = example("forward")
    while coordinator.alive:
        try:
            await coordinator.send(forward)
        except SplitprotoError:
            break
        await asyncio.sleep(0)
    error = await over(client)
    assert isinstance(error, FlowControlError)
    told = await over(coordinator)
    assert isinstance(told, RemoteError) and told.code == FlowControlError.code


async def test_a_steady_stream_that_is_read_is_never_too_much(
    hub: Hub, example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitproto.session.UNREAD", 10_000)
    client, coordinator = await hub.link(offer=Offer(max_message=1))
    await work(client, coordinator, example)
    await coordinator.send(Progress(0, {}))
    for step in range(300):
        await coordinator.send(Progress(step + 1, {}))
        assert (await client.receive(SOON)).step == step  # type: ignore[attr-defined]
    await client.receive(SOON)
    await part(client, coordinator)


class Listening:
    """Notes what a dialling end is told, in order."""

    def __init__(self) -> None:
        self.told: list[int | str] = []
        self.over = asyncio.Event()

    def arrived(self, data: bytes | memoryview) -> None:
        self.told.append(len(data))
        if len(data) > 1000:
            time.sleep(0.008)  # as long as decrypting it may take

    def carrier_lost(self, error: SplitprotoError) -> None:
        self.told.append("lost")
        self.over.set()


async def test_what_arrived_before_a_connection_was_lost_is_read_first() -> None:
    """The last of it says why: a refusal, a bye. More than one turn of the reader's waits before it."""
    for _ in range(5):
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            end, caller = (
                Dealer(f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"),
                Listening(),
            )
            end.start(caller)
            while not end.try_send(b"hello") or not router.poll(100):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            route, _ = router.recv_multipart()
            for octets in (700_000, 700_000, 99):
                router.send_multipart((route, bytes(octets)))
            threading.Timer(0.01, router.close, (1000,)).start()
            async with asyncio.timeout(SOON):
                await caller.over.wait()
            end.close()
            assert caller.told == [700_000, 700_000, 99, "lost"]
