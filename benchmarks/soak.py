"""A federation at full speed for an hour, its links rotated every few seconds: what memory, files and threads do.

Every party is a `splitpeer serve` process with certificates of its own and a phantom's images. The network is small,
so that steps are many, and links, checkpoints and event loops have most of the work. From /proc, every ten seconds:
resident memory, open files, threads. A leak shows as a slope, a warm-up as a lower first quarter.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from splitpeer.data.phantom.cohort import write_phantom
from splitpeer.settings.loading import to_toml
from splitproto import pki

MODALITIES = ("flair", "t1", "t1ce", "t2")
HUB, FEDERATION = "hub", "soak"
PATIENTS, SEED = 6, 7
ENDLESS = 10_000_000
"""Steps of the job: time ends it."""
START_S, LEAVE_S = 600.0, 60.0
WARM = 0.1
"""The first tenth does not count for the slope: caches fill, libraries are imported when first needed."""


@dataclass(frozen=True)
class Sample:
    """One party at one moment."""

    at_s: float
    """Since the first step."""
    party: str
    step: int
    links: int
    """Made so far by all sites."""
    rss_mib: float
    anon_mib: float
    """The part that no file on disk backs."""
    fds: int
    threads: int
    cpu_s: float


MEASURES = (("rss_mib", "memory, MiB"), ("fds", "open files"), ("threads", "threads"))


# --- the federation ------------------------------------------------------------------------------------------


class Soak:
    """The files of one federation, and its processes.

    Args:
        folder: empty, or where this ran before.
        modalities: one site each.
        worn: `rotate_s` or `rotate_mib` of every party's [network].
    """

    def __init__(self, folder: Path, modalities: Sequence[str], worn: dict[str, float]) -> None:
        self.folder = folder
        self.sites = {f"site-{modality}": modality for modality in modalities}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._worn = worn
        self._read: dict[Path, int] = {}
        self._links = 0
        self._step = 0
        self.rollbacks = 0

    def set_up(self) -> None:
        """Images, certificates, settings."""
        write_phantom(self.folder / "data", PATIENTS, seed=SEED)
        keys, now = self.folder / "pki", datetime.now(UTC)
        pki.create_ca(keys, FEDERATION, now=now)
        pki.issue(keys, "coordinator", HUB, hosts=["127.0.0.1"], now=now)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self._write(
            HUB,
            {
                "peer": {"role": "coordinator"},
                "network": {"listen": address},
                "data": {"labels": "../data/labels", "convention": "msd"},
            },
        )
        for site, modality in self.sites.items():
            pki.issue(keys, "client", site, now=now)
            self._write(
                site,
                {
                    "peer": {"role": "client", "modality": modality},
                    "network": {"coordinator": address},
                    "data": {"images": f"../data/{modality}"},
                    "policy": {"coordinators": [HUB]},
                    "runtime": {"initial_weights": SEED},
                },
            )
        job: dict[str, dict[str, Any]] = {
            "job": {"name": FEDERATION, "seed": SEED},
            "sites": self.sites,
            "model": {"dimensions": 2, "features": [2, 4, 4, 8, 8, 4]},
            "data": {"window": [32, 32], "validation": 1},
            "training": {"steps": ENDLESS, "batch": 2, "schedule": "constant"},
            "output": {"folder": "results"},
        }
        (self.folder / HUB / "job.toml").write_text(to_toml(job))

    def _write(self, party: str, settings: dict[str, dict[str, Any]]) -> None:
        settings["peer"] |= {"site": party, "federation": FEDERATION}
        names = {"ca": "ca.crt", "certificate": f"{party}.crt", "key": f"{party}.key"}
        settings["tls"] = {key: f"../pki/{name}" for key, name in names.items()}
        settings["network"] |= self._worn
        settings["data"]["salt"] = "../pki/federation.salt"
        settings["runtime"] = {"threads": 1, **settings.get("runtime", {})}
        (self.folder / party).mkdir()
        (self.folder / party / "peer.toml").write_text(to_toml(settings))

    @contextmanager
    def running(self) -> Iterator[None]:
        """All parties, until they have left."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        for party in (HUB, *self.sites):
            role = ["coordinator", "--job", "job.toml"] if party == HUB else ["client"]
            with (self.folder / party / "log.txt").open("wb") as log:
                self.processes[party] = subprocess.Popen(
                    [sys.executable, "-m", "splitpeer.cli", "serve", "--role", *role],
                    cwd=self.folder / party,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        try:
            yield
        finally:
            for process in self.processes.values():
                process.terminate()
            ends = time.monotonic() + LEAVE_S
            for process in self.processes.values():
                try:
                    process.wait(max(0.1, ends - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def check(self) -> None:
        """Raises SystemExit if a party has ended."""
        for party, process in self.processes.items():
            if (code := process.poll()) is not None:
                lines = (self.folder / party / "log.txt").read_text(errors="replace").splitlines()
                raise SystemExit(f"{party} ended with {code}: {lines[-1] if lines else 'it said nothing'}")

    def progress(self) -> tuple[int, int]:
        """(the newest committed step, links made)."""
        self._links += sum(self._new(site, "log.txt").count(b"link.up") for site in self.sites)
        written = self._new(HUB, "results/metrics.jsonl")
        self.rollbacks += written.count(b'"rollback"')
        if steps := re.findall(rb'"step": ?(\d+)', written):
            self._step = int(steps[-1])
        return self._step, self._links

    def _new(self, party: str, name: str) -> bytes:
        """Whole lines of a growing file that were not read yet."""
        path = self.folder / party / name
        if not path.exists():
            return b""
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            lines = file.read().rpartition(b"\n")
        self._read[path] = self._read.get(path, 0) + len(lines[0] + lines[1])
        return lines[0]


# --- looking on ------------------------------------------------------------------------------------------------


def look(soak: Soak, at_s: float) -> list[Sample]:
    """All parties now."""
    step, links = soak.progress()
    found = []
    for party, process in soak.processes.items():
        proc = Path("/proc", str(process.pid))
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        times = (proc / "stat").read_text().rpartition(")")[2].split()
        found.append(
            Sample(
                round(at_s, 1),
                party,
                step,
                links,
                int(status["VmRSS"].split()[0]) / 1024,
                int(status["RssAnon"].split()[0]) / 1024,
                len(list((proc / "fd").iterdir())),
                int(status["Threads"]),
                (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
            )
        )
    return found


def watch(soak: Soak, seconds: float, every: float, out: Path) -> list[Sample]:
    """Samples until `seconds` after the first step; on disk as they come."""
    ends = time.monotonic() + START_S
    while soak.progress()[0] < 1:
        soak.check()
        if time.monotonic() > ends:
            raise SystemExit(f"no step within {START_S:g} s: see {soak.folder}/*/log.txt")
        time.sleep(0.2)
    began, samples = time.monotonic(), []
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    console = Console(stderr=True)
    with (
        (out / "soak.csv").open("w", newline="") as file,
        Progress(*columns, console=console, disable=not console.is_terminal) as shown,
    ):
        table = csv.DictWriter(file, Sample.__dataclass_fields__)
        table.writeheader()
        task, spoken = shown.add_task("", total=seconds), 0.0
        while True:
            soak.check()
            now = look(soak, time.monotonic() - began)
            samples += now
            table.writerows(map(asdict, now))
            file.flush()
            at_s, rate = now[0].at_s, pace(samples[-20 * len(now) :])
            memory = " ".join(f"{sample.party} {sample.rss_mib:.0f}" for sample in now)
            line = f"step {now[0].step}, {rate:.1f}/s, {now[0].links} links; MiB: {memory}"
            shown.update(task, completed=at_s, description=line)
            if not console.is_terminal and at_s >= spoken:
                print(f"{at_s:6.0f} s  {line}", file=sys.stderr, flush=True)
                spoken = at_s + 60
            if at_s >= seconds:
                return samples
            time.sleep(max(0.0, min(every * (1 + at_s // every), seconds) - (time.monotonic() - began)))


def pace(samples: list[Sample]) -> float:
    """Steps a second."""
    first, last = samples[0], samples[-1]
    return (last.step - first.step) / (last.at_s - first.at_s) if last.at_s > first.at_s else 0.0


# --- telling -----------------------------------------------------------------------------------------------------


def summary(samples: list[Sample]) -> dict[str, dict[str, dict[str, float]]]:
    """Party to measure to: first and last quarter's medians, maximum, slope per hour after the warm-up."""
    whole = samples[-1].at_s
    told: dict[str, dict[str, dict[str, float]]] = {}
    for party in dict.fromkeys(sample.party for sample in samples):
        own = [sample for sample in samples if sample.party == party]
        at = np.array([sample.at_s for sample in own])
        warm = at >= WARM * whole
        told[party] = {}
        for measure, _ in MEASURES:
            values = np.array([getattr(sample, measure) for sample in own], float)
            slope = np.polyfit(at[warm], values[warm], 1)[0] * 3600 if warm.sum() > 2 else float("nan")
            told[party][measure] = {
                "first_quarter": statistics.median(values[at <= whole / 4]),
                "last_quarter": statistics.median(values[at >= whole * 3 / 4]),
                "max": float(values.max()),
                "slope_per_hour": round(float(slope), 3),
            }
    return told


def draw(samples: list[Sample], path: Path, title: str) -> None:
    """Memory, files and threads of each party over time."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        4, 1, sharex=True, figsize=(8, 8), height_ratios=(2, 2, 1, 1), layout="constrained"
    )
    memory, change, *others = axes
    for party in dict.fromkeys(sample.party for sample in samples):
        own = [sample for sample in samples if sample.party == party]
        minutes = [sample.at_s / 60 for sample in own]
        rss = np.array([sample.rss_mib for sample in own])
        memory.plot(minutes, rss, label=party)
        change.plot(minutes, rss - rss[int(WARM * len(rss))])
        for plot, (measure, _) in zip(others, MEASURES[1:], strict=True):
            plot.plot(minutes, [getattr(sample, measure) for sample in own])
    change.set_ylabel(f"change, MiB\n(0: {WARM:.0%} of the time)")
    for plot, (_, name) in zip((memory, *others), MEASURES, strict=True):
        plot.set_ylabel(name)
        # From zero: a slope shall look as large as it is. `change` is for looking closer.
        plot.set_ylim(0, 1.1 * plot.get_ylim()[1])
    for plot in axes:
        plot.grid(alpha=0.3)
    memory.set_title(title, fontsize=10)
    memory.legend(loc="lower right")
    others[-1].set_xlabel("minutes")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def tell(told: dict[str, Any]) -> None:
    """The table."""
    table = Table(title=told["title"])
    for heading in ("party", "", "first quarter", "last quarter", "max", "slope an hour"):
        table.add_column(heading, justify="left" if heading in ("party", "") else "right")
    for party, measures in told["parties"].items():
        for measure, name in MEASURES:
            values, digits = measures[measure], 1 if measure == "rss_mib" else 0
            cells = [f"{values[key]:.{digits}f}" for key in ("first_quarter", "last_quarter", "max")]
            table.add_row(
                party if measure == "rss_mib" else "", name, *cells, f"{values['slope_per_hour']:+.1f}"
            )
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    print(
        f"{told['steps']} steps, {told['steps_per_s']:.1f} a second; {told['rotations']} rotations, "
        f"{told['rollbacks']} rollbacks; load {told['load'][0]:.1f} at the end"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600)
    worn = parser.add_mutually_exclusive_group()
    worn.add_argument("--rotate-s", type=float, default=5.0, help="New links so often; default 5.")
    worn.add_argument("--rotate-mib", type=int, help="New links after so many MiB sent, instead.")
    parser.add_argument("--sites", type=int, choices=(1, 2, 3, 4), default=2)
    parser.add_argument("--every", type=float, default=10.0, help="Seconds between two samples.")
    parser.add_argument(
        "--out", type=Path, help="soak.json, .png, .csv and the parties' files; default: temporary."
    )
    given = parser.parse_args()
    how = {"rotate_mib": given.rotate_mib} if given.rotate_mib else {"rotate_s": given.rotate_s}
    out = given.out or Path(tempfile.mkdtemp(prefix="soak-"))
    out.mkdir(parents=True, exist_ok=True)
    soak = Soak(
        Path(tempfile.mkdtemp(prefix="federation-", dir=out)).resolve(), MODALITIES[: given.sites], how
    )
    soak.set_up()
    with soak.running():
        samples = watch(soak, given.seconds, given.every, out)
    codes = {party: process.returncode for party, process in soak.processes.items()}
    (key, value), last = next(iter(how.items())), samples[-1]
    told = {
        "title": f"{given.sites} site(s) and a coordinator for {last.at_s:.0f} s, {key} = {value:g}",
        "seconds": last.at_s,
        "steps": last.step,
        "steps_per_s": round(pace(samples), 2),
        "rotations": last.links - given.sites,
        "rollbacks": soak.rollbacks,
        "load": os.getloadavg(),
        "rotation": how,
        "codes": codes,
        "cpu_s": {
            s.party: round(s.cpu_s - f.cpu_s, 1)
            for f, s in zip(samples[: len(codes)], samples[-len(codes) :], strict=True)
        },
        "parties": summary(samples),
    }
    (out / "soak.json").write_text(json.dumps(told, indent=2) + "\n")
    draw(samples, out / "soak.png", told["title"])
    tell(told)
    print(f"{out}: soak.json, soak.csv, soak.png")
    if any(codes.values()):
        raise SystemExit(f"not everybody left in good order: {codes}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
