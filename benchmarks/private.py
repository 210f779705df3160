"""What taking part privately costs and what still leaks: Dice, beside images rebuilt from what the coordinator saw.

Rows: all halves trained together and every tensor seen (what a plain job does); narrow levels; a secure sum of which
only the sum is seen; and frozen encoders, pretrained on strangers, from which each window is released once
(docs/private.md). One process computes what a run would, bit for bit, as masks cancel (private_run.py).

Two adversaries: one has every encoder; the other is a coordinator that has none, and makes its own. The figure of each
is that of its best attack, for each contrast, with its budget doubled as long as that gains .01 (private_leak.py). A
third is a site of a joint run over a sum, which is sent its gradient and wants the labels (private_labels.py). All
rows are trained first, then attacked; --attack-seeds says of which seeds, as intervals of what leaks are over patients.
What is done is kept in --out, and not done again; the table is written next to it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pretraining import CONTRASTS
from private_leak import ATTACKS, GRADIENT, LABELS, Attacker, floor
from private_run import Federation, Row, RowBench
from private_table import markdown, shown
from rich.console import Console

from splitpeer.storage import durable

ROWS = (
    Row("joint, all tensors"),
    Row("joint, sum 2,2,4,8,16", widths=(2, 2, 4, 8, 16), secure=True),
    Row("joint, sum 1,1,2,4,8", widths=(1, 1, 2, 4, 8), secure=True),
    Row("frozen, all tensors", strangers=240),
    Row("frozen, tensors 1,1,2,4,8", strangers=240, widths=(1, 1, 2, 4, 8)),
    Row("frozen apart, sum 2,2,4,8,16", strangers=240, apart=True, widths=(2, 2, 4, 8, 16), secure=True),
    Row("frozen each, sum 2,2,4,8,16", strangers=240, each=True, widths=(2, 2, 4, 8, 16), secure=True),
    Row("frozen, sum 8,8,16,32,64", strangers=240, widths=(8, 8, 16, 32, 64), secure=True),
    Row("frozen, sum 4,4,8,8,16", strangers=240, widths=(4, 4, 8, 8, 16), secure=True),
    Row("frozen, sum 2,2,4,8,16", strangers=240, widths=(2, 2, 4, 8, 16), secure=True),
    Row("frozen, sum 1,1,2,4,8", strangers=240, widths=(1, 1, 2, 4, 8), secure=True),
    Row(
        "frozen, sum 2,2,4,8,16, under noise .5",
        strangers=240,
        widths=(2, 2, 4, 8, 16),
        secure=True,
        noise=0.5,
    ),
    Row(
        "frozen, sum 1,1,2,4,8, under noise .5", strangers=240, widths=(1, 1, 2, 4, 8), secure=True, noise=0.5
    ),
    # The widths are those of the job alone: one map for each region is sent.
    Row("frozen, sum of logits", strangers=240, widths=(1, 1, 2, 4, 8), secure=True, logits=True),
)


def tried(written: str, strangers: int) -> Row:
    """A further row: WIDTHS[:NOISE[:RATE]] of a frozen sum."""
    widths, noise, rate, *_ = [*written.split(":"), "0", "0"]
    if float(rate) and not float(noise):
        raise SystemExit(f"--more {written}: a rate is the price of what gets through noise: set one")
    name = f"frozen, sum {widths}"
    name += f", under noise {noise.lstrip('0')}" if float(noise) else ""
    name += f", rate {rate.lstrip('0')}" if float(rate) else ""
    return Row(
        name, strangers=strangers, widths=tuple(map(int, widths.split(","))), secure=True, noise=float(noise),
        rate=float(rate),
    )  # fmt: skip


# --- measurements ------------------------------------------------------------------------------------------


def octets(federation: Federation) -> int:
    """Sent by all sites for one window."""
    word = 4 if federation.job.fusion is None else federation.job.fusion.bits // 8
    bench, window = federation.bench, federation.job.window
    shapes = bench.job.model.backbone().cut.shapes(1, window)
    if bench.row.logits:
        shapes = {"x0": (bench.task.channels, *window)}
    return len(CONTRASTS) * word * sum(int(np.prod(shape)) for shape in shapes.values())


def ran(bench: RowBench, told: Any) -> dict[str, Any]:
    """Train one row with one seed, and score it."""
    started = time.monotonic()
    federation = Federation(bench, told)
    federation.train()
    federation.keep()
    dice, patients = federation.dice()
    told(f"Dice {dice['mean']:.3f}")
    return {
        "dice": dice,
        "patients": patients,
        "octets_per_window": octets(federation),
        "seconds": time.monotonic() - started,
    }


class Results:
    """What was measured, kept at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.all: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def put(self, key: str, value: Any) -> None:
        """Keep it."""
        self.all[key] = value
        durable.replace(self._path, json.dumps(self.all, indent=1).encode())


def measured(results: Results, given: argparse.Namespace, rows: Sequence[Row], name: str, told: Any) -> None:
    """All that is missing."""

    def bench(row: Row, seed: int) -> RowBench:
        folder = given.out / f"seed-{seed}-{name}"
        return RowBench(folder, seed, given, row, folder)

    for seed in given.seeds:
        for row in rows:
            if f"{row.name}/{seed}" not in results.all:
                results.put(f"{row.name}/{seed}", ran(bench(row, seed), partial(told, seed, row)))
    for seed in given.seeds if given.attack_seeds is None else given.attack_seeds:
        for row in rows if given.attack_rows is None else [one for one in rows if one.name in given.attacked]:
            attacker = Attacker(bench(row, seed), partial(told, seed, row), given)
            for attack in given.attacks:
                # What labels alone say is the same in all rows.
                key = f"{LABELS}/{seed}" if attack == LABELS else f"{row.name}/{seed}/{attack}"
                if key not in results.all and (attack != GRADIENT or row.one_gradient):
                    results.put(key, attacker.attack(attack))
            if f"floor/{seed}" not in results.all:
                results.put(f"floor/{seed}", {"patients": floor(attacker)})


def _told(console: Console, seed: int, row: Row, line: str) -> None:
    console.print(f"seed {seed}, {row.name}: {line}", highlight=False)


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/private"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--patients", type=int, default=124)
    parser.add_argument("--validation", type=int, default=24)
    parser.add_argument("--strangers", type=int, default=240)
    parser.add_argument("--steps", type=int, default=450, help="of the run")
    parser.add_argument("--pretraining-steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--rows", type=int, nargs="*", default=list(range(len(ROWS))), help="numbers; 0 is joint"
    )
    parser.add_argument(
        "--more", nargs="*", default=[], metavar="WIDTHS:NOISE:RATE", help="more rows: frozen sums"
    )
    parser.add_argument("--attack-seeds", type=int, nargs="*", help="of --seeds; absent: all")
    parser.add_argument(
        "--attack-rows", type=int, nargs="*", help="of --rows (and all of --more); absent: all"
    )
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--shadow", type=int, default=240, help="strangers whom the adversary has")
    parser.add_argument("--attack-steps", type=int, default=3840, help="of an inverse network, at most")
    parser.add_argument("--surrogate-steps", type=int, default=600)
    parser.add_argument("--search-steps", type=int, default=100, help="of the first attempt")
    parser.add_argument(
        "--readout-steps", type=int, default=300, help="of the networks that look for tumours"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs show it")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    console = Console(stderr=True)
    settings = (
        given.patients, given.validation, given.steps, given.pretraining_steps, given.batch, given.strangers
    )  # fmt: skip
    name = "-".join(map(str, settings))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"results-{name}-{given.attack_steps}.json"
    results = Results(path)
    numbered = {
        number: replace(ROWS[number], strangers=min(ROWS[number].strangers, given.strangers))
        for number in sorted({0, *given.rows})
    }
    more = [tried(one, given.strangers) for one in given.more]
    given.attacked = {row.name for number, row in numbered.items() if number in (given.attack_rows or ())}
    given.attacked |= {row.name for row in more}
    rows = [*numbered.values(), *more]
    measured(results, given, rows, name, partial(_told, console))
    text = markdown(results.all, rows, given)
    durable.replace(path.with_suffix(".md"), text.encode())
    if given.json:
        json.dump(results.all, sys.stdout, indent=1)
    elif given.markdown:
        print(text)
    else:
        Console().print(shown(results.all, rows, given))


if __name__ == "__main__":
    main()
