"""What lies between two hospitals, so that a test can break it: octets on a wire, and ZeroMQ messages.

`TcpRelay` passes octets, as a router or a firewall does: it can cut connections on both sides or on one, stop
passing without closing anything (a partition), delay and throttle. `EnvelopeRelay` speaks ZeroMQ on both
sides and passes whole envelopes, which TLS protects from end to end, so that it can lose, repeat, shorten,
damage, swap and hold single ones. Both live on an event loop: the test's own, or that of `Wires`, a thread,
for tests that are not asyncio.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, Protocol, TypeVar

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

Result = TypeVar("Result")
Direction = Literal["up", "down"]
"""`up` is from the client to the coordinator."""
BOTH: tuple[Direction, Direction] = ("up", "down")
CHUNK = 1 << 16
REBIND_S = 10.0


class Relay(Protocol):
    """What both have in common."""

    port: int
    """Where the client dials."""

    async def __aenter__(self) -> Any: ...

    async def __aexit__(self, *_: object) -> None: ...

    def cut(self, *, far_side: bool = True) -> None:
        """End every connection, or only the client's half."""

    def stall(self, *directions: Direction) -> None:
        """From now on nothing passes, and nothing is closed."""

    def flow(self) -> None:
        """The end of `stall`."""


# --- octets ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Pair:
    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    half: bool = False
    """Only the near end was cut: the far one shall not notice."""


class TcpRelay:
    """TCP from one port of this machine to another.

    Args:
        target: the port that is dialled for every connection taken.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._pairs: list[_Pair] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing: dict[Direction, asyncio.Event] = {}
        self.delay_s = 0.0
        """Added to every chunk; their order stays."""
        self.octets_per_s = float("inf")
        self.connections = 0
        """Taken so far, and passed on."""

    async def __aenter__(self) -> TcpRelay:
        self._flowing = {direction: asyncio.Event() for direction in BOTH}
        self.flow()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for pair in self._pairs:
            pair.near.transport.abort()
            pair.far.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, *, far_side: bool = True) -> None:
        """End every connection; unless `far_side`, the coordinator's end stays open and falls silent."""
        for pair in list(self._pairs):
            pair.half = not far_side
            pair.near.transport.abort()
            if far_side:
                pair.far.transport.abort()

    def stall(self, *directions: Direction) -> None:
        """From now on nothing passes in `directions` (none named: both), and nothing is closed."""
        for direction in directions or BOTH:
            self._flowing[direction].clear()

    def flow(self) -> None:
        """The end of `stall`: what waited passes."""
        for event in self._flowing.values():
            event.set()

    # --- inside ----------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A connection may still be on its way to the other side when the relay ends: it ends with it.
        self._keep(asyncio.current_task())
        try:
            # Behind a partition nobody is reached; the kernel has answered all the same.
            await self._flowing["up"].wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
            return
        self.connections += 1
        pair = _Pair(writer, far_writer)
        self._pairs.append(pair)
        for direction, source, sink in (("up", reader, far_writer), ("down", far_reader, writer)):
            self._keep(asyncio.create_task(self._pump(pair, direction, source, sink)))

    def _keep(self, task: asyncio.Task[None] | None) -> None:
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pump(
        self, pair: _Pair, direction: Direction, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        loop, waiting = asyncio.get_running_loop(), asyncio.Queue[tuple[float, bytes]](64)

        async def deliver() -> None:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(due - loop.time())
                await self._flowing[direction].wait()
                if not data:
                    break
                sink.write(data)
                await sink.drain()
                if self.octets_per_s < float("inf"):
                    await asyncio.sleep(len(data) / self.octets_per_s)

        delivering = asyncio.create_task(deliver())
        try:
            data = b"-"
            while data:
                data = await source.read(CHUNK)
                await waiting.put((loop.time() + self.delay_s, data))
            await delivering
        except OSError:
            pass
        finally:
            delivering.cancel()
            await asyncio.gather(delivering, return_exceptions=True)
            if not pair.half:
                # A side that ends a connection ends it for the other side too.
                sink.close()
                with suppress(ValueError):
                    self._pairs.remove(pair)


# --- envelopes ---------------------------------------------------------------------------------------------


@dataclass
class Damage:
    """One envelope that shall not pass as it is."""

    kind: Literal["lose", "twice", "short", "flip", "swap", "hold", "snap"]
    """`snap`: it is lost, and the connections are cut."""
    direction: Direction
    after: int = 0
    """So many envelopes pass before it."""
    seconds: float = 0.0
    """For `hold`: how long it and what follows wait."""


@dataclass(eq=False)
class _Way:
    """One client connection, and the connection to the coordinator that goes with it."""

    route: bytes
    dealer: zmq.asyncio.Socket
    monitor: zmq.asyncio.Socket
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    held: dict[Direction, bytes] = field(default_factory=dict)
    """For `swap`: passes after the next one."""


class EnvelopeRelay:
    """ZeroMQ messages of one site, from a ROUTER here to a DEALER per connection there.

    A connection that ends on one side ends on the other: neither ROUTER says which it was, so the client's
    side is ended by closing the socket and binding it again. That is why there is one relay for each site.

    Args:
        target: the coordinator's port.
        seed: where an envelope is cut or damaged.
    """

    def __init__(self, target: int, seed: int = 0) -> None:
        self._target, self._random = target, Random(seed)
        self._ways: dict[bytes, _Way] = {}
        self._armed: list[Damage] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._flowing: dict[Direction, bool] = dict.fromkeys(BOTH, True)
        self.port = 0
        self.passed: dict[Direction, int] = dict.fromkeys(BOTH, 0)
        self.done: list[Damage] = []
        """What was really done."""

    async def __aenter__(self) -> EnvelopeRelay:
        # A context of its own: its I/O thread shall not share the fate of the one under test.
        self._context = zmq.asyncio.Context()
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    def arm(self, *damages: Damage) -> None:
        """Do this to envelopes to come."""
        self._armed += damages

    def cut(self, *, far_side: bool = True) -> None:
        """End every connection; unless `far_side`, the coordinator's end stays open and falls silent."""
        self._start(self._again(far_side))

    def stall(self, *directions: Direction) -> None:
        """From now on every envelope in `directions` is lost (none named: both)."""
        for direction in directions or BOTH:
            self._flowing[direction] = False

    def flow(self) -> None:
        """The end of `stall`; what was sent meanwhile is lost."""
        self._flowing = dict.fromkeys(BOTH, True)

    # --- inside ----------------------------------------------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _open(self) -> None:
        self._router: zmq.asyncio.Socket = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self._router.set_hwm(0)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router_monitor = self._router.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
        )
        ends = time.monotonic() + REBIND_S
        while True:
            try:
                self._router.bind(f"tcp://127.0.0.1:{self.port or '*'}")
                break
            except zmq.ZMQError:
                # libzmq closes sockets a little later than it says.
                if time.monotonic() > ends:
                    raise
                await asyncio.sleep(0.01)
        endpoint: bytes = self._router.getsockopt(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
        self.port = int(endpoint.decode().rstrip("\0").rpartition(":")[2])
        self._near = [self._start(self._from_client(self._router)), self._start(self._watch_client())]

    def _close(self) -> None:
        for task in self._near:
            task.cancel()
        _close(self._router, self._router_monitor)
        for way in list(self._ways.values()):
            self._leave(way)

    async def _again(self, far_side: bool) -> None:
        ways = {} if far_side else self._ways
        if not far_side:
            self._ways = {}
        self._close()
        for way in ways.values():
            # Nobody reads what the coordinator sends there.
            way.tasks[0].cancel()
            self._tasks.add(asyncio.create_task(_keep(way)))
        await self._open()

    def _leave(self, way: _Way) -> None:
        if self._ways.get(way.route) is way:
            del self._ways[way.route]
        for task in way.tasks:
            if task is not asyncio.current_task():
                task.cancel()
        _close(way.dealer, way.monitor)

    async def _from_client(self, router: zmq.asyncio.Socket) -> None:
        while True:
            frames = await router.recv_multipart()
            if len(frames) != 2:
                continue
            route, data = frames
            way = self._ways.get(route)
            if way is None:
                for older in list(self._ways.values()):
                    self._leave(older)
                way = self._join(route)
            await self._pass("up", way, data)

    def _join(self, route: bytes) -> _Way:
        dealer: zmq.asyncio.Socket = self._context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.set_hwm(0)
        dealer.setsockopt(zmq.RECONNECT_IVL, -1)
        monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        way = self._ways[route] = _Way(route, dealer, monitor)
        dealer.connect(f"tcp://127.0.0.1:{self._target}")
        way.tasks += [self._start(self._watch_far(way)), self._start(self._from_far(way))]
        return way

    async def _from_far(self, way: _Way) -> None:
        while True:
            await self._pass("down", way, await way.dealer.recv())

    async def _watch_far(self, way: _Way) -> None:
        """The coordinator's end is gone: so is the client's."""
        await way.monitor.recv_multipart()
        self._leave(way)
        self._start(self._again(True))

    async def _watch_client(self) -> None:
        connected = 0
        while True:
            happened = parse_monitor_message(await self._router_monitor.recv_multipart())
            connected += 1 if happened["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED else -1
            if connected <= 0:
                for way in list(self._ways.values()):
                    self._leave(way)

    async def _pass(self, direction: Direction, way: _Way, data: bytes) -> None:
        self.passed[direction] += 1
        if not self._flowing[direction]:
            return
        out = await self._damaged(direction, way, data)
        for octets in out:
            try:
                if direction == "up":
                    await way.dealer.send(octets)
                else:
                    await self._router.send_multipart((way.route, octets))
            except zmq.ZMQError:
                # The client of this way has gone; the monitor will say so.
                return

    async def _damaged(self, direction: Direction, way: _Way, data: bytes) -> list[bytes]:
        """What goes out in the place of `data`, in this order."""
        due = None
        for damage in self._armed:
            if damage.direction != direction:
                continue
            if damage.after == 0 and due is None:
                due = damage
            else:
                damage.after = max(damage.after - 1, 0)
        earlier = way.held.pop(direction, None)
        out = [data]
        if due is not None:
            self._armed.remove(due)
            self.done.append(due)
            if due.kind == "lose":
                out = []
            elif due.kind == "twice":
                out = [data, data]
            elif due.kind == "short":
                out = [data[: self._random.randrange(len(data))]]
            elif due.kind == "flip":
                changed, place = bytearray(data), self._random.randrange(8 * len(data))
                changed[place // 8] ^= 1 << place % 8
                out = [bytes(changed)]
            elif due.kind == "swap":
                way.held[direction] = data
                out = []
            elif due.kind == "snap":
                out = []
                self.cut()
            else:
                await asyncio.sleep(due.seconds)
        return out if earlier is None else [*out, earlier]


async def _keep(way: _Way) -> None:
    """Hold one end open until the relay closes."""
    try:
        await asyncio.Event().wait()
    finally:
        _close(way.dealer, way.monitor)


def _close(socket: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket) -> None:
    if socket.closed:
        return
    # In this order: libzmq's I/O thread waits for ever to report to a monitor that nobody holds.
    socket.disable_monitor()
    if not monitor.closed:
        monitor.close(linger=0)
    socket.close(linger=0)


# --- a thread for them ---------------------------------------------------------------------------------------


class Wires:
    """An event loop in a thread: relays for tests that are not asyncio themselves. A context manager."""

    def __enter__(self) -> Wires:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wires", daemon=True)
        self._thread.start()
        self._relays: list[Relay] = []
        return self

    def __exit__(self, *_: object) -> None:
        for relay in self._relays:
            self._run(relay.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def lay(self, relay: Relay) -> None:
        """Start a relay; it ends with the thread."""
        self._run(relay.__aenter__())
        self._relays.append(relay)

    def do(self, verb: Callable[..., Result], *arguments: Any, **keywords: Any) -> Result:
        """Call a relay's method where the relay lives."""

        async def call() -> Result:
            return verb(*arguments, **keywords)

        return self._run(call())

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)
