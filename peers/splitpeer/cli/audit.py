"""`splitpeer audit`: what would leak, measured before anything leaves; and the sweep over defences."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from splitpeer.cli.loading import load
from splitpeer.cli.options import FILE, budget_option, config_option, load_peer, private_files, set_option
from splitpeer.defences.specs import by_place
from splitpeer.errors import AttackImpossible, ConfigError
from splitpeer.ranks.torchrun import own_rank
from splitpeer.storage import durable

if TYPE_CHECKING:
    from splitpeer.audit.rehearsal import Protection
    from splitpeer.audit.release_audit import ReleaseAudit
    from splitpeer.audit.site_audit import SiteAudit
    from splitpeer.settings.job import JobConfig


@click.command()
@config_option
@set_option
@click.option(
    "--job", "job_file", type=FILE, required=True, help="The job.toml that this site is invited to."
)
@click.option("--defence", "defences", multiple=True,
              help='Rehearse this too: "dropout:0.5+gaussian:1", "image/voxel-noise:0.2".')  # fmt: skip
@click.option("--attack", "attacks", multiple=True, default=("pca", "whitebox", "inverse"), show_default=True)
@budget_option
@click.option("--labels", type=FILE, help="Folder of masks; without it a stand-in task is trained.")
@click.option(
    "--convention", type=click.Choice(("msd", "brats", "brats2023", "nnunet", "task")), help="Of the masks."
)
@click.option(
    "--shadow", type=FILE, help="Similar images that an adversary may hold; default: own other patients."
)
@click.option(
    "--partners",
    type=FILE,
    help="What stands in for the other hospitals: a folder of images per modality, this site's too unless ids are its "
    "own patients'; for a secure sum with SEAT.safetensors where an encoder is known. Default: phantom patients, "
    "random encoders.",
)
@click.option(
    "--wider",
    "wider",
    multiple=True,
    help="Attacks on neighbouring slices and with hospitals that help; default: inverse and refined, with the effort "
    "that inverse needed alone.",
)
@click.option(
    "--quick", is_flag=True, help="Only the samples alone: no neighbouring slices, no help, no membership."
)
@click.option("--steps", type=click.IntRange(1), help="Training steps to rehearse; default: the job's.")
@click.option(
    "--samples", type=click.IntRange(1), default=12, show_default=True, help="Patients under attack."
)
@click.option(
    "--views", type=click.IntRange(1), default=20, show_default=True, help="Releases of each sample."
)
@click.option(
    "--sweep", "sweep_file", type=FILE, help="sweep.toml: many defences, on the phantom or a folder."
)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes of a sweep.")
@click.option("--keep-captures", is_flag=True, help="Also keep a sweep's reconstructions; they are large.")
@click.option("--write", "document", type=FILE, help="Put the sweep's table into this Markdown file.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=FILE, default=Path("runs/audit"), show_default=True)
def audit(
    config_file: Path | None,
    settings: tuple[str, ...],
    job_file: Path,
    defences: tuple[str, ...],
    attacks: tuple[str, ...],
    budget: str | None,
    labels: Path | None,
    convention: str | None,
    shadow: Path | None,
    partners: Path | None,
    wider: tuple[str, ...],
    quick: bool,
    steps: int | None,
    samples: int,
    views: int,
    sweep_file: Path | None,
    workers: int,
    keep_captures: bool,
    document: Path | None,
    seed: int,
    device: str,
    out: Path,
) -> None:
    """Play both parts of a job on this site's own images, attack what would have left, and write a report.

    Nothing is sent: no network is used. With --sweep, compare many defences instead.
    """
    private_files()
    if sweep_file is not None:
        _sweep(sweep_file, job_file, out, workers, keep_captures, document, device, budget)
        return
    if (labels is None) != (convention is None):
        raise ConfigError(
            "--labels and --convention go together: what the masks' numbers mean is never guessed"
        )
    load("torch")
    import torch

    from splitpeer.attacks.budget import AUTO, Budget
    from splitpeer.audit.wider import WIDER
    from splitpeer.federation.compute import pick_device
    from splitpeer.settings.job import JobConfig

    _refuse_unknown((*attacks, *wider))
    config, job = load_peer(config_file, settings), JobConfig.load(job_file)
    torch.set_num_threads(config.runtime.threads)
    asked: dict[str, Any] = {
        "config": config, "job": job, "out": out, "labels": labels, "convention": convention, "shadow": shadow,
        "samples": samples, "seed": seed, "device": pick_device(device), "budget": Budget.read(budget or AUTO),
        "partners": partners, "wider": () if quick else wider or WIDER,
    }  # fmt: skip
    one = _audit_of(job, {"steps": steps, "views": views}, asked)
    _run(one, attacks, defences)


def _run(one: SiteAudit | ReleaseAudit, attacks: tuple[str, ...], defences: tuple[str, ...]) -> None:
    """Attack, and write the report."""
    from splitpeer.cli.attack import attack_progress
    from splitpeer.report.build import write_report

    console = Console(stderr=True)
    command = shlex.join(["splitpeer", *sys.argv[1:]])
    folders = one.run(
        attacks,
        one.protections([_protection(text) for text in defences]),
        (command,),
        attack_progress(console),
    )
    page = one.out / "report.html"
    write_report(folders, page)
    console.print(f"no byte left this machine; read {page}")


def _audit_of(job: JobConfig, played: dict[str, Any], asked: dict[str, Any]) -> SiteAudit | ReleaseAudit:
    """Encoders that learn are rehearsed, in a sum with stand-ins; of frozen ones, what they release is computed."""
    if job.training.frozen:
        from splitpeer.audit.release_audit import ReleaseAudit

        return ReleaseAudit(**asked)
    if job.model.fusion == "secure-sum":
        from splitpeer.audit.sum_audit import SumAudit

        training = job.training.model_copy(update={"steps": played["steps"] or job.training.steps})
        return SumAudit(**asked | {"job": job.model_copy(update={"training": training})})
    from splitpeer.audit.site_audit import SiteAudit

    return SiteAudit(**asked, **played)


def _refuse_unknown(attacks: tuple[str, ...]) -> None:
    """Raises ConfigError: an attack or setting that does not exist; that must not cost an hour."""
    from splitpeer.attacks.catalogue import make_attack
    from splitpeer.audit.experiment import parse_order

    for order in map(parse_order, attacks):
        # One that no capture can feed is a row of the report.
        with contextlib.suppress(AttackImpossible):
            make_attack(order.attack, **order.settings)


def _protection(text: str) -> Protection:
    from splitpeer.audit.rehearsal import Protection

    parts = by_place(part.strip() for part in text.split("+") if part.strip())
    if odd := [part for part in parts.activations if "/" in part]:
        raise ConfigError(f"--defence {odd[0]}: only image/ and gradients/ may stand before a defence")
    return Protection(parts.activations, parts.image, parts.gradients)


def _sweep(
    plan: Path, job: Path, out: Path, workers: int, keep_captures: bool, document: Path | None, device: str,
    budget: str | None,
) -> None:  # fmt: skip
    rank = own_rank()
    if rank is not None:
        rank.quieten()
    from splitpeer.audit.sweep import sweep
    from splitpeer.audit.table import markdown, write_into
    from splitpeer.federation.compute import pick_device
    from splitpeer.ranks.group import device_of

    console = Console(stderr=True)

    def told(what: str, done: int, total: int) -> None:
        console.print(f"[{done}/{total}] {what}", highlight=False)

    points = sweep(
        plan, job, out, workers=workers, keep_captures=keep_captures, told=told, budget=budget, rank=rank,
        device=pick_device(device) if rank is None else device_of(rank, device),
    )  # fmt: skip
    if rank is not None and not rank.leads:
        return
    durable.replace(out / "table.md", markdown(points).encode(), mode=0o666, sync=False)
    if document is not None:
        write_into(document, markdown(points), out / "frontier.png")
    table = Table(title="Dice against leakage")
    for head in ("configuration", "Dice", "leakage (SSIM)", "by", "views", "mask AUC"):
        table.add_column(head, justify="left" if head in ("configuration", "by") else "right")
    for point in points:
        auc = "-" if point["mask_auc"] is None else f"{point['mask_auc']:.3f}"
        table.add_row(point["name"], f"{point['dice']:.3f}", f"{point['leakage']:.3f}", point["by"],
                      str(point["views"]), auc)  # fmt: skip
    console.print(table)
    console.print(f"{out}/frontier.png, {out}/frontier.json, {out}/table.md")
