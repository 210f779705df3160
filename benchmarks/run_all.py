"""Runs every benchmark of speed with its defaults, and writes benchmarks/RESULTS.md from their figures.

    pip install -c constraints.txt -e . -r benchmarks/peers.txt
    python benchmarks/run_all.py                      # an hour on two cores; nothing else should run
    python benchmarks/run_all.py --only throughput    # repeat one; the others' figures stay
    python benchmarks/run_all.py --only               # only write the page again

The figures of each program are kept as JSON in benchmarks/results/speed/, with the day and the machine. A program
prints them with `--json`; its `ABOUT` and `rows` say what they are, and what they are to be. `peers` finds NVFlare and
Flower by NVFLARE_PYTHON and FLOWER_PYTHON (README.md), and measures neither without.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import ssl
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
KEPT, PAGE = HERE / "results" / "speed", HERE / "RESULTS.md"
PROGRAMS: dict[str, tuple[str, ...]] = {
    "throughput": ("--rounds", "7", "--mib", "256"),
    "latency": (),
    "sites": (),
    "step": (),
    "recording": (),
    "feature_bank": (),
    "links": (),
    "ranks": (),
    "start": (),
    "inference": (),
    "peers": (),
    "codings": (),
    "cost_model": (),
}
LIBRARIES = ("torch", "numpy", "pyzmq", "msgpack", "cryptography", "grpcio")
NOT_MEASURED = (("a coordinator with a GPU", "none at hand"),)


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


def run(name: str) -> bool:
    """Run one program and keep its figures at once; whether there are any."""
    load = os.getloadavg()[0]
    print(f"{name}: load {load:.1f} before", file=sys.stderr)
    made = subprocess.run(
        (sys.executable, HERE / f"{name}.py", "--json", *PROGRAMS[name]),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if made.returncode:
        print(f"{name}.py ended with exit code {made.returncode}: its last line says why", file=sys.stderr)
        return False
    # A program that trains prints its daemons' output before its figures.
    found = json.loads(made.stdout[made.stdout.index("\n{") + 1 if not made.stdout.startswith("{") else 0 :])
    KEPT.mkdir(parents=True, exist_ok=True)
    kept = {
        "day": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine(),
        "load_before": load,
        "arguments": PROGRAMS[name],
        "found": found,
    }
    (KEPT / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    return True


def page() -> str:
    """RESULTS.md, from all figures that are kept."""
    lines = [
        "# Speed",
        "",
        "Written by `python benchmarks/run_all.py`. Figures are medians (lowest-highest) over rounds. What is compared",
        "takes turns within a round, and a ratio is of figures of one round. But in `step` and `links` the range is",
        "over steps, by a median of runs before and after them; Flower and the daemons have turns of their own.",
        "A target is met if the median meets it.",
        "[README.md](README.md) describes each program.",
        "",
    ]
    for name in PROGRAMS:
        program = importlib.import_module(name)
        if not (path := KEPT / f"{name}.json").exists():
            lines += [f"## {name}", "", *program.ABOUT, "", "Not measured.", ""]
            continue
        kept = json.loads(path.read_text())
        lines += [
            f"## {name}",
            "",
            *program.ABOUT,
            "",
            f"{kept['day']}; {kept['machine']}; load before the start {kept['load_before']:.1f}; "
            f"`{' '.join((f'{name}.py', *kept['arguments']))}`.",
            "",
        ]
        lines += [
            "| figure | target | measured | met |",
            "|---|---|---|---|",
            *map(str, program.rows(kept["found"])),
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
    failed = [name for name in (PROGRAMS if given.only is None else given.only) if not run(name)]
    PAGE.write_text(page())
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
