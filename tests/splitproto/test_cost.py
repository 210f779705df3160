"""A session's count of the seconds that its link costs: it grows where work is done, and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from splitproto import Session
from splitproto.messages import Activations, Message

from .links import hub_of, work

SOON = 10.0
Example = Callable[[str], Message]


async def test_each_end_counts_what_it_does(federation: Any, example: Example) -> None:
    async with hub_of(federation) as hub:
        client, coordinator = await hub.link()
        await work(client, coordinator, example)
        await asyncio.gather(coordinator.send(example("forward")), client.receive(SOON))
        before = [asdict(end.cost) for end in (client, coordinator)]
        # The coordinator only reads, but for credit and heartbeats.
        tensors = {"x0": np.ones((1 << 20,), np.float32)}
        sent = Activations("train", 1, 0, b"\1" * 32, tensors)
        await asyncio.gather(client.send(sent), coordinator.receive(SOON))
        here, there = (
            {name: seconds - earlier[name] for name, seconds in asdict(end.cost).items()}
            for end, earlier in zip((client, coordinator), before, strict=True)
        )
    assert here["message"] > 0 and here["encrypt"] > 0
    assert there["decrypt"] > 0 and there["message"] == 0
    # Nothing is counted twice: all of it is this thread's.
    assert min(*here.values(), *there.values()) >= 0


async def test_a_full_queue(federation: Any, example: Example) -> None:
    async with hub_of(federation) as hub:
        client, coordinator = await hub.link()
        await work(client, coordinator, example)
        assert coordinator.cost.blocked == 0.0
        refuse(coordinator, times=3)
        await asyncio.gather(coordinator.send(example("forward")), client.receive(SOON))
    assert coordinator.cost.blocked > 0.0


def refuse(session: Session, times: int) -> None:
    """Its carrier has no room for so many attempts."""
    carrier, left = session._carrier, [None] * times
    take = carrier.try_send

    def try_send(data: bytes) -> bool:
        return bool(left.pop()) if left else take(data)

    carrier.try_send = try_send  # type: ignore[method-assign]
