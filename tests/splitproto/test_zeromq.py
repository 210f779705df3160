"""Links over real ZeroMQ sockets on 127.0.0.1: normal use, and the end of a listener."""

from __future__ import annotations

import asyncio
import socket as tcp
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.asyncio

from splitproto import Listener, envelope
from splitproto.envelope import Kind, ResetReason
from splitproto.errors import (
    DeadlineExceeded,
    LinkLost,
    PolicyRefused,
    RemoteError,
    Superseded,
)
from splitproto.lanes import zeromq_reader
from splitproto.lanes.addresses import parse_address
from splitproto.messages import Activations, Applied, Bye, Gradients, Message, Progress
from splitproto.session import Session
from tests.splitproto.links import (
    CLIENTS,
    SOON,
    Example,
    Hub,
    answer,
    hub_of,
    over,
    part,
    quiet,
    raw,
    stall,
    work,
)

# --- everyday ----------------------------------------------------------------------------------------------


async def test_dial_talk_and_part(hub: Hub, example: Example) -> None:
    client, coordinator = await hub.link()
    assert (client.peer.site, coordinator.peer.site) == ("hub", "charite")
    assert client.tls.startswith("TLSv1.3")
    await work(client, coordinator, example)
    rng = np.random.default_rng(0)
    for size in (1, 300_000, 5_000_000):
        values = rng.integers(0, 256, size, np.uint8)
        sending = asyncio.create_task(client.send(Activations("train", 1, 0, bytes(32), {"x": values})))
        got = await coordinator.receive(SOON)
        await sending
        np.testing.assert_array_equal(got.tensors["x"], values)  # type: ignore[attr-defined]
        await coordinator.send(Gradients(1, {"x": values[::-1]}))
        got = await client.receive(SOON)
        np.testing.assert_array_equal(got.tensors["x"], values[::-1])  # type: ignore[attr-defined]
    await part(client, coordinator)
    assert client.ended.result() is coordinator.ended.result() is None
    assert client.bytes_out > 5_000_000 and coordinator.bytes_in == client.bytes_out
    await quiet()
    assert hub.refused == []


async def test_one_side_says_bye_and_the_other_answers(hub: Hub) -> None:
    client, coordinator = await hub.link()
    closing = asyncio.create_task(client.close("rotate", "key is spent"))
    bye = await coordinator.receive(SOON)
    assert bye == Bye("rotate", "key is spent")
    await coordinator.close("rotate")
    assert await closing, "it was repeated"
    assert not await coordinator.close("complete"), "another was said before"
    assert client.ended.result() is coordinator.ended.result() is None
    with pytest.raises(LinkLost):
        await client.send(Applied(1))
    with pytest.raises(LinkLost):
        await coordinator.receive(SOON)


async def test_byes_that_cross_are_both_heard(hub: Hub) -> None:
    client, coordinator = await hub.link()
    assert client.farewell is None
    closing = client.close("rotate"), coordinator.close("complete", "the job is done")
    assert await asyncio.gather(*closing) == [True, True], "after both byes each says so"
    assert client.farewell == Bye("complete", "the job is done")
    assert coordinator.farewell == Bye("rotate", "")


async def test_closing_twice_waits_twice_and_breaks_nothing(hub: Hub) -> None:
    client, coordinator = await hub.link()
    first, second = (asyncio.create_task(client.close("complete")) for _ in range(2))
    assert isinstance(await coordinator.receive(SOON), Bye)
    assert client.alive, "the second close must not cut off the first"
    await coordinator.close("complete")
    assert await asyncio.gather(first, second) == [True, False]
    await client.close("complete")
    assert client.ended.result() is coordinator.ended.result() is None


async def test_a_peer_that_does_not_answer_a_bye_delays_nobody_for_long(hub: Hub) -> None:
    client, coordinator = await hub.link()
    assert not await client.close("complete", timeout=0.1)
    assert isinstance(client.ended.result(), LinkLost)
    assert isinstance(await over(coordinator), LinkLost)


async def test_a_wait_ends_at_its_deadline_and_the_link_lives(hub: Hub, example: Example) -> None:
    client, coordinator = await hub.link()
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.01 s for a job"):
        await client.receive(0.01, "a job")
    await coordinator.send(example("job-offer"))
    assert (await client.receive(SOON)).name == "job-offer"
    with pytest.raises(DeadlineExceeded, match="a peer to connect"):
        await hub.listener.accept(0.01)
    await part(client, coordinator)


async def test_an_error_reaches_the_peer_with_its_cause(hub: Hub) -> None:
    client, coordinator = await hub.link()
    client.fail(PolicyRefused("levels 0 and 1 may not leave this site"))
    told = await over(coordinator)
    assert isinstance(told, RemoteError) and told.name == "policy-refused"
    assert "levels 0 and 1" in str(told)
    with pytest.raises(RemoteError):
        await coordinator.send(Progress(1, {}))


async def test_both_directions_at_once_do_not_stop_each_other(hub: Hub, example: Example) -> None:
    """Both queues full, both sides writing: a side that writes must keep reading."""
    client, coordinator = await hub.link()
    await work(client, coordinator, example)
    tensors = {"x": np.zeros(6 << 20, np.uint8)}

    async def push(session: Session, message: Message) -> None:
        for _ in range(8):
            await session.send(message)

    async def pull(session: Session) -> None:
        for _ in range(8):
            await session.receive(30)

    await asyncio.wait_for(
        asyncio.gather(
            push(client, Activations("train", 1, 0, bytes(32), tensors)),
            push(coordinator, Gradients(1, tensors)),
            pull(client),
            pull(coordinator),
        ),
        60,
    )
    await part(client, coordinator)


@pytest.mark.parametrize("side", ["dialler", "listener"])
async def test_what_arrives_while_our_queue_is_full_is_read(side: str, hub: Hub, example: Example) -> None:
    """A send that fails may swallow the report that something arrived; nobody would look again."""
    client, coordinator = await hub.link()
    await work(client, coordinator, example)
    writer, reader = (client, coordinator) if side == "dialler" else (coordinator, client)
    (lane, route, _) = next(iter(hub.listener._links))

    def try_send() -> bool:
        return writer._carrier.try_send(bytes(1 << 20))

    stall(reader if side == "listener" else hub.listener)
    full = 0
    for _ in range(1000):
        full = 0 if try_send() else full + 1
        if full == 10:
            break
        await asyncio.sleep(0.02 if full else 0)
    if side == "dialler":
        lane._socket.send_multipart((route, coordinator_says(coordinator)), zmq.NOBLOCK)
    else:
        reader._carrier._socket.send(coordinator_says(reader), zmq.NOBLOCK)  # type: ignore[attr-defined]
    time.sleep(0.3)  # noqa: ASYNC251 - the event loop must not see it before the send does
    assert not try_send()
    assert (await writer.receive(SOON)).name == "bye"
    for session in (client, coordinator):
        session.carrier_lost(LinkLost("test"))


def coordinator_says(session: Session) -> bytes:
    """The envelope of a bye, made by hand."""
    session._connection.send(Bye("complete", ""))
    data = session._connection.next_envelope(0.0)
    assert data is not None
    return data


async def test_an_idle_link_costs_nothing(hub: Hub) -> None:
    client, coordinator = await hub.link()
    await asyncio.sleep(0.1)
    calls = []
    for session in (client, coordinator):
        original = session._connection.next_envelope
        session._connection.next_envelope = (  # type: ignore[method-assign]
            lambda now, original=original: calls.append(now) or original(now)
        )
    before = time.process_time()
    await asyncio.sleep(0.5)
    assert calls == [], "a writer turns although nothing happened"
    assert time.process_time() - before < 0.1
    await part(client, coordinator)


async def test_a_newer_link_of_a_site_does_not_end_the_older(hub: Hub) -> None:
    """SP-9-6: that is for the application to decide, which knows who has proved what."""
    old, old_there = await hub.link()
    new, new_there = await hub.link()
    assert await old_there.answers(SOON) and await new_there.answers(SOON)
    old_there.fail(Superseded("another link counts"))
    told = await over(old)
    assert isinstance(told, RemoteError) and told.name == "superseded" and told.retry
    assert new.alive and new_there.alive
    assert new_there.address == "127.0.0.1" and new.address.startswith("tcp://127.0.0.1:")
    assert new.binding == new_there.binding and len(new.binding) == 32
    await part(new, new_there)


async def test_a_peer_that_does_not_answer_a_ping(hub: Hub) -> None:
    """SP-11.14-4: octets that arrive are no answer; only the PONG is."""
    near, far = await hub.link()
    near._connection._sign_of_life = lambda *_: None  # type: ignore[method-assign]
    asking = asyncio.create_task(far.answers(0.3))
    await near.close("drain", timeout=0.05)
    assert not await asking
    assert not await far.answers(0.3), "a link that is over does not answer"
    await part(far)


async def test_accept_hands_out_living_sessions_only(hub: Hub) -> None:
    sessions = [await hub.dial() for _ in range(5)]
    for session in sessions[:-1]:
        session.fail(PolicyRefused("changed my mind"))
    while len(hub.listener._links) > 1:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    coordinator = await hub.listener.accept(SOON)
    assert coordinator.alive
    await part(sessions[-1], coordinator)
    gone = await hub.dial()
    gone.fail(PolicyRefused("changed my mind"))
    await quiet()
    with pytest.raises(DeadlineExceeded):
        await hub.listener.accept(0.1)


# --- the end of a listener -----------------------------------------------------------------------------------


async def test_a_listener_that_leaves_says_so_to_everybody(federation: Any) -> None:
    async with hub_of(federation) as hub:
        links = [await hub.link(site) for site in ("charite", "ukm")]
        clients = [client for client, _ in links]

        async def polite(client: Session) -> Message:
            bye = await client.receive(SOON)
            await client.close("drain")
            return bye

        answers = [asyncio.create_task(polite(client)) for client in clients]
    byes = await asyncio.gather(*answers)
    assert byes == [Bye("drain", "")] * 2
    assert [client.ended.result() for client in clients] == [None, None]
    assert [session.ended.result() for _, session in links] == [None, None]
    await quiet()


async def test_a_listener_leaves_at_once_when_there_are_only_half_open_links(federation: Any) -> None:
    async with hub_of(federation) as hub, raw(hub) as stranger:
        for n in range(5):
            await stranger.send(envelope.encode(Kind.OPEN, bytes((n + 1,)) * 16, 0))
        await stranger.send(b"are you there?")
        await answer(stranger)
        assert len(hub.listener._links) == 5
        start = time.monotonic()
    assert time.monotonic() - start < SOON
    await quiet()


async def test_a_listener_can_leave_while_connections_come_and_go(federation: Any) -> None:
    """libzmq's I/O thread stops for ever if it must report an event to a monitor that nobody holds."""
    going = True

    def knock(port: int) -> None:
        while going:
            with tcp.socket() as probe:
                probe.connect_ex(("127.0.0.1", port))

    for _ in range(3):
        going = True
        async with hub_of(federation) as hub:
            knocking = asyncio.create_task(asyncio.to_thread(knock, parse_address(hub.address)[1]))
            try:
                await asyncio.sleep(0.05)
            except BaseException:
                going = False  # the loop waits for its threads
                raise
        going = False
        await knocking
    async with hub_of(federation) as hub:
        await hub.works()


FLOODED = """
import asyncio, socket, sys
from unittest.mock import Mock

from splitproto.lanes import zeromq_reader
from splitproto.lanes.zeromq import ZmqLane

zeromq_reader.MONITOR_QUEUE = int(sys.argv[1])


async def main():
    lane = ZmqLane("tcp://127.0.0.1:0")
    await lane.listen(Mock())
    address = ("127.0.0.1", int(lane.address.rpartition(":")[2]))
    for _ in range(3000):
        try:
            socket.create_connection(address, 1).close()
        except TimeoutError:
            break  # full: libzmq waits for us, and accepts nobody
    lane.leave()


asyncio.run(main())
print("left")
"""


@pytest.mark.parametrize("queue", [100, zeromq_reader.MONITOR_QUEUE])
def test_a_listener_can_leave_a_flood_that_nobody_has_read(queue: int) -> None:
    """Reports wait for the event loop, which is busy: leaving must not wait for the one who waits for room.

    In a process of its own: pyzmq holds Python's lock while it waits for libzmq's, so that no timeout would help.
    """
    done = subprocess.run(
        [sys.executable, "-c", FLOODED, str(queue)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


async def test_a_listener_that_is_leaving_takes_nobody_in(federation: Any) -> None:
    listener = Listener("tcp://127.0.0.1:0", federation.credentials("hub"), CLIENTS)
    await listener.__aenter__()
    hub = Hub(federation, listener, [])
    async with raw(hub) as stranger:
        client, coordinator = await hub.link()
        leaving = asyncio.create_task(listener.__aexit__(None, None, None))
        assert isinstance(await client.receive(SOON), Bye)
        await stranger.send(envelope.encode(Kind.OPEN, b"x" * 16, 0))
        assert (await answer(stranger)).reason is ResetReason.BUSY
        await client.close("drain")
        await leaving
        assert coordinator.ended.result() is None


async def test_the_application_closes_while_the_listener_leaves(federation: Any) -> None:
    async with hub_of(federation) as hub:
        client, coordinator = await hub.link()
        closing = asyncio.create_task(coordinator.close("complete"))
        assert await client.receive(SOON) == Bye("complete", "")
        answering = asyncio.create_task(client.close("complete"))
    await asyncio.gather(closing, answering)
    assert client.ended.result() is coordinator.ended.result() is None
    await quiet()
