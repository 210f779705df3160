"""Codings of activations and gradients: Dice after the same number of steps, bytes of a step, CPU time.

The demo's job and phantom, smaller. Four encoders and a decoder are trained in one process with the coding at the cut,
by the library's own functions: bit for bit what a federation computes. What is done is kept in --out, and not done
again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rows import Found, Line, spread

from splitpeer.data.phantom.cohort import write_phantom
from splitpeer.demo.baselines import Baseline, train
from splitpeer.demo.federation import SITES, DemoJob
from splitpeer.federation.terms import cut_descriptors, job_on_wire
from splitpeer.settings.job import JobConfig
from splitpeer.settings.loading import to_toml
from splitpeer.storage import durable
from splitpeer.training.forms import Forms, WireForm
from splitproto.codings import CODINGS
from splitproto.tensors import body_bytes

PAIRS = (
    ("f32", "f32"),
    ("bf16", "bf16"),
    ("f16", "f16"),
    ("int8", "int8"),
    ("int8", "int4"),
    ("int4", "int8"),
    ("int4", "int4"),
    ("int4 int4 int4 f16 f16", "int4"),
    ("int4 int4 int4 f16 f16", "int4 int4 int4 int8 int8"),
)
"""Activations and gradients: one word for all levels, or one for each, the finest first."""
PRECISIONS = ("f32", "bf16")
EXACT = "f32 / f32"
TOLERATED, MOST = 0.01, 0.27
"""Of Dice, and of float32's bytes."""
ROUNDS = 7
MIB = 1 << 20


@dataclass(frozen=True)
class Training:
    """One network to train."""

    activations: str
    gradients: str
    seed: int
    patients: int
    validation: int
    steps: int

    @property
    def pair(self) -> str:
        return f"{self.activations} / {self.gradients}"

    @property
    def name(self) -> str:
        """Of the file that keeps its Dice."""
        said = (self.activations, self.gradients, self.seed, self.patients, self.validation, self.steps)
        return "-".join(map(str, said)).replace(" ", "+")

    def toml(self) -> dict[str, Any]:
        """Its job.toml."""
        job = DemoJob(self.patients, self.validation, self.steps, seed=self.seed).toml()
        both = {"activations": self.activations, "gradients": self.gradients}
        job["training"]["precision"] = next((form for form in both.values() if form in PRECISIONS), "f32")
        coded = {name: form.split() for name, form in both.items() if form not in PRECISIONS}
        return job | {"wire": {name: forms if len(forms) > 1 else forms[0] for name, forms in coded.items()}}


def job_of(training: Training, folder: Path) -> Path:
    """Write its job.toml."""
    path = folder / f"{training.name}.toml"
    durable.replace(path, to_toml(training.toml()).encode())
    return path


def dice_of(training: Training, data: Path, folder: Path) -> float:
    """Train, or read what was kept."""
    kept = folder / f"{training.name}.json"
    if not kept.exists():
        os.nice(19)
        salt = folder / "federation.salt"
        found = train(
            Baseline(
                training.pair,
                tuple(SITES.values()),
                job_of(training, folder),
                data,
                salt,
                as_travelled=True,
            )
        )
        durable.replace(kept, json.dumps(found.dice).encode())
    return float(json.loads(kept.read_text())["mean"])


def octets_of(training: Training, folder: Path) -> int:
    """Octets of one site's tensors in a step, activations and gradients."""
    job = job_on_wire(JobConfig.load(job_of(training, folder)))
    back = Forms.of(job).gradients
    there = cut_descriptors(job)
    return body_bytes(there) + body_bytes(back.described(one.name, job.batch) for one in there)


def milliseconds(coding: str, rounds: int) -> dict[str, list[float]]:
    """CPU ms for each MiB of float32, of the largest level of a batch."""
    shape = (8, 32, 96, 96)
    tensor = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    form, took = WireForm(coding, {"x0": shape[1:]}), {"encode": list[float](), "decode": list[float]()}
    for _ in range(rounds + 1):
        began = time.process_time()
        sent = form.to_wire({"x0": tensor})
        between = time.process_time()
        form.from_wire(sent)
        ended = time.process_time()
        took["encode"].append(1e3 * (between - began) * MIB / tensor.nbytes)
        took["decode"].append(1e3 * (ended - between) * MIB / tensor.nbytes)
    return {what: values[1:] for what, values in took.items()}


ABOUT = (
    "Four sites of the phantom in one process, with activations / gradients coded as the row says; all from the same",
    "weights, on the same batches. Dice of the patients held out: mean (lowest-highest) over seeds, and its difference",
    "to float32's.",
)


def rows(found: Found) -> Iterator[Line]:
    """Dice, bytes and CPU of each pair; the smallest that loses no more than .01 of Dice with any seed."""
    exact, best = statistics.mean(found["dice"][EXACT]), (math.inf, "")
    for pair, dice in found["dice"].items():
        octets, change = found["octets"][pair] / found["octets"][EXACT], statistics.mean(dice) - exact
        reached = f"{statistics.mean(dice):.3f} ({min(dice):.3f}-{max(dice):.3f}), {change:+.3f}"
        yield Line(pair, "", f"{octets:.3f} of float32's bytes; Dice {reached}", None)
        lost = max(other - one for one, other in zip(dice, found["dice"][EXACT], strict=True))
        if lost <= TOLERATED and pair != EXACT:
            best = min(best, (octets, pair))
    octets, pair = best
    what = f"bytes of a step / float32's, Dice within {TOLERATED:g} with each seed"
    yield Line(
        what, f"<= {MOST:g}", f"{octets:.3f} ({pair})" if pair else "no pair is within", octets <= MOST
    )
    for coding, took in found["ms"].items():
        shown = f"{spread(took['encode'])} to encode, {spread(took['decode'])} to decode"
        yield Line(f"{coding}, CPU ms for each MiB of float32", "", shown, None)


def measured(given: argparse.Namespace, folder: Path) -> Found:
    """All figures."""
    data = folder / f"data-{given.patients}"
    write_phantom(data, given.patients, seed=7, workers=given.workers)
    durable.replace(folder / "federation.salt", b"5a" * 32 + b"\n")
    wanted = [
        Training(there, back, seed, given.patients, given.validation, given.steps)
        for seed in given.seeds
        for there, back in PAIRS
    ]
    with ProcessPoolExecutor(given.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        dice = list(pool.map(dice_of, wanted, [data] * len(wanted), [folder] * len(wanted)))
    by_pair: dict[str, list[float]] = {}
    for training, reached in zip(wanted, dice, strict=True):
        by_pair.setdefault(training.pair, []).append(reached)
    return {
        "steps": given.steps,
        "seeds": given.seeds,
        "dice": by_pair,
        "octets": {training.pair: octets_of(training, folder) for training in wanted},
        "ms": {coding: milliseconds(coding, ROUNDS) for coding in ("bf16", *CODINGS)},
    }


def shown(found: Found) -> Table:
    """For people."""
    table = Table(title=f"{found['steps']} steps, seeds {', '.join(map(str, found['seeds']))}")
    for heading in ("activations / gradients", "bytes by float32's", "Dice", "by float32's"):
        table.add_column(heading, justify="left" if "/" in heading else "right")
    exact = found["dice"][EXACT]
    for pair, dice in found["dice"].items():
        apart = [one - other for one, other in zip(dice, exact, strict=True)]
        table.add_row(
            pair,
            f"{found['octets'][pair] / found['octets'][EXACT]:.3f}",
            " ".join(f"{one:.3f}" for one in dice),
            " ".join(f"{one:+.3f}" for one in apart),
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--patients", type=int, default=48)
    parser.add_argument("--validation", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where phantom and results are kept")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as nowhere:
        folder = given.out or Path(nowhere)
        folder.mkdir(parents=True, exist_ok=True)
        found = measured(given, folder)
    if given.json:
        print(json.dumps(found, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(shown(found))
    for coding, took in found["ms"].items():
        console.print(
            f"{coding}: CPU ms for each MiB {spread(took['encode'])} to encode, {spread(took['decode'])} to decode"
        )


if __name__ == "__main__":
    main()
