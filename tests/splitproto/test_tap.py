"""A session's tap: it is told what the application sends and receives, in order, and nothing depends on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from splitproto import Listener, dial
from splitproto.errors import UnexpectedMessage
from splitproto.identity import AllowList
from splitproto.messages import Applied, Gradients, Message
from splitproto.session import Session

SOON = 10.0
Example = Callable[[str], Message]
ORDER = ["job-offer", "job-accept", "inventory", "begin", "forward", "activations", "gradients", "applied"]


async def talk(client: Session, coordinator: Session, example: Example) -> list[Message]:
    """One step, and byes; what was heard on both sides."""
    heard = []
    for name in ORDER:
        by_client = name in ("job-accept", "inventory", "activations", "applied")
        speaker, hearer = (client, coordinator) if by_client else (coordinator, client)
        _, message = await asyncio.gather(speaker.send(example(name)), hearer.receive(SOON))
        heard.append(message)
    await coordinator.close("complete", "done", timeout=0.1)
    heard.append(await client.receive(SOON))
    await client.close("complete")
    return heard


async def pair(federation: Any, example: Example, *taps: Any) -> list[Message]:
    clients, coordinators = AllowList({"client": {"ukm"}}, "job"), AllowList({"coordinator": {"hub"}}, "peer")
    async with Listener("tcp://127.0.0.1:0", federation.credentials("hub"), clients) as listener:
        client, coordinator = await asyncio.gather(
            dial(listener.address, federation.credentials("ukm"), coordinators), listener.accept(SOON)
        )
        client.tap, coordinator.tap = taps
        return await talk(client, coordinator, example)


async def test_both_sides_are_told_everything_in_order(federation: Any, example: Example) -> None:
    told: dict[str, list[tuple[str, Message]]] = {"client": [], "coordinator": []}
    heard = await pair(
        federation,
        example,
        lambda *what: told["client"].append(what),
        lambda *what: told["coordinator"].append(what),
    )
    assert [(way, m.name) for way, m in told["client"]] == [
        ("in", "job-offer"), ("out", "job-accept"), ("out", "inventory"), ("in", "begin"), ("in", "forward"),
        ("out", "activations"), ("in", "gradients"), ("out", "applied"), ("in", "bye"), ("out", "bye"),
    ]  # fmt: skip
    other_way = {"in": "out", "out": "in"}
    # Nobody receives the answer to a bye, so nobody is told of it.
    assert [(way, m.name) for way, m in told["coordinator"]] == [
        (other_way[way], m.name) for way, m in told["client"][:-1]
    ]
    said = {m.name: m for _, m in told["coordinator"]}
    for message in heard:
        if message.name in ("activations", "gradients"):
            for name, array in message.tensors.items():  # type: ignore[attr-defined]
                assert np.array_equal(array, said[message.name].tensors[name])  # type: ignore[attr-defined]


async def test_what_was_refused_is_not_told(federation: Any, example: Example) -> None:
    told: list[str] = []
    clients, coordinators = AllowList({"client": {"ukm"}}, "job"), AllowList({"coordinator": {"hub"}}, "peer")
    async with Listener("tcp://127.0.0.1:0", federation.credentials("hub"), clients) as listener:
        client, coordinator = await asyncio.gather(
            dial(listener.address, federation.credentials("ukm"), coordinators), listener.accept(SOON)
        )
        client.tap = lambda way, message: told.append(message.name)
        for early in (Applied(1), Gradients(1, {})):
            try:
                await client.send(early)
            except UnexpectedMessage:
                continue
            raise AssertionError("it was sent")
        await asyncio.gather(client.close("complete"), coordinator.close("complete"))
    assert told == ["bye"]


async def test_a_tap_that_fails_is_left_out_and_the_conversation_goes_on(
    federation: Any, example: Example
) -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    told: list[str] = []

    def broken(way: str, message: Message) -> None:
        told.append(message.name)
        raise OSError("no space left")

    heard = await pair(federation, example, broken, broken)
    assert [m.name for m in heard] == [*ORDER, "bye"]
    assert told == ["job-offer", "job-offer"]
    assert [str(c["exception"]) for c in complaints] == ["no space left"] * 2
