"""Two hospitals with T1, one with FLAIR, patients who lack a seat: the files, and the same training in one process.

The computation here shares networks, batch schedule and windows with the product, but nothing of how a step is put
together from what sites send.
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
from splitpeer.training.split_round import Place
from splitpeer.training.tiles import TiledSchedule
from splitpeer.training.windows import window_origins
from splitproto.records import Sample

from .scene import PATIENTS, SEED, Scene

HUB = "hub"

Where = Mapping[str, Mapping[str, Sequence[int]]]
"""Site to its modalities to the patients, by number, of whom it has them."""

WHERE: Where = {
    "site-flair": {"flair": (0, 1, 3, 4)},
    "site-t1": {"t1": (0, 1, 4)},
    "stranger": {"t1": (1, 2, 5)},
}
"""Patients as `names` has them: 1 is at both T1 hospitals; 2 and 5 lack FLAIR, 3 T1. 4 and 5 are held out, where two
are."""


def names(scene: Scene) -> list[str]:
    """The patients, so that the last two are those who are held out: whom that strikes depends on the salt."""
    by_key = {scene.key(patient): patient for patient in PATIENTS}
    training, held_out = split_patients(sorted(by_key), 2, SEED)
    return [by_key[key] for key in (*training, *held_out)]


def link(scene: Scene, site: str, modality: str, number: int) -> None:
    """One more patient of a site."""
    name = f"{names(scene)[number]}.nii.gz"
    folder = scene.folder / "images" / site / modality
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(scene.federation.data / modality / name)


def cast(
    scene: Scene, where: Where = WHERE, *, policy: Mapping[str, Any] | None = None, **job: Mapping[str, Any]
) -> Scene:
    """All files; patients with one seat are used unless `job` says otherwise. `policy`: more of it, at all sites."""
    scene.coordinator()
    sections = {**job, "data": {"min_seats": 1, "augment": True, **job.get("data", {})}}
    scene.job(sites={site: list(held) for site, held in where.items()}, **sections)
    for site, held in where.items():
        for modality, patients in held.items():
            for number in patients:
                link(scene, site, modality, number)
        images = scene.folder / "images" / site
        scene.client(
            next(iter(held)),
            site,
            peer={"modality": list(held)},
            data={"images": str(images if len(held) > 1 else images / next(iter(held)))},
            policy=policy or {},
        )
    return scene


def who(where: Where = WHERE) -> list[str]:
    """All parties."""
    return ["hub", *where]


class Whole:
    """All parties' networks in one process, trained together; every modality is a seat.

    Args:
        scene: its files.
        where: as they were cast.
    """

    def __init__(self, scene: Scene, where: Where = WHERE) -> None:
        torch.set_num_threads(1)
        self.scene, self.job = scene, scene.settings
        self.places = [Place(site, seat) for site in sorted(where) for seat in sorted(where[site])]
        self.seats = sorted({place.seat for place in self.places})
        every = [scene.key(name) for name in names(scene)]
        self.has = {place: {every[n] for n in where[place.site][place.seat]} for place in self.places}
        backbone = self.job.model.backbone()
        self.encoders = {
            place: build_encoder(backbone, seed=site_seed(SEED, place.seat)) for place in self.places
        }
        self.decoder = build_decoder(
            backbone, self.seats, self.job.model.fusion, scene.task().channels,
            exclusive=scene.task().exclusive, seed=site_seed(SEED, "coordinator"),
        )  # fmt: skip
        training = self.job.training
        self.trained = {}
        for name, part in {**self.encoders, HUB: self.decoder}.items():
            optimiser = make_optimiser(
                part.parameters(), training.optimiser, training.learning_rate, training.weight_decay
            )
            self.trained[name] = optimiser, make_schedule(optimiser, training.schedule, training.steps)
        salt = load_salt(scene.config("hub").data.salt)
        folder = scene.folder / "images"
        self.images = {
            p: SiteData(Volumes(find_images(folder / p.site / p.seat, "folder", p.seat), salt=salt))
            for p in self.places
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
        """The first site by name that has the patient's."""
        return next((p.site for p in self.places if p.seat == seat and key in self.has[p]), None)

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
            self.step(step + 1, samples, drawn if job.data.augment else None)
        return self

    def _filled(self, samples: Sequence[Sample]) -> dict[Place, list[int]]:
        """Which samples each site fills at each seat; where it fills none, it is not there."""
        found = {
            place: [n for n, s in enumerate(samples) if self.filler(s.key, place.seat) == place.site]
            for place in self.places
        }
        return {place: numbers for place, numbers in found.items() if numbers}

    def step(self, step: int, samples: Sequence[Sample], seed: int | None) -> None:
        self._average(step)
        filled = self._filled(samples)
        seats = {place.seat for place in filled}
        out = left_out(SEED, step, seats, self.job.training.seat_dropout)
        filled = {place: numbers for place, numbers in filled.items() if place.seat not in out}
        if filled:
            target = torch.from_numpy(SiteData(self.masks).batch(samples, self.window, seed, None))
            logits = self.decoder.decode(self._fused(samples, seed, filled))
            loss = task_loss(logits, target, exclusive=self.scene.task().exclusive)
            loss.backward()
        for name, (optimiser, schedule) in self.trained.items():
            if filled and (name == HUB or name in filled):
                optimiser.step()
            schedule.step()
            optimiser.zero_grad()
        self.losses.append(loss.item() if filled else None)
        self.without.append([seat for seat in self.seats if seat not in {place.seat for place in filled}])

    def _sent(
        self, place: Place, samples: Sequence[Sample], seed: int | None
    ) -> tuple[list[int], dict[str, torch.Tensor]]:
        """What the site computes for the seat: of all its samples of the batch, also those that another site fills."""
        own = [n for n, s in enumerate(samples) if place.site in {self.filler(s.key, q) for q in self.seats}]
        rows = [n for n in own if samples[n].key in self.has[place]]
        x = self.images[place].batch([samples[n] for n in rows], self.window, seed, place.seat, places=rows)
        return rows, self.encoders[place](torch.from_numpy(x))

    def _average(self, step: int) -> None:
        """SP-11.16-1, SP-11.16-4: value by value."""
        every = self.job.training.average_every
        for seat in self.seats if every and (step - 1) % every == 0 else ():
            places = [place for place in self.places if place.seat == seat]
            counts = [sum(self.filler(key, seat) == place.site for key in self.training) for place in places]
            if len(places) < 2:
                continue
            states = [self.encoders[place].state_dict() for place in places]
            for name in states[0]:
                total = states[0][name].double() * counts[0]
                for state, count in zip(states[1:], counts[1:], strict=True):
                    total = total + state[name].double() * count
                mean = (total / sum(counts)).float()
                for state in states:
                    state[name].copy_(mean)
            self.averaged.append(step - 1)

    def _fused(
        self, samples: Sequence[Sample], seed: int | None, filled: Mapping[Place, Sequence[int]]
    ) -> dict[int, torch.Tensor]:
        """Levels by number; what nobody has is zeros, and not counted in a mean."""
        backbone, batch = self.job.model.backbone(), len(samples)
        sent = {place: self._sent(place, samples, seed) for place in filled}
        having = torch.zeros(batch)
        for numbers in filled.values():
            having[list(numbers)] += 1
        fused = {}
        for level, name in zip(backbone.levels, backbone.cut.names, strict=True):
            some = next(iter(sent.values()))[1][name]
            by_seat = {seat: torch.zeros(batch, *some.shape[1:]) for seat in self.seats}
            for place, numbers in filled.items():
                rows, tensors = sent[place]
                used = tensors[name][[rows.index(n) for n in numbers]]
                by_seat[place.seat] = by_seat[place.seat].index_add(0, torch.tensor(numbers), used)
            if self.job.model.fusion == "concat":
                fused[level] = torch.cat(list(by_seat.values()), 1)
                continue
            used = [by_seat[seat] for seat in self.seats if any(place.seat == seat for place in filled)]
            fused[level] = torch.stack(used).sum(0) / having.clamp(min=1).view(-1, *[1] * (some.ndim - 1))
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
                filled = self._filled(forward.samples)
                logits = self.decoder.decode(self._fused(forward.samples, None, filled)).float()
                found = probabilities(logits, exclusive=self.scene.task().exclusive)
                scoring.add(index, found.numpy().astype(np.float32))
        return scoring.dice.result()

    def assert_exact(self) -> None:
        """Losses, all weights and the Dice are those of the run in the scene, bit for bit."""
        assert losses(self.scene) == self.losses
        steps = self.job.training.steps
        found = {name: weights(self.scene, name, steps) for name in {HUB, *(p.site for p in self.places)}}
        alone = {site: sum(p.site == site for p in self.places) == 1 for site in found}
        for name, part in {**self.encoders, HUB: self.decoder}.items():
            site, start = (
                (name, "") if name == HUB else (name.site, "" if alone[name.site] else f"{name.seat}/")
            )
            own = {k.removeprefix(start): t for k, t in found[site].items() if k.startswith(start)}
            state = part.state_dict()
            assert own.keys() == state.keys(), name
            assert [key for key in state if not torch.equal(state[key], own[key])] == [], name


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
    """A party's, from its checkpoint; of several seats, each name begins with its seat."""
    (run,) = [path for path in (scene.folder / name / "state").iterdir() if [*path.glob("step-*")]]
    tensors, meta, _ = checkpoint.load(run, step)
    assert meta["step"] == step
    return {
        key.replace("model/", "", 1): tensor
        for key, tensor in tensors.items()
        if "model" in key.split("/")[:2]
    }


class FrozenWhole(Whole):
    """The same with encoders that stay as they are: every window is encoded once, in the batches that are released."""

    def __init__(self, scene: Scene, where: Where = WHERE) -> None:
        super().__init__(scene, where)
        for encoder in self.encoders.values():
            encoder.eval()
        self._made: dict[tuple[Place, Sample], dict[str, torch.Tensor]] = {}

    def train(self) -> Whole:
        """All steps."""
        job = self.job
        drawn = TiledSchedule(
            self.training, self.masks, overlap=job.evaluation.overlap, window=self.window,
            batch=job.training.batch, steps=job.training.steps, seed=job.job.seed,
            positive_fraction=job.data.positive_fraction, complete=self.complete(),
            complete_first=job.data.complete_first,
        )  # fmt: skip
        for step in range(job.training.steps):
            self.step(step + 1, drawn.batch(step)[0], None)
        return self

    def missing(self, seat: str) -> dict[str, float | None]:
        """The Dice without a seat; whoever has no other is left out."""
        whole = self._filled
        self._filled = lambda samples: {p: rows for p, rows in whole(samples).items() if p.seat != seat}  # type: ignore[method-assign]
        plan = Plan.of(
            [key for key in self.held_out if self.seats_of(key) != [seat]], self.masks, self.window,
            self.job.evaluation.overlap, self.job.evaluation.batch, self.job.training.steps,
        )  # fmt: skip
        kept, self.held_out = self.held_out, list(dict.fromkeys(plan.keys))
        found = self.dice()
        self.held_out, self._filled = kept, whole  # type: ignore[method-assign]
        return found

    def _sent(
        self, place: Place, samples: Sequence[Sample], seed: int | None
    ) -> tuple[list[int], dict[str, torch.Tensor]]:
        rows = [n for n, s in enumerate(samples) if self.filler(s.key, place.seat) == place.site]
        levels = [self._released(place, samples[n]) for n in rows]
        return rows, {name: torch.cat([level[name] for level in levels]) for name in levels[0]}

    def _released(self, place: Place, sample: Sample) -> dict[str, torch.Tensor]:
        """Of one window, [1, C, *spatial] by level."""
        if (place, sample) not in self._made:
            settings = self.job.evaluation
            origins = window_origins(self.masks.geometry(sample.key).shape, self.window, settings.overlap)
            for first in range(0, len(origins), settings.batch):
                batch = [Sample(sample.key, at) for at in origins[first : first + settings.batch]]
                x = self.images[place].batch(batch, self.window, None, place.seat)
                with torch.no_grad():
                    made = self.encoders[place](torch.from_numpy(x))
                for row, one in enumerate(batch):
                    self._made[place, one] = {name: t[row : row + 1] for name, t in made.items()}
        return self._made[place, sample]
