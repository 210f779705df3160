"""ZeroMQ without ZeroMQ: ROUTER, DEALER and their monitors over lines in memory, on which faults act.

What `splitproto.lanes.zeromq` does with its sockets is real, and so is everything above: door, links, TLS, sessions.
This file is what lies below: TCP connections that are slow, keep their order, fill up, break on both sides or on one,
fall silent, or pass through an attacker who loses, repeats, cuts, alters, reorders or forges envelopes.

A machine is named by its host: "hub" or a site. Lines belong to a `Life`; when it ends, so do they.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextvars import Context
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import zmq

from splitproto import envelope
from splitproto.envelope import ResetReason
from splitproto.lanes.tcp import QUEUE

from .virtual import LIFE, Life, VirtualLoop

IN_FLIGHT = 4
"""Messages that TCP itself holds, apart from both queues."""
HEARTBEAT = (20.0, 25.0)
"""libzmq gives up a line that was silent for this long (HEARTBEAT_IVL, HEARTBEAT_TIMEOUT)."""
LINGER = 0.5
POLL = 0.25
Kind = Literal["lost", "twice", "cut", "flipped", "swapped", "reset"]


class Frame:
    """One part of a message."""

    def __init__(self, data: bytes, source: str = "") -> None:
        self.bytes, self._source = data, source
        self.more = False

    @property
    def buffer(self) -> memoryview:
        return memoryview(self.bytes)

    def __len__(self) -> int:
        return len(self.bytes)

    def get(self, name: str | int) -> str | int:
        return -1 if name == zmq.SRCFD else self._source


class Pipe:
    """One direction of a line: `put` at the source, arrives at the target, in order."""

    def __init__(self, network: Network, source: End, target: End) -> None:
        self.network, self.source, self.target = network, source, target
        self.waiting: deque[tuple[float, bytes | None]] = deque()  # None: the source has closed
        self.unread = 0
        self.silent_since: float | None = None
        self._last = 0.0
        self._swapped: bytes | None = None

    @property
    def full(self) -> bool:
        return len(self.waiting) >= QUEUE + IN_FLIGHT

    def put(self, data: bytes | None) -> None:
        if data is None:
            self._append(None)
            return
        for piece in self.network.tampered(self, data):
            self._append(piece)

    def _append(self, data: bytes | None) -> None:
        self._last = max(self._last, self.network.now + self.network.latency(self))
        self.waiting.append((self._last, data))
        self.network.at(self._last, self.pump)

    def swap(self, data: bytes) -> list[bytes]:
        """`data` waits until the next message has gone before it, or for a while."""
        self._swapped = data
        self.network.at(self.network.now + 1.0, self._unswap)
        return []

    def _unswap(self) -> None:
        if (late := self._swapped) is not None:
            self._swapped = None
            self._append(late)

    def take_swapped(self) -> list[bytes]:
        late, self._swapped = self._swapped, None
        return [] if late is None else [late]

    def pump(self) -> None:
        """Deliver what is due."""
        while self.waiting and self.waiting[0][0] <= self.network.now and not self.network.blocked(self):
            data = self.waiting[0][1]
            if data is not None and self.unread >= QUEUE:
                return
            self.waiting.popleft()
            if data is None:
                self.target.lost()
            elif self.target.open:
                self.unread += 1
                self.target.arrived(data)

    def cut(self, keep: int = 0) -> None:
        """Lose what is on its way, but for the first `keep` messages."""
        while len(self.waiting) > keep:
            self.waiting.pop()
        self._swapped = None


class End:
    """One side of a line."""

    def __init__(self, socket: Socket) -> None:
        self.socket = socket
        self.open = True
        self.route = b""
        self.out: Pipe
        self.back: Pipe

    @property
    def life(self) -> Life:
        return self.socket.life

    def arrived(self, data: bytes) -> None:
        source = f"{self.out.target.life.name}"
        frames = [Frame(data, source)]
        if self.route:
            frames.insert(0, Frame(self.route, source))
        self.socket.take(frames, self.back)

    def lost(self) -> None:
        """The connection is gone, and this side finds out."""
        if self.open:
            self.open = False
            self.back.cut()
            self.out.cut()
            # The other side hears of it when it sends or waits.
            self.out.put(None)
            self.socket.line_lost(self)

    def close(self) -> None:
        """This side ends it; what it sent before still goes out, if it goes soon."""
        if self.open:
            self.open = False
            self.back.cut()
            self.out.put(None)
            self.out.network.at(self.out.network.now + LINGER, self._lingered)

    def _lingered(self) -> None:
        if any(data is not None for _, data in self.out.waiting):
            self.out.cut()
            self.out.put(None)


class Socket:
    """What `splitproto.lanes.zeromq` uses of a `zmq.Socket`. Belongs to the life that made it."""

    def __init__(self, network: Network, kind: int) -> None:
        life = LIFE.get()
        assert life is not None, "a socket of nobody"
        self.network, self.kind, self.life = network, kind, life
        self.closed = False
        self.linger = 0
        self.ends: dict[bytes, End] = {}
        self._monitor: Monitor | None = None
        self._queue: deque[tuple[list[Frame], Pipe | None]] = deque()
        self._parts: deque[Frame] = deque()  # of the message that is being read
        self._call: Callable[[], asyncio.Handle] | None = None
        self._signal: asyncio.Handle | None = None
        self._fd = network.descriptor(self._told)
        self._routes = count(1)
        self._port = 0
        network.sockets.append(self)

    # --- options -----------------------------------------------------------------------------------------

    def set_hwm(self, value: int) -> None:
        return

    def setsockopt(self, option: int, value: object) -> None:
        return

    def getsockopt(self, option: int) -> int | bytes:
        if option == zmq.EVENTS:
            self._swallow()
            return zmq.POLLIN if self._queue or self._parts else 0
        return self._fd if option == zmq.FD else f"tcp://127.0.0.1:{self._port}\0".encode()

    def set(self, option: int, value: object) -> None:
        return

    @property
    def context(self) -> Socket:
        """What makes a socket for this one's reports."""
        return self

    def socket(self, kind: int) -> Monitor:
        assert kind == zmq.PAIR
        self._monitor = Monitor(self.network, self._reported)
        return self._monitor

    def monitor(self, address: str, events: int) -> None:
        self._reported = events

    def disable_monitor(self) -> None:
        self._monitor = None

    # --- readiness: edge-triggered, and a send may swallow it -----------------------------------------------

    def _told(self, call: Callable[[], asyncio.Handle] | None) -> None:
        self._call = call

    def _report(self) -> None:
        if self._call is not None and self._signal is None:
            self._signal = self._call()

    def _swallow(self) -> None:
        if self._signal is not None:
            self._signal.cancel()
            self._signal = None

    def take(self, frames: list[Frame], pipe: Pipe | None) -> None:
        """Something arrived."""
        if not self.closed:
            self._queue.append((frames, pipe))
            self._report()

    def recv(self, flags: int, copy: bool = True) -> Frame:
        self._signal = None
        if self._parts:
            return self._parts.popleft()
        if not self._queue:
            raise zmq.Again
        frames, pipe = self._queue.popleft()
        for frame in frames[:-1]:
            frame.more = True
        if pipe is not None:
            pipe.unread -= 1
            pipe.pump()
        self._parts.extend(frames)
        return self._parts.popleft()

    # --- lines -------------------------------------------------------------------------------------------

    def connect(self, address: str) -> None:
        self.network.connect(self, int(address.rpartition(":")[2]))

    def bind(self, address: str) -> None:
        port = int(address.rpartition(":")[2])
        if port in self.network.listening:
            raise zmq.ZMQError(zmq.EADDRINUSE)
        self._port = port
        self.network.listening[port] = self

    def unbind(self, address: bytes) -> None:
        self.network.listening.pop(self._port, None)

    def accepted(self, end: End) -> None:
        """A new line; as a ROUTER it gets a route."""
        if self.kind == zmq.ROUTER:
            end.route = b"\0" + next(self._routes).to_bytes(4, "big")
        self.ends[end.route] = end

    def line_lost(self, end: End) -> None:
        self.ends.pop(end.route, None)
        self.happened(zmq.EVENT_DISCONNECTED)

    def happened(self, event: int) -> None:
        if self._monitor is not None and self._monitor.events & event:
            self._monitor.take([Frame(struct.pack("=hi", event, 0)), Frame(b"")], None)

    def send(self, data: bytes, flags: int, copy: bool = True) -> None:
        self._swallow()
        end = self.ends.get(b"")
        if end is None or end.out.full:
            raise zmq.Again
        end.out.put(bytes(data))

    def send_multipart(self, parts: tuple[bytes, bytes], flags: int, copy: bool = True) -> None:
        self._swallow()
        end = self.ends.get(parts[0])
        if end is None:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        if end.out.full:
            raise zmq.Again
        end.out.put(bytes(parts[1]))

    def close(self, linger: int = 0) -> None:
        if not self.closed:
            self.closed = True
            self._call = None
            for end in list(self.ends.values()):
                end.close()
            self.ends.clear()
            self.network.forget(self)


class Monitor(Socket):
    """Tells what happens to another socket's lines."""

    def __init__(self, network: Network, events: int) -> None:
        super().__init__(network, zmq.PAIR)
        self.events = events

    def connect(self, address: str) -> None:
        """To the socket that made it."""


@dataclass
class Tamper:
    """Somebody on the way, who does this to one envelope."""

    kind: Kind
    host: str
    """The site whose line it is."""
    up: bool
    """Towards the hub."""
    skip: int = 0
    """So many envelopes pass before."""
    done: bool = False


class Network:
    """All machines' lines.

    Args:
        loop: its time is the network's.
        seed: of latencies and of what tampering does.
        tell: told what happens, a line each.
        hub: the host that listens.
    """

    def __init__(self, loop: VirtualLoop, seed: int, tell: Callable[[str], None], hub: str = "hub") -> None:
        self._loop, self._hub, self.tell = loop, hub, tell
        self.random = random.Random(f"network {seed}")
        self.sockets: list[Socket] = []
        self.listening: dict[int, Socket] = {}
        self.lines: list[tuple[End, End]] = []  # dialler, listener
        self.tampers: list[Tamper] = []
        self.dark: set[str] = set()
        """Hosts without power."""
        self._slow: dict[str, float] = {}
        self._parted: Counter[tuple[str, str]] = Counter()
        self._numbers = count(1 << 20)
        self._context = Context()
        loop.reach = self.reach

    # --- for sockets and pipes -----------------------------------------------------------------------------

    @property
    def now(self) -> float:
        return self._loop.now

    def at(self, when: float, call: Callable[[], object]) -> None:
        """Of the network itself: it lives as long as the laboratory does."""
        self._loop.call_at(when, call, context=self._context.copy())

    def descriptor(self, told: Callable[[Any], None]) -> int:
        number = next(self._numbers)
        self._loop.descriptors[number] = told
        return number

    def forget(self, socket: Socket) -> None:
        self.listening = {port: other for port, other in self.listening.items() if other is not socket}
        self.sockets.remove(socket)

    def latency(self, pipe: Pipe) -> float:
        slow = max(self._slow.get(pipe.source.life.name, 1.0), self._slow.get(pipe.target.life.name, 1.0))
        return slow * self.random.uniform(0.001, 0.004)

    def blocked(self, pipe: Pipe) -> bool:
        """Whether nothing is delivered now."""
        target = pipe.target.life
        return target.stopped or not self._reachable(pipe.source.life.name, target.name)

    def _reachable(self, source: str, target: str) -> bool:
        return not (self._parted[source, target] or self.dark & {source, target})

    def connect(self, socket: Socket, port: int) -> None:
        """As TCP and then ZMTP do it; until it succeeds, or the socket is closed."""

        def attempt() -> None:
            if socket.closed or not socket.life.alive:
                return
            if socket.life.stopped or not self._both_ways(socket.life.name):
                self.at(self.now + POLL, attempt)
                return
            listener = self.listening.get(port)
            if listener is None:
                self.at(self.now + 0.002, lambda: socket.happened(zmq.EVENT_CLOSED))
            elif listener.life.stopped:
                self.at(self.now + POLL, attempt)
            else:
                self._join(socket, listener)

        self.at(self.now + self.random.uniform(0.002, 0.01), attempt)

    def _join(self, dialler: Socket, listener: Socket) -> None:
        near, far = End(dialler), End(listener)
        near.out = far.back = Pipe(self, near, far)
        far.out = near.back = Pipe(self, far, near)
        listener.accepted(far)
        dialler.accepted(near)
        self.lines = [line for line in self.lines if line[0].open or line[1].open]
        self.lines.append((near, far))

    def _both_ways(self, host: str) -> bool:
        return self._reachable(host, self._hub) and self._reachable(self._hub, host)

    async def reach(self, host: str, port: int) -> None:
        """Plain TCP, of the machine that asks."""
        life = LIFE.get()
        assert life is not None
        await asyncio.sleep(0.003)
        while not self._both_ways(life.name):  # noqa: ASYNC110 (nobody would set an event)
            await asyncio.sleep(POLL)
        if port not in self.listening:
            raise ConnectionRefusedError(111, "refused")

    # --- faults ----------------------------------------------------------------------------------------------

    def tampered(self, pipe: Pipe, data: bytes) -> list[bytes]:
        """What becomes of `data` on its way."""
        site = pipe.target.life.name if pipe.source.life.name == self._hub else pipe.source.life.name
        up = pipe.target.life.name == self._hub
        for tamper in self.tampers:
            if tamper.done or tamper.host != site or tamper.up != up:
                continue
            if tamper.skip > 0:
                tamper.skip -= 1
                continue
            tamper.done = True
            self.tell(f"an envelope {'from' if up else 'to'} {site} is {tamper.kind}")
            return self._tamper(tamper.kind, pipe, data)
        return [data, *pipe.take_swapped()]

    def _tamper(self, kind: Kind, pipe: Pipe, data: bytes) -> list[bytes]:
        if kind == "lost":
            return []
        if kind == "twice":
            return [data, data]
        if kind == "cut":
            return [data[: int(len(data) * self.random.random())]]
        if kind == "flipped":
            # Half of them in the header, where it is read before TLS can object.
            size = 32 if self.random.random() < 0.5 else len(data)
            place = int(size * self.random.random())
            return [
                data[:place] + bytes((data[place] ^ (1 << self.random.randrange(8)),)) + data[place + 1 :]
            ]
        if kind == "swapped":
            return pipe.swap(data)
        reason = self.random.choice(list(ResetReason))
        return [envelope.encode_reset(envelope.link_of(data), reason, "forged"), data]

    def of(self, host: str) -> Iterator[tuple[End, End]]:
        """The open lines of a site."""
        for near, far in self.lines:
            if near.life.name == host and (near.open or far.open):
                yield near, far

    def cut(self, host: str, notice: Literal["both", "site", "hub"]) -> None:
        """The line of a site breaks; what is on its way is lost. A site that misses it talks to nobody for a while."""
        for near, far in list(self.of(host)):
            for end, told in ((near, notice != "hub"), (far, notice != "site")):
                end.out.cut()
                if told:
                    self.at(self.now + 0.001, end.lost)
                else:
                    self.at(self.now + self.random.uniform(*HEARTBEAT), end.lost)
            if notice != "both":
                self._swallow_all(near, far)

    def _swallow_all(self, near: End, far: End) -> None:
        """Whatever is put into a line that is no more gets nowhere."""
        for pipe in (near.out, far.out):
            pipe.put = pipe._append = lambda data: None  # type: ignore[method-assign]

    def part(self, a: str, b: str, seconds: float, *, both: bool = True) -> None:
        """Nothing gets from `a` to `b` (and back) for a while; nobody is told; what was sent arrives late."""
        ways = [(a, b), (b, a)] if both else [(a, b)]
        self._parted.update(ways)
        self._watch()

        def heal() -> None:
            self._parted.subtract(ways)
            self.tell(f"{a} and {b} are connected again")
            self._pump()

        self.at(self.now + seconds, heal)

    def slow(self, host: str, factor: float, seconds: float) -> None:
        """Everything to and from `host` takes longer for a while."""
        self._slow[host] = factor
        self.at(self.now + seconds, lambda: self._slow.pop(host, None))

    def stopped(self, life: Life) -> None:
        """Its process stands still."""
        self._watch()

    def resumed(self, life: Life, seconds: float) -> None:
        """It goes on after `seconds`: heartbeats that it missed count first."""
        for near, far in list(self.lines):
            for end in (near, far):
                if end.life is life and seconds > HEARTBEAT[1]:
                    end.lost()
        self._pump()

    def ended(self, life: Life, *, power: bool) -> None:
        """Its process was killed: the system closes its lines. Or its machine lost power: nobody does."""
        if power:
            self.dark.add(life.name)
        for socket in [socket for socket in self.sockets if socket.life is life]:
            for end in list(socket.ends.values()):
                end.open = False
                end.back.cut()
                if power:
                    end.out.cut()
                    self.at(self.now + self.random.uniform(*HEARTBEAT), end.out.target.lost)
                else:
                    end.out.cut(keep=self.random.randint(0, len(end.out.waiting)))
                    end.out._append(None)
            socket.closed = True
            socket._call = None
            self.forget(socket)
        self._watch()

    def powered(self, host: str) -> None:
        """It is on again: who still talks to what was there before hears that it is no more."""
        self.dark.discard(host)
        for near, far in self.lines:
            for end in (near, far):
                if not end.life.alive and end.life.name == host:
                    self.at(self.now + self.random.uniform(0.0, 5.0), end.out.target.lost)
        self._pump()

    def _watch(self) -> None:
        """A side that hears nothing from now on gives up its line after a while."""
        for line in self.lines:
            for end in line:
                silent = self._silent(end.back)
                if silent and end.back.silent_since is None:
                    end.back.silent_since = self.now
                    self.at(
                        self.now + self.random.uniform(*HEARTBEAT),
                        lambda end=end, since=self.now: self._give_up(end, since),
                    )
                elif not silent:
                    end.back.silent_since = None

    def _silent(self, pipe: Pipe) -> bool:
        return pipe.source.life.stopped or self.blocked(pipe)

    def _give_up(self, end: End, since: float) -> None:
        if end.open and end.back.silent_since == since and end.life.alive and not end.life.stopped:
            end.lost()

    def _pump(self) -> None:
        self._watch()
        for line in list(self.lines):
            for end in line:
                end.out.pump()


def zmq_of(network: Network) -> Any:
    """The module `zmq` as `splitproto.lanes.zeromq` sees it, with sockets in memory."""

    class Sockets:
        @classmethod
        def instance(cls) -> type[Sockets]:
            return cls

        @staticmethod
        def socket(kind: int) -> Socket:
            return Socket(network, kind)

    class Zmq:
        Context = Sockets

        def __getattr__(self, name: str) -> Any:
            return getattr(zmq, name)

    return Zmq()
