"""What the same network reaches without splitting: each contrast alone, and all four in one process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from splitpeer.data.layouts import find_images, find_labels
from splitpeer.data.loader import SiteData
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.sampling import TrainingSchedule, split_patients
from splitpeer.data.volumes import Volumes
from splitpeer.federation.evaluation import Plan, Scoring
from splitpeer.models import build_split_network
from splitpeer.settings.job import JobConfig
from splitpeer.training.loss import region_loss
from splitpeer.training.metrics import Scores
from splitpeer.training.optimiser import make_optimiser, make_schedule

Done = Callable[[str, Scores], None]


@dataclass(frozen=True)
class Baseline:
    """One network to train: a name for the table and the contrasts it sees."""

    name: str
    modalities: tuple[str, ...]
    job: Path
    data: Path
    salt: Path
    convention: str = "msd"


def train(baseline: Baseline) -> Scores:
    """Dice of the network in one process, with the job's schedule, seeds, steps and patients held out."""
    torch.set_num_threads(1)
    config = JobConfig.load(baseline.job)
    salt = load_salt(baseline.salt)
    window = tuple((*config.data.window, 1)[:3])
    labels = Volumes(find_labels(baseline.data / "labels", "folder"), salt=salt, labels=baseline.convention)
    images = {
        m: SiteData(Volumes(find_images(baseline.data / m, "folder", m), salt=salt))
        for m in baseline.modalities
    }
    training, validation = split_patients(
        labels.keys(), config.data.validation, config.job.seed, labels.subjects()
    )
    schedule = TrainingSchedule(
        training,
        labels,
        window=window,
        batch=config.training.batch,
        steps=config.training.steps,
        seed=config.job.seed,
        positive_fraction=config.data.positive_fraction,
    )
    network = build_split_network(
        config.model.backbone(),
        baseline.modalities,
        config.model.fusion,
        job_seed=config.job.seed,
    )
    settings = config.training
    optimiser = make_optimiser(
        network.parameters(), settings.optimiser, settings.learning_rate, settings.weight_decay
    )
    rate = make_schedule(optimiser, settings.schedule, settings.steps)

    def read(samples, seed):  # type: ignore[no-untyped-def]
        return {m: torch.from_numpy(data.batch(samples, window, seed, m)) for m, data in images.items()}

    for step in range(settings.steps):
        samples, drawn = schedule.batch(step)
        seed = drawn if config.data.augment else None
        target = SiteData(labels).batch(samples, window, seed, None)
        loss = region_loss(network(read(samples, seed)), torch.from_numpy(target).float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    network.eval()
    plan = Plan.of(
        validation, labels, window, config.evaluation.overlap, config.evaluation.batch, settings.steps
    )
    scoring = Scoring(plan, labels, window, None)
    with torch.no_grad():
        for index, forward in enumerate(plan.forwards):
            scoring.add(index, network(read(forward.samples, None)).sigmoid().numpy())
    return scoring.dice.result()


def train_all(
    job: Path, data: Path, salt: Path, modalities: tuple[str, ...], workers: int, done: Done
) -> dict[str, Scores]:
    """Each contrast alone and all together, in `workers` processes; `done` hears each result as it comes."""
    wanted = [Baseline("centralised, four contrasts", modalities, job, data, salt)]
    wanted += [Baseline(f"{modality} alone", (modality,), job, data, salt) for modality in modalities]
    results: dict[str, Scores] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(train, baseline): baseline.name for baseline in wanted}
        for future in as_completed(running):
            results[running[future]] = future.result()
            done(running[future], future.result())
    return {baseline.name: results[baseline.name] for baseline in wanted}
