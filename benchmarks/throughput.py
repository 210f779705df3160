"""Tensors over the wire: splitproto and its peers, measured in turns in one run.

The peers are a bare TLS 1.3 socket, a gRPC stream if grpcio is installed (peers.txt), and ZeroMQ, both with CURVE and
unencrypted. One process asks for a message and stops the clock when all its tensors lie in arrays of their own; another
one sends. TLS is mutual, with the same certificates, for all that have it. Loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import functools
import importlib.util
import io
import json
import multiprocessing
import pstats
import queue
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Protocol

import numpy as np
import zmq
from rich.console import Console
from rich.table import Table
from rows import Found, Line, at_least, at_most, ratios, spread
from working import DIGEST, HUB, MIB, PATIENT, WAIT_S, begin, certificates, credentials, join

from splitproto import AllowList, Listener, Session, dial
from splitproto.allocator import keep_freed_memory
from splitproto.messages import Activations, Forward
from splitproto.records import Sample

Shapes = tuple[tuple[int, ...], ...]


def skips(features: tuple[int, ...], batch: int, side: int) -> Shapes:
    """The five levels that one U-Net encoder sends for a batch of square slices."""
    return tuple((batch, width, side >> n, side >> n) for n, width in enumerate(features))


CASES: dict[str, Shapes] = {
    "1 MiB": ((MIB // 4,),),
    "8 MiB": ((8 * MIB // 4,),),
    "64 MiB": ((64 * MIB // 4,),),
    "256 MiB": ((256 * MIB // 4,),),
    "skips, 8 x 96x96, widths 8..64": skips((8, 8, 16, 32, 64), 8, 96),
    "skips, 1 x 240x240, widths 32..256": skips((32, 32, 64, 128, 256), 1, 240),
}


def nbytes(shapes: Shapes) -> int:
    return sum(4 * int(np.prod(shape)) for shape in shapes)


@functools.lru_cache(1)
def payload(number: int) -> dict[str, np.ndarray]:
    """Tensors of one case. Only the last case's are cached, so a process that waits for its turn holds no more."""
    rng, shapes = np.random.default_rng(0), list(CASES.values())[number]
    return {f"x{n}": rng.standard_normal(shape, np.float32) for n, shape in enumerate(shapes)}


def empty(shapes: Shapes) -> list[memoryview]:
    """New arrays for one message, as octets: a training step keeps what it receives."""
    return [np.empty(shape, np.float32).reshape(-1).view(np.uint8).data for shape in shapes]


class Transport(Protocol):
    """The listening end of one way to move tensors."""

    def fetch(self, case: str, times: int) -> None:
        """Ask for the message of a case, `times` in a row, and wait until each is here."""
        ...

    def close(self) -> None: ...


# --- splitproto -------------------------------------------------------------------------------------------------


class Ours:
    def __init__(self, folder: Path, spawn: Callable[[Callable[..., None], object], None]) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self._open(folder, spawn))

    async def _open(self, folder: Path, spawn: Callable[[Callable[..., None], object], None]) -> None:
        allow = AllowList({"client": {"sender"}}, "benchmark")
        self.listener = Listener("tcp://127.0.0.1:0", credentials(folder, HUB), allow, timing=PATIENT)
        await self.listener.__aenter__()
        spawn(ours_sender, self.listener.address)
        self.session: Session = await self.listener.accept(WAIT_S)
        await begin(self.session)

    def fetch(self, case: str, times: int) -> None:
        self.loop.run_until_complete(self._fetch(list(CASES).index(case), times))

    async def _fetch(self, case: int, times: int) -> None:
        for _ in range(times):
            await self.session.send(Forward("evaluate", 0, case, (Sample(bytes(16), (0, 0, 0)),), DIGEST))
            message = await self.session.receive(WAIT_S)
            if not isinstance(message, Activations):
                raise TypeError(f"a {message.name} where activations were due")

    def close(self) -> None:
        self.loop.run_until_complete(self.session.close("complete"))
        self.loop.run_until_complete(self.listener.__aexit__(None, None, None))
        self.loop.close()


def ours_sender(folder: Path, address: str) -> None:
    async def run() -> None:
        allow = AllowList({"coordinator": {"hub"}}, "benchmark")
        session = await dial(address, credentials(folder, "sender"), allow, timing=PATIENT)
        await join(session)
        while isinstance(asked := await session.receive(3600), Forward):
            await session.send(Activations("evaluate", 0, asked.batch, DIGEST, payload(asked.batch)))
        await session.close("complete")

    asyncio.run(run())


# --- a TLS socket -----------------------------------------------------------------------------------------------


class TlsSocket:
    def __init__(self, folder: Path, spawn: Callable[[Callable[..., None], object], None]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            spawn(tls_sender, server.getsockname()[1])
            plain, _ = server.accept()
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = credentials(folder, HUB).server_context().wrap_socket(plain, server_side=True)

    def fetch(self, case: str, times: int) -> None:
        for _ in range(times):
            self.socket.sendall(bytes([list(CASES).index(case)]))
            for target in empty(CASES[case]):
                while target:
                    target = target[self.socket.recv_into(target) :]

    def close(self) -> None:
        self.socket.close()


def tls_sender(folder: Path, port: int) -> None:
    plain = socket.create_connection(("127.0.0.1", port))
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    context = credentials(folder, "sender").client_context()
    with context.wrap_socket(plain, server_hostname="127.0.0.1") as stream:
        while asked := stream.recv(1):
            for array in payload(asked[0]).values():
                stream.sendall(array.reshape(-1).view(np.uint8).data)


# --- gRPC ---------------------------------------------------------------------------------------------------------

CHUNK = MIB
"""Octets per message of the stream: the fastest of 64 KiB to 4 MiB here. gRPC's default limit is 4 MiB."""
GRPC = (("grpc.optimization_target", "throughput"), ("grpc.max_receive_message_length", -1))


class GrpcStream:
    """One bidirectional stream of bytes, without protobuf; the second process is the server."""

    def __init__(self, folder: Path, spawn: Callable[[Callable[..., None], object], None]) -> None:
        import grpc

        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        spawn(grpc_sender, port)
        own = grpc.ssl_channel_credentials(
            *((folder / name).read_bytes() for name in ("ca.crt", "sender.key", "sender.crt"))
        )
        self.channel = grpc.secure_channel(f"127.0.0.1:{port}", own, GRPC)
        grpc.channel_ready_future(self.channel).result(WAIT_S)
        self.asked: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.chunks = self.channel.stream_stream("/benchmark/fetch")(iter(self.asked.get, None))

    def fetch(self, case: str, times: int) -> None:
        for _ in range(times):
            self.asked.put(bytes([list(CASES).index(case)]))
            for target in empty(CASES[case]):
                while target:
                    chunk = next(self.chunks)
                    target[: len(chunk)] = chunk
                    target = target[len(chunk) :]

    def close(self) -> None:
        self.asked.put(None)
        for _ in self.chunks:
            pass
        self.channel.close()


def grpc_sender(folder: Path, port: int) -> None:
    import grpc

    done = threading.Event()

    def fetch(asked: Iterator[bytes], _: object) -> Iterator[bytes]:
        for case in asked:
            for array in payload(case[0]).values():
                octets = array.reshape(-1).view(np.uint8).data
                for start in range(0, len(octets), CHUNK):
                    yield octets[start : start + CHUNK].tobytes()
        done.set()

    handler = grpc.stream_stream_rpc_method_handler(fetch)
    server = grpc.server(ThreadPoolExecutor(1), options=GRPC)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark", {"fetch": handler}),))
    pair = ((folder / "hub.key").read_bytes(), (folder / "hub.crt").read_bytes())
    own = grpc.ssl_server_credentials([pair], (folder / "ca.crt").read_bytes(), require_client_auth=True)
    server.add_secure_port(f"127.0.0.1:{port}", own)
    server.start()
    done.wait()
    server.stop(5).wait()


# --- ZeroMQ -----------------------------------------------------------------------------------------------------


class PlainZeroMQ:
    curve = False

    def __init__(self, folder: Path, spawn: Callable[[Callable[..., None], object], None]) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PAIR)
        public = b""
        if self.curve:
            public, self.socket.curve_secretkey = zmq.curve_keypair()
            self.socket.curve_server = True
        spawn(zeromq_sender, (self.socket.bind_to_random_port("tcp://127.0.0.1"), public))

    def fetch(self, case: str, times: int) -> None:
        for _ in range(times):
            self.socket.send(bytes([list(CASES).index(case)]))
            # libzmq received each tensor into memory of its own: another copy would only flatter us.
            frames = self.socket.recv_multipart(copy=False)
            for frame, shape in zip(frames, CASES[case], strict=True):
                np.frombuffer(frame.buffer, np.float32).reshape(shape)

    def close(self) -> None:
        self.socket.send(b"")
        self.socket.close(linger=1000)
        self.context.term()


class CurveZeroMQ(PlainZeroMQ):
    curve = True


def zeromq_sender(folder: Path, where: tuple[int, bytes]) -> None:
    port, server = where
    with zmq.Context() as context, context.socket(zmq.PAIR) as stream:
        if server:
            stream.curve_publickey, stream.curve_secretkey = zmq.curve_keypair()
            stream.curve_serverkey = server
        stream.connect(f"tcp://127.0.0.1:{port}")
        while asked := stream.recv():
            stream.send_multipart([array.data for array in payload(asked[0]).values()], copy=False)


# --- the run ----------------------------------------------------------------------------------------------------

TRANSPORTS: dict[str, Callable[[Path, Callable[[Callable[..., None], object], None]], Transport]] = {
    "splitproto": Ours,
    "TLS socket": TlsSocket,
    **({"gRPC": GrpcStream} if importlib.util.find_spec("grpc") else {}),
    "CURVE": CurveZeroMQ,
    "ZeroMQ, no TLS": PlainZeroMQ,
}


@dataclass(frozen=True)
class Figures:
    """One transport and case, round by round."""

    rates: list[float]
    """MiB/s."""
    costs: list[float]
    """CPU seconds per GiB, both processes and all their threads: steadier than rates on a busy machine."""

    def __str__(self) -> str:
        rates = f"{statistics.median(self.rates):.0f} ({min(self.rates):.0f}-{max(self.rates):.0f})"
        return f"{rates}  {statistics.median(self.costs):.1f}"


def cpu_seconds(pid: int) -> float:
    """User and system time of a process (Linux: clock_getcpuclockid)."""
    return time.clock_gettime((~pid << 3) | 2)


def sender(target: Callable[..., None], folder: Path, where: object, profiled: Pipe | None) -> None:
    """The second process."""
    # As the daemons do.
    keep_freed_memory()
    if profiled is None:
        target(folder, where)
        return
    with cProfile.Profile() as profile:
        target(folder, where)
    profiled.send(report(profile))


def report(profile: cProfile.Profile) -> str:
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(14)
    return "\n".join(line for line in text.getvalue().splitlines() if line.strip())


def start(
    name: str, folder: Path, stack: ExitStack, profiled: Pipe | None = None
) -> tuple[Transport, Callable[[], float]]:
    """The listening end, and a clock of the CPU time of both ends."""
    processes = multiprocessing.get_context("spawn")
    pids: list[int] = []

    def spawn(target: Callable[..., None], where: object) -> None:
        process = processes.Process(target=sender, args=(target, folder, where, profiled), daemon=True)
        process.start()
        pids.append(process.pid or 0)
        stack.callback(process.join, 20)

    transport = TRANSPORTS[name](folder, spawn)
    stack.callback(transport.close)
    return transport, lambda: time.process_time() + sum(cpu_seconds(pid) for pid in pids)


def measure(folder: Path, cases: list[str], rounds: int, mib: int) -> dict[str, dict[str, Figures]]:
    figures = {case: {name: Figures([], []) for name in TRANSPORTS} for case in cases}
    with ExitStack() as stack:
        transports = {name: start(name, folder, stack) for name in TRANSPORTS}
        for case in cases:
            for turn in range(rounds + 1):
                times = max(1, mib * MIB // nbytes(CASES[case]))
                moved = times * nbytes(CASES[case]) / MIB
                for name, (transport, cpu) in transports.items():
                    began, spent = time.perf_counter(), cpu()
                    transport.fetch(case, times)
                    took, spent = time.perf_counter() - began, cpu() - spent
                    if turn:  # the first round warms up
                        figures[case][name].rates.append(moved / took)
                        figures[case][name].costs.append(spent / moved * 1024)
    return figures


def profile(folder: Path, case: str, mib: int) -> None:
    """Where splitproto's time goes, at both ends (the profiler itself slows Python down, not OpenSSL)."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    with ExitStack() as stack:
        transport, _ = start("splitproto", folder, stack, theirs)
        with cProfile.Profile() as watching:
            transport.fetch(case, max(1, mib * MIB // nbytes(CASES[case])))
    print(f"--- receiving, {case}\n{report(watching)}\n--- sending\n{ours.recv()}")


def ratio(figures: dict[str, Figures], other: str) -> str:
    """splitproto by the other, of the same round: median of the rates, of the CPU costs."""
    ours, theirs = figures["splitproto"], figures[other]
    pairs = ((ours.rates, theirs.rates), (ours.costs, theirs.costs))
    medians = (statistics.median(a / b for a, b in zip(*pair, strict=True)) for pair in pairs)
    return "  ".join(f"{median:.2f}" for median in medians)


ABOUT = (
    "Tensors are moved from one process to another: messages of one tensor, or of the skip connections of a network",
    "for one batch.",
    "CPU time is that of both processes.",
)

NAMES = {"TLS socket": "a bare TLS socket", "gRPC": "gRPC", "CURVE": "ZeroMQ with CURVE"}
"""Of the other transports."""


def rows(found: Found) -> Iterator[Line]:
    """Rates and CPU time, and their ratios to those of other transports in the same round."""
    for case, row in found["cases"].items():
        ours = row["splitproto"]
        own = f"{spread(ours['rates'], 0)} MiB/s, {spread(ours['costs'])} CPU s/GiB"
        yield Line(f"{case}: splitproto", "", own, None)
        for peer, target in (("TLS socket", 0.95), ("gRPC", 1.3), ("CURVE", 1.3)):
            if peer in row:
                yield at_least(
                    f"{case}: rate / rate of {NAMES[peer]}", ratios(ours["rates"], row[peer]["rates"]), target
                )
        yield at_most(
            f"{case}: CPU / CPU of {NAMES['TLS socket']}",
            ratios(ours["costs"], row["TLS socket"]["costs"]),
            1.15,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, default=128, help="moved per transport, case and round")
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--profile", action="store_true", help="of splitproto alone, instead of figures")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    keep_freed_memory()
    cases = given.case or list(CASES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        certificates(folder, ["sender"])
        if given.profile:
            for case in cases:
                profile(folder, case, given.mib)
            return
        figures = measure(folder, cases, given.rounds, given.mib)
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported: the protocol library must do without")
    if given.json:
        rows = {case: {name: vars(f) for name, f in row.items()} for case, row in figures.items()}
        units = {"rates": "MiB/s", "costs": "CPU seconds per GiB"}
        print(json.dumps({"units": units, "rounds": given.rounds, "cases": rows}, indent=2))
        return
    table = Table(title=f"MiB/s: median of {given.rounds} rounds (min-max); CPU seconds per GiB")
    others = list(TRANSPORTS)[1:]
    for heading in ("message", *TRANSPORTS, *(f"ours / {other}" for other in others)):
        table.add_column(heading, justify="left" if heading == "message" else "right")
    for case, row in figures.items():
        ratios = (ratio(row, other) for other in others)
        table.add_row(case, *(str(row[name]) for name in TRANSPORTS), *ratios)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    main()
