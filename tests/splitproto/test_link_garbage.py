"""A link that has ended is freed, with its TLS state, without waiting for the garbage collector."""

from __future__ import annotations

import gc
import weakref

from splitproto.session import Session
from tests.splitproto.links import Hub, part, quiet

LINKS = 5


async def test_nothing_of_a_link_waits_for_the_garbage_collector(hub: Hub) -> None:
    """Python collects what lives long only now and then: links that rotate or break would fill the memory."""
    gc.collect()
    gc.disable()
    try:
        gone: list[weakref.ref[Session]] = []
        for _ in range(LINKS):
            client, coordinator = await hub.link()
            gone += weakref.ref(client), weakref.ref(coordinator)
            await part(client, coordinator)
            del client, coordinator
        await quiet()
        alive = [ref for ref in gone if ref() is not None]
        assert len(alive) <= 2, f"{len(alive)} of {len(gone)} sessions are still in memory"
    finally:
        gc.enable()
