"""`splitpeer demo`: what `make demo` runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.console import Console

from splitpeer.cli.options import FILE, private_files
from splitpeer.cli.progress import bar
from splitpeer.demo.federation import HUB, SEAT, DemoJob, Federation
from splitpeer.demo.private import PrivateJob

if TYPE_CHECKING:
    from splitpeer.demo.baselines import Reached
    from splitpeer.training.scores import Scores

REPORT = "report.html"
SPLIT = "split, four hospitals"
PRIVATE = "private, four hospitals"
_DEFAULT = DemoJob()
_PRIVATE = PrivateJob()


@click.command()
@click.option("--out", type=FILE, default=Path("runs/demo"), show_default=True, help="Everything goes here.")
@click.option(
    "--patients",
    type=click.IntRange(4),
    help=f"Default: {_DEFAULT.patients}, with --private {_PRIVATE.patients}.",
)
@click.option("--validation", type=click.IntRange(1), default=_DEFAULT.validation, show_default=True)
@click.option(
    "--steps", type=click.IntRange(1), help=f"Default: {_DEFAULT.steps}, with --private {_PRIVATE.steps}."
)
@click.option("--seed", type=click.IntRange(0), default=_DEFAULT.seed, show_default=True)
@click.option("--device", default=_DEFAULT.device, show_default=True, help='"cpu", "cuda" or "auto".')
@click.option("--leak/--no-leak", default=True, show_default=True, help="Record, attack and report.")
@click.option("--missing", is_flag=True, help="Also score the network without each seat.")
@click.option(
    "--seat-dropout",
    type=click.FloatRange(0, 1, max_open=True),
    default=_DEFAULT.seat_dropout,
    show_default=True,
    help="Probability that a seat is left out of a step.",
)
@click.option("--baselines", is_flag=True, help="Also train each modality alone, and all in one process.")
@click.option(
    "--private",
    is_flag=True,
    help="Frozen encoders, and only the sum over all hospitals is readable (docs/private.md).",
)
@click.option(
    "--strangers",
    type=click.IntRange(4),
    default=_PRIVATE.strangers,
    show_default=True,
    help="With --private: other patients, from whom the encoders learn beforehand.",
)
@click.option(
    "--pretraining-steps",
    type=click.IntRange(1),
    default=_PRIVATE.pretraining_steps,
    show_default=True,
    help="With --private: steps of the encoders, as one network, before the run.",
)
@click.pass_context
def demo(
    context: click.Context,
    /,
    out: Path,
    leak: bool,
    baselines: bool,
    private: bool,
    strangers: int,
    pretraining_steps: int,
    **settings: Any,
) -> None:
    """Four hospitals and a coordinator on this machine train one network over TLS."""
    private_files()
    _refuse_contradictions(context, private=private)
    _end_on_signals()
    settings = {name: value for name, value in settings.items() if value is not None}
    if private:
        job = PrivateJob(**settings, strangers=strangers, pretraining_steps=pretraining_steps)
        _private(out, job, leak=leak)
        return
    from splitpeer.demo.report import draw, read_result, write_summary

    console = Console(stderr=True)
    started = time.monotonic()
    federation = Federation(
        out.resolve(), DemoJob(**settings), lambda line: console.print(line, style="yellow", highlight=False)
    )
    console.rule("1 of 4: a phantom for five parties")
    _prepare(federation, leak=leak)
    console.print(
        f"{federation.job.patients} patients; certificates of a new CA; one folder per site below {out}"
    )
    console.rule("2 of 4: five daemons train over mutual TLS")
    _train(federation, console, out)
    console.rule("3 of 4: results")
    result = read_result(federation.results)
    alone = _baselines(federation, console) if baselines else {}
    rows = _dice(result) | {name: found.dice for name, found in alone.items()}
    leaked = {}
    if leak:
        console.rule("4 of 4: what the coordinator and one hospital recorded is attacked")
        leaked = _attack(federation, console)
    pictures = draw(out, federation.data, federation.results, rows)
    summary = _summary(federation, result, alone, leaked, time.monotonic() - started)
    write_summary(out / "summary.json", summary)
    _show_tables(console, rows, result, alone)
    console.print(
        f"{summary['steps']} steps, {summary['bytes_per_step'] / 1e6:.1f} MB a step on the wire ({summary['tls']}); "
        f"the hospitals sent {summary['sent_bytes'] / 1e6:.1f} MB in all; {summary['seconds']} s",
        highlight=False,
    )
    files = (*pictures, *([out / REPORT] if leak else []), out / "summary.json")
    console.print("look at: " + ", ".join(map(str, files)))


def _refuse_contradictions(context: click.Context, *, private: bool) -> None:
    """Raises UsageError: a flag was given that the other mode of the demo has no use for."""
    written = {
        name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if private and written & {"baselines", "missing", "seat_dropout"}:
        raise click.UsageError(
            "--private excludes --baselines, --missing and --seat-dropout: all hospitals are in the sum."
        )
    if not private and (idle := sorted(written & {"strangers", "pretraining_steps"})):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise click.UsageError(f"{flags} needs --private: otherwise encoders are trained in the run itself.")


def _private(out: Path, job: PrivateJob, *, leak: bool) -> None:
    """The same with frozen encoders, of which only the sum is seen."""
    from splitpeer.demo.private import pretrain_all, refuse_second_run
    from splitpeer.demo.report import dice_table, draw, read_result, write_summary
    from splitpeer.demo.sum_attacks import EFFORT, SumAttacks

    console = Console(stderr=True)
    started = time.monotonic()
    federation = Federation(
        out.resolve(), job, lambda line: console.print(line, style="yellow", highlight=False)
    )
    refuse_second_run(federation)
    console.rule("1 of 4: a phantom for five parties, and encoders made of other patients")
    _prepare(federation, leak=False)
    console.print(
        f"one hospital trains the encoders of all on {job.strangers} other patients, and hands them over"
    )
    attacks = SumAttacks(federation, job, EFFORT) if leak else None
    leaked: dict[str, float] = {}
    try:
        pretrain_all(federation, job, len(os.sched_getaffinity(0)))
        console.rule("2 of 4: each window leaves once, masked; the hospitals stop; the coordinator trains")
        _train(federation, console, out, attacks.start if attacks is not None else None)
        console.rule("3 of 4: results")
        result = read_result(federation.results)
        rows = {PRIVATE: result["dice"]}
        if attacks is not None:
            console.rule("4 of 4: what the coordinator kept is attacked, since the hospitals stopped")
            with console.status("the attacks go on") if console.is_terminal else nullcontext():
                leaked = attacks.report(federation.folder / REPORT)
            _show_leaked(console, leaked)
    finally:
        if attacks is not None:
            attacks.stop()
    pictures = draw(out, federation.data, federation.results, rows)
    summary = _summary(federation, result, {}, leaked, time.monotonic() - started)
    write_summary(out / "summary.json", summary)
    console.print(dice_table(rows))
    present = summary["steps_with_hospitals"]
    console.print(
        f"The hospitals sent {summary['sent_bytes'] / 1e6:.1f} MB in all ({summary['tls']}). "
        + (
            "Their processes ran to the end. "
            if present is None
            else f"Of {summary['steps']} steps, {summary['steps'] - present} were made when all of their processes had "
            f"ended, in {summary['alone_s']} s. "
        )
        + f"{summary['seconds']} s in all. The plain demo is the same command without --private.",
        highlight=False,
    )
    files = (*pictures, *([out / REPORT] if leak else []), out / "summary.json")
    console.print("look at: " + ", ".join(map(str, files)))


def _prepare(federation: Federation, *, leak: bool) -> None:
    """Images, certificates and settings of all parties; with `leak`, two of them record."""
    with bar("rendering") as progress:
        task = progress.add_task("", total=federation.job.patients)
        federation.render(lambda done, total: progress.update(task, completed=done, total=total))
    federation.certify()
    if leak:
        federation.record(HUB, keys=federation.recorded_keys())
        federation.record(federation.site_of(SEAT), every=100, max_mib=64)
    federation.set_up()


def _train(
    federation: Federation, console: Console, out: Path, alone: Callable[[], None] | None = None
) -> None:
    """Start the daemons and wait for the job's end; `alone` is called once no hospital's process is left. Raises
    JobFailed."""
    try:
        pids = federation.start()
        console.print(
            ", ".join(f"{name} pid {pid}" for name, pid in pids.items())
            + f"\nTry `kill -9 {pids[federation.site_of(SEAT)]}`, or any other: it is started again and the result "
            f"is the same.\nIn another terminal: `splitpeer status --watch {out}/*/peer.toml`",
            highlight=False,
            soft_wrap=True,
        )
        federation.wait(alone)
    finally:
        federation.stop()


def _end_on_signals() -> None:
    """Stopping the demo, or closing its terminal, must not leave processes behind."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


def _dice(result: Mapping[str, Any]) -> dict[str, Scores]:
    """Dice of the network, and of the same without each seat that was scored so."""
    from splitpeer.demo.report import CONTRASTS

    rows = {SPLIT: result["dice"]}
    without = {name: result["missing"].get(held) for name, held in CONTRASTS.items()}
    return rows | {f"the same without {name}": dice for name, dice in without.items() if dice}


def _baselines(federation: Federation, console: Console) -> dict[str, Reached]:
    from splitpeer.demo.baselines import train_all
    from splitpeer.demo.report import CONTRASTS
    from splitpeer.training.scores import shown

    console.print("baselines: the same network on each modality alone and in one process, same steps")
    return train_all(
        federation.hub / "job.toml",
        federation.data,
        federation.salt,
        CONTRASTS,
        len(os.sched_getaffinity(0)),
        lambda name, found: console.print(f"  {name}: mean Dice {shown(found.dice['mean'])}"),
    )


def _attack(federation: Federation, console: Console) -> dict[str, float]:
    from splitpeer.cli.attack import attack_progress
    from splitpeer.demo.leak import attack_and_report

    leaked = attack_and_report(federation, federation.folder / REPORT, attack_progress(console))
    _show_leaked(console, leaked)
    return leaked


def _show_leaked(console: Console, leaked: Mapping[str, float]) -> None:
    for name, value in leaked.items():
        console.print(f"  {name} {value:.3f}", highlight=False)


def _show_tables(
    console: Console, rows: Mapping[str, Scores], result: Mapping[str, Any], alone: Mapping[str, Reached]
) -> None:
    """Dice, and where it was measured the distance and the volumes."""
    from splitpeer.demo.report import dice_table, distance_table, volume_line

    console.print(dice_table(rows))
    distances = {SPLIT: result["hd95"]} if result["hd95"] else {}
    if distances := distances | {name: found.hd95 for name, found in alone.items()}:
        console.print(distance_table(distances))
        console.print(
            f"found of true volume, on average: {volume_line(result['volume_ml'])}", highlight=False
        )


def _summary(
    federation: Federation,
    result: Mapping[str, Any],
    alone: Mapping[str, Reached],
    leaked: Mapping[str, float],
    seconds: float,
) -> dict[str, Any]:
    """`summary.json`."""
    return {
        "leakage": leaked,
        "dice": result["dice"],
        "seconds": round(seconds, 1),
        "steps": result["step"],
        "sites": len(result["sites"]),
        "tls": result["tls"],
        "bytes_per_step": result["bytes_per_step"],
        "sent_bytes": federation.sent_bytes(),
        "steps_with_hospitals": federation.steps_with_hospitals,
        "alone_s": round(federation.alone_s, 1),
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
