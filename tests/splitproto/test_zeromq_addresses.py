"""Dialling: names, addresses, ports, and others that may answer there."""

from __future__ import annotations

import asyncio
import socket as tcp
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import zmq
import zmq.asyncio

from splitproto import Listener, dial, envelope
from splitproto.connection import Timing
from splitproto.envelope import Kind
from splitproto.errors import (
    AddressError,
    BindFailed,
    CarrierVersionError,
    DeadlineExceeded,
    EnvelopeError,
    LinkLost,
    SetupError,
)
from splitproto.lanes.addresses import parse_address
from tests.splitproto.links import (
    CLIENTS,
    COORDINATORS,
    SOON,
    Hub,
    free_port,
    part,
    quiet,
)

# --- addresses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["192.0.2.7", "no-such-interface", "[2001:db8::7]"])
async def test_a_listener_names_an_address_that_is_not_this_machines(host: str, federation: Any) -> None:
    with pytest.raises(
        BindFailed, match=r"this machine has no such address.*use one of its own, or tcp://\*:7443"
    ):
        async with Listener(f"tcp://{host}:7443", federation.credentials("hub"), CLIENTS):
            pass
    await quiet()


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
        "tcp://*:5555",
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
    with pytest.raises(AddressError) as caught:
        await dial(address, federation.credentials("charite"), COORDINATORS)
    assert "\n" not in str(caught.value)
    assert not caught.value.retry


def test_addresses() -> None:
    assert parse_address("tcp://hub.example:5555") == ("hub.example", 5555)
    assert parse_address("tcp://[::1]:5555/") == ("::1", 5555)


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("", AddressError),
        ("tcp://127.0.0.1", AddressError),
        ("tcp://[::1", AddressError),
        ("tcp://192.0.2.1:5555", BindFailed),
        ("ipc://x", AddressError),
    ],
)
async def test_a_listener_that_cannot_listen_says_so(
    address: str, error: type[SetupError], federation: Any
) -> None:
    with pytest.raises(error) as caught:
        async with Listener(address, federation.credentials("hub"), CLIENTS):
            raise AssertionError("not reached")
    assert "\n" not in str(caught.value)
    assert not caught.value.retry


async def test_a_port_in_use(hub: Hub, federation: Any) -> None:
    with pytest.raises(BindFailed, match="is in use"):
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
