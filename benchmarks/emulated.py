"""A network of links that are as narrow and as long as wanted, for processes of this machine.

Each machine is a network namespace whose only way out is a tun device, and a thread of this process carries IP packets
from one device to another as links would. So the TCP that meets the links is the kernel's: its windows, slow start and
losses are real.

    machine --- uplink: rate, delay ---> switch --- downlink: rate, delay, buffer ---> machine

Linux can do this by itself with `tc netem`, but not every kernel has it. A namespace lives as long as a process that
reads our pipe, and a tun device as long as its descriptor: nothing of the network stays behind when this process ends,
however it ends.
"""

from __future__ import annotations

import fcntl
import heapq
import math
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

SUBNET = "10.83.0"
"""Inside the namespaces alone."""
DEFAULTS = {
    "net.ipv4.tcp_rmem": "4096 131072 6291456",
    "net.ipv4.tcp_wmem": "4096 16384 4194304",
    "net.ipv4.tcp_slow_start_after_idle": "1",
}
CONGESTION = "cubic"
"""TCP as Linux comes, whatever this machine's administrator has set."""
BURST_S = 1e-3
"""An uplink that was looked at this much too late has lost nothing: the depth of its token bucket, in time."""
PRIORITY = 10
IDLE_S = 0.05
WAIT_S = 10.0

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_BURST, _WAITING = 70_000, 20_000_000
"""Octets: the longest packet that is not cut yet, and more than ever wait."""
_CHECKSUMS, _SEGMENTS = 1, 2
"""TUN_F_CSUM, TUN_F_TSO4: the kernel hands over packets of up to 64 KiB and says how they are to be cut."""
_VNET = struct.Struct("=BBHHHH")
"""struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset."""
_LONGEST = _VNET.size + (1 << 16)


@dataclass(frozen=True)
class Link:
    """What lies between any two machines; all machines have the same, or all but the first."""

    rate: float = math.inf
    """Bits a second of IP packets, of each machine's uplink and of its downlink."""
    round_trip_s: float = 0.0
    """There and back, of a packet that waits nowhere; each of the four links on the way has a quarter."""
    buffer_s: float = 0.05
    """How much a downlink queues at the switch before it drops packets, as the time to send it."""
    first_rate: float | None = None
    """Of the first machine's; None: the same."""

    def rate_of(self, machine: Machine) -> float:
        """Bits a second."""
        return self.rate if self.first_rate is None or not machine.first else self.first_rate


@dataclass(eq=False)
class Machine:
    """One namespace."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    """The process that keeps the namespace."""
    device: int
    """Descriptor of its tun device."""
    interface: str = ""
    """Name of that device."""
    first: bool = False
    """Of the network."""
    sent: int = 0
    """Octets of IP packets that have left on its uplink."""
    received: int = 0
    """That have arrived on its downlink."""
    dropped: int = 0
    """That the switch had no room for."""
    up: float = 0.0
    """Time at which its uplink has sent all that it was given."""
    down: float = 0.0

    def inside(self) -> list[str]:
        """What precedes a command that is to run there."""
        return ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net"]


class _Packet(NamedTuple):
    """One that is on its way; the earliest sorts first."""

    at: float
    number: int
    """So that no two are equal."""
    machine: Machine
    """Where it goes."""
    octets: int
    data: bytes


class Network:
    """Machines with names, each linked to a switch. A context manager; needs root, `ip`, `tc`, `unshare` and `nsenter`.

    Args:
        names: of the machines; the first has address .1.

    Raises on entry:
        OSError, subprocess.CalledProcessError: this user or kernel may not make namespaces or tun devices.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.machines: dict[str, Machine] = {}
        self.link = Link()
        self._by_address: dict[bytes, Machine] = {}
        self._at_switch: list[_Packet] = []
        self._arriving: list[_Packet] = []
        self._number = 0
        self._carrying = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="links", daemon=True)
        self.cpu_s = 0.0
        """CPU seconds that carrying has taken."""

    def __enter__(self) -> Network:
        try:
            for number, name in enumerate(self._names, 1):
                self._make(name, f"{SUBNET}.{number}")
        except BaseException:
            self._remove()
            raise
        self._by_address = {socket.inet_aton(one.address): one for one in self.machines.values()}
        self._carrying.set()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._carrying.clear()
        self._thread.join()
        self._remove()

    @property
    def link(self) -> Link:
        """May be replaced at any time; packets on their way keep their times."""
        return self._link

    @link.setter
    def link(self, link: Link) -> None:
        self._link = link
        for machine in self.machines.values():
            _shape(machine, link.rate_of(machine))

    def set(self, key: str, value: str) -> None:
        """Change a setting of the kernel on all machines. Raises subprocess.CalledProcessError: there is no such."""
        for machine in self.machines.values():
            _set(machine, key, value)

    # --- inside -----------------------------------------------------------------------------------------

    def _make(self, name: str, address: str) -> None:
        # Ctrl-C is not for it: daemons still have to leave in good order.
        holder = subprocess.Popen(("unshare", "--net", "cat"), stdin=subprocess.PIPE, start_new_session=True)
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        machine = self.machines[name] = Machine(name, address, holder, device, first=not self.machines)
        made = fcntl.ioctl(
            device, _TUNSETIFF, struct.pack("16sH14x", b"link%d", _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
        )
        fcntl.ioctl(device, _TUNSETOFFLOAD, _CHECKSUMS | _SEGMENTS)
        interface = machine.interface = made[:16].rstrip(b"\0").decode()
        _moved(holder)
        _run("ip", "link", "set", interface, "netns", str(holder.pid))
        for command in (
            f"ip address add {address}/32 dev {interface}",
            f"ip link set {interface} up",
            "ip link set lo up",
            # By route, since a namespace's own default may only be what the whole machine allows.
            f"ip route add {SUBNET}.0/24 dev {interface} src {address} congctl {CONGESTION}",
        ):
            _run(*machine.inside(), *command.split())
        for key, value in DEFAULTS.items():
            _set(machine, key, value)

    def _remove(self) -> None:
        for machine in self.machines.values():
            os.close(machine.device)
            assert machine.holder.stdin is not None
            machine.holder.stdin.close()
            machine.holder.wait()

    def _carry(self) -> None:
        with suppress(OSError):
            # Links do not wait for a processor.
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(PRIORITY))
        by_device = {one.device: one for one in self.machines.values()}
        while self._carrying.is_set():
            now = time.monotonic()
            self._switch(now)
            self._deliver(now)
            # A packet waits in the kernel until the uplink is free, as at a network card.
            free = [device for device, one in by_device.items() if one.up <= now]
            times = [heap[0].at for heap in (self._at_switch, self._arriving) if heap]
            times += [one.up for one in by_device.values() if one.up > now]
            wait = max(0.0, min([*times, now + IDLE_S]) - time.monotonic())
            for device in select.select(free, (), (), wait)[0]:
                self._take(by_device[device])
            self.cpu_s = time.thread_time()

    def _take(self, machine: Machine) -> None:
        """What a machine sends, until its uplink is busy."""
        link, now = self.link, time.monotonic()
        while machine.up <= now and (packet := _read(machine.device)):
            start = _VNET.size + 16  # of the destination in an IPv4 header
            other = self._by_address.get(packet[start : start + 4])
            if other is None:
                continue
            octets = _octets(packet)
            machine.sent += octets
            machine.up = max(machine.up, now - BURST_S) + 8 * octets / link.rate_of(machine)
            self._number += 1
            at = max(now, machine.up) + link.round_trip_s / 4
            heapq.heappush(self._at_switch, _Packet(at, self._number, other, octets, packet))

    def _switch(self, now: float) -> None:
        """What has reached the switch goes on to a downlink, or is lost where that has too much to send."""
        link = self.link
        while self._at_switch and self._at_switch[0].at <= now:
            one = heapq.heappop(self._at_switch)
            machine = one.machine
            if machine.down - one.at > link.buffer_s:
                machine.dropped += one.octets
                continue
            machine.down = max(one.at, machine.down) + 8 * one.octets / link.rate_of(machine)
            heapq.heappush(self._arriving, one._replace(at=machine.down + link.round_trip_s / 4))

    def _deliver(self, now: float) -> None:
        while self._arriving and self._arriving[0].at <= now:
            one = heapq.heappop(self._arriving)
            try:
                os.write(one.machine.device, one.data)
            except OSError:
                one.machine.dropped += one.octets
            else:
                one.machine.received += one.octets


def _read(device: int) -> bytes:
    try:
        return os.read(device, _LONGEST)
    except BlockingIOError:
        return b""


def _octets(packet: bytes) -> int:
    """Of the IP packets that a network card would make of this one."""
    segment: int = _VNET.unpack_from(packet)[3]
    octets = len(packet) - _VNET.size
    if not segment:
        return octets
    ip = 4 * (packet[_VNET.size] & 15)
    headers = ip + 4 * (packet[_VNET.size + ip + 12] >> 4)
    return octets + headers * (-(-(octets - headers) // segment) - 1)


def _shape(machine: Machine, rate: float) -> None:
    """Have packets wait in a queue of the kernel, as at a network card.

    A tun device owns packets as soon as it has them: TCP could not count what still waits ("small queues") and would
    queue whole windows, in front of acknowledgements.
    """
    shape = f"replace dev {machine.interface} root tbf rate {rate:.0f} burst {_BURST} limit {_WAITING}"
    if rate == math.inf:
        shape = f"replace dev {machine.interface} root pfifo_fast"
    _run(*machine.inside(), "tc", "qdisc", *shape.split())


def _set(machine: Machine, key: str, value: str) -> None:
    _run(*machine.inside(), "sysctl", "-q", "-w", f"{key}={value}")


def _moved(holder: subprocess.Popen[bytes]) -> None:
    """Wait until it is in a namespace of its own."""
    ends = time.monotonic() + WAIT_S
    ours = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{holder.pid}/ns/net") == ours:
        if holder.poll() is not None or time.monotonic() > ends:
            raise OSError("unshare made no network namespace: run as root")
        time.sleep(0.01)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
