"""Links over real ZeroMQ sockets on 127.0.0.1: everyday use, strangers, losses and ends."""

from __future__ import annotations

import asyncio
import socket as tcp
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.asyncio

from splitproto import constants, envelope
from splitproto.connection import Timing
from splitproto.envelope import NO_LINK, Kind, ResetReason
from splitproto.errors import (
    CarrierVersionError,
    DeadlineExceeded,
    EnvelopeError,
    FlowControlError,
    LinkLost,
    LinkReset,
    LocalError,
    NotAuthorised,
    PolicyRefused,
    RemoteError,
    SecureChannelError,
    SplitprotoError,
    Superseded,
    TooManyLinks,
)
from splitproto.identity import AllowList, Credentials
from splitproto.messages import Activations, Applied, Bye, Gradients, Message, Progress
from splitproto.negotiation import Offer
from splitproto.session import Session
from splitproto.zeromq import Listener, dial, parse_address

CLIENTS = AllowList({"client": {"charite", "ukm"}}, "job")
COORDINATORS = AllowList({"coordinator": {"hub"}}, "peer.toml")
SOON = 5.0
"""Seconds; what is promised within one, on a machine that may be busy."""
Example = Callable[[str], Message]


class Hub:
    """A listener, and links to it."""

    def __init__(self, federation: Any, listener: Listener, refused: list[SplitprotoError]) -> None:
        self.federation = federation
        self.listener = listener
        self.refused = refused
        self.context = zmq.asyncio.Context.instance()

    @property
    def address(self) -> str:
        return self.listener.address

    async def dial(self, site: str | Credentials = "charite", **options: Any) -> Session:
        credentials = self.federation.credentials(site) if isinstance(site, str) else site
        options.setdefault("allow", COORDINATORS)
        return await dial(self.address, credentials, **options)

    async def link(self, site: str = "charite", **options: Any) -> tuple[Session, Session]:
        return await asyncio.gather(self.dial(site, **options), self.listener.accept(SOON))

    async def works(self) -> None:
        """It still serves."""
        client, coordinator = await self.link("ukm")
        await asyncio.gather(client.close("complete"), coordinator.close("complete"))
        assert client.ended.result() is coordinator.ended.result() is None


@asynccontextmanager
async def hub_of(federation: Any, address: str = "tcp://127.0.0.1:0", **options: Any) -> AsyncIterator[Hub]:
    refused: list[SplitprotoError] = []
    options.setdefault("refused", lambda source, error: refused.append(error))
    async with Listener(address, federation.credentials("hub"), CLIENTS, **options) as listener:
        yield Hub(federation, listener, refused)
    assert not listener._links
    assert not listener._by_site


@pytest.fixture
async def hub(federation: Any) -> AsyncIterator[Hub]:
    async with hub_of(federation) as hub:
        yield hub
    await quiet()


async def quiet() -> None:
    """Nothing of ours is left running."""
    ours = {task for task in asyncio.all_tasks() if "splitproto" in repr(task.get_coro())}
    ours |= {task for task in asyncio.all_tasks() if "Session._write" in repr(task)}
    if ours:
        _, ours = await asyncio.wait(ours, timeout=SOON)
    assert not ours


async def over(session: Session) -> SplitprotoError | None:
    """How a session ends, soon."""
    return await asyncio.wait_for(asyncio.shield(session.ended), SOON)


async def work(client: Session, coordinator: Session, example: Example) -> None:
    """Both in WORKING."""
    await coordinator.send(example("job-offer"))
    await client.receive(SOON)
    for name in ("job-accept", "inventory"):
        await client.send(example(name))
        await coordinator.receive(SOON)
    await coordinator.send(example("begin"))
    await client.receive(SOON)


async def part(*sessions: Session) -> None:
    await asyncio.gather(*(session.close("complete") for session in sessions))


@asynccontextmanager
async def raw(
    hub: Hub, kind: int = zmq.DEALER, address: str | None = None, **options: Any
) -> AsyncIterator[Any]:
    """A ZeroMQ socket of somebody else."""
    socket = hub.context.socket(kind)
    socket.linger = 0
    for name, value in options.items():
        setattr(socket, name, value)
    socket.connect(address or hub.address)
    try:
        yield socket
    finally:
        socket.close()


async def answer(socket: Any) -> envelope.Reset:
    """The RESET that a stranger reads."""
    (data,) = await asyncio.wait_for(socket.recv_multipart(), SOON)
    arrived = envelope.decode(data)
    assert arrived.kind is Kind.RESET
    return envelope.decode_reset(arrived.body)


def free_port() -> int:
    with tcp.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    await closing
    assert client.ended.result() is coordinator.ended.result() is None
    with pytest.raises(LinkLost):
        await client.send(Applied(1))
    with pytest.raises(LinkLost):
        await coordinator.receive(SOON)


async def test_closing_twice_waits_twice_and_breaks_nothing(hub: Hub) -> None:
    client, coordinator = await hub.link()
    first, second = (asyncio.create_task(client.close("complete")) for _ in range(2))
    assert isinstance(await coordinator.receive(SOON), Bye)
    assert client.alive, "the second close must not cut off the first"
    await coordinator.close("complete")
    await asyncio.gather(first, second)
    await client.close("complete")
    assert client.ended.result() is coordinator.ended.result() is None


async def test_a_peer_that_does_not_answer_a_bye_delays_nobody_for_long(hub: Hub) -> None:
    client, coordinator = await hub.link()
    await client.close("complete", timeout=0.1)
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
    """Both queues full, both sides writing: whoever writes must go on reading."""
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
    (route, _) = next(iter(hub.listener._links))

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
        hub.listener._socket.send_multipart((route, coordinator_says(coordinator)), zmq.NOBLOCK)
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


async def test_the_older_link_of_a_site_is_superseded(hub: Hub) -> None:
    old, old_there = await hub.link()
    new, new_there = await hub.link()
    told = await over(old)
    assert isinstance(told, RemoteError) and told.name == "superseded"
    assert isinstance(await over(old_there), Superseded)
    assert new.alive and new_there.alive
    other, other_there = await hub.link("ukm")
    assert new.alive and new_there.alive
    await part(new, new_there, other, other_there)


async def test_accept_hands_out_living_sessions_only(hub: Hub) -> None:
    for _ in range(5):
        newest = await hub.dial()
    assert len(hub.listener._ready) <= 2, "superseded sessions pile up"
    coordinator = await hub.listener.accept(SOON)
    assert coordinator.alive
    assert len(hub.listener._links) <= 2
    await part(newest, coordinator)
    gone = await hub.dial()
    gone.fail(PolicyRefused("changed my mind"))
    await quiet()
    with pytest.raises(DeadlineExceeded):
        await hub.listener.accept(0.1)


# --- refusals ----------------------------------------------------------------------------------------------


async def test_a_client_that_is_not_listed_reads_why_and_so_do_we(hub: Hub) -> None:
    with pytest.raises(RemoteError, match="'stranger' is not on our allow-list") as caught:
        await hub.dial("stranger")
    assert caught.value.code == NotAuthorised.code and not caught.value.retry
    await quiet()
    (error,) = hub.refused
    assert isinstance(error, NotAuthorised)
    await hub.works()


async def test_a_coordinator_that_is_not_listed_reads_why_and_so_do_we(hub: Hub) -> None:
    with pytest.raises(NotAuthorised, match="'hub' is not on our allow-list"):
        await hub.dial(allow=AllowList({"coordinator": {"other"}}, "peer.toml"))
    await quiet()
    (error,) = hub.refused
    assert isinstance(error, RemoteError) and error.code == NotAuthorised.code
    await hub.works()


@pytest.mark.parametrize("who", ["expired", "another CA"])
async def test_tls_done_is_not_admission(who: str, hub: Hub, federation: Any, outsider: Credentials) -> None:
    with pytest.raises(SecureChannelError, match="our certificate"):
        await hub.dial(federation.credentials("late") if who == "expired" else outsider)
    await quiet()
    (error,) = hub.refused
    assert isinstance(error, SecureChannelError)
    with pytest.raises(DeadlineExceeded):
        await hub.listener.accept(0.01)
    await hub.works()


@pytest.fixture
async def wide(federation: Any) -> AsyncIterator[Hub]:
    """Listens on every address of this machine."""
    async with hub_of(federation, "tcp://0.0.0.0:0", timing=Timing(handshake=1.0)) as hub:
        hub.listener.address = hub.listener.address.replace("0.0.0.0", "127.0.0.1")
        yield hub
    await quiet()


async def test_a_name_that_the_certificate_lacks_is_told_to_the_coordinator(
    wide: Hub, federation: Any
) -> None:
    with pytest.raises(
        SecureChannelError, match=r"does not name the address that we dialled \(127\.0\.0\.2\)"
    ):
        await dial(
            wide.address.replace("127.0.0.1", "127.0.0.2"), federation.credentials("charite"), COORDINATORS
        )
    await quiet()
    (error,) = wide.refused
    assert "refuses our certificate" in str(error)


# --- addresses -----------------------------------------------------------------------------------------------


async def test_nothing_listens(federation: Any) -> None:
    start = time.monotonic()
    with pytest.raises(LinkLost, match="nothing listens at 127") as caught:
        await dial(f"tcp://127.0.0.1:{free_port()}", federation.credentials("charite"), COORDINATORS)
    assert caught.value.retry
    assert time.monotonic() - start < SOON
    await quiet()


async def test_an_unknown_name(federation: Any) -> None:
    with pytest.raises(LinkLost, match=r"the name no-such-hub\.invalid is unknown"):
        await dial("tcp://no-such-hub.invalid:5555", federation.credentials("charite"), COORDINATORS)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "hub:5555",
        "tcp://hub",
        "tcp://hub:",
        "tcp://hub:0",
        "tcp://hub:99999",
        "tcp://hub:abc",
        "tcp://[::1",
        "tcp://:5555",
        "tcp://me@hub:5555",
        "tcp://hub:5555/path",
        "tcp://hub:5555?x=1",
        "tcp://hub:5555#x",
        "ipc:///tmp/x",
        "inproc://x",
        "https://hub:5555",
        "tcp://a..b:5555",
        "tcp://" + "x" * 70 + ":5555",
    ],
)
async def test_addresses_that_are_none(address: str, federation: Any) -> None:
    with pytest.raises(LinkLost) as caught:
        await dial(address, federation.credentials("charite"), COORDINATORS)
    assert "\n" not in str(caught.value)


def test_addresses() -> None:
    assert parse_address("tcp://hub.example:5555") == ("hub.example", 5555)
    assert parse_address("tcp://[::1]:5555/") == ("::1", 5555)


@pytest.mark.parametrize("address", ["", "tcp://127.0.0.1", "tcp://[::1", "tcp://192.0.2.1:5555", "ipc://x"])
async def test_a_listener_that_cannot_listen_says_so(address: str, federation: Any) -> None:
    with pytest.raises(LinkLost) as caught:
        async with Listener(address, federation.credentials("hub"), CLIENTS):
            raise AssertionError("not reached")
    assert "\n" not in str(caught.value)


async def test_a_port_in_use(hub: Hub, federation: Any) -> None:
    with pytest.raises(LinkLost, match="is in use"):
        async with Listener(hub.address, federation.credentials("hub"), CLIENTS):
            raise AssertionError("not reached")
    await hub.works()


@pytest.mark.parametrize("addresses", [("127.0.0.2", "127.0.0.1"), ("127.0.0.1", "127.0.0.2")])
async def test_every_address_of_a_name_is_tried(
    addresses: tuple[str, str], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name with an IPv6 and an IPv4 address, of which only one is served."""
    loop = asyncio.get_running_loop()
    port = parse_address(hub.address)[1]

    async def resolve(host: str, port_: int, **_: Any) -> list[Any]:
        return [(tcp.AF_INET, tcp.SOCK_STREAM, 6, "", (at, port)) for at in addresses]

    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    client, coordinator = await asyncio.gather(
        dial(f"tcp://localhost:{port}", hub.federation.credentials("charite"), COORDINATORS),
        hub.listener.accept(SOON),
    )
    await part(client, coordinator)


@asynccontextmanager
async def server(reply: bytes | None) -> AsyncIterator[str]:
    """Something that is not ours; it answers the first octets, or nothing."""

    writers = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.read(10)
        if reply is not None:
            writer.write(reply)
            writer.close()
        else:
            await reader.read()
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"tcp://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        for writer in writers:
            writer.close()
            await writer.wait_closed()


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" * 3,
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x00" * 100,
        b"",
    ],
    ids=["HTTP", "SSH", "zeros", "closes"],
)
async def test_something_else_at_the_dialled_port(reply: bytes, federation: Any) -> None:
    start = time.monotonic()
    async with server(reply) as address:
        with pytest.raises((LinkLost, EnvelopeError)) as caught:
            await dial(address, federation.credentials("charite"), COORDINATORS)
    assert time.monotonic() - start < SOON
    assert "is this the coordinator's port" in str(caught.value) or "not a coordinator" in str(caught.value)
    await quiet()


async def test_a_silent_server_at_the_dialled_port(federation: Any) -> None:
    async with server(None) as address:
        with pytest.raises(DeadlineExceeded, match="does not answer as a coordinator"):
            await dial(address, federation.credentials("charite"), COORDINATORS, timing=Timing(handshake=0.3))
    await quiet()


@pytest.mark.parametrize("kind", [zmq.ROUTER, zmq.REP, zmq.DEALER, zmq.PUB])
async def test_another_zeromq_program_at_the_dialled_port(kind: int, federation: Any) -> None:
    other = zmq.asyncio.Context.instance().socket(kind)
    port = other.bind_to_random_port("tcp://127.0.0.1")
    try:
        with pytest.raises((DeadlineExceeded, EnvelopeError, LinkLost)) as caught:
            await dial(
                f"tcp://127.0.0.1:{port}",
                federation.credentials("charite"),
                COORDINATORS,
                timing=Timing(handshake=0.3),
            )
        assert "coordinator" in str(caught.value)
    finally:
        other.close(linger=0)
    await quiet()


async def test_a_newer_coordinator_is_readable(federation: Any) -> None:
    other = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
    port = other.bind_to_random_port("tcp://127.0.0.1")
    credentials = federation.credentials("charite")
    dialling = asyncio.create_task(dial(f"tcp://127.0.0.1:{port}", credentials, COORDINATORS))
    try:
        route, data = await asyncio.wait_for(other.recv_multipart(), SOON)
        reset = bytearray(envelope.encode(Kind.RESET, envelope.link_of(data), 0, bytes((2, 2, 2, 3))))
        reset[4] = 3
        await other.send_multipart([route, reset])
        with pytest.raises(CarrierVersionError, match="carrier version 2, 3, this side 1"):
            await asyncio.wait_for(dialling, SOON)
    finally:
        other.close(linger=0)
    await quiet()


async def test_a_dial_that_is_cancelled_leaves_nothing(federation: Any) -> None:
    async with server(None) as address:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await dial(address, federation.credentials("charite"), COORDINATORS)
    await quiet()


# --- strangers at the listener's port ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "reason", "words"),
    [
        ([b"GET / HTTP/1.1"], ResetReason.MALFORMED, "not splitproto"),
        ([b""], ResetReason.MALFORMED, "not splitproto"),
        ([b"SPLT" + bytes(28)], ResetReason.CARRIER_VERSION, "carrier version 0"),
        ([b"SPLT\x02\x01" + bytes(26)], ResetReason.CARRIER_VERSION, "carrier version 2"),
        ([b"SPLT\x01\x01" + bytes(26)], ResetReason.MALFORMED, "no link id"),
        ([b"SPLT\x01\x02\0\0" + b"x" * 16 + bytes(8)], ResetReason.UNKNOWN_LINK, ""),
        ([b"SPLT\x01\x01\0\0" + b"x" * 16 + bytes(8), b""], ResetReason.MALFORMED, "several parts"),
        ([b"", b"hello"], ResetReason.MALFORMED, "several parts"),
    ],
    ids=["garbage", "empty", "version 0", "version 2", "no link", "unknown link", "multipart", "REQ"],
)
async def test_a_plain_zeromq_peer_reads_why_and_others_are_served(
    parts: list[bytes], reason: ResetReason, words: str, hub: Hub
) -> None:
    client, coordinator = await hub.link()
    async with raw(hub) as stranger:
        await stranger.send_multipart(parts)
        reset = await answer(stranger)
        assert (reset.reason, reset.versions) == (reason, (1,)) and words in reset.text
        # Whatever it goes on saying.
        for _ in range(50):
            await stranger.send_multipart(parts)
    assert client.alive and coordinator.alive
    await hub.works()
    await part(client, coordinator)


async def test_an_oversize_message_ends_its_connection_only(hub: Hub) -> None:
    client, coordinator = await hub.link()
    async with raw(hub) as stranger:
        monitor = stranger.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        await stranger.send(bytes(envelope.ENVELOPE_HEADER + constants.MAX_ENVELOPE_BODY + 1))
        await asyncio.wait_for(monitor.recv_multipart(), SOON)
        stranger.disable_monitor()
        monitor.close()
    assert client.alive and coordinator.alive
    await hub.works()
    await part(client, coordinator)


ZMTP = b"\xff" + bytes(8) + b"\x7f\x03\x00"


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: hub\r\nUser-Agent: scanner and some more octets\r\n\r\n", id="HTTP"
        ),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2, id="TLS"),
        pytest.param(bytes(range(255, -1, -1)) * 40, id="garbage"),
        pytest.param(ZMTP + b"CURVE".ljust(20, b"\0") + bytes(32), id="another ZMTP mechanism"),
        pytest.param(b"", id="nothing"),
    ],
)
async def test_raw_tcp_garbage_does_not_stop_the_listener(octets: bytes, hub: Hub) -> None:
    client, coordinator = await hub.link()
    reader, writer = await asyncio.open_connection(*parse_address(hub.address))
    writer.write(octets)
    await writer.drain()
    await hub.works()
    if octets.startswith(ZMTP) or not octets:
        # libzmq says so itself, or lets it wait for a second. (The others pass for the ZMTP of 2010.)
        while await asyncio.wait_for(reader.read(100), SOON):
            pass
    if octets.startswith(ZMTP):
        assert any("not ZeroMQ" in str(error) for error in hub.refused)
    assert client.alive and coordinator.alive
    writer.close()
    await part(client, coordinator)


async def test_a_stranger_cannot_fill_the_listener_from_one_source(hub: Hub) -> None:
    async with raw(hub) as stranger:
        for n in range(constants.MAX_HALF_OPEN_PER_SOURCE + 3):
            await stranger.send(envelope.encode(Kind.OPEN, n.to_bytes(16, "big").replace(b"\0", b"a"), 0))
        for _ in range(3):
            assert (await answer(stranger)).reason is ResetReason.BUSY
        assert len(hub.listener._links) == constants.MAX_HALF_OPEN_PER_SOURCE
        with pytest.raises(TooManyLinks) as caught:
            await hub.dial()
        assert caught.value.retry


async def test_strangers_cannot_fill_the_listener_from_many_sources(wide: Hub) -> None:
    port = parse_address(wide.address)[1]
    each = constants.MAX_HALF_OPEN // 8
    for source in range(10, 18):
        async with raw(wide, address=f"tcp://127.0.0.{source}:0;127.0.0.1:{port}") as stranger:
            for n in range(each):
                await stranger.send(envelope.encode(Kind.OPEN, bytes((source, n)) * 8, 0))
            # Answered after all before it: they have been seen.
            await stranger.send(b"are you there?")
            assert (await answer(stranger)).reason is ResetReason.MALFORMED
    assert len(wide.listener._links) == constants.MAX_HALF_OPEN
    with pytest.raises(TooManyLinks):
        await wide.dial()
    # The handshake deadline makes room again, without any traffic.
    ends = [link.session.ended for link in wide.listener._links.values() if link.session]
    await asyncio.wait_for(asyncio.gather(*ends), SOON)
    await wide.works()
    assert len(wide.listener._links) <= 1


async def test_the_handshake_deadline_ends_a_half_open_link(federation: Any) -> None:
    async with hub_of(federation, timing=Timing(handshake=0.2)) as hub:
        async with raw(hub) as stranger:
            await stranger.send(envelope.encode(Kind.OPEN, b"x" * 16, 0))
            await stranger.send(b"are you there?")
            await answer(stranger)
            (link,) = hub.listener._links.values()
            assert isinstance(await over(link.session), DeadlineExceeded)  # type: ignore[arg-type]
        await hub.works()
        assert any(isinstance(error, DeadlineExceeded) for error in hub.refused)


async def test_a_stranger_with_the_same_routing_id_gets_nothing_and_gives_nothing(hub: Hub) -> None:
    async with raw(hub, routing_id=b"charite") as first, raw(hub, routing_id=b"charite") as second:
        await first.send(b"garbage")
        await answer(first)
        await second.send(b"garbage")
        await first.send(b"garbage")
        await answer(first)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(second.recv(), 0.3)
    await hub.works()


async def test_a_stranger_cannot_receive_inject_or_reset_another_ones_session(
    hub: Hub, example: Example
) -> None:
    """It knows the link id and the routing id, which are not secret, and claims both."""
    client, coordinator = await hub.link()
    await work(client, coordinator, example)
    (key,) = hub.listener._links
    route, link = key
    number = coordinator._connection._sequence_in
    async with raw(hub, routing_id=route) as impostor, raw(hub) as stranger:
        await impostor.send(envelope.encode(Kind.DATA, link, number, b"x" * 50))
        await impostor.send(envelope.encode_reset(link, ResetReason.UNKNOWN_LINK, ""))
        await stranger.send(envelope.encode(Kind.DATA, link, number, b"x" * 50))
        assert (await answer(stranger)).reason is ResetReason.UNKNOWN_LINK
        await stranger.send(envelope.encode_reset(link, ResetReason.UNKNOWN_LINK, ""))
        await stranger.send(envelope.encode_reset(NO_LINK, ResetReason.UNKNOWN_LINK, ""))
        await stranger.send(envelope.encode(Kind.OPEN, link, 0, b""))
        for octets in (b"", b"\x16\x03\x01"):
            await impostor.send(envelope.encode(Kind.DATA, link, number + 1, octets))
        await coordinator.send(Progress(1, {"loss": 1.0}))
        await client.send(Applied(1))
        assert (await client.receive(SOON)).name == "progress"
        assert (await coordinator.receive(SOON)).name == "applied"
        await coordinator.send(Progress(2, {}))
        for socket in (impostor, stranger):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(socket.recv(), 0.2)
        assert client.alive and coordinator.alive
    await client.receive(SOON)
    await part(client, coordinator)


async def test_a_refused_callback_that_fails_does_not_stop_the_listener(federation: Any) -> None:
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))

    def refused(source: str, error: SplitprotoError) -> None:
        raise RuntimeError("a defect of the application")

    async with hub_of(federation, refused=refused) as hub, raw(hub) as stranger:
        for _ in range(3):
            await stranger.send(b"garbage")
        await hub.works()
    assert failures, "the defect is not hidden either"


async def test_a_listener_whose_files_are_gone_answers_busy(
    federation: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ca.crt", "hub.crt", "hub.key"):
        (tmp_path / name).write_bytes((federation.folder / name).read_bytes())
        (tmp_path / name).chmod(0o600)
    own = Credentials(tmp_path / "ca.crt", tmp_path / "hub.crt", tmp_path / "hub.key")
    refused: list[SplitprotoError] = []
    async with Listener(
        "tcp://127.0.0.1:0", own, CLIENTS, refused=lambda source, error: refused.append(error)
    ) as listener:
        (tmp_path / "hub.crt").rename(tmp_path / "away")
        with pytest.raises(TooManyLinks, match="cannot use its certificate") as caught:
            await dial(listener.address, federation.credentials("charite"), COORDINATORS)
        assert str(tmp_path) not in str(caught.value)
        assert str(tmp_path) in str(refused[0])
        (tmp_path / "away").rename(tmp_path / "hub.crt")
        hub = Hub(federation, listener, refused)
        await hub.works()


# --- losses ------------------------------------------------------------------------------------------------


def vanish(session: Session) -> None:
    """The process of a dialling peer is gone: its socket closes, nothing is said."""
    carrier = session._carrier
    carrier._socket.disable_monitor()  # type: ignore[attr-defined]
    carrier._monitor.close()  # type: ignore[attr-defined]
    carrier._reader.close(linger_ms=0)  # type: ignore[attr-defined]


async def test_a_message_to_a_vanished_peer_is_an_error_and_not_silence(hub: Hub) -> None:
    """What ROUTER_MANDATORY is for: without it, ZeroMQ drops the message and says nothing."""
    client, coordinator = await hub.link()
    (key,) = hub.listener._links
    vanish(client)
    error: LinkLost | None = None
    deadline = time.monotonic() + SOON
    while error is None and time.monotonic() < deadline:
        try:
            hub.listener._try_send(key[0], b"x")
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
    """Silent reconnect: a DEALER would send what is queued, under a new id, to whoever binds the port next."""
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
    listener._socket.disable_monitor()
    listener._monitor.close()
    listener._socket.close(linger=0)
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


def stall(who: Session | Listener) -> None:
    """A peer that no longer reads its socket."""
    reader = who._reader if isinstance(who, Listener) else who._carrier._reader  # type: ignore[attr-defined]
    asyncio.get_running_loop().remove_reader(reader._fd)
    reader._deliver = lambda frames: None  # a reading that is already under way comes to nothing
    reader.look = lambda: None


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
        async with hub_of(federation) as hub:
            knocking = asyncio.create_task(asyncio.to_thread(knock, parse_address(hub.address)[1]))
            await asyncio.sleep(0.05)
        going = False
        await knocking
        going = True
    async with hub_of(federation) as hub:
        await hub.works()


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
