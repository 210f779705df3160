"""The demo's last part: what its coordinator kept, and one hospital recorded, is attacked, and a report written."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from splitpeer.attacks.base import Progress
from splitpeer.audit.capture_audit import CaptureAudit
from splitpeer.audit.experiment import Experiment, parse_order
from splitpeer.audit.run_folder import RunFolder
from splitpeer.data.phantom.cohort import write_phantom
from splitpeer.demo.federation import ATTACKED, SEAT, SITES, STRANGERS, Federation
from splitpeer.errors import JobFailed
from splitpeer.report.build import write_report

QUICK = ("inverse:steps=40,width=16",)
"""On every contrast; the one that shows most is then attacked by `ATTACKS`."""
ATTACKS = ("pca", "whitebox:iterations=150", "inverse:steps=120,width=16")
SITE_ATTACKS = ("gradient-norm",)
SHADOW = 400
"""Images that the adversary draws from its strangers."""


def attack_and_report(federation: Federation, page: Path, progress: Progress) -> dict[str, float]:
    """Attack both captures and write `report.html`; returns a few figures for the terminal."""
    strangers = federation.strangers
    write_phantom(strangers, STRANGERS, seed=federation.job.seed + 1000)
    audit = partial(
        CaptureAudit, salt=federation.salt, truth=federation.data, convention="msd", seed=federation.job.seed,
        shadow_images=SHADOW, finder_steps=150,
    )  # fmt: skip
    run = partial(run_attacks, progress)
    shown: dict[str, float] = {}
    most: tuple[Experiment, RunFolder] | None = None
    folders = []
    for seat in SITES.values():
        weights = _last_checkpoint(federation.folder / federation.site_of(seat) / "state")
        asked = audit(
            federation.capture("hub"), seat=seat, samples=ATTACKED,
            knows=(f"weights={weights}", f"shadow={strangers}"),
        )  # fmt: skip
        experiment, folder = _opened(federation, asked, f"images-{seat}")
        shown[seat] = max(run(experiment, folder, QUICK).values(), default=0.0)
        most = (experiment, folder) if most is None or shown[seat] >= max(shown.values()) else most
        folders.append(folder.folder)
    figures = {f"{seat}, quick {QUICK[0].partition(':')[0]} ssim": value for seat, value in shown.items()}
    figures["mean over contrasts, ssim"] = fmean(shown.values())
    if most is not None:
        figures |= run(*most, ATTACKS)
    # What the hospital's own image shows, with the same strangers' labels, is the floor of what the gradients show.
    site = federation.site_of(SEAT)
    hospital = audit(federation.capture(site), samples=48, step=1, knows=(f"shadow={strangers}",))
    experiment, folder = _opened(federation, hospital, "labels")
    figures |= run(experiment, folder, SITE_ATTACKS)
    write_report([*folders, folder.folder], page)
    return figures


def _opened(federation: Federation, asked: CaptureAudit, name: str) -> tuple[Experiment, RunFolder]:
    experiment = asked.experiment()
    folder = federation.folder / "attack" / name
    return experiment, asked.open_folder(experiment, folder, commands=("splitpeer demo",))


def run_attacks(
    progress: Progress, experiment: Experiment, folder: RunFolder, attacks: Sequence[str]
) -> dict[str, float]:
    """The main figure of each attack, by its name and contrast."""
    orders, figures = [parse_order(written) for written in attacks], {}
    for outcome in experiment.run(orders, folder, progress=progress):
        figure = "ssim" if outcome.result.goal == "image" else "auc"
        name = f"{outcome.modality}, {outcome.result.attack} {figure}"
        figures[name] = outcome.scores[figure].mean or 0.0
    return figures


def _last_checkpoint(state: Path) -> Path:
    found = sorted(state.glob("*/step-*.safetensors"))
    if not found:
        raise JobFailed(f"{state}: no checkpoint to take the site's weights from")
    return found[-1]
