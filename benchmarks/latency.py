"""How long a small request takes, on an idle link and beside 256 MiB of tensors; and how much memory receiving takes.

The coordinator sends a request (`advance`) and stops the clock when the site's answer (`advanced`) arrives; the site is
a process of its own. For comparison, the same over a bare TLS 1.3 socket with the same certificates: as many octets,
blocking calls, no event loop. "Loaded" means that the coordinator is sending one message with tensors meanwhile.
Then, in a new process for each measurement: how far the site's memory grows at most while one message arrives, divided
by the size of the tensors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rows import Found, Line, at_most, ratios, rounded, spread
from working import HUB, MIB, PATIENT, WAIT_S, begin, certificates, credentials, forget_peak, join, memory

from splitproto import AllowList, Listener, Session, dial
from splitproto.allocator import keep_freed_memory
from splitproto.messages import Advance, Advanced, Applied, Gradients

SITE = "site"
OCTETS = 32
"""Size of a request on the bare socket: that of `advance` with the header of its frame."""
WARM = 64 * 1024
"""Octets of a tensor that is received before memory is measured."""

Target = Callable[[Path, int], None]
Asked = tuple[float, int]
"""Seconds that one request took, and octets that were sent meanwhile."""


@dataclass
class Waits:
    """Milliseconds from a request to its answer, and MiB that were sent meanwhile: p50 and p99 of each round."""

    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    sent50: list[float] = field(default_factory=list)
    """What was queued before or behind the request: steadier than milliseconds on a busy machine."""
    sent99: list[float] = field(default_factory=list)
    count: int = 0

    def add(self, asked: list[Asked]) -> None:
        """One round."""
        waits, sent = (statistics.quantiles(column, n=100) for column in zip(*asked, strict=True))
        self.p50.append(1e3 * waits[49])
        self.p99.append(1e3 * waits[98])
        self.sent50.append(sent[49] / MIB)
        self.sent99.append(sent[98] / MIB)
        self.count += len(asked)


# --- the site ---------------------------------------------------------------------------------------------------


def site(folder: Path, port: int) -> None:
    """Answers every request."""
    keep_freed_memory()

    async def run() -> None:
        allow = AllowList({"coordinator": {HUB}}, "benchmark")
        session = await dial(f"tcp://127.0.0.1:{port}", credentials(folder, SITE), allow, timing=PATIENT)
        await join(session)
        while isinstance(asked := await session.receive(3600), Advance | Gradients):
            await session.send((Advanced if isinstance(asked, Advance) else Applied)(asked.step))
        await session.close("complete")

    asyncio.run(run())


def tls_site(folder: Path, port: int) -> None:
    """The same over a bare socket."""
    plain = socket.create_connection(("127.0.0.1", port))
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    context = credentials(folder, SITE).client_context()
    with context.wrap_socket(plain, server_hostname="127.0.0.1") as stream:
        while asked := stream.recv(OCTETS):
            stream.sendall(asked)


@contextmanager
def process(target: Target, folder: Path, port: int) -> Iterator[BaseProcess]:
    """A site's process; waits until it has ended by itself."""
    started = multiprocessing.get_context("spawn").Process(target=target, args=(folder, port), daemon=True)
    started.start()
    yield started
    started.join(20)


# --- the coordinator ---------------------------------------------------------------------------------------------


async def ask(session: Session) -> Asked:
    """One request."""
    began, sent = time.perf_counter(), session.bytes_out
    await session.send(Advance(1))
    while not isinstance(await session.receive(WAIT_S), Advanced):
        pass  # what came was the answer to a message with tensors
    return time.perf_counter() - began, session.bytes_out - sent


async def beside(session: Session, tensors: dict[str, np.ndarray], times: int) -> list[Asked]:
    """Each request that began while a message with these tensors was being sent."""
    asked = []
    for _ in range(times):
        sending = asyncio.create_task(session.send(Gradients(1, tensors)))
        await asyncio.sleep(0)
        while not sending.done():
            asked.append(await ask(session))
        await sending
    await ask(session)
    return asked


def ask_tls(stream: socket.socket) -> Asked:
    began = time.perf_counter()
    stream.sendall(bytes(OCTETS))
    left = OCTETS
    while left:
        left -= len(stream.recv(left))
    return time.perf_counter() - began, OCTETS


@contextmanager
def tls_link(folder: Path) -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server, process(tls_site, folder, server.getsockname()[1]):
        plain, _ = server.accept()
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with credentials(folder, HUB).server_context().wrap_socket(plain, server_side=True) as stream:
            yield stream


def listener(folder: Path) -> Listener:
    allow = AllowList({"client": {SITE}}, "benchmark")
    return Listener("tcp://127.0.0.1:0", credentials(folder, HUB), allow, timing=PATIENT)


def port_of(door: Listener) -> int:
    return int(door.address.rpartition(":")[2])


async def waits(folder: Path, given: argparse.Namespace) -> dict[str, Waits]:
    """All rounds; within each, the kinds of requests take turns."""
    found = {kind: Waits() for kind in ("idle", "TLS socket, idle", "loaded")}
    tensors = {"x0": np.zeros(given.mib * MIB // 4, np.float32)}
    async with listener(folder) as door:
        with process(site, folder, port_of(door)), tls_link(folder) as stream:
            session = await door.accept(WAIT_S)
            await begin(session)
            for turn in range(given.rounds + 1):
                idle = [await ask(session) for _ in range(given.requests)]
                bare = [ask_tls(stream) for _ in range(given.requests)]
                loaded = await beside(session, tensors, given.messages)
                if turn:  # the first round warms up
                    for kind, asked in zip(found, (idle, bare, loaded), strict=True):
                        found[kind].add(asked)
            await session.close("complete")
    return found


async def peak(folder: Path, octets: int) -> float:
    """Growth of a site's memory, up to the peak while one message arrives, divided by the message's octets."""
    async with listener(folder) as door:
        with process(site, folder, port_of(door)) as receiving:
            session, pid = await door.accept(WAIT_S), receiving.pid or 0
            await begin(session)
            await received(session, WARM)
            before = memory(pid)
            forget_peak(pid)
            await received(session, octets)
            most = memory(pid, "VmHWM")
            await session.close("complete")
    return (most - before) / octets


async def received(session: Session, octets: int) -> None:
    """Send a tensor of so many octets, and wait until it has been received."""
    await session.send(Gradients(1, {"x0": np.ones(octets // 4, np.float32)}))
    while not isinstance(await session.receive(WAIT_S), Applied):
        pass


def show(found: dict[str, Waits], peaks: dict[int, list[float]], rounds: int) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title=f"One request and its answer, ms: median of {rounds} rounds (min-max)")
    for heading in ("", "p50", "p99", "p99 / p50", "p50 / TLS socket", "MiB sent: p50", "p99", "requests"):
        table.add_column(heading, justify="right" if heading else "left")
    bare = found["TLS socket, idle"].p50
    for kind, row in found.items():
        ratios = (
            [a / b for a, b in zip(*pair, strict=True)] for pair in ((row.p99, row.p50), (row.p50, bare))
        )
        cells = (row.p50, row.p99, *ratios, row.sent50, row.sent99)
        table.add_row(kind, *map(rounded, cells), str(row.count))
    console.print(table)
    table = Table(title="Growth of memory while one message arrives / size of its tensors")
    for mib in peaks:
        table.add_column(f"{mib} MiB", justify="right")
    table.add_row(*(rounded(ratios) for ratios in peaks.values()))
    console.print(table)


ABOUT = (
    "A coordinator sends a small request and waits for the site's answer. p50 is the median of one round's requests,",
    "p99 their 99th percentile.",
)

LINKS = {
    "idle": "idle link",
    "TLS socket, idle": "idle bare TLS socket",
    "loaded": "link that is sending 256 MiB of tensors",
}


def rows(found: Found) -> Iterator[Line]:
    """How long a small request waits for its answer, and what receiving takes of memory."""
    waits = found["waits"]
    for kind, row in waits.items():
        told = f"p50 {spread(row['p50'])} ms, p99 {spread(row['p99'])} ms"
        yield Line(f"small request and its answer, {LINKS[kind]}", "", told, None)
    loaded, quick = waits["loaded"], waits["idle"]["p50"]
    told = f"p50 {spread(loaded['sent50'], 1)} MiB, p99 {spread(loaded['sent99'], 1)} MiB"
    yield Line("loaded link: MiB that it sends between request and answer", "", told, None)
    yield at_most("idle link: p99 / p50", ratios(waits["idle"]["p99"], quick), 3)
    yield at_most("p99 of the loaded link / p50 of the idle link", ratios(loaded["p99"], quick), 3)
    for size, peaks in found["peaks"].items():
        yield at_most(f"receiving {size} MiB of tensors: extra memory at the peak / their size", peaks, 1.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=1000, help="on the idle links, in each round")
    parser.add_argument("--messages", type=int, default=4, help="with tensors, in each round")
    parser.add_argument("--mib", type=int, default=256, help="tensors of one such message")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256], help="MiB, for the memory")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        certificates(folder, [SITE])
        found = asyncio.run(waits(folder, given))
        peaks: dict[int, list[float]] = {mib: [] for mib in given.sizes}
        for _ in range(given.rounds):
            for mib in given.sizes:
                peaks[mib].append(asyncio.run(peak(folder, mib * MIB)))
    if given.json:
        units = {
            "waits": "p50, p99: ms; sent50, sent99: MiB",
            "peaks": "memory by tensors, for each size in MiB",
        }
        rows = {kind: vars(row) for kind, row in found.items()}
        print(json.dumps({"units": units, "waits": rows, "peaks": peaks}, indent=2))
        return
    show(found, peaks, given.rounds)


if __name__ == "__main__":
    main()
