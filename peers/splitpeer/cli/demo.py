"""`splitpeer demo`: what `make demo` runs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import click
from rich.console import Console

from splitpeer.cli.data import bar
from splitpeer.cli.options import FILE, private_files
from splitpeer.demo.federation import HUB, SITES, DemoJob, Federation

_DEFAULT = DemoJob()


@click.command()
@click.option("--out", type=FILE, default=Path("runs/demo"), show_default=True, help="Everything goes here.")
@click.option("--patients", type=click.IntRange(4), default=_DEFAULT.patients, show_default=True)
@click.option("--validation", type=click.IntRange(1), default=_DEFAULT.validation, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=_DEFAULT.steps, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=_DEFAULT.seed, show_default=True)
@click.option("--device", default=_DEFAULT.device, show_default=True, help='"cpu", "cuda" or "auto".')
@click.option("--leak/--no-leak", default=True, show_default=True, help="Record, attack and report.")
@click.option("--missing", is_flag=True, help="Also score the network without each modality.")
@click.option(
    "--modality-dropout",
    type=click.FloatRange(0, 1, max_open=True),
    default=_DEFAULT.modality_dropout,
    show_default=True,
    help="Probability that a modality is left out of a step.",
)
@click.option("--baselines", is_flag=True, help="Also train each modality alone, and all in one process.")
def demo(
    out: Path,
    patients: int,
    validation: int,
    steps: int,
    seed: int,
    device: str,
    leak: bool,
    missing: bool,
    modality_dropout: float,
    baselines: bool,
) -> None:
    """Four hospitals and a coordinator on this machine train one network over TLS."""
    private_files()
    from splitpeer.cli.attack import attack_progress
    from splitpeer.demo.baselines import train_all
    from splitpeer.demo.leak import MODALITY, attack_and_report, recorded_keys
    from splitpeer.demo.report import (
        CONTRASTS,
        dice_table,
        distance_table,
        draw,
        read_result,
        volume_line,
        write_summary,
    )
    from splitpeer.training.scores import shown

    console = Console(stderr=True)
    started = time.monotonic()
    job = DemoJob(
        patients=patients,
        validation=validation,
        steps=steps,
        seed=seed,
        modality_dropout=modality_dropout,
        missing=missing,
        device=device,
    )
    federation = Federation(
        out.resolve(), job, lambda line: console.print(line, style="yellow", highlight=False)
    )
    console.rule("1 of 4: a phantom for five parties")
    with bar("rendering") as progress:
        task = progress.add_task("", total=patients)
        federation.render(lambda done, total: progress.update(task, completed=done, total=total))
    federation.certify()
    if leak:
        federation.record(HUB, keys=recorded_keys(federation))
        federation.record(federation.site_of(MODALITY), every=100, max_mib=64)
    federation.set_up()
    console.print(f"{patients} patients; certificates of a new CA; one folder per site below {out}")

    console.rule("2 of 4: five daemons train over mutual TLS")
    # Whoever stops the demo, or closes its terminal, must not leave daemons behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        pids = federation.start()
        console.print(
            ", ".join(f"{name} pid {pid}" for name, pid in pids.items())
            + f"\nTry `kill -9 {pids[federation.site_of(MODALITY)]}`, or any other: it is started again and the result "
            f"is the same.\nIn another terminal: `splitpeer status --watch {out}/*/peer.toml`",
            highlight=False,
            soft_wrap=True,
        )
        federation.wait()
    finally:
        federation.stop()
    result = read_result(federation.results)

    console.rule("3 of 4: results")
    rows = {"split, four hospitals": result["dice"]}
    distances = {"split, four hospitals": result["hd95"]} if result["hd95"] else {}
    without = {name: result["missing"].get(held) for name, held in CONTRASTS.items()}
    rows |= {f"the same without {name}": dice for name, dice in without.items() if dice}
    alone = {}
    if baselines:
        console.print("baselines: the same network on each contrast alone and in one process, same steps")
        alone = train_all(
            federation.hub / "job.toml",
            federation.data,
            out / "pki" / "federation.salt",
            tuple(sorted(SITES.values())),
            len(os.sched_getaffinity(0)),
            lambda name, found: console.print(f"  {name}: mean Dice {shown(found.dice['mean'])}"),
        )
        rows |= {name: found.dice for name, found in alone.items()}
        distances |= {name: found.hd95 for name, found in alone.items()}
    leaked = {}
    if leak:
        console.rule("4 of 4: what the coordinator and one hospital recorded is attacked")
        leaked = attack_and_report(federation, out / "report.html", attack_progress(console))
        for name, value in leaked.items():
            console.print(f"  {name} {value:.3f}", highlight=False)
    pictures = draw(out, federation.data, federation.results, rows)
    summary = {
        "leakage": leaked,
        "dice": result["dice"],
        "seconds": round(time.monotonic() - started, 1),
        "steps": result["step"],
        "sites": len(result["sites"]),
        "tls": result["tls"],
        "bytes_per_step": result["bytes_per_step"],
        "patients": {
            "training": result["patients"] - result["validation"],
            "validation": result["validation"],
        },
        "missing": result["missing"],
        "hd95": result["hd95"],
        "volume_ml": result["volume_ml"],
        "baselines": {name: found.dice for name, found in alone.items()},
        "baselines_hd95": {name: found.hd95 for name, found in alone.items()},
    }
    write_summary(out / "summary.json", summary)
    console.print(dice_table(rows))
    if distances:
        console.print(distance_table(distances))
        console.print(
            f"found of true volume, on average: {volume_line(result['volume_ml'])}", highlight=False
        )
    console.print(
        f"{summary['steps']} steps, {summary['bytes_per_step'] / 1e6:.1f} MB a step on the wire ({summary['tls']}), "
        f"{summary['seconds']} s"
    )
    console.print(
        "look at: "
        + ", ".join(
            str(path) for path in (*pictures, *([out / "report.html"] if leak else []), out / "summary.json")
        )
    )
