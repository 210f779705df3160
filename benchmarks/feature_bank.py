"""What a feature bank costs a step of the decoder: trained from the bank, and from tensors in memory, in turns.

Four sites of the demo, with frozen encoders, fill a bank. Then a coordinator trains another decoder from it, alone
(`[training] bank`). After every few of its steps the same decoder is trained for as many in the same process, on
batches of the same shape that are in memory already. The first blocks, in which each release is read and verified for
the first time, are a row of their own, and so are steps with a cache that holds none of the bank.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rows import Found, Line, at_most, ratios, spread

from splitpeer import logs
from splitpeer.coordinator.assembly import make_half
from splitpeer.coordinator.coordinator import Coordinator
from splitpeer.daemon.console import LogView
from splitpeer.demo.federation import DemoJob, Federation
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import cut_descriptors, job_on_wire
from splitpeer.settings.job import JobConfig
from splitpeer.settings.loading import to_toml
from splitpeer.settings.peer import PeerConfig
from splitproto.allocator import keep_freed_memory

BATCHES = 8
"""Different ones in memory, so that they are no more in the processor's cache than those of the bank."""
WARM_UP = 3
"""Blocks that do not count: by then each release has been read."""
CASES = {"cached": 1024, "not cached": 0}
"""`[data] cache_mib` of the coordinator."""


@dataclass(frozen=True)
class FrozenJob(DemoJob):
    """The demo's with frozen encoders, and no more scores than it must have."""

    bank: str = ""
    """Of an earlier run; empty: sites fill one."""

    def toml(self) -> dict[str, Any]:
        settings = super().toml()
        settings["training"] |= {"encoders": "frozen", "checkpoint_every": self.steps}
        settings["training"] |= {"bank": self.bank} if self.bank else {}
        settings["evaluation"] |= {"every": 0}
        return settings


class InMemory:
    """The same decoder, and batches for it; trained in a thread, as a coordinator's decoder is.

    glibc keeps the freed memory of each thread apart. Without such a thread, and without `keep_freed_memory` as
    `splitpeer serve` calls it, one of the two would pay for 15,000 page faults a step, a fifth of its time, and by
    chance either the one or the other.
    """

    def __init__(self, config: PeerConfig, settings: JobConfig) -> None:
        job, seats = job_on_wire(settings), seats_of(settings)
        self._half = make_half(config, settings, job, seats)
        torch.manual_seed(0)
        self._batches = [
            {
                seat: {d.name: torch.randn(d.shape).relu().numpy() for d in cut_descriptors(job)}
                for seat in seats.names
            }
            for _ in range(BATCHES)
        ]
        window = tuple(settings.data.window)
        self._targets = [(torch.rand(job.batch, 3, *window) > 0.9).float().numpy() for _ in range(BATCHES)]
        self._steps = 0
        self._thread = ThreadPoolExecutor(1)

    def train(self, steps: int) -> float:
        """Seconds of a step."""
        return self._thread.submit(self._train, steps).result()

    def _train(self, steps: int) -> float:
        began = time.monotonic()
        for _ in range(steps):
            at = self._steps % BATCHES
            self._half.learn(self._batches[at], self._targets[at])
            self._steps += 1
        return (time.monotonic() - began) / steps


class Turns(LogView):
    """After each block of the run's steps, as many in memory."""

    def __init__(self, memory: InMemory, block: int) -> None:
        super().__init__()
        self._memory, self._block = memory, block
        self._began = 0.0
        self.bank: list[float] = []
        """Seconds of a step, for each block; the first step of each is left out, for it follows a pause."""
        self.memory: list[float] = []

    def step(self, step: int, loss: float, octets: dict[str, int]) -> None:
        now = time.monotonic()
        if step % self._block == 1:
            self._began = now
        elif step % self._block == 0:
            self.bank.append((now - self._began) / (self._block - 1))
            self.memory.append(self._memory.train(self._block - 1))


def fill(folder: Path, patients: int, batch: int) -> tuple[Federation, Path]:
    """A federation, and the bank that its sites have filled."""
    federation = Federation(folder, FrozenJob(patients=patients, validation=1, steps=1, batch=batch))
    federation.render(lambda done, total: None)
    federation.set_up()
    federation.run()
    (bank,) = (federation.hub / "state").glob("*/bank")
    return federation, bank.resolve()


def train(federation: Federation, bank: Path, case: str, steps: int, block: int) -> dict[str, list[float]]:
    """Seconds of a step by block, from the bank and in memory."""
    made = federation.job
    job = FrozenJob(made.patients, made.validation, steps, made.batch, seed=made.seed, bank=str(bank))
    (federation.hub / "job.toml").write_text(to_toml(job.toml()))
    settings = JobConfig.load(federation.hub / "job.toml")
    config = PeerConfig.load(federation.hub / "peer.toml")
    data = config.data.model_copy(update={"cache_mib": CASES[case]})
    config = config.model_copy(update={"data": data})
    view = Turns(InMemory(config, settings), block)

    async def run() -> None:
        await Coordinator(config, settings, asyncio.Event(), view).run()

    asyncio.run(run())
    return {"bank": view.bank, "memory": view.memory}


ABOUT = (
    "The decoder of the demo's federation, four seats with frozen encoders: steps from the feature bank, then as",
    "many on tensors in memory, in turns, in one process of one thread on two cores.",
)


def rows(found: Found) -> Iterator[Line]:
    """Steps from the bank, relative to steps on tensors in memory."""
    for case, blocks in found["cases"].items():
        bank, memory = blocks["bank"][WARM_UP:], blocks["memory"][WARM_UP:]
        yield Line(f"step from the bank, {case}", "", spread([1e3 * one for one in bank], 0) + " ms", None)
        yield at_most(f"step from the bank / from memory, {case}", ratios(bank, memory), 1.05)
    first = found["cases"]["cached"]
    told = spread(ratios(first["bank"][:WARM_UP], first["memory"][:WARM_UP]))
    yield Line("the same, while each release is read for the first time", "", told, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--block", type=int, default=12)
    parser.add_argument("--patients", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    logs.setup("text", "error")
    keep_freed_memory()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        federation, bank = fill(Path(folder).resolve(), given.patients, given.batch)
        cases = {case: train(federation, bank, case, given.steps, given.block) for case in CASES}
    found = {"unit": "seconds a step, by block", "block": given.block, "cases": cases}
    if given.json:
        print(json.dumps(found, indent=2))
        return
    table = Table(title=f"A step of the decoder, batch {given.batch} of 96x96, four seats")
    for heading in ("", "measured"):
        table.add_column(heading)
    for line in rows(found):
        table.add_row(line.what, line.found)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()
