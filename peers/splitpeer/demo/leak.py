"""The demo's last part: what its coordinator and one hospital recorded is attacked, and a report written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from splitpeer.audit.capture_audit import CaptureAudit
from splitpeer.audit.experiment import parse_order
from splitpeer.data.layouts import find_labels
from splitpeer.data.phantom.cohort import write_phantom
from splitpeer.data.pseudonym import load_salt, pseudonym
from splitpeer.data.sampling import split_patients
from splitpeer.demo.federation import Federation
from splitpeer.errors import JobFailed
from splitpeer.report.build import write_report

SEAT = "t1"
PATIENTS = 4
"""Patients held out whose evaluation the coordinator records and that are attacked."""
STRANGERS = 24
"""Phantom patients of another seed: the adversary's own similar images."""
ATTACKS = ("pca", "whitebox:iterations=150", "inverse:steps=120")
SITE_ATTACKS = ("gradient-norm",)

Progress = Callable[[str, int, int], None]


def recorded_keys(federation: Federation) -> list[str]:
    """Pseudonyms, in hexadecimal, of a few patients that the job will hold out."""
    salt = load_salt(federation.salt)
    cases = find_labels(federation.data / "labels", "folder")
    keys = [pseudonym(salt, case.patient) for case in cases]
    _, held_out = split_patients(keys, federation.job.validation, federation.job.seed)
    return [key.hex() for key in held_out[:PATIENTS]]


def attack_and_report(federation: Federation, page: Path, progress: Progress) -> dict[str, float]:
    """Attack both captures and write `report.html`; returns a few figures for the terminal."""
    strangers = federation.folder / "strangers"
    write_phantom(strangers, STRANGERS, seed=federation.job.seed + 1000)
    site = federation.site_of(SEAT)
    audit = partial(
        CaptureAudit, salt=federation.salt, truth=federation.data, convention="msd", seed=federation.job.seed
    )
    coordinator = audit(
        federation.capture("hub"), seat=SEAT, samples=PATIENTS, shadow_images=400,
        knows=(f"weights={_last_checkpoint(federation.folder / site / 'state')}", f"shadow={strangers}"),
    )  # fmt: skip
    # What the hospital's own image shows, with the same strangers' labels, is the floor of what the gradients show.
    hospital = audit(
        federation.capture(site), samples=48, step=1, shadow_images=400, knows=(f"shadow={strangers}",)
    )
    folders, figures = [], {}
    for name, asked, attacks in (
        ("images", coordinator, ATTACKS),
        ("labels", hospital, SITE_ATTACKS),
    ):
        folder = federation.folder / "attack" / name
        experiment = asked.experiment()
        run_folder = asked.open_folder(experiment, folder, commands=("splitpeer demo",))
        orders = [parse_order(written) for written in attacks]
        for outcome in experiment.run(orders, run_folder, progress=progress):
            figure = "ssim" if outcome.result.goal == "image" else "auc"
            figures[f"{outcome.result.attack} {figure}"] = outcome.scores[figure].mean or 0.0
        folders.append(folder)
    write_report(folders, page)
    return figures


def _last_checkpoint(state: Path) -> Path:
    found = sorted(state.glob("*/step-*.safetensors"))
    if not found:
        raise JobFailed(f"{state}: no checkpoint to take the site's weights from")
    return found[-1]
