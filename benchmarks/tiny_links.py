"""The trainings of tiny.py over splitproto's own links: two sites as processes, the coordinator in the caller's."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import tiny
from working import DIGEST, HUB, PATIENT, WAIT_S, begin, credentials, join

from splitproto import AllowList, Listener, Session, dial
from splitproto.allocator import keep_freed_memory
from splitproto.messages import Activations, Applied, Forward, Gradients
from splitproto.records import Sample

SAMPLES = (Sample(bytes(16), (0, 0, 0)),)


class Training:
    """A coordinator's half, and one link to each site."""

    def __init__(self, kind: str, sessions: dict[str, Session]) -> None:
        self.sessions = sessions
        self._decoder = tiny.Decoder(kind)
        self._step = 0
        self._gradients: dict[str, tiny.Arrays] = {}

    async def train(self, steps: int) -> tuple[float, list[float]]:
        """(seconds, the loss of each step)."""
        losses, began = [], time.perf_counter()
        for _ in range(steps):
            for site, session in self.sessions.items():
                if self._gradients:
                    await session.send(Gradients(self._step, self._gradients[site]))
                # Does not wait until these are applied: a site works on one message after the other.
                await session.send(Forward("train", self._step + 1, 0, SAMPLES, DIGEST))
            activations = {site: await self._activations(session) for site, session in self.sessions.items()}
            loss, self._gradients = self._decoder.step(activations)
            self._step += 1
            losses.append(loss)
        return time.perf_counter() - began, losses

    async def _activations(self, session: Session) -> tiny.Arrays:
        message = await session.receive(WAIT_S)
        if isinstance(message, Applied):
            message = await session.receive(WAIT_S)
        if not isinstance(message, Activations):
            raise TypeError(f"a {message.name} where activations were due")
        return dict(message.tensors)


@asynccontextmanager
async def training(folder: Path, kind: str) -> AsyncIterator[Training]:
    """A training of this kind, its sites as processes. `folder` has the certificates."""
    allow = AllowList({"client": set(tiny.SITES)}, "benchmark")
    async with Listener("tcp://127.0.0.1:0", credentials(folder, HUB), allow, timing=PATIENT) as listener:
        processes = [
            multiprocessing.get_context("spawn").Process(
                target=site_process, args=(folder, site, kind, listener.address), daemon=True
            )
            for site in tiny.SITES
        ]
        for process in processes:
            process.start()
        sessions = {}
        for _ in processes:
            session = await listener.accept(WAIT_S)
            sessions[session.peer.site] = session
            await begin(session)
        yield Training(kind, {site: sessions[site] for site in tiny.SITES})
        for session in sessions.values():
            await session.close("complete")
    for process in processes:
        process.join(20)


def site_process(folder: Path, site: str, kind: str, address: str) -> None:
    """A site's process, until the coordinator closes the link."""
    # As the daemons do.
    keep_freed_memory()

    async def run() -> None:
        encoder = tiny.Encoder(kind, site)
        allow = AllowList({"coordinator": {HUB}}, "benchmark")
        session = await dial(address, credentials(folder, site), allow, timing=PATIENT)
        await join(session)
        while isinstance(asked := await session.receive(3600), Forward | Gradients):
            if isinstance(asked, Gradients):
                encoder.backward(asked.tensors)
                await session.send(Applied(asked.step))
            else:
                await session.send(Activations("train", asked.step, 0, DIGEST, encoder.forward()))
        await session.close("complete")

    asyncio.run(run())
