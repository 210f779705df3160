"""A job played in one process: the real halves, defences, messages and captures; no network.

What the coordinator and each site would have seen is written into the same capture files that `--curious` writes,
so that every attack on a rehearsal is the attack on the wire.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from splitpeer.audit.cohort import Cohort
from splitpeer.config import JobConfig
from splitpeer.curious.recorder import Limits, Recorder
from splitpeer.data.loader import SiteData
from splitpeer.data.sampling import TrainingSchedule, batch_digest, split_patients
from splitpeer.defences import Release, Stack, make_stack
from splitpeer.defences.defended import Defended
from splitpeer.models import build_decoder, build_encoder, site_seed
from splitpeer.roles.batches import TrainingStream
from splitpeer.roles.compute import from_wire, to_wire
from splitpeer.roles.evaluation import Plan, Scoring
from splitpeer.roles.terms import cut_descriptors, job_on_wire, window_of
from splitpeer.training import checkpoint
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import Arrays, ClientHalf, CoordinatorHalf
from splitproto.messages import Activations, Applied, Forward, Gradients, JobAccept, JobOffer, Message, Sample
from splitproto.tensors import schema_digest

Progress = Callable[[str, int, int], None]
COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Protection:
    """What the parties apply."""

    defences: tuple[str, ...] = ()
    """Of activations, at every site."""
    image: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For tables."""
        parts = [*self.defences, *(f"image/{d}" for d in self.image), *(f"gradients/{d}" for d in self.gradients)]
        return " + ".join(parts) or "none"

    @property
    def announced(self) -> tuple[str, ...]:
        """As a site announces it."""
        return (*(f"image/{d}" for d in self.image), *self.defences)


@dataclass(frozen=True)
class Recording:
    """What of a rehearsal is recorded."""

    first: int = 1
    """Training steps at the beginning."""
    last: int = 1
    """Training steps at the end."""
    targets: tuple[Sample, ...] = ()
    """Samples whose evaluation is recorded at the end."""
    views: int = 1
    """How often the coordinator asks for them; fresh noise differs each time."""


@dataclass
class Rehearsed:
    """What a rehearsal left in its folder."""

    folder: Path
    dice: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    @property
    def capture(self) -> Path:
        """The coordinator's."""
        return self.folder / f"{COORDINATOR}.cap"

    def site_capture(self, modality: str) -> Path:
        """The capture of the site with this modality."""
        return self.folder / f"{modality}.cap"

    def weights(self, party: str) -> Path:
        """Checkpoint of the last step: of a modality's site, or of the coordinator."""
        return sorted((self.folder / f"weights-{party}").glob("step-*.safetensors"))[-1]

    def first_weights(self, party: str) -> Path:
        """Checkpoint of step 0."""
        return self.folder / f"weights-{party}" / "step-00000000.safetensors"


class _Site:
    """One site's half with its defences."""

    def __init__(self, modality: str, rehearsal: Rehearsal) -> None:
        job, protection, seed = rehearsal.job, rehearsal.protection, rehearsal.seed
        self.name, self.modality = f"site-{modality}", modality
        channels = {f"x{level}": job.features[level] for level in job.levels}
        key = hashlib.sha256(f"rehearsal\0{seed}\0{modality}".encode()).digest()
        stack = make_stack(protection.defences, key=key, channels=channels, dimensions=job.dimensions)
        encoder = build_encoder(job.dimensions, job.features, job.levels, seed=site_seed(seed, modality))
        network = Defended(encoder, stack) if stack else encoder
        optimiser = make_optimiser(network.parameters(), job.optimiser, job.learning_rate, job.weight_decay)
        schedule = make_schedule(optimiser, job.schedule, job.steps)
        self.half = ClientHalf(network, optimiser, schedule, rehearsal.device)
        self.image_stack = make_stack(
            protection.image, key=key, channels={"image": 1}, dimensions=job.dimensions, place="image"
        )
        self.data = SiteData(rehearsal.cohort.images[modality], self.image_stack or None)
        # What the label holder does to the gradients that this site is sent.
        key = hashlib.sha256(f"rehearsal gradients\0{seed}\0{modality}".encode()).digest()
        self.gradient_stack: Stack = make_stack(
            protection.gradients, key=key, channels=channels, dimensions=job.dimensions, place="gradients"
        )


class Rehearsal:
    """All parties of one job on one cohort.

    Args:
        config: the job; its sites' modalities must be in the cohort.
        cohort: patients with masks (or stand-ins for masks: `audit/standin.py`).
        protection: the defences of all sites and of the label holder.
        seed: of all weights and defences: a rehearsal repeats.
        folder: captures and weights go here.
    """

    def __init__(
        self,
        config: JobConfig,
        cohort: Cohort,
        protection: Protection,
        folder: Path,
        *,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.config, self.cohort, self.protection, self.seed, self.device = config, cohort, protection, seed, device
        self.folder = folder
        self.job = job_on_wire(config)
        self.window = window_of(self.job)
        self.run = hashlib.sha256(f"rehearsal\0{seed}\0{protection.label}".encode()).digest()[:16]
        self.modalities = sorted(config.sites.values())
        labels = cohort.labels
        if labels is None:
            raise ValueError("a rehearsal needs masks")
        self.labels = labels
        self.training, self.validation = split_patients(
            cohort.keys(), config.data.validation, config.job.seed, labels.subjects()
        )
        self.sites = [_Site(modality, self) for modality in self.modalities]
        decoder = build_decoder(
            self.job.dimensions, self.job.features, self.modalities, self.job.levels, config.model.fusion,
            seed=site_seed(config.job.seed, COORDINATOR),
        )  # fmt: skip
        optimiser = make_optimiser(
            decoder.parameters(), self.job.optimiser, self.job.learning_rate, self.job.weight_decay
        )
        self.half = CoordinatorHalf(
            decoder, optimiser, make_schedule(optimiser, self.job.schedule, self.job.steps), device
        )

    def play(self, recording: Recording, progress: Progress = lambda what, done, total: None) -> Rehearsed:
        """Train, evaluate, record."""
        done = Rehearsed(self.folder)
        recorders = self._recorders()
        tap = _Tap(recorders)
        try:
            self._join(tap)
            self._save(0)
            stream = TrainingStream(
                TrainingSchedule(
                    self.training, self.labels, window=self.window, batch=self.job.batch, steps=self.job.steps,
                    seed=self.config.job.seed, positive_fraction=self.config.data.positive_fraction,
                ),
                self.config.data.augment,
            )  # fmt: skip
            for index in range(self.job.steps):
                recorded = index < recording.first or index >= self.job.steps - recording.last
                done.losses.append(self._step(stream[index], tap if recorded else _silent))
                stream.prepare(index + 1, index + 2)
                progress("training", index + 1, self.job.steps)
            self._save(self.job.steps)
            done.dice = self._evaluate(progress)
            self._views(recording, tap, progress)
        finally:
            for recorder in recorders.values():
                recorder.close("complete")
        return done

    # --- inside ----------------------------------------------------------------------------------------------

    def _step(self, forward: Forward, tap: Tap) -> float:
        """One training step of all parties, as the messages of SP-11.3."""
        target = SiteData(self.labels).batch(forward.samples, self.window, forward.seed, None)
        release = self._release(forward)
        sent: dict[str, Arrays] = {}
        for site in self.sites:
            tap(site, "forward", forward)
            x = site.data.batch(forward.samples, self.window, forward.seed, site.modality)
            sent[site.modality] = self._answer(site, forward, site.half.forward(x, release), tap)
        loss, gradients = self.half.step(sent, target)
        marked = replace(release, target=target)
        for site in self.sites:
            arrays = defend_arrays(site.gradient_stack, gradients[site.modality], marked)
            message = Gradients(forward.step, to_wire(arrays, self.job.precision))
            tap(site, "gradients", message)
            site.half.backward(from_wire(message.tensors, self.job.precision))
            tap(site, "applied", Applied(forward.step))
        return loss

    def _answer(self, site: _Site, forward: Forward, arrays: Arrays, tap: Tap) -> Arrays:
        tensors = to_wire(arrays, self.job.precision)
        tap(site, "activations", Activations(forward.mode, forward.step, forward.batch, forward.digest, tensors))
        return from_wire(tensors, self.job.precision)

    def _release(self, forward: Forward) -> Release:
        return Release(self.run, forward.mode, forward.step, forward.batch, forward.samples)

    def _asked(self, forward: Forward, sites: Sequence[_Site], tap: Tap) -> dict[str, Arrays]:
        release = self._release(forward)
        answers = {}
        for site in sites:
            tap(site, "forward", forward)
            x = site.data.batch(forward.samples, self.window, None, site.modality)
            answers[site.modality] = self._answer(site, forward, site.half.evaluate(x, release), tap)
        return answers

    def _evaluate(self, progress: Progress) -> dict[str, float]:
        settings = self.config.evaluation
        plan = Plan.of(
            self.validation, self.labels, self.window, settings.overlap, settings.batch, self.job.steps
        )
        scoring = Scoring(plan, self.labels, self.window, None)
        for index, forward in enumerate(plan.forwards):
            scoring.add(index, self.half.predict(self._asked(forward, self.sites, _silent)))
            progress("evaluating", index + 1, len(plan.forwards))
        return scoring.dice.result() if len(scoring.dice) else {}

    def _views(self, recording: Recording, tap: Tap, progress: Progress) -> None:
        """The coordinator asks for the same samples again and again; the site draws fresh noise each time."""
        samples, batch = recording.targets, self.config.evaluation.batch
        pieces = [tuple(samples[i : i + batch]) for i in range(0, len(samples), batch)]
        asked = [site for site in self.sites if site.modality == recording.modality] or self.sites
        number = 0
        for view in range(recording.views):
            for piece in pieces:
                digest = batch_digest(self.job.steps, piece, None)
                forward = Forward("evaluate", self.job.steps, number, piece, digest)
                number += 1
                # All sites the first time; after that only the one under attack, to keep the capture small.
                answers = self._asked(forward, self.sites if view == 0 else asked, tap)
                if view == 0:
                    self._first = answers if number == 1 else self._first
                elif number == len(pieces) + 1 and self._same(answers):
                    return
            progress("asking again", view + 1, recording.views)

    def _same(self, answers: Mapping[str, Arrays]) -> bool:
        """Nothing fresh was drawn: a hundred views would be a hundred copies."""
        return all(
            np.array_equal(array, self._first[modality][name])
            for modality, arrays in answers.items()
            for name, array in arrays.items()
        )

    def _save(self, step: int) -> None:
        halves = {site.modality: site.half for site in self.sites} | {COORDINATOR: self.half}
        for party, half in halves.items():
            tensors, meta = half.state()
            checkpoint.save(self.folder / f"weights-{party}", step, tensors, meta)
