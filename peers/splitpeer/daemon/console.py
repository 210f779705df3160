"""What people see of a running job: a live line on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from splitpeer.logs import event
from splitpeer.training.scores import Scores, shown

log = logging.getLogger(__name__)
LINE_EVERY_S = 5.0


class RunView(Protocol):
    """Told by the coordinator; must not raise or wait."""

    def waiting(self, missing: str) -> None:
        """Sites that have not joined yet; empty when all have."""

    def begin(self, steps: int, sites: Sequence[str], missing: Sequence[str]) -> None:
        """Work begins with `sites`, and without `missing`."""

    def step(self, step: int, loss: float, octets: dict[str, int]) -> None:
        """A step is committed; `octets` on the wire by site, since the start."""

    def collecting(self, done: int, total: int) -> None:
        """Windows in the feature bank."""

    def evaluating(self, done: int, total: int) -> None:
        """Batches of an evaluation."""

    def evaluated(self, step: int, dice: Scores) -> None:
        """Dice over the patients held out."""

    def close(self) -> None:
        """No more."""


class Pace:
    """Steps per second and MB/s per site over the last few seconds."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int, dict[str, int]]] = []

    def add(self, step: int, octets: dict[str, int]) -> tuple[float, dict[str, float]]:
        """Note a step and the octets by site so far; returns steps per second and MB/s by site."""
        now = time.monotonic()
        self._marks = [mark for mark in self._marks if now - mark[0] < 10] + [(now, step, octets)]
        then, before, counted = self._marks[0]
        seconds = max(now - then, 1e-6)
        if len(self._marks) == 1:
            return 0.0, dict.fromkeys(octets, 0.0)
        return (step - before) / seconds, {
            s: (n - counted.get(s, n)) / seconds / 1e6 for s, n in octets.items()
        }


def dice_line(dice: Scores) -> str:
    """Such as `WT 0.810 TC 0.700 ET - mean 0.755`."""
    return " ".join(f"{region} {shown(value)}" for region, value in dice.items())


class LogView(RunView):
    """A log line every few seconds."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._said = 0.0
        self._steps = 0

    def waiting(self, missing: str) -> None:
        if missing:
            event(log, "job.waiting", sites=missing)

    def begin(self, steps: int, sites: Sequence[str], missing: Sequence[str]) -> None:
        self._steps = steps
        if missing:
            event(log, "job.begins_without", logging.WARNING, sites=", ".join(sites), missing=", ".join(missing),
                  steps=steps)  # fmt: skip
        elif sites:
            event(log, "job.all_here", sites=", ".join(sites), steps=steps)

    def step(self, step: int, loss: float, octets: dict[str, int]) -> None:
        rate, traffic = self._pace.add(step, octets)
        if time.monotonic() - self._said < LINE_EVERY_S and step != self._steps:
            return
        self._said = time.monotonic()
        left = (self._steps - step) / rate if rate else 0.0
        event(log, "job.step", step=f"{step}/{self._steps}", loss=round(loss, 4), steps_per_s=round(rate, 2),
              mb_per_s=" ".join(f"{site} {value:.1f}" for site, value in traffic.items()),
              left_s=round(left))  # fmt: skip

    def collecting(self, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._said >= LINE_EVERY_S:
            self._said = time.monotonic()
            event(log, "job.collecting", windows=f"{done}/{total}")

    def evaluating(self, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._said >= LINE_EVERY_S:
            self._said = time.monotonic()
            event(log, "job.evaluating", batch=f"{done}/{total}")

    def evaluated(self, step: int, dice: Scores) -> None:
        return

    def close(self) -> None:
        return


class LiveView(RunView):
    """One line that moves, and one for each evaluation."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace = Pace()
        self._dice = ""
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("waiting", total=None, figures="")
        self._progress.start()

    def waiting(self, missing: str) -> None:
        self._progress.update(self._task, description="waiting for", figures=missing)

    def begin(self, steps: int, sites: Sequence[str], missing: Sequence[str]) -> None:
        if missing:
            self._console.print(f"begins without {', '.join(missing)}", highlight=False, markup=False)
        self._progress.reset(self._task, total=steps, description="training", figures="")

    def step(self, step: int, loss: float, octets: dict[str, int]) -> None:
        rate, traffic = self._pace.add(step, octets)
        wire = " ".join(f"{site} {value:.1f}" for site, value in traffic.items())
        figures = f"loss {loss:.3f}  {rate:.1f} steps/s  MB/s {wire}  {self._dice}"
        self._progress.update(self._task, completed=step, description="training", figures=figures)

    def collecting(self, done: int, total: int) -> None:
        self._progress.update(self._task, description="collecting", figures=f"window {done}/{total}")

    def evaluating(self, done: int, total: int) -> None:
        self._progress.update(self._task, description="evaluating", figures=f"batch {done}/{total}")

    def evaluated(self, step: int, dice: Scores) -> None:
        self._dice = f"Dice {shown(dice.get('mean'))}"
        self._console.print(f"step {step}: Dice {dice_line(dice)}")

    def close(self) -> None:
        self._progress.stop()


def make_view() -> RunView:
    """`LiveView` on a terminal, `LogView` elsewhere."""
    console = Console(stderr=True)
    return LiveView(console) if console.is_terminal and sys.stderr.isatty() else LogView()
