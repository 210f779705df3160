"""The same network without splitting: each modality alone, and all four in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from splitpeer.data.layouts import find_images, find_labels
from splitpeer.data.loader import SiteData
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.sampling import split_patients
from splitpeer.data.task import Task
from splitpeer.data.volumes import Volumes
from splitpeer.defences.randomness import Release
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.evaluation import Plan, Scoring
from splitpeer.federation.terms import job_on_wire, window_of
from splitpeer.models import Encoder, build_split_network
from splitpeer.settings.job import JobConfig
from splitpeer.training.forms import Forms
from splitpeer.training.optimiser import Schedule, make_optimiser, make_schedule
from splitpeer.training.scores import Scores
from splitpeer.training.split_round import Parties, Place, split_round
from splitpeer.training.split_step import ClientHalf, CoordinatorHalf
from splitproto.records import Sample


@dataclass(frozen=True)
class Reached:
    """What a network came to on the patients held out."""

    dice: Scores
    hd95: Scores
    """In mm."""


Done = Callable[[str, Reached], None]


@dataclass(frozen=True)
class Baseline:
    """One network to train: a name for the table and the modalities it sees."""

    name: str
    modalities: tuple[str, ...]
    job: Path
    data: Path
    salt: Path
    convention: str = "msd"
    as_travelled: bool = False
    """With the job's precision or codings between encoders and decoder."""


def train(baseline: Baseline) -> Reached:
    """The network in one process, with the job's schedule, seeds, steps and patients held out."""
    torch.set_num_threads(1)
    config = JobConfig.load(baseline.job)
    job = job_on_wire(config)
    salt, window = load_salt(baseline.salt), window_of(job)
    task = config.task.task(baseline.convention)
    labels = Volumes(find_labels(baseline.data / "labels", "folder"), salt=salt, labels=task)
    images = {}
    for m in baseline.modalities:
        cases = find_images(baseline.data / m, "folder", m)
        images[m] = SiteData(Volumes(cases, salt=salt, normalisation=config.task.rule(m)))
    training, validation = split_patients(
        labels.keys(), config.data.validation, config.job.seed, labels.subjects()
    )
    stream = TrainingStream.of(config, job, training, labels, frozenset(training))
    parties = _parties(config, baseline.modalities, task)
    forms = Forms.of(job) if baseline.as_travelled else None

    def read(samples: Sequence[Sample], seed: int | None) -> dict[str, np.ndarray]:
        return {m: data.batch(samples, window, seed, m) for m, data in images.items()}

    for index in range(job.steps):
        forward = stream[index]
        target = SiteData(labels).batch(forward.samples, window, forward.seed, None)
        release = Release(b"", forward.mode, forward.step, forward.batch, forward.samples)
        images_at = {Place(m, m): image for m, image in read(forward.samples, forward.seed).items()}
        split_round(parties, images_at, target, release, forms=forms)
    plan = Plan.of(validation, labels, window, config.evaluation.overlap, config.evaluation.batch, job.steps)
    scoring = Scoring(plan, labels, window, None, measure=True)
    for index, forward in enumerate(plan.forwards):
        shown = read(forward.samples, None)
        sent = {m: parties.sites[Place(m, m)].evaluate(image) for m, image in shown.items()}
        if forms is not None:
            sent = {m: forms.activations.read(levels) for m, levels in sent.items()}
        scoring.add(index, parties.coordinator.predict(sent))
    return Reached(scoring.dice.result(), scoring.surfaces.distances() if scoring.surfaces else {})


def _parties(config: JobConfig, modalities: tuple[str, ...], task: Task) -> Parties:
    """All halves with nothing between them, which is the whole network, bit for bit."""
    job = job_on_wire(config)
    network = build_split_network(
        config.model.backbone(), modalities, config.model.decoder_fusion, task.channels, exclusive=task.exclusive,
        job_seed=config.job.seed,
    )  # fmt: skip

    def stepping(part: nn.Module) -> tuple[Optimizer, Schedule]:
        optimiser = make_optimiser(part.parameters(), job.optimiser, job.learning_rate, job.weight_decay)
        return optimiser, make_schedule(optimiser, job.schedule, job.steps)

    encoders = {m: cast("Encoder", network.encoders[m]) for m in modalities}
    sites = {Place(m, m): ClientHalf(encoder, *stepping(encoder)) for m, encoder in encoders.items()}
    half = CoordinatorHalf(network.decoder, *stepping(network.decoder), exclusive=task.exclusive)
    return Parties(half, sites)


def train_all(
    job: Path, data: Path, salt: Path, contrasts: Mapping[str, str], workers: int, done: Done
) -> dict[str, Reached]:
    """Each modality alone and all together, in `workers` processes.

    Args:
        contrasts: what people call a modality, and its name.
        done: called with each result.
    """
    wanted = [Baseline("centralised, four modalities", tuple(contrasts.values()), job, data, salt)]
    wanted += [Baseline(f"{name} alone", (held,), job, data, salt) for name, held in contrasts.items()]
    results: dict[str, Reached] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(train, baseline): baseline.name for baseline in wanted}
        for future in as_completed(running):
            results[running[future]] = future.result()
            done(running[future], future.result())
    return {baseline.name: results[baseline.name] for baseline in wanted}
