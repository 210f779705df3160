"""Links over real ZeroMQ sockets on 127.0.0.1, and strangers at the listener's port."""

from __future__ import annotations

import asyncio
import socket as tcp
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import zmq
import zmq.asyncio

from splitproto import Listener, dial, envelope
from splitproto.envelope import Kind
from splitproto.errors import (
    SplitprotoError,
)
from splitproto.identity import AllowList, Credentials
from splitproto.messages import Message
from splitproto.session import Session

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


def stall(who: Session | Listener) -> None:
    """A peer that no longer reads its socket."""
    carrier: Any = who.lanes[0] if isinstance(who, Listener) else who._carrier
    reader = carrier._reader
    asyncio.get_running_loop().remove_reader(reader._fd)
    reader._deliver = lambda frames: None  # a reading that is already under way comes to nothing
    reader.look = lambda: None
