"""Two hospitals with T1, one with FLAIR, patients of whom a seat is missing: the files, and the same in one process.

What is computed here shares the networks, the schedule of batches and the windows with the product, and nothing of how
a step is put together from what sites send.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from splitpeer.data.layouts import find_images
from splitpeer.data.loader import SiteData
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.sampling import TrainingSchedule, split_patients
from splitpeer.data.volumes import Volumes
from splitpeer.federation.evaluation import Plan, Scoring
from splitpeer.models import build_decoder, build_encoder, site_seed
from splitpeer.storage import checkpoint
from splitpeer.training.dropout import left_out
from splitpeer.training.loss import probabilities, task_loss
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitproto.messages import Sample

from .scene import PATIENTS, SEED, Scene

WHERE: dict[str, tuple[str, tuple[int, ...]]] = {
    "site-flair": ("flair", (0, 1, 3, 4)),
    "site-t1": ("t1", (0, 1, 4)),
    "stranger": ("t1", (1, 2, 5)),
}
"""Site to its modality and its patients, as `names` has them: 1 is at both T1 hospitals; 2 and 5 lack FLAIR, 3 T1.
Patients 4 and 5 are held out, where two are."""


def names(scene: Scene) -> list[str]:
    """The patients, so that the last two are those who are held out: whom that strikes depends on the salt."""
    by_key = {scene.key(patient): patient for patient in PATIENTS}
    training, held_out = split_patients(sorted(by_key), 2, SEED)
    return [by_key[key] for key in (*training, *held_out)]


def link(scene: Scene, site: str, modality: str, number: int) -> None:
    """One more patient of a site."""
    name = f"{names(scene)[number]}.nii.gz"
    (scene.folder / "images" / site / name).symlink_to(scene.federation.data / modality / name)


def cast(
    scene: Scene,
    where: Mapping[str, tuple[str, Sequence[int]]] = WHERE,
    *,
    policy: Mapping[str, Any] | None = None,
    **job: Mapping[str, Any],
) -> Scene:
    """All files; patients with one seat are used unless `job` says otherwise. `policy`: more of it, at all sites."""
    scene.coordinator()
    sections = {**job, "data": {"min_seats": 1, "augment": True, **job.get("data", {})}}
    scene.job(sites={site: modality for site, (modality, _) in where.items()}, **sections)
    for site, (modality, patients) in where.items():
        folder = scene.folder / "images" / site
        folder.mkdir(parents=True, exist_ok=True)
        for number in patients:
            link(scene, site, modality, number)
        scene.client(modality, site, data={"images": str(folder)}, policy=policy or {})
    return scene


def who(where: Mapping[str, Any] = WHERE) -> list[str]:
    """All parties."""
    return ["hub", *where]


class Whole:
    """All parties' networks in one process, trained together.

    Args:
        scene: its files.
        where: site to modality and patients.
        gone: sites that take no part from a step on.
    """

    def __init__(
        self,
        scene: Scene,
        where: Mapping[str, tuple[str, Sequence[int]]] = WHERE,
        gone: Mapping[str, int] | None = None,
    ) -> None:
        torch.set_num_threads(1)
        self.scene, self.job, self.gone = scene, scene.settings, gone or {}
        self.modality = {site: modality for site, (modality, _) in sorted(where.items())}
        self.seats = sorted(set(self.modality.values()))
        every = [scene.key(name) for name in names(scene)]
        self.has = {site: {every[n] for n in patients} for site, (_, patients) in where.items()}
        backbone = self.job.model.backbone()
        self.encoders = {
            site: build_encoder(backbone, seed=site_seed(SEED, modality))
            for site, modality in self.modality.items()
        }
        self.decoder = build_decoder(
            backbone, self.seats, self.job.model.fusion, scene.task().channels,
            exclusive=scene.task().exclusive, seed=site_seed(SEED, "coordinator"),
        )  # fmt: skip
        training = self.job.training
        self.trained = {}
        for name, part in {**self.encoders, "hub": self.decoder}.items():
            optimiser = make_optimiser(
                part.parameters(), training.optimiser, training.learning_rate, training.weight_decay
            )
            self.trained[name] = optimiser, make_schedule(optimiser, training.schedule, training.steps)
        salt = load_salt(scene.config("hub").data.salt)
        self.images = {
            site: SiteData(Volumes(find_images(scene.folder / "images" / site, "folder", m), salt=salt))
            for site, m in self.modality.items()
        }
        self.masks = scene.masks()
        self.window = (*self.job.data.window, 1)[:3]
        least = self.job.data.min_seats or len(self.seats)
        self.keys = sorted(key for key in self.masks.keys() if len(self.seats_of(key)) >= least)  # noqa: SIM118
        self.training, self.held_out = split_patients(self.keys, self.job.data.validation, self.job.job.seed)
        self.losses: list[float | None] = []
        self.without: list[list[str]] = []
        self.averaged: list[int] = []
        """Steps after which encoders were averaged."""

    def filler(self, key: bytes, seat: str) -> str | None:
        """The first site by name that has the patient."""
        return next((s for s, m in self.modality.items() if m == seat and key in self.has[s]), None)

    def seats_of(self, key: bytes) -> list[str]:
        return [seat for seat in self.seats if self.filler(key, seat) is not None]

    def complete(self) -> list[bytes]:
        return [key for key in self.keys if self.seats_of(key) == self.seats]

    def train(self) -> Whole:
        """All steps."""
        job = self.job
        schedule = TrainingSchedule(
            self.training, self.masks, window=self.window, batch=job.training.batch, steps=job.training.steps,
            seed=job.job.seed, positive_fraction=job.data.positive_fraction,
            complete=self.complete(), complete_first=job.data.complete_first,
        )  # fmt: skip
        for step in range(job.training.steps):
            samples, drawn = schedule.batch(step)
            self._step(step + 1, samples, drawn if job.data.augment else None)
        return self

    def _here(self, site: str, step: int) -> bool:
        return step < self.gone.get(site, step + 1)

    def _step(self, step: int, samples: Sequence[Sample], seed: int | None) -> None:
        self._average(step)
        rows = {
            site: [place for place, sample in enumerate(samples) if self.filler(sample.key, m) == site]
            for site, m in self.modality.items()
            if self._here(site, step)
        }
        had = {self.modality[site] for site, places in rows.items() if places}
        out = left_out(SEED, step, had, self.job.training.modality_dropout)
        rows = {site: places for site, places in rows.items() if places and self.modality[site] not in out}
        if rows:
            target = torch.from_numpy(SiteData(self.masks).batch(samples, self.window, seed, None))
            logits = self.decoder.decode(self._fused(samples, seed, rows))
            loss = task_loss(logits, target, exclusive=self.scene.task().exclusive)
            loss.backward()
        for name, (optimiser, schedule) in self.trained.items():
            if rows and (name == "hub" or name in rows):
                optimiser.step()
            schedule.step()
            optimiser.zero_grad()
        self.losses.append(loss.item() if rows else None)
        self.without.append([seat for seat in self.seats if seat not in {self.modality[s] for s in rows}])

    def _average(self, step: int) -> None:
        """SP-11.16-1, SP-11.16-4: value by value."""
        every = self.job.training.average_every
        for seat in self.seats if every and (step - 1) % every == 0 else ():
            sites = [s for s, m in self.modality.items() if m == seat and self._here(s, step)]
            counts = [sum(self.filler(key, seat) == site for key in self.training) for site in sites]
            if len(sites) < 2:
                continue
            states = [self.encoders[site].state_dict() for site in sites]
            for name in states[0]:
                total = states[0][name].double() * counts[0]
                for state, count in zip(states[1:], counts[1:], strict=True):
                    total = total + state[name].double() * count
                mean = (total / sum(counts)).float()
                for state in states:
                    state[name].copy_(mean)
            self.averaged.append(step - 1)

    def _fused(
        self, samples: Sequence[Sample], seed: int | None, rows: Mapping[str, Sequence[int]]
    ) -> dict[int, torch.Tensor]:
        """Levels by number; what nobody has is zeros, and not counted in a mean."""
        batch = len(samples)
        names = self.job.model.backbone().cut.names
        sent = {}
        for site, places in rows.items():
            own = [samples[place] for place in places]
            x = self.images[site].batch(own, self.window, seed, self.modality[site], places=places)
            sent[site] = self.encoders[site](torch.from_numpy(x))
        fused = {}
        for level, name in zip(self.job.model.backbone().levels, names, strict=True):
            some = next(iter(sent.values()))[name]
            by_seat = {}
            for seat in self.seats:
                by_seat[seat] = torch.zeros(batch, *some.shape[1:])
                for site, places in rows.items():
                    if self.modality[site] == seat:
                        by_seat[seat] = by_seat[seat].index_add(0, torch.tensor(places), sent[site][name])
            if self.job.model.fusion == "concat":
                fused[level] = torch.cat(list(by_seat.values()), 1)
                continue
            having = torch.zeros(batch)
            for places in rows.values():
                having[list(places)] += 1
            shape = (-1, *[1] * (some.ndim - 1))
            used = [by_seat[seat] for seat in self.seats if any(self.modality[s] == seat for s in rows)]
            fused[level] = torch.stack(used).sum(0) / having.clamp(min=1).view(shape)
        return fused

    def dice(self, masks: Path | None = None) -> dict[str, float | None]:
        """Over the patients held out, each from the seats that it has."""
        job = self.job
        plan = Plan.of(
            self.held_out,
            self.masks,
            self.window,
            job.evaluation.overlap,
            job.evaluation.batch,
            job.training.steps,
        )
        scoring = Scoring(plan, self.masks, self.window, masks)
        with torch.no_grad():
            for index, forward in enumerate(plan.forwards):
                key = plan.keys[index]
                sites = [s for seat in self.seats_of(key) if (s := self.filler(key, seat)) is not None]
                rows = {site: list(range(len(forward.samples))) for site in sites}
                logits = self.decoder.decode(self._fused(forward.samples, None, rows)).float()
                found = probabilities(logits, exclusive=self.scene.task().exclusive)
                scoring.add(index, found.numpy().astype(np.float32))
        return scoring.dice.result()

    def assert_exact(self) -> None:
        """Losses, all weights and the Dice are those of the run in the scene, bit for bit."""
        assert losses(self.scene) == self.losses
        steps = self.job.training.steps
        for name, part in {**self.encoders, "hub": self.decoder}.items():
            found = weights(self.scene, name, steps)
            state = part.state_dict()
            assert found.keys() == state.keys()
            assert [key for key in state if not torch.equal(state[key], found[key])] == [], name


def losses(scene: Scene) -> list[float | None]:
    """As `Scene.losses`, and None where nobody took part."""
    kept: list[float | None] = []
    for line in scene.metrics():
        if line.get("rollback"):
            del kept[line["step"] :]
        elif "loss" in line:
            assert line["step"] == len(kept) + 1
            kept.append(line["loss"])
    return kept


def weights(scene: Scene, name: str, step: int) -> dict[str, torch.Tensor]:
    """A party's, from its checkpoint."""
    (run,) = [path for path in (scene.folder / name / "state").iterdir() if [*path.glob("step-*")]]
    tensors, meta, _ = checkpoint.load(run, step)
    assert meta["step"] == step
    start = "model/"
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
