"""What recording costs a training step: the same run with and without `--curious`, in turns.

The federation is the demo's: four sites, each a process of its own, and a coordinator in this one. Every few steps
the coordinator's capture is switched on or off, so that both kinds of steps run under the same conditions; between two
blocks pending data is written to disk, so that neither pays for the other; the time of that is a part of the block's.
Every other pair begins with the recorded block. The first steps of a block do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rows import Found, Line, at_most, spread

from splitpeer import logs
from splitpeer.coordinator.coordinator import Coordinator
from splitpeer.daemon.console import LogView
from splitpeer.demo.federation import DemoJob, Federation
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitproto.allocator import keep_freed_memory

SKIPPED = 2
"""Steps at the beginning of a block that are not counted."""


class Switch(LogView):
    """Turns the coordinator's recording on and off every `block` steps, and notes its CPU seconds."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block
        self.coordinator: Coordinator
        self.cpu: dict[int, float] = {}
        """Step to CPU seconds of this process, all threads, up to its end."""
        self.flushed: dict[int, float] = {}
        """Last step of a block to seconds that writing what it left took."""
        self.octets = 0

    def recorded(self, step: int) -> bool:
        return (step - 1) // self.block % 4 in (1, 2)

    def step(self, step: int, loss: float, octets: dict[str, int]) -> None:
        self.cpu[step] = time.process_time()
        if step % self.block:
            return
        witness = self.coordinator._witness
        recorder = witness._recorder
        assert recorder is not None
        began = time.monotonic()
        while recorder._queue:
            time.sleep(0.001)
        self.flushed[step] = time.monotonic() - began
        self.octets = recorder.state.octets
        for site in self.coordinator.sites:
            assert site.session is not None
            if self.recorded(step + 1):
                witness.listen(site.session)
            else:
                site.session.tap = None
        self.cpu[step] = time.process_time()


async def train(job: DemoJob, folder: Path, block: int, curious: Path) -> tuple[Switch, list[float]]:
    """One run; the switch, and the seconds of each step."""
    federation = Federation(folder, job)
    federation.render(lambda done, total: None)
    federation.set_up()
    federation.start_clients()
    view = Switch(block)
    try:
        config = PeerConfig.load(federation.hub / "peer.toml")
        settings = JobConfig.load(federation.hub / "job.toml")
        view.coordinator = Coordinator(config, settings, asyncio.Event(), view, curious=curious)
        await view.coordinator.run()
    finally:
        federation.stop()
    lines = (federation.results / "metrics.jsonl").read_text().splitlines()
    return view, [line["seconds"] for line in map(json.loads, lines) if "loss" in line]


def pairs(view: Switch, seconds: list[float]) -> list[dict[str, float]]:
    """Per pair of neighbouring blocks: means of a step's wall seconds, and of its CPU seconds, off and on."""
    wall, cpu = [], []
    for number in range(len(seconds) // view.block):
        steps = range(number * view.block + 1 + SKIPPED, (number + 1) * view.block + 1)
        flushed = view.flushed[steps[-1]] if view.recorded(steps[-1]) else 0.0
        wall.append((sum(seconds[step - 1] for step in steps) + flushed) / len(steps))
        cpu.append((view.cpu[steps[-1]] - view.cpu[steps[0] - 1]) / len(steps))
    found = []
    for n in range(2, len(wall) - 1, 2):  # the first pair warms up
        off, on = (n + 1, n) if view.recorded(n * view.block + 1) else (n, n + 1)
        found.append({"off": wall[off], "on": wall[on], "cpu_off": cpu[off], "cpu_on": cpu[on]})
    return found


ABOUT = (
    "The same federation; its coordinator records what it sees (`--curious`) for a few steps, then not for",
    "as many, in turns. A recorded step's time includes its share of what was still to be written at the end.",
)


def rows(found: Found) -> Iterator[Line]:
    """Steps that the coordinator records, relative to others of the same run."""
    yield at_most(
        "training step with recording / without", [p["on"] / p["off"] for p in found["pairs"]], 1.03
    )
    more = [1e3 * (p["cpu_on"] - p["cpu_off"]) for p in found["pairs"]]
    yield Line("CPU time that recording adds to a step", "", spread(more, 1) + " ms", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--patients", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--capture", type=Path, help="Write the capture here (a folder); default: temporary.")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    logs.setup("text", "error")
    keep_freed_memory()
    job = DemoJob(patients=given.patients, validation=1, steps=given.steps, batch=given.batch)
    with tempfile.TemporaryDirectory() as folder:
        capture = (given.capture or Path(folder)) / "coordinator.cap"
        view, seconds = asyncio.run(train(job, Path(folder), given.block, capture))
    found = pairs(view, seconds)
    if given.json:
        print(json.dumps({"unit": "seconds a step", "pairs": found, "octets": view.octets}, indent=2))
        return
    table = Table(
        title=f"A step of four sites, batch {job.batch} of 96x96: {len(found)} pairs of {given.block} steps"
    )
    for heading in ("", "off", "on", "on / off: median", "quarters", "range"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, off, on in (("wall, ms", "off", "on"), ("coordinator's CPU, ms", "cpu_off", "cpu_on")):
        ratios = sorted(pair[on] / pair[off] for pair in found)
        low, _, high = statistics.quantiles(ratios, n=4)
        table.add_row(
            name,
            *(f"{1e3 * statistics.median(pair[key] for pair in found):.0f}" for key in (off, on)),
            f"{statistics.median(ratios):.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{ratios[0]:.3f}-{ratios[-1]:.3f}",
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    recorded = sum(view.recorded(step) for step in range(1, len(seconds) + 1))
    print(f"recorded: {view.octets / recorded / 2**20:.1f} MiB a step")


if __name__ == "__main__":
    main()
