"""What a start costs: CPU seconds of commands, of a role until its first byte is on the wire, of the demo's daemons.

Each round starts everything once, one after the other, so that all rows meet the same machine. The federation is the
demo's, with one step to train, and its patients are rendered once. Other programs change CPU seconds less than wall
seconds, but not by nothing: read the ratios.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rows import Found, Line, at_most, ratios, spread

from splitpeer.demo.federation import HUB, SITES, DemoJob, Federation

WAIT_S = 300.0
POLL_S = 0.005
SITE = next(iter(SITES))
TORCH = "import torch"
TORCH_ENDED = "import torch, until the process has ended"
FIRST_STEP = "demo: five daemons, until the first step"
ONE_STEP = "demo: five daemons, one step and its scores, until all have ended"
HELP = "splitpeer --help"
COMMANDS = {
    HELP: ("--help",),
    "splitpeer serve --help": ("serve", "--help"),
    "splitpeer status (no daemon)": ("status",),
    "splitpeer segment (no daemon)": ("segment", "someone", "--out", "mask.nii.gz"),
}
ROLES = {f"serve --role {role}, until its first byte": role for role in ("client", "coordinator")}

Cost = tuple[float, float]
"""CPU seconds (user and system, all threads), wall seconds."""


class Costs:
    """The rows, round by round."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Cost]] = {}

    def add(self, row: str, cost: Cost) -> None:
        self.rows.setdefault(row, []).append(cost)

    def cpu(self, row: str) -> list[float]:
        return [cpu for cpu, _ in self.rows[row]]

    def wall(self, row: str) -> list[float]:
        return [wall for _, wall in self.rows[row]]

    def ratio(self, row: str, by: str = TORCH) -> float:
        """The median of the rounds' own ratios of CPU seconds."""
        return statistics.median(
            mine / base for mine, base in zip(self.cpu(row), self.cpu(by), strict=True) if base > 0
        )


def cpu_of(pid: int) -> float:
    """CPU seconds of another process so far, to the nanosecond: clock_getcpuclockid(3)."""
    clock = ctypes.c_int()
    if error := ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise OSError(error, os.strerror(error))
    return time.clock_gettime(clock.value)


def environment() -> dict[str, str]:
    """As an installation has it: one thread, and compiled modules are kept."""
    left = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return left | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def begun(*arguments: str, folder: Path) -> subprocess.Popen[bytes]:
    """A Python program in `folder`, where its log is."""
    with (folder / "start.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=environment(), stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, process_group=0,
        )  # fmt: skip


@contextmanager
def process(*arguments: str, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """A program, and when it was started; killed on the way out if it still runs."""
    began = time.monotonic()
    started = begun(*arguments, folder=folder)
    try:
        yield started, began
    finally:
        if started.returncode is None:
            started.kill()
            started.wait()


def whole(*arguments: str, folder: Path) -> Cost:
    """A program from its start until it has ended."""
    with process(*arguments, folder=folder) as (started, began):
        cost = ended(started)
    return cost, time.monotonic() - began


def ended(started: subprocess.Popen[bytes]) -> float:
    """CPU seconds of a program, its exit included, once it has ended."""
    _, status, used = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


def imported(folder: Path) -> Cost:
    """`import torch`, by the process's own clock: from its start until the import is over."""
    began = time.monotonic()
    program = "import torch, time; print(time.process_time(), time.monotonic())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment(), check=True, capture_output=True
    )
    cpu, at = map(float, done.stdout.split())
    return cpu, at - began


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not what():
        if time.monotonic() > deadline:
            sys.exit(f"nothing within {WAIT_S:g} s: look at start.log (--out keeps it)")
        time.sleep(POLL_S)


def serve(role: str) -> tuple[str, ...]:
    job = ("--job", "job.toml", "--fresh") if role == "coordinator" else ()
    return ("-m", "splitpeer.cli", "serve", "--role", role, *job)


def address(folder: Path) -> tuple[str, int]:
    """Where the federation's coordinator listens."""
    listen = tomllib.loads((folder / HUB / "peer.toml").read_text())["network"]["listen"]
    host, _, port = listen.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def first_byte_of_client(folder: Path) -> Cost:
    """A hospital's daemon, dialling a socket that only listens."""
    with socket.create_server(address(folder)) as server:
        server.settimeout(WAIT_S)
        with process(*serve("client"), folder=folder / SITE) as (started, began):
            arrived, _ = server.accept()
            with arrived:
                arrived.settimeout(WAIT_S)
                arrived.recv(1)
                return cpu_of(started.pid), time.monotonic() - began


def first_byte_of_coordinator(folder: Path) -> Cost:
    """A coordinator's daemon, dialled again and again until it answers."""
    with process(*serve("coordinator"), folder=folder / HUB) as (started, began):

        def answers() -> bool:
            if started.poll() is not None:
                sys.exit("the coordinator ended: look at start.log (--out keeps it)")
            try:
                with socket.create_connection(address(folder), WAIT_S) as dialled:
                    return bool(dialled.recv(1))
            except ConnectionRefusedError:
                return False

        until(answers)
        return cpu_of(started.pid), time.monotonic() - began


def five(folder: Path) -> tuple[Cost, Cost]:
    """The demo's daemons, from their start until the coordinator has made a step, and until all have ended."""
    metrics = folder / HUB / "results" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    began = time.monotonic()
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name in (*SITES, HUB):
            role = "coordinator" if name == HUB else "client"
            started.append(begun(*serve(role), folder=folder / name))
        until(lambda: metrics.exists() and '"loss"' in metrics.read_text())
        first = sum(cpu_of(one.pid) for one in started), time.monotonic() - began
        last = sum(map(ended, started)), time.monotonic() - began
    finally:
        for one in started:
            if one.returncode is None:
                one.kill()
                one.wait()
    if any(one.returncode for one in started):
        sys.exit("a daemon failed: look at start.log (--out keeps it)")
    return first, last


def one_round(costs: Costs, folder: Path) -> None:
    costs.add(TORCH, imported(folder))
    costs.add(TORCH_ENDED, whole("-c", "import torch", folder=folder))
    for row, arguments in COMMANDS.items():
        costs.add(row, whole("-m", "splitpeer.cli", *arguments, folder=folder / SITE))
    for row, role in ROLES.items():
        costs.add(row, (first_byte_of_client if role == "client" else first_byte_of_coordinator)(folder))
    first, last = five(folder)
    costs.add(FIRST_STEP, first)
    costs.add(ONE_STEP, last)


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


HELP_S = 0.25
FIRST_BYTE = 1.2
"""By `import torch`."""
FIVE = 8.4
"""By `import torch`: half of what five daemons took at first (16.7, revision 9887fd3)."""

ABOUT = ("CPU time from the start of a process to the point that the row names.",)


def rows(found: Found) -> Iterator[Line]:
    """CPU seconds, of one process or of five."""
    torch = found["rows"][TORCH]["cpu"]
    for row, told in found["rows"].items():
        cpu = told["cpu"]
        if row == HELP:
            yield at_most(row, cpu, HELP_S, " CPU s")
        elif row == FIRST_STEP:
            yield Line(row, "", f"{spread(cpu)} CPU s", None)
            yield at_most(f"{row} / `import torch`", ratios(cpu, torch), FIVE)
        else:
            by = f"; {told['by_torch']:.2f} x `import torch`"
            yield Line(row, "", f"{spread(cpu)} CPU s{by}", None)
        if row in ROLES:
            yield at_most(f"{row} / `import torch`", ratios(cpu, torch), FIRST_BYTE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="Besides a first one, which does not count.")
    parser.add_argument("--patients", type=int, default=DemoJob().patients)
    parser.add_argument("--out", type=Path, help="Keep patients, certificates and logs here.")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    job = DemoJob(patients=given.patients, validation=1, steps=1, evaluations=1)
    costs = Costs()
    with tempfile.TemporaryDirectory() as temporary:
        federation = Federation((given.out or Path(temporary)).resolve(), job)
        federation.render(lambda done, total: None)
        federation.set_up()
        for number in range(given.rounds + 1):
            # The first compiles modules and fills the page cache.
            one_round(Costs() if number == 0 else costs, federation.folder)
    if given.json:
        found = {
            row: {"cpu": costs.cpu(row), "wall": costs.wall(row), "by_torch": costs.ratio(row)}
            for row in costs.rows
        }
        print(json.dumps({"unit": "seconds", "patients": given.patients, "rows": found}, indent=2))
        return
    table = Table(title=f"Seconds: median (least-most) of {given.rounds} rounds; {given.patients} patients")
    for heading in ("", "CPU", "wall", f"CPU by `{TORCH}`"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in costs.rows:
        table.add_row(row, shown(costs.cpu(row)), shown(costs.wall(row)), f"{costs.ratio(row):.2f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
