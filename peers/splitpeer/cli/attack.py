"""`splitpeer attack`: replay a capture into attacks, and score what they recover."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from splitpeer.cli.loading import load
from splitpeer.cli.options import FILE, LAYOUT, budget_option, first_modality, private_files
from splitpeer.errors import AttackImpossible, ConfigError

if TYPE_CHECKING:
    from splitpeer.audit.experiment import Experiment
    from splitpeer.audit.judge import Outcome
    from splitpeer.audit.run_folder import RunFolder
    from splitpeer.data.task import Task


def attack_progress(console: Console) -> Callable[[str, int, int], None]:
    """Shows what runs on a terminal, and nothing elsewhere."""
    from rich.status import Status

    if not console.is_terminal:
        return lambda what, done, total: None
    status = Status("", console=console)
    status.start()

    def shown(what: str, done: int, total: int) -> None:
        status.update(f"{what}: {done}/{total}")

    return shown


def outcome_table(outcomes: list[Outcome]) -> Table:
    """One line for each attack: its main figure, the floor, and under what it was obtained."""
    table = Table(
        title="What was recovered (mean over patients, 95 % interval; floor: without seeing anything)"
    )
    for head in ("attack", "form", "views", "figure", "value", "floor", "seconds"):
        table.add_column(head, justify="left" if head in ("attack", "form", "figure") else "right")
    for outcome in outcomes:
        result = outcome.result
        figure = {"mask": "auc", "member": "member_auc"}.get(result.goal, "ssim")
        score = outcome.scores.get(figure)
        value = floor = "-"
        if score is not None and score.mean is not None:
            value = f"{score.mean:.3f}"
            if score.low is not None and score.high is not None:
                value += f" ({score.low:.2f}-{score.high:.2f})"
            known = [f for f in score.floors.values() if f is not None]
            floor = f"{max(known):.3f}" if known else "-"
        name = {"auc": "mask AUC", "ssim": "SSIM in the body", "member_auc": "membership AUC"}[figure]
        form = "adaptive" if result.adaptive else "naive" if outcome.view.defences else "-"
        table.add_row(result.attack, form, str(result.views), name, value, floor, f"{result.seconds:.0f}")
    return table


def effort_lines(outcomes: list[Outcome]) -> list[str]:
    """How hard each attack was tried, beside the published effort: one line for each."""
    tried = {o.result.attack: o.result.spent for o in outcomes if o.result.spent and o.result.adaptive}
    return [
        f"{name}: {spent.told()}" + (f"; published: {spent.published}" if spent.published else "")
        for name, spent in tried.items()
    ]


@click.command()
@click.argument("capture", type=FILE)
@click.option("--attack", "attacks", multiple=True, required=True, metavar="NAME[:key=value,...]",
              help="May be given several times; a wrong name lists all.")  # fmt: skip
@click.option("--seat", help="The input under attack, by its name; default: the first one.")
@click.option("--site", help="Of several that fill the seat; default: the first by name.")
@click.option("--knows", multiple=True, metavar="KIND=PATH",
              help="Grant the adversary weights=, initial=, decoder= (checkpoints), shadow= (a folder).")  # fmt: skip
@click.option(
    "--queries", is_flag=True, help="The adversary only queries the encoder; it does not see its weights."
)
@click.option("--shadow-images", type=click.IntRange(1), default=600, show_default=True,
              help="How many similar images it uses.")  # fmt: skip
@click.option(
    "--truth", type=FILE, help="Folder of the true images, to score and to show; the attack never sees it."
)
@click.option("--salt", type=FILE, help="federation.salt; needed with --truth.")
@click.option("--layout", type=LAYOUT, default="folder", show_default=True)
@click.option("--convention", type=click.Choice(("msd", "brats", "brats2023", "nnunet", "task")),
              help="Convention of the masks, if the truth (or shadow folder) has any; task: see --job.")  # fmt: skip
@click.option(
    "--job", "job_file", type=FILE, help="The job.toml whose [task] the masks follow; default: a glioma."
)
@click.option("--defence", help='Try the clean traffic under defences, offline: "dropout:0.5+gaussian:1.0".')
@click.option("--config", "config_file", type=FILE,
              help="With --defence, for a site of several seats: its peer.toml, whose order decides keys.")  # fmt: skip
@click.option(
    "--views", type=click.IntRange(1), help="Releases of each sample to use or, with --defence, to simulate."
)
@click.option(
    "--samples", type=click.IntRange(1), default=24, show_default=True, help="Samples to attack, at most."
)
@click.option(
    "--step", type=click.IntRange(0), help="Only what was sent at this step; default: the last one."
)
@click.option("--neighbours", type=click.IntRange(0), default=0, show_default=True,
              help="Slices above and below each sample that are read with it.")  # fmt: skip
@click.option("--with", "helpers", multiple=True, metavar="MODALITY",
              help="A site that works with the coordinator, and shows it its images (from --truth).")  # fmt: skip
@click.option("--first-step", is_flag=True, help="Only what was sent at step 1, before anything was learnt.")
@budget_option
@click.option("--no-naive", is_flag=True, help="Only the attack that knows the defence.")
@click.option("--key", "key_file", type=FILE, help="Key of an encrypted capture.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--out", type=FILE, required=True, help="Run folder: attack.json and reconstructions.npz.")
def attack(
    capture: Path,
    attacks: tuple[str, ...],
    seat: str | None,
    site: str | None,
    knows: tuple[str, ...],
    queries: bool,
    shadow_images: int,
    truth: Path | None,
    salt: Path | None,
    layout: str,
    convention: str | None,
    job_file: Path | None,
    defence: str | None,
    config_file: Path | None,
    views: int | None,
    samples: int,
    step: int | None,
    neighbours: int,
    helpers: tuple[str, ...],
    first_step: bool,
    budget: str | None,
    no_naive: bool,
    key_file: Path | None,
    seed: int,
    device: str,
    threads: int,
    out: Path,
) -> None:
    """Attack what a curious peer recorded in CAPTURE.

    A coordinator's capture is attacked for images, a site's for labels. Every defence is attacked by an
    adversary that knows it; the naive form is shown next to it.
    """
    private_files()
    _together(helpers, truth, salt, config_file, defence)
    task, first = _task(convention, job_file), first_modality(config_file)
    load("torch")
    import torch

    from splitpeer.attacks.budget import AUTO, Budget
    from splitpeer.audit.capture_audit import CaptureAudit
    from splitpeer.data.modalities import canonical_modality
    from splitpeer.federation.compute import pick_device

    torch.set_num_threads(threads)
    asked = CaptureAudit(
        capture, key_file=key_file, seat=seat, site=site, knows=knows, queries=queries, shadow_images=shadow_images,
        truth=truth, salt=salt, layout=layout, convention=task, defence=defence, first=first, views=views,
        samples=samples, neighbours=neighbours, helpers=tuple(map(canonical_modality, helpers)),
        step=1 if first_step else step, seed=seed, device=pick_device(device),
        budget=Budget.read(budget or AUTO), labels=_of_labels(attacks),
    )  # fmt: skip
    experiment = asked.experiment()
    folder = asked.open_folder(experiment, out, commands=(shlex.join(["splitpeer", *sys.argv[1:]]),))
    console = Console(stderr=True)
    if not experiment.source.complete:
        console.print(f"{capture}: cut off; attacked up to its last whole record", highlight=False)
    _run(experiment, folder, attacks, console, naive=not no_naive)


def _of_labels(attacks: tuple[str, ...]) -> bool:
    """Whether what is attacked are labels at a site. Raises ConfigError: some attacks are, and others are not."""
    named = [written.partition(":")[0] == "logit-gradient" for written in attacks]
    if any(named) and not all(named):
        raise ConfigError("logit-gradient attacks labels, the others images: run them one after the other")
    return any(named)


def _together(
    helpers: tuple[str, ...],
    truth: Path | None,
    salt: Path | None,
    config_file: Path | None,
    defence: str | None,
) -> None:
    """Refuse options that need another one. Raises ConfigError."""
    if helpers and truth is None:
        raise ConfigError("--with needs --truth: the images that the site shows are taken from there")
    if truth is not None and salt is None:
        raise ConfigError("--truth needs --salt: patients are found by their pseudonyms")
    if config_file is not None and defence is None:
        raise ConfigError("--config says whose keys a --defence has: add --defence, or leave it out")


def _task(convention: str | None, job_file: Path | None) -> Task | str | None:
    """What the masks mean: the name of a glioma's convention, or the job's task."""
    if job_file is None:
        if convention == "task":
            raise ConfigError(
                "--convention task needs --job: the masks hold the values that its [task] names"
            )
        return convention
    if convention is None:
        raise ConfigError("--job says what masks mean that --convention names: add --convention task")
    from splitpeer.settings.job import JobConfig

    return JobConfig.load(job_file).task.task(convention)


def _run(
    experiment: Experiment, folder: RunFolder, attacks: tuple[str, ...], console: Console, *, naive: bool
) -> None:
    """Run them one after the other: what was done before an interruption is shown."""
    from splitpeer.audit.experiment import parse_order

    out = folder.folder
    outcomes: list[Outcome] = []
    try:
        orders = [parse_order(written) for written in attacks]
        outcomes.extend(experiment.run(orders, folder, naive=naive, progress=attack_progress(console)))
    finally:
        if outcomes:
            console.print(outcome_table(outcomes))
            for line in effort_lines(outcomes):
                console.print(line, highlight=False)
            console.print(f"{out}: splitpeer report {out} --out report.html makes the page")
    if not outcomes:
        folder.discard()
        raise AttackImpossible((folder.refused or ["no attack ran"])[-1])
    for reason in folder.refused:
        console.print(f"not run: {reason}", highlight=False)
