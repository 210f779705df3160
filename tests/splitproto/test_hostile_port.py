"""Hostile strangers at a listener's port: what they use is bounded, and honest peers are served meanwhile.

Bounds are counted in work (turns of the loop, handshakes done, bytes held), never in seconds.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket as tcp
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest
import zmq

from splitproto import Timing, constants, envelope
from splitproto.admission import HANDSHAKE_BURST, OPEN_COST, HandshakeBudget
from splitproto.connection import Connection
from splitproto.envelope import Kind
from splitproto.errors import (
    DeadlineExceeded,
    EnvelopeError,
    MessageTooLarge,
    SecureChannelError,
    TooManyLinks,
)
from splitproto.identity import Credentials
from splitproto.lanes.addresses import parse_address
from splitproto.lanes.tcp import STRANGER_HOLDS
from splitproto.lanes.zeromq_reader import KEPT, MESSAGES_A_TURN, PARTS_A_TURN, Reader
from splitproto.visitors import MAX_FAULTS
from tests.splitproto.links import SOON, Example, Hub, hub_of, part, quiet, raw, work

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
EMPTY = b"\x01\x00"
"""An empty part with more to come."""


@pytest.fixture(autouse=True)
async def nothing_reaches_the_loop(caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """Neither the loop's exception handler nor a traceback in the log, whatever a stranger sends."""
    reached: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reached.append(context))
    yield
    await quiet()
    assert not reached
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]


@asynccontextmanager
async def tcp_to(hub: Hub, octets: bytes = b"", source: str = "127.0.0.1") -> AsyncIterator[tcp.socket]:
    """A TCP connection of a stranger, which has sent `octets`."""
    loop = asyncio.get_running_loop()
    with tcp.socket() as stranger:
        stranger.bind((source, 0))
        stranger.setblocking(False)
        await loop.sock_connect(stranger, parse_address(hub.address))
        await loop.sock_sendall(stranger, octets)
        yield stranger


@asynccontextmanager
async def zmtp_to(hub: Hub, octets: bytes = b"", source: str = "127.0.0.1") -> AsyncIterator[tcp.socket]:
    """The same, which has finished ZMTP before."""
    loop = asyncio.get_running_loop()
    async with tcp_to(hub, GREETING, source) as stranger:
        heard = b""
        while len(heard) < 64:
            heard += await asyncio.wait_for(loop.sock_recv(stranger, 64), SOON)
        await loop.sock_sendall(stranger, READY)
        await asyncio.wait_for(loop.sock_recv(stranger, 200), SOON)
        await loop.sock_sendall(stranger, octets)
        yield stranger


async def closed(stranger: tcp.socket) -> None:
    """The listener has ended the connection."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(SOON):
        try:
            while await loop.sock_recv(stranger, 65536):
                pass
        except ConnectionError:
            return


async def until(condition: Any) -> None:
    async with asyncio.timeout(SOON):
        while not condition():  # noqa: ASYNC110 (nobody would set an event)
            await asyncio.sleep(0.01)


def opening(n: int, body: bytes = b"") -> bytes:
    return envelope.encode(Kind.OPEN, n.to_bytes(2, "big") * 8, 0, body)


def not_admitted(hub: Hub) -> int:
    return sum(not link.admitted for link in hub.listener._links.values())


# --- messages of many parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [[b""] * 100_000, [b"x"] * 30_000, [b"", b"y" * 100] * 10_000])
async def test_a_message_of_many_parts_is_read_in_bounded_turns(parts: list[bytes]) -> None:
    read = {"in this turn": 0, "most": 0, "turns": 0}
    delivered: list[list[bytes]] = []
    context = zmq.Context()
    sender, receiver = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    sender.bind("inproc://parts")
    receiver.connect("inproc://parts")

    class Counting:
        """The socket, which counts what is read of it before others get a turn."""

        def __getattr__(self, name: str) -> Any:
            return getattr(receiver, name)

        def recv(self, *args: Any, **options: Any) -> Any:
            read["in this turn"] += 1
            read["most"] = max(read["most"], read["in this turn"])
            return receiver.recv(*args, **options)

    reader = Reader(Counting(), lambda frames: delivered.append([frame.bytes for frame in frames]))  # type: ignore[arg-type]
    sender.send_multipart(parts)
    sender.send(b"next")
    tracemalloc.start()
    while len(delivered) < 2:
        read["in this turn"] = 0
        read["turns"] += 1
        await asyncio.sleep(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert delivered == [parts[:KEPT], [b"next"]]
    assert read["most"] <= PARTS_A_TURN <= 256
    assert read["turns"] >= len(parts) // PARTS_A_TURN, "turns that an honest task had meanwhile"
    assert peak < 1 << 20
    reader.close()
    sender.close()
    context.term()


async def test_many_messages_are_read_in_bounded_turns(hub: Hub) -> None:
    handled = {"in this turn": 0, "most": 0, "all": 0}
    turn_away = hub.listener._turn_away

    def counted(*args: Any) -> None:
        handled["in this turn"] += 1
        handled["all"] += 1
        handled["most"] = max(handled["most"], handled["in this turn"])
        turn_away(*args)

    hub.listener._turn_away = counted  # type: ignore[method-assign]
    async with zmtp_to(hub, b"\x00\x03abc" * 2000):
        async with asyncio.timeout(SOON):
            while handled["all"] < MAX_FAULTS:
                handled["in this turn"] = 0
                await asyncio.sleep(0)
    assert handled["most"] <= MESSAGES_A_TURN <= 32
    await hub.works()


@pytest.mark.parametrize(
    "more",
    [EMPTY, b"\x01\x05parts", b"\x03" + bytes(8)],
    ids=["empty parts", "short ones", "long empty ones"],
)
async def test_a_message_that_never_ends_is_cut_off(more: bytes, hub: Hub, example: Example) -> None:
    """libzmq keeps its parts and asks nobody: 14 MB of empty ones are 450 MB of memory."""
    client, coordinator = await hub.link()
    await work(client, coordinator, example)
    loop, sent = asyncio.get_running_loop(), 0
    piece = more * (65_536 // len(more))
    async with zmtp_to(hub) as stranger:
        try:
            while sent < 14_000_000:
                await asyncio.wait_for(loop.sock_sendall(stranger, piece), SOON)
                sent += len(piece)
                await asyncio.sleep(0.01)  # 50 Mbit/s
        except ConnectionError:
            pass
    assert STRANGER_HOLDS - len(piece) <= sent < 2_000_000
    (error,) = hub.refused
    assert isinstance(error, MessageTooLarge)
    assert "unfinished ZeroMQ message" in str(error)
    assert client.alive
    assert coordinator.alive
    await part(client, coordinator)


async def test_a_message_of_several_parts_ends_the_connection(hub: Hub) -> None:
    async with zmtp_to(hub, EMPTY * 10_000 + b"\x00\x00") as stranger:
        await closed(stranger)
    assert [type(error) for error in hub.refused] == [EnvelopeError]
    await hub.works()


# --- what is not ZeroMQ ------------------------------------------------------------------------------------

NOT_ZEROMQ = {
    "https": bytes.fromhex("1603010200010001fc0303") + bytes(range(256)) * 2,
    "http": b"GET / HTTP/1.1\r\nHost: hub\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n",
    "frames of 2010": EMPTY * 50_000,
    "whole frames of 2010": b"\x01\x00\x06\x00hello" * 500,
    "zmtp 2": b"\xff" + bytes(7) + b"\x01\x7f\x01\x05" + b"\x00\x00" + b"\x00\x05hello" * 500,
    "zmtp 2, unknown mechanism": b"\xff" + bytes(8) + b"\x01\x01\x05\x00\x00\x00\x05hello" * 9,
    "ssh": b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(1000),
    "dicom": b"\x01\x00\x00\x00\x00\xcd\x00\x01\x00\x00" + b"SPLITPROTO      SCANNER         " * 4,
}


@pytest.mark.parametrize("octets", NOT_ZEROMQ.values(), ids=NOT_ZEROMQ)
async def test_what_is_not_zeromq_is_one_refusal(octets: bytes, hub: Hub) -> None:
    client, coordinator = await hub.link()
    async with tcp_to(hub) as stranger:
        with suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(stranger, octets)
        await closed(stranger)
    await until(lambda: hub.refused)
    await asyncio.sleep(0.1)
    (error,) = hub.refused
    assert isinstance(error, EnvelopeError)
    assert "not ZeroMQ" in str(error)
    assert client.alive
    assert coordinator.alive
    await hub.works()
    await part(client, coordinator)


async def test_a_defect_while_reading_is_logged_once_and_does_not_reach_the_loop(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    def defect(*args: Any) -> None:
        raise zmq.ZMQError(zmq.EFAULT)

    hub.listener._turn_away = defect  # type: ignore[method-assign]
    async with raw(hub) as stranger:
        for _ in range(100):
            await stranger.send(b"garbage")
        await hub.works()
        await until(lambda: caplog.records)
        await hub.works()
    assert [record.message for record in caplog.records if record.exc_info] == [
        "a message could not be handled; this is a defect, please report it"
    ]
    caplog.clear()


# --- the caps are no lock-out ------------------------------------------------------------------------------


async def half_open(hub: Hub, stack: AsyncExitStack, count: int, sources: int = 1) -> None:
    """Connections that each begin a link and leave it at that."""
    message = opening(7)
    for n in range(count):
        octets = b"\x00" + bytes([len(message)]) + message
        await stack.enter_async_context(zmtp_to(hub, octets, f"127.0.0.{1 + n % sources}"))


async def silent(hub: Hub, stack: AsyncExitStack, count: int, sources: int = 1) -> None:
    """Connections that finish ZMTP and say nothing."""
    for n in range(count):
        await stack.enter_async_context(zmtp_to(hub, b"", f"127.0.0.{1 + n % sources}"))


async def mute(hub: Hub, stack: AsyncExitStack, count: int, sources: int = 1) -> None:
    """Connections that do not even speak ZMTP."""
    for n in range(count):
        await stack.enter_async_context(tcp_to(hub, b"", f"127.0.0.{1 + n % sources}"))


@pytest.mark.parametrize(
    ("strangers", "count", "sources"),
    [(half_open, 16, 1), (half_open, 40, 1), (half_open, 64, 4), (half_open, 90, 9), (silent, 240, 1),
     (silent, 90, 9), (mute, 100, 1)],
    ids=["16 half-open links from our address", "40", "64 from four addresses", "90 from nine",
         "240 silent ones", "90 from nine silent ones", "100 that are not ZeroMQ"],
)  # fmt: skip
async def test_strangers_lock_nobody_out(strangers: Any, count: int, sources: int, hub: Hub) -> None:
    most = 0

    def admitted(loop_is: Any = None) -> int:
        nonlocal most
        most = max(most, not_admitted(hub))
        return most

    async with AsyncExitStack() as stack:
        for _ in range(7):
            await strangers(hub, stack, -(-count // 7), sources)
            admitted()
            await hub.works()
            admitted()
    assert most <= constants.MAX_HALF_OPEN
    if sources == 1:
        assert most <= constants.MAX_HALF_OPEN_PER_SOURCE


@pytest.mark.parametrize("strangers", [half_open, silent, mute])
async def test_connections_without_a_peer_keep_no_descriptors(strangers: Any, hub: Hub) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    client, coordinator = await hub.link()
    before = descriptors()
    async with AsyncExitStack() as stack:
        await strangers(hub, stack, 200)
        await until(lambda: descriptors() - before - 200 <= constants.MAX_HALF_OPEN_PER_SOURCE)
        assert client.alive
        assert coordinator.alive
    await part(client, coordinator)


async def test_a_connection_without_a_link_has_its_time_and_no_more(federation: Any) -> None:
    async with hub_of(federation, timing=Timing(handshake=0.2)) as hub:
        client, coordinator = await hub.link()
        async with zmtp_to(hub) as one, zmtp_to(hub) as other:
            await closed(one)
            await closed(other)
        assert [type(error) for error in hub.refused] == [DeadlineExceeded] * 2
        await asyncio.sleep(1.5)
        assert client.alive, "a connection with a link has all the time in the world"
        await part(client, coordinator)


async def test_links_that_fail_are_counted_until_they_are_gone(hub: Hub) -> None:
    """Their strangers do not read, so their last words wait in a full queue."""
    async with raw(hub) as stranger:
        for n in range(60):
            await stranger.send(opening(n + 1, b"\x15\x03\x01\x00\x02\x02\x28"))
        while len(hub.refused) < 60:
            assert len(hub.listener._links) <= constants.MAX_HALF_OPEN_PER_SOURCE
            await asyncio.sleep(0)


# --- handshakes cost work ----------------------------------------------------------------------------------

BROKEN = {
    "7 bytes": b"\x15\x03\x01\x00\x02\x02\x28",
    "60 kB": b"\x16\x03\x01\x40\x00\x01\x00\xea\x60" + bytes(60_000),
}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[list[Any]]:
    made: list[Any] = []
    real = getattr(owner, name)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        made.append(weakref.ref(self) if isinstance(self, Connection) else self)
        return real(self, *args, **options)

    monkeypatch.setattr(owner, name, call)
    yield made


@pytest.mark.parametrize("hello", BROKEN.values(), ids=BROKEN)
async def test_what_fails_leaves_no_memory_behind(
    hello: bytes, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without garbage collection: nothing of a dead link waits for one."""
    with counted(monkeypatch, Connection, "__init__") as made:
        async with raw(hub) as stranger:
            await stranger.send(opening(1, hello))
            await until(lambda: hub.refused)
            gc.collect()
            gc.disable()
            try:
                tracemalloc.start()
                # One by one: a connection without a link may not have more than one handshake's bytes waiting.
                for n in range(2, 14):
                    await stranger.send(opening(n, hello))
                    await until(lambda n=n: len(hub.refused) >= n and not hub.listener._links)
                await asyncio.sleep(0.05)
                left, _ = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                assert len(made) == 13
                assert not [connection for connection in made if connection() is not None]
                assert left < 200_000
            finally:
                gc.enable()
    assert {type(error) for error in hub.refused} == {SecureChannelError}
    await hub.works()


async def test_a_peer_that_is_refused_leaves_no_memory_behind(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted(monkeypatch, Connection, "__init__") as made:
        gc.collect()
        gc.disable()
        try:
            with pytest.raises(Exception, match="allow-list"):
                await hub.dial("stranger")
            await quiet()
            ours = [connection() for connection in made]
            assert not [one for one in ours if one is not None and one.side.value == "coordinator"]
        finally:
            gc.enable()


async def test_the_files_are_read_again_only_when_they_were_replaced(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    await hub.works()
    with counted(monkeypatch, Credentials, "server_context") as made:
        for _ in range(3):
            await hub.works()
        assert not made
        own = hub.listener._credentials
        again = own.certificate.with_suffix(".new")
        again.write_bytes(own.certificate.read_bytes())
        again.rename(own.certificate)
        await hub.works()
        await hub.works()
        assert len(made) == 1


@pytest.mark.parametrize("hello", BROKEN.values(), ids=BROKEN)
async def test_handshakes_of_one_source_have_a_budget(
    hello: bytes, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spent(HandshakeBudget):
        """No tokens come back."""

        def take(self, source: str, octets: int, now: float, *, opens: bool = False) -> bool:
            return super().take(source, octets, 0.0, opens=opens)

    hub.listener._budget = Spent(0.0)
    affordable = HANDSHAKE_BURST // (len(opening(1, hello)) + OPEN_COST)

    def beyond() -> list[Any]:
        return [error for error in hub.refused if "more handshakes" in str(error)]

    with counted(monkeypatch, Connection, "__init__") as made:
        async with raw(hub) as stranger:
            for n in range(affordable + 12):
                await stranger.send(opening(n + 1, hello))
            await until(beyond)
            await asyncio.sleep(0.2)
        assert len(made) == affordable
    assert {type(error) for error in beyond()} == {TooManyLinks}
    assert len(beyond()) <= 12
