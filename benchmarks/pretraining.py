"""What an encoder should start from where it never changes: Dice of the patients held out.

Four encoders, one a contrast, and one decoder, in one process: with nothing between the halves, that is what a run
computes, bit for bit. Rows: encoders drawn at random, trained to restore distorted windows of the training patients,
trained with the masks of N strangers (a phantom of another seed), all frozen; and all halves trained together, as in a
joint run. No window is augmented, since a frozen encoder sends each once. What is done is kept in --out, and not done
again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor

from splitpeer.data.layouts import find_images, find_labels
from splitpeer.data.loader import SiteData
from splitpeer.data.normalisation import Normaliser
from splitpeer.data.phantom.cohort import write_phantom
from splitpeer.data.rules import Rules
from splitpeer.data.sampling import TrainingSchedule, split_patients
from splitpeer.data.task import Task
from splitpeer.data.volumes import Volumes
from splitpeer.defences.randomness import Release
from splitpeer.demo.federation import SITES, DemoJob
from splitpeer.federation.evaluation import Plan, Scoring
from splitpeer.federation.halves import client_half, coordinator_half
from splitpeer.federation.terms import job_on_wire, window_of
from splitpeer.models import site_seed
from splitpeer.pretraining import encoder_file
from splitpeer.pretraining.course import Planned, pretrain, stage_of
from splitpeer.pretraining.encoder_file import OWN, EncoderFacts
from splitpeer.pretraining.examples import ImageSource
from splitpeer.pretraining.sources import PUBLIC_SALT, Preparation, public
from splitpeer.settings.job import JobConfig
from splitpeer.settings.loading import to_toml
from splitpeer.storage import durable
from splitpeer.training.split_round import Parties, Place, fused_step, split_round
from splitproto.records import Sample, Seat

CONTRASTS = tuple(sorted(SITES.values()))
CONFIDENCE = 0.95
STRANGERS = 100_000
"""Added to a seed: the phantom of the strangers."""


@dataclass(frozen=True)
class Bench:
    """One seed: its patients, its job, and where its results go."""

    folder: Path
    seed: int
    given: argparse.Namespace

    @property
    def job(self) -> JobConfig:
        """The demo's, without augmentation."""
        demo = DemoJob(
            patients=self.given.patients, validation=self.given.validation, steps=self.given.steps,
            batch=self.given.batch, seed=self.seed,
        ).toml()  # fmt: skip
        demo["data"]["augment"] = False
        path = self.folder / "job.toml"
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(to_toml(demo))
        return JobConfig.load(path)

    def cohort(self, strangers: int = 0) -> Path:
        """The patients of the run, or so many others."""
        folder = self.folder / (f"strangers-{strangers}" if strangers else "patients")
        seed = self.seed + (STRANGERS if strangers else 0)
        write_phantom(folder, strangers or self.given.patients, seed=seed)
        return folder

    @property
    def task(self) -> Task:
        """What is segmented."""
        return self.job.task.task("msd")

    def masks(self, folder: Path) -> Volumes:
        """The masks of a cohort."""
        return Volumes(find_labels(folder / "labels", "folder"), salt=PUBLIC_SALT, labels=self.task)

    def split(self) -> tuple[list[bytes], list[bytes]]:
        """Training, and held out."""
        labels = self.masks(self.cohort())
        return split_patients(labels.keys(), self.given.validation, self.seed, labels.subjects())


# --- encoders --------------------------------------------------------------------------------------------


def encoder(bench: Bench, row: str, contrast: str) -> dict[str, Tensor] | None:
    """First weights of a row's encoder; None: those that are drawn."""
    if row in ("random", "joint"):
        return None
    path = bench.folder / f"{row}-{contrast}.safetensors"
    if not path.exists():
        _pretrain(bench, row, contrast, path)
    return dict(encoder_file.read(path).tensors)


def _pretrain(bench: Bench, row: str, contrast: str, path: Path) -> None:
    """As `splitpeer pretrain` does; an interrupted one goes on."""
    job, task = bench.job, bench.task
    preparation = Preparation((), lambda modality: Normaliser(), Rules(), 1024)
    strangers = int(row.partition("-")[2]) if row.startswith("strangers-") else 0
    held_out = set() if strangers else set(bench.split()[1])

    def source() -> ImageSource:
        folder = bench.cohort(strangers)
        opened = public(
            folder,
            "folder",
            {contrast: (contrast,)},
            preparation,
            folder / "labels" if strangers else None,
            task,
        )
        return ImageSource(opened.channels, opened.labels, lambda: held_out)

    stage = stage_of(
        job, "phantom" if strangers else OWN, labels=bool(strangers), steps=bench.given.pretraining_steps,
        seed=site_seed(bench.seed, f"{row} {contrast}"), channels=task.channels if strangers else 1,
        exclusive=False, device="cpu",
    )  # fmt: skip
    backbone = job.model.backbone()
    facts = EncoderFacts.of(backbone, (contrast,), ("zscore-nonzero",), (), job.data.window)
    pretrain([Planned(stage, source)], backbone, facts, path, force=False)


# --- the run ---------------------------------------------------------------------------------------------


def halves(bench: Bench, row: str) -> Parties:
    """All halves of the network, encoders with the row's weights."""
    job = job_on_wire(bench.job)
    backbone, sites = bench.job.model.backbone(), {}
    for contrast in CONTRASTS:
        half = client_half(
            job, backbone, Seat(contrast, (contrast,)), (), key=bytes(32), seed=bench.seed, device="cpu"
        )
        if (weights := encoder(bench, row, contrast)) is not None:
            encoder_file.load(half.network, weights)
        sites[Place(contrast, contrast)] = half
    return Parties(coordinator_half(bench.job, job, CONTRASTS, bench.task, "cpu"), sites)


def reached(bench: Bench, row: str, told: Callable[[str], None]) -> dict[str, float | None]:
    """Dice by region of the patients held out, after the job's steps."""
    torch.set_num_threads(1)
    parties, job, folder = halves(bench, row), bench.job, bench.cohort()
    window, masks = window_of(job_on_wire(job)), bench.masks(folder)
    images = {
        contrast: SiteData(Volumes(find_images(folder / contrast, "folder", contrast), salt=PUBLIC_SALT))
        for contrast in CONTRASTS
    }
    training, held_out = bench.split()
    schedule = TrainingSchedule(
        training, masks, window=window, batch=job.training.batch, steps=job.training.steps, seed=bench.seed,
        positive_fraction=job.data.positive_fraction,
    )  # fmt: skip

    def read(samples: Sequence[Sample]) -> dict[Place, np.ndarray]:
        return {Place(c, c): data.batch(samples, window, None, c) for c, data in images.items()}

    for step in range(job.training.steps):
        samples, _ = schedule.batch(step)
        target = SiteData(masks).batch(samples, window, None, None)
        release = Release(b"", "train", step + 1, 0, tuple(samples))
        if row == "joint":
            split_round(parties, read(samples), target, release)
        else:
            sent = {place: parties.sites[place].evaluate(image) for place, image in read(samples).items()}
            fused_step(parties.coordinator, sent, target, release, {})
        if (step + 1) % 100 == 0:
            told(f"seed {bench.seed}, {row}: step {step + 1} of {job.training.steps}")
    plan = Plan.of(held_out, masks, window, job.evaluation.overlap, job.evaluation.batch, job.training.steps)
    scoring = Scoring(plan, masks, window, None)
    for index, forward in enumerate(plan.forwards):
        shown_to = read(forward.samples)
        answers = {place.seat: parties.sites[place].evaluate(image) for place, image in shown_to.items()}
        scoring.add(index, parties.coordinator.predict(answers))
    return scoring.dice.result()


# --- results ---------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> float | None:
    """Half the width of Student's t interval of a mean; None: of one value there is none."""
    if len(values) < 2:
        return None
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(quantile * statistics.stdev(values) / math.sqrt(len(values)))


def summary(
    results: dict[str, dict[str, Any]], rows: Sequence[str], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """By row, over seeds: mean Dice, and its difference from the joint run of the same seed, with intervals."""
    means = {row: [results[f"{row}/{seed}"]["mean"] for seed in seeds] for row in rows}
    found = []
    for row, values in means.items():
        differences = [a - b for a, b in zip(values, means["joint"], strict=True)] if "joint" in means else []
        found.append(
            {
                "encoders": row,
                "dice": statistics.fmean(values),
                "interval": interval(values),
                "minus_joint": statistics.fmean(differences) if differences and row != "joint" else None,
                "minus_joint_interval": interval(differences) if row != "joint" else None,
                "seeds": values,
            }
        )
    return found


def shown(found: Sequence[dict[str, Any]], title: str) -> Table:
    """For a terminal."""
    table = Table(title=title)
    for column in ("encoders", "mean Dice", "minus joint"):
        table.add_column(column, justify="left" if column == "encoders" else "right")
    for row in found:
        cells = []
        for value, half in (
            (row["dice"], row["interval"]),
            (row["minus_joint"], row["minus_joint_interval"]),
        ):
            text = "-" if value is None else f"{value:.3f}"
            cells.append(text if half is None else f"{text} +- {half:.3f}")
        table.add_row(row["encoders"], *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pretraining"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--patients", type=int, default=124)
    parser.add_argument("--validation", type=int, default=24)
    parser.add_argument("--strangers", type=int, nargs="*", default=[24, 240])
    parser.add_argument("--steps", type=int, default=300, help="of the run")
    parser.add_argument("--pretraining-steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    console = Console(stderr=True)
    settings = {k: v for k, v in vars(given).items() if k not in ("out", "seeds", "strangers", "json")}
    name = "-".join(str(value) for value in settings.values())
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / f"results-{name}.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    rows = ["random", "self-supervised", *(f"strangers-{count}" for count in given.strangers), "joint"]
    for seed in given.seeds:
        bench = Bench(given.out / f"seed-{seed}-{name}", seed, given)
        for row in rows:
            if f"{row}/{seed}" not in results:
                results[f"{row}/{seed}"] = reached(
                    bench, row, lambda line: console.print(line, highlight=False)
                )
                durable.replace(kept, json.dumps(results, indent=1).encode())
    found = summary(results, rows, given.seeds)
    if given.json:
        json.dump(found, sys.stdout, indent=1)
        return
    title = f"{given.patients} patients, {given.steps} steps of {given.batch}, seeds {given.seeds}"
    Console().print(shown(found, title))


if __name__ == "__main__":
    main()
