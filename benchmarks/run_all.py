"""One command, one table: every benchmark of speed with its defaults, and benchmarks/RESULTS.md from what they found.

    pip install -c constraints.txt -e . -r benchmarks/peers.txt
    python benchmarks/run_all.py                      # half an hour on two cores; nothing else should run
    python benchmarks/run_all.py --only throughput    # one again; the others' figures stay

Each program's JSON is kept in benchmarks/results/speed/, with the machine and the day it was measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import ssl
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEPT, PAGE = HERE / "results" / "speed", HERE / "RESULTS.md"
PROGRAMS: dict[str, tuple[str, ...]] = {
    "throughput": ("--rounds", "7", "--mib", "256"),
    "latency": (),
    "sites": (),
    "step": (),
    "recording": (),
    "start": (),
    "inference": (),
}
LIBRARIES = ("torch", "numpy", "pyzmq", "msgpack", "cryptography", "grpcio")
Found = dict[str, Any]
NOT_MEASURED = (
    ("NVFlare's best transport, a step and small requests on NVFlare and Flower", "not set up"),
    ("decoder training from a feature bank by the same from memory", "no program yet"),
    ("bytes per step with the best lossy codec", "fp16 and bf16 are the only codecs"),
    ("emulated 1 Gb/s and 100 Mb/s, 10 and 50 ms", "no program yet"),
    ("a GPU at the coordinator", "none at hand"),
)


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    what: str
    target: str
    found: str
    met: bool | None
    """None: there is no target."""

    def __str__(self) -> str:
        verdict = {True: "yes", False: "**no**", None: ""}[self.met]
        return f"| {self.what} | {self.target} | {self.found} | {verdict} |"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (lowest-highest)."""
    median, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{median} ({low}-{high})"


def at_most(what: str, values: Sequence[float], target: float, unit: str = "", digits: int = 2) -> Line:
    """Met where the median is."""
    met = statistics.median(values) <= target
    return Line(what, f"<= {target:g}{unit}", spread(values, digits) + unit, met)


def at_least(what: str, values: Sequence[float], target: float, unit: str = "", digits: int = 2) -> Line:
    """Met where the median is."""
    met = statistics.median(values) >= target
    return Line(what, f">= {target:g}{unit}", spread(values, digits) + unit, met)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


# --- what each program says --------------------------------------------------------------------------------------


def throughput(found: Found) -> Iterator[Line]:
    """Ratios of one round; of the peers' rates the targets are those of the wire."""
    for case, row in found["cases"].items():
        ours = row["splitproto"]
        own = f"{spread(ours['rates'], 0)} MiB/s, {spread(ours['costs'])} CPU s/GiB"
        yield Line(f"{case}: splitproto", "", own, None)
        for peer, target in (("TLS socket", 0.95), ("gRPC", 1.3), ("CURVE", 1.3)):
            if peer in row:
                yield at_least(f"{case}: rate, by {peer}", ratios(ours["rates"], row[peer]["rates"]), target)
        yield at_most(f"{case}: CPU, by TLS socket", ratios(ours["costs"], row["TLS socket"]["costs"]), 1.15)


def latency(found: Found) -> Iterator[Line]:
    """p99 by p50 of the idle link; peaks by what was received."""
    waits = found["waits"]
    for kind, row in waits.items():
        told = f"{spread(row['p50'])} ms, p99 {spread(row['p99'])} ms"
        yield Line(f"request and reply, {kind}: p50", "", told, None)
    quick = waits["idle"]["p50"]
    yield at_most("its p99 by p50, idle link", ratios(waits["idle"]["p99"], quick), 3)
    yield at_most(
        "p99 beside 256 MiB on the link, by p50 of the idle one", ratios(waits["loaded"]["p99"], quick), 3
    )
    for size, peaks in found["peaks"].items():
        yield at_most(f"peak memory while {size} MiB arrive, by the tensors", peaks, 1.25)


def sites(found: Found) -> Iterator[Line]:
    """Per site, by how many there are."""
    for count, rounds in found.items():
        yield at_least(
            f"{count} sites: handshakes per CPU second", [one["handshakes"] for one in rounds], 100, digits=0
        )
        yield at_most(
            f"{count} sites: memory of an idle one", [one["idle_kib"] for one in rounds], 200, " KiB", 0
        )
        told = spread([one["step_ms"] for one in rounds])
        yield Line(f"{count} sites: a request and a reply of 64 KiB to all, per site", "", f"{told} ms", None)


def step(found: Found) -> Iterator[Line]:
    """By the same network in one process with as many threads as there are cores."""
    rows = found["rows"]
    whole = statistics.median(rows["whole, 2 thread(s), before"] + rows["whole, 2 thread(s), after"])
    took = rows["four sites, over the wire"]
    yield Line("one training step, four sites", "", spread([1000 * value for value in took], 0) + " ms", None)
    yield Line("the same network in one process, two threads", "", f"{1000 * whole:.0f} ms", None)
    median = statistics.median(took) / whole
    yield Line("a step, by the same in one process", "<= 1.1", f"{median:.2f}", median <= 1.1)


def recording(found: Found) -> Iterator[Line]:
    """By steps that were not recorded."""
    yield at_most("a step with recording, by one without", [p["on"] / p["off"] for p in found["pairs"]], 1.03)


def start(found: Found) -> Iterator[Line]:
    """CPU seconds, of one process or of five."""
    for row, told in found["rows"].items():
        by = f"; {told['by_torch']:.2f} x `import torch`"
        yield Line(f"start: {row}", "", f"{spread(told['cpu'])} CPU s{by}", None)


def inference(found: Found) -> Iterator[Line]:
    """Of one patient; what neither a site nor the coordinator computes is wire and queue."""
    for case, told in found.items():
        patient = f"{told['latency_s']:.2f} s a patient, {told['per_minute']:.0f} patients a minute"
        yield Line(f"inference, {case}", "", f"{patient}, {told['mib']:.0f} MiB of activations", None)


READ: dict[str, Callable[[Found], Iterator[Line]]] = {
    "throughput": throughput,
    "latency": latency,
    "sites": sites,
    "step": step,
    "recording": recording,
    "start": start,
    "inference": inference,
}


# --- the run -------------------------------------------------------------------------------------------------------


def machine() -> str:
    """In one line."""
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    libraries = []
    for name in LIBRARIES:
        try:
            libraries.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return (
        f"{cpu[1] if cpu else platform.processor()}, {len(os.sched_getaffinity(0))} cores; Python "
        f"{platform.python_version()}, {ssl.OPENSSL_VERSION}, {', '.join(libraries)}"
    )


def run(name: str) -> None:
    """One program; its figures are kept at once."""
    load = os.getloadavg()[0]
    print(f"{name}: load {load:.1f} before", file=sys.stderr)
    made = subprocess.run(
        (sys.executable, HERE / f"{name}.py", "--json", *PROGRAMS[name]),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if made.returncode:
        raise SystemExit(f"{name}.py ended with exit code {made.returncode}: its last line says why")
    # A program that trains prints what its daemons say before its figures.
    found = json.loads(made.stdout[made.stdout.index("\n{") + 1 if not made.stdout.startswith("{") else 0 :])
    KEPT.mkdir(parents=True, exist_ok=True)
    kept = {"day": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "load_before": load, "found": found}
    (KEPT / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def page() -> str:
    """RESULTS.md, from all that is kept."""
    lines = [
        "# Speed",
        "",
        "Made by `python benchmarks/run_all.py`. Medians (lowest-highest) over rounds; a ratio is of one",
        "round, in which all took turns. [README.md](README.md) says what each program does.",
        "",
    ]
    for name in PROGRAMS:
        if not (path := KEPT / f"{name}.json").exists():
            lines += [f"## {name}", "", "Not measured.", ""]
            continue
        kept = json.loads(path.read_text())
        lines += [
            f"## {name}",
            "",
            f"{kept['day']}; {kept['machine']}; load {kept['load_before']:.1f} before.",
            "",
        ]
        lines += [
            "| what | target | measured | met |",
            "|---|---|---|---|",
            *map(str, READ[name](kept["found"])),
            "",
        ]
    lines += ["## Not measured", "", *(f"- {what}: {why}." for what, why in NOT_MEASURED)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", nargs="*", choices=list(PROGRAMS), help="run these; with no name, only write the page"
    )
    given = parser.parse_args()
    for name in PROGRAMS if given.only is None else given.only:
        run(name)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
