"""What the wire costs a training step: four sites and a coordinator, against the same network in one process.

The federation is the demo's: five processes, TLS 1.3, images read from NIfTI, one thread at each site. Its coordinator
computes while the sites wait, so it has one thread in one run and all cores in the next. The whole network is stepped
before and after them, on random images that are already in memory, with one thread and with two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rows import Found, Line, at_most, spread

from splitpeer.demo.federation import SITES, DemoJob, Federation
from splitpeer.models import OUT_CHANNELS, build_split_network, unet_backbone
from splitpeer.training.loss import region_loss
from splitpeer.training.optimiser import make_optimiser
from splitproto.allocator import keep_freed_memory

WARM_UP = 5


def whole(job: DemoJob, steps: int, threads: int) -> list[float]:
    """Seconds of each training step of the whole network."""
    torch.set_num_threads(threads)
    settings = job.toml()
    modalities, side = tuple(SITES.values()), settings["data"]["window"]
    network = build_split_network(
        unet_backbone(2, settings["model"]["features"]), modalities, job_seed=job.seed
    )
    optimiser = make_optimiser(network.parameters(), "adam", job.learning_rate, 0.0)
    images = {m: torch.randn(job.batch, 1, *side) for m in modalities}
    target = (torch.rand(job.batch, OUT_CHANNELS, *side) > 0.9).float()
    took = []
    for _ in range(steps):
        began = time.perf_counter()
        optimiser.zero_grad()
        region_loss(network(images), target).backward()
        optimiser.step()
        took.append(time.perf_counter() - began)
    return took[WARM_UP:]


def federated(job: DemoJob, folder: Path) -> dict[str, list[float]]:
    """Per step, by the coordinator's clock: seconds in all, waiting for activations, in its own half."""
    federation = Federation(folder, job)
    federation.render(lambda done, total: None)
    federation.set_up()
    federation.run()
    lines = (federation.results / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line][WARM_UP:]
    return {key: [step[key] for step in steps] for key in ("seconds", "waited", "computed")}


ABOUT = (
    "The demo's federation: five processes on two cores, one thread at each site. The coordinator computes while its",
    "sites wait; with two threads it uses both cores. The range is over steps.",
)


def rows(found: Found) -> Iterator[Line]:
    """A training step, relative to one of the same network in one process with two threads."""
    kept = found["rows"]
    whole = statistics.median(kept["whole, 2 thread(s), before"] + kept["whole, 2 thread(s), after"])
    yield Line("training step, whole network in one process, two threads", "", f"{1000 * whole:.0f} ms", None)
    for threads in (1, 2):
        if (took := kept.get(f"four sites, coordinator with {threads} thread(s)")) is None:
            continue
        what = f"four sites, coordinator with {'one thread' if threads == 1 else 'two threads'}"
        yield Line(what, "", spread([1000 * one for one in took], 0) + " ms", None)
        yield at_most(f"{what} / one process with two threads", [one / whole for one in took], 1.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--patients", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    keep_freed_memory()
    job = DemoJob(patients=given.patients, validation=1, steps=given.steps, batch=given.batch)
    found: dict[str, list[float]] = {}
    for threads in (1, 2):
        found[f"whole, {threads} thread(s), before"] = whole(job, given.steps, threads)
    for threads in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            wire = federated(replace(job, threads=threads), Path(folder))
        found[f"four sites, coordinator with {threads} thread(s)"] = wire["seconds"]
        found[f"   waiting for activations, {threads}"] = wire["waited"]
        found[f"   coordinator's half, {threads}"] = wire["computed"]
    for threads in (1, 2):
        found[f"whole, {threads} thread(s), after"] = whole(job, given.steps, threads)
    if given.json:
        print(json.dumps({"unit": "seconds", "rows": found}, indent=2))
        return
    base = {
        t: statistics.median(
            [*found[f"whole, {t} thread(s), before"], *found[f"whole, {t} thread(s), after"]]
        )
        for t in (1, 2)
    }
    table = Table(title=f"Milliseconds a step, batch {job.batch} of 96x96: median (min-max)")
    for heading in ("", "ms", "by whole, 1 thread", "by whole, 2 threads"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, took in found.items():
        median = statistics.median(took)
        spread = f"{1e3 * median:.0f} ({1e3 * min(took):.0f}-{1e3 * max(took):.0f})"
        table.add_row(name, spread, *(f"{median / base[t]:.2f}" for t in (1, 2)))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()
