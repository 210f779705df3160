"""One coordinator and many sites: the cost of a handshake, of an idle site, and of a step with so many sites.

The coordinator is a process of its own, new for each measurement, with one `Listener`; all sites live in a second
process and dial a few at a time, each with a certificate and an address (127.1.x.y) of its own. A step is `forward` to
all sites, `activations` from all, `gradients` to all and `applied` from all; `activations` and `gradients` hold one
small tensor. CPU is that of the coordinator's process with all its threads. Memory is its growth since before the sites
came; four other sites have come, made a step and gone by then. "After steps" this includes the links' buffers, and what
the allocator keeps of the tensors.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rows import Found, Line, at_least, at_most, ratios, rounded, spread
from working import DIGEST, HUB, PATIENT, WAIT_S, begin, certificates, credentials, join, memory

from splitproto import AllowList, Listener, Session, SplitprotoError, dial
from splitproto.allocator import keep_freed_memory
from splitproto.lanes.base import Attempt
from splitproto.lanes.zeromq import Dealer
from splitproto.messages import Activations, Applied, Forward, Gradients
from splitproto.records import Sample

AT_ONCE = 8
"""Sites that dial at the same time."""
WARM = 4
"""Sites that come first, so that one-time imports and caches are not counted."""
IDLE_S = 3.0
KIB = 1024


@dataclass(frozen=True)
class Figures:
    """One coordinator with so many sites."""

    handshakes: float
    """Per second of the coordinator's CPU time."""
    idle_kib: float
    """Memory per site that was admitted and has said nothing since."""
    worked_kib: float
    """The same after the steps."""
    idle_cpu: float
    """CPU time that all idle sites together cost, in per cent of a core."""
    step_ms: float
    """Median step, divided by the number of sites."""
    step_cpu_ms: float
    """The coordinator's CPU time per step, divided by the number of sites."""


# --- the sites ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Near:
    """A listener on this machine, dialled from a given address: admission counts by address."""

    port: int
    source: str
    host: str = "127.0.0.1"

    async def attempts(self, timeout: float) -> Sequence[Attempt]:
        where = f"tcp://{self.source}:0;{self.host}:{self.port}"
        return [Attempt(where, partial(Dealer, where))]

    async def diagnose(self, error: SplitprotoError) -> SplitprotoError:
        return error


def name_of(number: int) -> str:
    return f"site-{number}"


async def visit(folder: Path, port: int, number: int, turn: asyncio.Semaphore, octets: int) -> None:
    """The life of one site, until the coordinator says bye."""
    allow, own = AllowList({"coordinator": {HUB}}, "benchmark"), credentials(folder, name_of(number))
    tensors = {"x0": np.ones(octets // 4, np.float32)}
    async with turn:
        where = Near(port, f"127.1.{number // 250}.{number % 250 + 1}")
        session = await dial(where, own, allow, timing=PATIENT)
    await join(session)
    while isinstance(asked := await session.receive(3600), Forward | Gradients):
        if isinstance(asked, Forward):
            await session.send(Activations("train", asked.step, 0, DIGEST, tensors))
        else:
            await session.send(Applied(asked.step))
    await session.close("complete")


def sites(folder: Path, port: int, orders: Pipe, octets: int) -> None:
    """The second process. For each order (first, count) it runs so many sites; it ends when all have gone."""
    keep_freed_memory()
    more_files()

    async def run() -> None:
        loop, turn = asyncio.get_running_loop(), asyncio.Semaphore(AT_ONCE)
        running: list[asyncio.Task[None]] = []
        while (order := await loop.run_in_executor(None, orders.recv)) is not None:
            first, count = order
            numbers = range(first, first + count)
            running += [asyncio.create_task(visit(folder, port, n, turn, octets)) for n in numbers]
        await asyncio.gather(*running)

    asyncio.run(run())


def more_files() -> None:
    """Raise the limit of open files as far as the system allows: each link of a dialler takes four."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


# --- the coordinator ---------------------------------------------------------------------------------------------


async def step(sessions: Sequence[Session], number: int, tensors: dict[str, np.ndarray]) -> None:
    """One round of all sites."""
    forward = Forward("train", number, 0, (Sample(bytes(16), (0, 0, 0)),), DIGEST)
    for message, answer in ((forward, Activations), (Gradients(number, tensors), Applied)):
        await asyncio.gather(*(session.send(message) for session in sessions))
        for got in await asyncio.gather(*(session.receive(WAIT_S) for session in sessions)):
            if not isinstance(got, answer):
                raise TypeError(f"a {got.name} where {answer.__name__} was due")


def emptied() -> int:
    """Memory of this process after freed memory was returned to the system, so that later growth counts in full."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory(os.getpid())


def collected() -> int:
    """Memory of this process after a garbage collection; what the allocator keeps is included."""
    gc.collect()
    return memory(os.getpid())


async def gathered(door: Listener, orders: Pipe, first: int, count: int) -> list[Session]:
    """Have so many sites dial, and accept them."""
    orders.send((first, count))
    return [await door.accept(WAIT_S) for _ in range(count)]


async def part(sessions: list[Session]) -> None:
    await asyncio.gather(*(session.close("complete") for session in sessions))


async def measure(folder: Path, count: int, steps: int, octets: int) -> Figures:
    tensors = {"x0": np.ones(octets // 4, np.float32)}
    allow = AllowList({"client": {name_of(number) for number in range(WARM + count)}}, "benchmark")
    processes = multiprocessing.get_context("spawn")
    async with Listener("tcp://127.0.0.1:0", credentials(folder, HUB), allow, timing=PATIENT) as door:
        orders, theirs = processes.Pipe()
        port = int(door.address.rpartition(":")[2])
        dialling = processes.Process(target=sites, args=(folder, port, theirs, octets), daemon=True)
        dialling.start()
        warm = await gathered(door, orders, 0, WARM)
        await asyncio.gather(*map(begin, warm))
        await step(warm, 1, tensors)

        # They stay until memory is measured: new sites would be put where these had been.
        before, spent = emptied(), time.process_time()
        sessions = await gathered(door, orders, WARM, count)
        handshakes = count / (time.process_time() - spent)
        idle = collected() - before
        await part(warm)
        spent = time.process_time()
        await asyncio.sleep(IDLE_S)
        idle_cpu = (time.process_time() - spent) / IDLE_S
        await asyncio.gather(*map(begin, sessions))
        took, cpu = await timed(sessions, steps, tensors)
        worked = collected() - before
        await part(sessions)
        orders.send(None)
    dialling.join(20)
    per_site = 1e3 / count
    return Figures(
        handshakes, idle / KIB / count, worked / KIB / count, 100 * idle_cpu, took * per_site, cpu * per_site
    )


async def timed(
    sessions: Sequence[Session], steps: int, tensors: dict[str, np.ndarray]
) -> tuple[float, float]:
    """Seconds of a step, and CPU seconds of a step."""
    await step(sessions, 1, tensors)
    took, spent = [], time.process_time()
    for number in range(2, steps + 2):
        began = time.perf_counter()
        await step(sessions, number, tensors)
        took.append(time.perf_counter() - began)
    return statistics.median(took), (time.process_time() - spent) / steps


def coordinator(folder: Path, count: int, steps: int, octets: int) -> Figures:
    """In a process of its own."""
    keep_freed_memory()
    more_files()
    return asyncio.run(measure(folder, count, steps, octets))


# --- the table ----------------------------------------------------------------------------------------------------


ABOUT = (
    "Many sites at one coordinator, whose memory and CPU time are shown. A site is idle if it was admitted",
    "and has said nothing since. In a step each site is sent two messages and answers both; one message",
    "each way holds a tensor of 64 KiB.",
)


def rows(found: Found) -> Iterator[Line]:
    """What a coordinator spends on its sites, by how many there are."""
    counts = list(found)
    least, most = counts[0], counts[-1]
    by_least = ratios(*([one["step_ms"] for one in found[count]] for count in (most, least)))
    yield at_most(f"a step, divided by the number of sites: {most} sites / {least} sites", by_least, 1)
    for count, rounds in found.items():
        column = {key: [one[key] for one in rounds] for key in rounds[0]}
        yield at_least(f"{count} sites: handshakes per CPU second", column["handshakes"], 100, digits=0)
        yield at_most(f"{count} sites: memory per idle site", column["idle_kib"], 200, " KiB", 0)
        worked = spread(column["worked_kib"], 0)
        yield Line(f"{count} sites: memory per site after steps", "", f"{worked} KiB", None)
        idle = spread(column["idle_cpu"], 1)
        yield Line(f"{count} sites: CPU while all are idle", "", f"{idle} % of a core", None)
        told = f"{spread(column['step_ms'])} ms, {spread(column['step_cpu_ms'])} ms of CPU"
        yield Line(f"{count} sites: a step, divided by the number of sites", "", told, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--kib", type=int, default=64, help="of the tensor in each message that has one")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found: dict[int, list[Figures]] = {count: [] for count in given.sites}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        certificates(folder, [name_of(number) for number in range(WARM + max(given.sites))])
        for _ in range(given.rounds):
            for count in given.sites:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    asked = pool.submit(coordinator, folder, count, given.steps, given.kib * KIB)
                    found[count].append(asked.result())
    if given.json:
        print(
            json.dumps({count: [asdict(one) for one in rounds] for count, rounds in found.items()}, indent=2)
        )
        return
    table = Table(title=f"Median of {given.rounds} rounds (min-max); steps with {given.kib} KiB each way")
    headings = {
        "handshakes": "handshakes per CPU second",
        "idle_kib": "KiB per idle site",
        "worked_kib": "after steps",
        "idle_cpu": "CPU of all idle, %",
        "step_ms": "step / sites, ms",
        "step_cpu_ms": "its CPU / sites, ms",
    }
    for heading in ("sites", *headings.values()):
        table.add_column(heading, justify="right")
    for count, rounds in found.items():
        table.add_row(str(count), *(rounded([getattr(one, key) for one in rounds]) for key in headings))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
