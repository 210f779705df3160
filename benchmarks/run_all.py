"""Runs every benchmark of speed with its defaults, and writes benchmarks/RESULTS.md from their figures.

    pip install -c constraints.txt -e . -r benchmarks/peers.txt
    python benchmarks/run_all.py                      # half an hour on two cores; nothing else should run
    python benchmarks/run_all.py --only throughput    # repeat one; the others' figures stay
    python benchmarks/run_all.py --only               # only write the page again

The figures of each program are kept as JSON in benchmarks/results/speed/, with the day and the machine.
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
    ("NVFlare's fastest transport; a training step and small requests with NVFlare and Flower", "not set up"),
    ("training a decoder from a feature bank, relative to training it from memory", "no program yet"),
    ("bytes per step with the best lossy codec", "bf16 is the only one"),
    ("emulated networks of 1 Gb/s and 100 Mb/s with delays of 10 and 50 ms", "no program yet"),
    ("a coordinator with a GPU", "none at hand"),
)


@dataclass(frozen=True)
class Line:
    """A row of a table."""

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
    """A row whose target is an upper bound on the median."""
    met = statistics.median(values) <= target
    return Line(what, f"<= {target:g}{unit}", spread(values, digits) + unit, met)


def at_least(what: str, values: Sequence[float], target: float, unit: str = "", digits: int = 2) -> Line:
    """A row whose target is an lower bound on the median."""
    met = statistics.median(values) >= target
    return Line(what, f">= {target:g}{unit}", spread(values, digits) + unit, met)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours by theirs, for each round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


# --- what each program found --------------------------------------------------------------------------------------


NAMES = {"TLS socket": "a bare TLS socket", "gRPC": "gRPC", "CURVE": "ZeroMQ with CURVE"}
"""Of the other transports."""
LINKS = {
    "idle": "idle link",
    "TLS socket, idle": "idle bare TLS socket",
    "loaded": "link that is sending 256 MiB of tensors",
}


def throughput(found: Found) -> Iterator[Line]:
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


def latency(found: Found) -> Iterator[Line]:
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


def sites(found: Found) -> Iterator[Line]:
    """What a coordinator spends on its sites, by how many there are."""
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


def step(found: Found) -> Iterator[Line]:
    """A training step, relative to one of the same network in one process with two threads."""
    rows = found["rows"]
    whole = statistics.median(rows["whole, 2 thread(s), before"] + rows["whole, 2 thread(s), after"])
    took = rows["four sites, over the wire"]
    yield Line(
        "training step, four sites and a coordinator",
        "",
        spread([1000 * one for one in took], 0) + " ms",
        None,
    )
    yield Line("training step, whole network in one process, two threads", "", f"{1000 * whole:.0f} ms", None)
    median = statistics.median(took) / whole
    yield Line("four sites / one process", "<= 1.1", f"{median:.2f}", median <= 1.1)


def recording(found: Found) -> Iterator[Line]:
    """Steps that the coordinator records, relative to others of the same run."""
    yield at_most(
        "training step with recording / without", [p["on"] / p["off"] for p in found["pairs"]], 1.03
    )


def start(found: Found) -> Iterator[Line]:
    """CPU seconds, of one process or of five."""
    for row, told in found["rows"].items():
        by = f"; {told['by_torch']:.2f} x `import torch`"
        yield Line(row, "", f"{spread(told['cpu'])} CPU s{by}", None)


def inference(found: Found) -> Iterator[Line]:
    """Requests for one patient, from the spool to the result."""
    for case, told in found.items():
        patient = f"{told['latency_s']:.2f} s a patient, {told['per_minute']:.0f} patients a minute"
        yield Line(f"inference, {case}", "", f"{patient}, {told['mib']:.0f} MiB of activations", None)


ABOUT = {
    "throughput": (
        "Tensors are moved from one process to another: messages of one tensor, or of the skip connections of a "
        "network for one batch.",
        "CPU time is that of both processes.",
    ),
    "latency": (
        "A coordinator sends a small request and waits for the site's answer. p50 is the median of one round's "
        "requests,",
        "p99 their 99th percentile.",
    ),
    "sites": (
        "Many sites at one coordinator, whose memory and CPU time are shown. A site is idle if it was admitted and has "
        "said nothing",
        "since. In a step each site is sent two messages and answers both; one message each way holds a tensor of "
        "64 KiB.",
    ),
    "step": (
        "The demo's federation: five processes of one thread each, on two cores. The range is over steps.",
    ),
    "recording": (
        "The same federation; its coordinator records what it sees (`--curious`) for a few steps, then not for as "
        "many, in turns.",
    ),
    "start": ("CPU time from the start of a process to the point that the row names.",),
    "inference": ("A request, from the spool to the result.",),
}
"""Under each heading."""
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
    """Processor, Python and libraries, in one line."""
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
    """Run one program and keep its figures at once."""
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
    # A program that trains prints its daemons' output before its figures.
    found = json.loads(made.stdout[made.stdout.index("\n{") + 1 if not made.stdout.startswith("{") else 0 :])
    KEPT.mkdir(parents=True, exist_ok=True)
    kept = {"day": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "load_before": load, "found": found}
    (KEPT / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def page() -> str:
    """RESULTS.md, from all figures that are kept."""
    lines = [
        "# Speed",
        "",
        "Written by `python benchmarks/run_all.py`. Figures are medians (lowest-highest) over rounds. What is compared",
        "takes turns within a round, and a ratio is of figures of one round. A target is met if the median meets it.",
        "[README.md](README.md) describes each program.",
        "",
    ]
    for name in PROGRAMS:
        if not (path := KEPT / f"{name}.json").exists():
            lines += [f"## {name}", "", *ABOUT[name], "", "Not measured.", ""]
            continue
        kept = json.loads(path.read_text())
        lines += [
            f"## {name}",
            "",
            *ABOUT[name],
            "",
            f"{kept['day']}; {kept['machine']}; load before the start {kept['load_before']:.1f}.",
            "",
        ]
        lines += [
            "| figure | target | measured | met |",
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
