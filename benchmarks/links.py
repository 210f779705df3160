"""A training step over links of 1 Gb/s and 100 Mb/s, with round trips of 10 and 50 ms: what the network adds to it.

The demo's federation, five processes, each in a network namespace of its own (`emulated.py`; needs root). Each link has
a run of its own, as a run tries but once in 100 steps whether gradients are to go to all sites at once or to one after
the other (`[wire] gradients_in_turns`). Runs over the loopback interface before and after all others say how long the
step takes without a network.

All machines have the same link to one switch. What is narrowest is then the coordinator's own link: in each step it
carries the activations of four sites one way and their gradients the other. Some rows are of runs with
`gradients_in_turns` = "never", and of sites whose links are the narrowest.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emulated import Link, Network
from rich.console import Console
from rich.table import Table
from rows import Found, Line, at_most, spread
from step import whole

from splitpeer.coordinator.turns import TRIALS
from splitpeer.demo.federation import HUB, SITES, DemoJob, Federation
from splitproto.allocator import keep_freed_memory

UNLIMITED = "no limit"
LINKS = {
    UNLIMITED: Link(),
    "1 Gb/s, 10 ms": Link(1e9, 0.010),
    "1 Gb/s, 50 ms": Link(1e9, 0.050),
    "100 Mb/s, 10 ms": Link(1e8, 0.010),
    "100 Mb/s, 50 ms": Link(1e8, 0.050),
}
"""Rates of IP packets, and round trips between coordinator and site."""
KEEPING = {"0": "", "1": ", slow start after idle"}
"""How names of cases end: Linux keeps what it has learned of a path that was idle, or, as it comes, forgets it."""
SLOW_START = "net.ipv4.tcp_slow_start_after_idle"
WARM_UP = 5
CODING = "int4"
"""Of the second run, which is made over links whose rate decides."""
TURNS = {
    "100 Mb/s, 10 ms": LINKS["100 Mb/s, 10 ms"],
    "100 Mb/s, 50 ms": LINKS["100 Mb/s, 50 ms"],
    "sites 25 Mb/s, 10 ms": Link(25e6, 0.010, first_rate=1e9),
}
"""Over which steps with and without turns are compared."""
SKIPPED = WARM_UP + 2 * TRIALS
"""Steps of a run that are not counted where the coordinator finds out which way is faster."""
THREADS = 2
"""Of the whole network in one process: the limit of computing."""
WAIT_S = 120.0
"""For the first step, and for each block of steps."""
POLL_S = 0.02


@dataclass(frozen=True)
class CodedJob(DemoJob):
    """The demo's, with a coding both ways."""

    def toml(self) -> dict[str, Any]:
        return super().toml() | {"wire": {"activations": CODING, "gradients": CODING}}


@dataclass(frozen=True)
class TurnsJob(DemoJob):
    """The demo's, with `[wire] gradients_in_turns`."""

    turns: str = "never"

    def toml(self) -> dict[str, Any]:
        return super().toml() | {"wire": {"gradients_in_turns": self.turns}}


class Far(Federation):
    """The demo's federation, its parties on machines of a network."""

    def __init__(self, folder: Path, job: DemoJob, network: Network) -> None:
        super().__init__(folder, job)
        self._machines = network.machines
        self.listens = self.dials = network.machines[HUB].address

    def inside(self, site: str) -> list[str]:
        return self._machines[site].inside()


Case = tuple[str, str, Link]
"""Name, value of `SLOW_START`, link."""


def cases() -> list[Case]:
    """All, for float32."""
    return [
        (name + ending, value, link)
        for name, link in LINKS.items()
        for value, ending in KEEPING.items()
        if name != UNLIMITED or not ending
    ]


def made(federation: Federation) -> list[dict[str, Any]]:
    """What the coordinator has written about each step so far."""
    try:
        text = (federation.results / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [line for line in map(json.loads, whole) if "loss" in line]


def reach(federation: Federation, steps: int) -> None:
    """Wait until so many steps are made. Raises SystemExit: a daemon has ended, or they take too long."""
    ends = time.monotonic() + WAIT_S
    while federation.steps() < steps:
        for site in (HUB, *SITES):
            if site not in federation.pids():
                raise SystemExit(f"{site} has ended: {federation.last_line(site)}")
        if time.monotonic() > ends:
            raise SystemExit(f"no {steps} steps within {WAIT_S:g} s")
        time.sleep(POLL_S)


def loopback(job: DemoJob, folder: Path, steps: int) -> list[float]:
    """Seconds of each step where all parties share one machine and no link lies between them."""
    federation = Federation(folder, job)
    federation.render(lambda done, total: None)
    federation.set_up()
    federation.start()
    try:
        reach(federation, WARM_UP + steps)
        return [line["seconds"] for line in made(federation)[WARM_UP:]]
    finally:
        federation.stop()


def linked(
    job: DemoJob, folder: Path, steps: int, cases: Sequence[Case], skipped: int = SKIPPED
) -> dict[str, dict[str, Any]]:
    """For each link: seconds of each step of a run, and octets a step that the coordinator's link carried."""
    found: dict[str, dict[str, Any]] = {}
    with Network((HUB, *SITES)) as network:
        hub = network.machines[HUB]
        for number, (name, value, link) in enumerate(cases):
            network.link = link
            network.set(SLOW_START, value)
            federation = Far(folder / str(number), job, network)
            federation.render(lambda done, total: None)
            federation.set_up()
            federation.start()
            try:
                reach(federation, skipped)
                before = hub.received, hub.sent, hub.dropped, network.cpu_s
                begun = federation.steps()
                reach(federation, begun + steps)
                after = hub.received, hub.sent, hub.dropped, network.cpu_s
                lines = made(federation)[begun:]
            finally:
                federation.stop()
            up, down, dropped, cpu = (b - a for a, b in zip(before, after, strict=True))
            found[name] = (
                {key: [line[key] for line in lines] for key in ("seconds", "waited", "computed")}
                | {"turns": sum(line.get("turns", False) for line in lines)}
                | {"up": up / len(lines), "down": down / len(lines), "dropped": dropped / len(lines)}
                | {"carrying": cpu / len(lines)}
            )
    return found


ABOUT = (
    "The demo's federation, each party in a network namespace of its own. All have the same link to one switch;",
    "the coordinator's is the narrowest. Rates are of IP packets, milliseconds the round trip between coordinator and",
    "site. The limit in the target is the step of the same network in one process of two threads, or the octets of",
    "the busier direction by the rate, whichever is greater. A site's activations have to arrive before its gradients",
    "leave, so the second ratio is to the step on the loopback interface, one round trip and both directions, added",
    "up. Hosts have Linux's",
    "defaults, but net.ipv4.tcp_slow_start_after_idle = 0 unless the row says otherwise. Rows of int4 are of the same",
    'job with [wire] activations and gradients = "int4". Gradients go to all sites at once or in turns, whichever the',
    "coordinator finds to be faster.",
)


def _limits(found: Found, name: str) -> tuple[float, float]:
    """Seconds: max(compute, octets / rate); loopback step + round trip + octets of both directions / rate."""
    compute, loopback = (statistics.median(found[name]) for name in ("whole", "loopback"))
    up, down = (statistics.median(one[way] for one in found["octets"]) for way in ("up", "down"))
    link = found["links"][name]
    apart = 8 * max(up, down) / link["rate"]
    return max(compute, apart), loopback + link["round_trip_s"] + 8 * (up + down) / link["rate"]


def rows(found: Found) -> Iterator[Line]:
    """A step over each link, by what the network and the computing allow."""
    yield Line("step of the whole network in one process", "", f"{_ms(found['whole'])} ms", None)
    yield Line("step on the loopback interface", "", f"{_ms(found['loopback'])} ms", None)
    up, down = (statistics.median(one[way] for one in found["octets"]) for way in ("up", "down"))
    octets = f"{up / 2**20:.1f} MiB to the coordinator, {down / 2**20:.1f} MiB from it"
    yield Line("octets a step, of all sites", "", octets, None)
    for name, took in found["steps"].items():
        yield Line(f"{name}: step", "", f"{_ms(took)} ms", None)
        if name in found["links"]:
            overlapped, serial = _limits(found, name)
            yield at_most(
                f"{name}: step / max(compute, octets / rate)", [one / overlapped for one in took], 1.1
            )
            by_sum = spread([one / serial for one in took])
            yield Line(f"{name}: step / (loopback step + round trip + both directions)", "", by_sum, None)
    yield from _turns(found.get("turns", {}))
    up, down = (statistics.median(one[way] for one in found["coded_octets"]) for way in ("up", "down"))
    octets = f"{up / 2**20:.2f} MiB to the coordinator, {down / 2**20:.2f} MiB from it"
    yield Line(f"octets a step, of all sites, {CODING}", "", octets, None)
    for name, took in found["coded"].items():
        yield Line(f"{name}, {CODING}: step", "", f"{_ms(took)} ms", None)
        plain = statistics.median(found["steps"][name])
        by_plain = spread([one / plain for one in took])
        yield Line(f"{name}, {CODING}: step / step of float32", "", by_plain, None)


def _turns(found: Found) -> Iterator[Line]:
    """Steps with `[wire] gradients_in_turns` = "auto" and "never"."""
    for name in found.get("never", {}):
        never, auto = found["never"][name], found["auto"][name]
        yield Line(f"{name}: step, gradients to all sites at once", "", f"{_ms(never)} ms", None)
        yield Line(f"{name}: step, as found to be faster", "", f"{_ms(auto)} ms", None)
        ratio = statistics.median(never)
        yield Line(f"{name}: step / step at once", "", spread([one / ratio for one in auto]), None)


def turns(
    job: DemoJob, folder: Path, steps: int, found: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, list[float]]]:
    """By setting of `[wire] gradients_in_turns` and link, seconds of each step; those in `found` are measured."""
    cases = [(name, "0", link) for name, link in TURNS.items()]
    left = [case for case in cases if case[0] not in found]
    auto = {**found, **linked(job, folder / "auto", steps, left)}
    never = linked(TurnsJob(**vars(job)), folder / "never", steps, cases, WARM_UP)
    return {
        setting: {name: of[name]["seconds"] for name in TURNS}
        for setting, of in (("never", never), ("auto", auto))
    }


def _ms(seconds: list[float]) -> str:
    return spread([1000 * one for one in seconds], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="of each link")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", action="store_true", help="only compare steps with and without turns")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    # Namespaces and daemons are left in good order also by a `kill`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    keep_freed_memory()
    job = DemoJob(patients=8, validation=1, steps=10_000, batch=given.batch, evaluations=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.turns:
            for row in _turns(turns(job, folder, given.steps, {})):
                print(f"{row.what}: {row.found}")
            return
        computed = whole(job, WARM_UP + given.steps, THREADS)
        alone = loopback(job, folder / "before", given.steps)
        plain = linked(job, folder / "linked", given.steps, cases())
        steady = [case for case in cases() if case[1] == "0" and case[0] != UNLIMITED]
        coded = linked(CodedJob(**vars(job)), folder / CODING, given.steps, steady)
        compared = turns(job, folder / "turns", given.steps, plain)
        alone += loopback(job, folder / "after", given.steps)
        computed += whole(job, WARM_UP + given.steps, THREADS)
    found = {
        "unit": "seconds; octets",
        "whole": computed,
        "loopback": alone,
        "links": {
            case: {"rate": link.rate, "round_trip_s": link.round_trip_s}
            for case, _, link in cases()
            if link.rate < math.inf
        },
        "steps": {name: run["seconds"] for name, run in plain.items()},
        "octets": [{"up": run["up"], "down": run["down"]} for run in plain.values()],
        "turns": compared,
        "coding": CODING,
        "coded": {name: run["seconds"] for name, run in coded.items()},
        "coded_octets": [{"up": run["up"], "down": run["down"]} for run in coded.values()],
        "runs": plain,
    }
    if given.json:
        print(json.dumps(found, indent=1))
        return
    table = Table(title=f"A step of four sites, batch {job.batch} of 96x96: median (lowest-highest)")
    for heading in ("figure", "target", "measured"):
        table.add_column(heading)
    for row in rows(found):
        table.add_row(row.what, row.target, row.found)
    Console(width=None if sys.stdout.isatty() else 130).print(table)


if __name__ == "__main__":
    main()
