"""A site that fills two seats, one with two channels, and another site: a whole run equals that of one process."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from splitpeer.data.augment import augment
from splitpeer.data.layouts import find_images
from splitpeer.data.loader import SiteData
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.sampling import TrainingSchedule
from splitpeer.data.volumes import Volumes
from splitpeer.models import build_decoder, build_encoder, site_seed
from splitpeer.storage import checkpoint
from splitpeer.training.loss import task_loss
from splitpeer.training.optimiser import make_optimiser, make_schedule

from .scene import PATIENTS, SEED, Scene

SEATS = {"flair": ("flair",), "mri": ("t2", "t1"), "t1ce": ("t1ce",)}
AT = {"flair": "site-t1", "mri": "site-t1", "t1ce": "site-t1ce"}
STEPS = 8


@pytest.fixture
def stage(scene: Scene) -> Scene:
    for seat, site in AT.items():
        for modality in SEATS[seat]:
            shutil.copytree(scene.federation.data / modality, scene.folder / "images" / site / modality)
    scene.modalities = ("t1", "t1ce")
    scene.coordinator()
    scene.job(
        sites={"site-t1": ["t1", "flair", "t2"], "site-t1ce": "t1ce"},
        seats={"mri": ["t2", "t1"]},
        training={"steps": STEPS, "batch": 3, "checkpoint_every": 3},
        data={"min_seats": 1, "augment": True},
    )
    own(scene)
    scene.client("t1ce", data={"images": str(scene.folder / "images" / "site-t1ce")})
    return scene


def own(scene: Scene, **over: Any) -> None:
    images = str(scene.folder / "images" / "site-t1")
    scene.client("t1", **{"peer": {"modality": ["t1", "flair", "t2"]}, "data": {"images": images}, **over})


class Reference:
    """All encoders and the decoder in this process; a row of a seat is where all its channels have the patient."""

    def __init__(self, scene: Scene) -> None:
        torch.set_num_threads(1)
        self.scene, job = scene, scene.settings
        salt, backbone = load_salt(scene.config("hub").data.salt), job.model.backbone()
        self.names, self.levels = backbone.cut.names, backbone.levels
        self.volumes = {
            modality: Volumes(
                find_images(scene.folder / "images" / AT[seat] / modality, "folder", modality), salt=salt
            )
            for seat, modalities in SEATS.items()
            for modality in modalities
        }
        self.encoders = {
            seat: build_encoder(backbone, len(modalities), seed=site_seed(SEED, seat))
            for seat, modalities in SEATS.items()
        }
        self.decoder = build_decoder(
            backbone,
            list(SEATS),
            job.model.fusion,
            scene.task().channels,
            seed=site_seed(SEED, "coordinator"),
        )
        self.losses: list[float] = []

    def train(self) -> Reference:
        job, masks = self.scene.settings, self.scene.masks()
        training, window = job.training, (*job.data.window, 1)
        parts = [*self.encoders.values(), self.decoder]
        made = [
            make_optimiser(p.parameters(), training.optimiser, training.learning_rate, training.weight_decay)
            for p in parts
        ]
        schedules = [make_schedule(one, training.schedule, training.steps) for one in made]
        drawn = TrainingSchedule(
            self.scene.patients()[0], masks, window=window, batch=training.batch, steps=training.steps,
            seed=job.job.seed, positive_fraction=job.data.positive_fraction,
        )  # fmt: skip
        for step in range(training.steps):
            samples, seed = drawn.batch(step)
            target = torch.from_numpy(SiteData(masks).batch(samples, window, seed, None))
            loss = task_loss(self.decoder.decode(self._fused(samples, window, seed)), target, exclusive=False)
            loss.backward()
            for optimiser, schedule in zip(made, schedules, strict=True):
                optimiser.step()
                schedule.step()
                optimiser.zero_grad()
            self.losses.append(loss.item())
        return self

    def _fused(self, samples: Any, window: Any, seed: int) -> dict[int, torch.Tensor]:
        fused: dict[str, list[torch.Tensor]] = {name: [] for name in self.names}
        for seat, modalities in SEATS.items():
            rows = [
                row
                for row, sample in enumerate(samples)
                if all(sample.key in self.volumes[m].cases for m in modalities)
            ]
            channels = []
            for modality in modalities:
                x = SiteData(self.volumes[modality]).batch([samples[r] for r in rows], window, None, modality)
                channels.append(np.stack([augment(x[n], seed, r, modality) for n, r in enumerate(rows)]))
            sent = self.encoders[seat](torch.from_numpy(np.concatenate(channels, axis=1)))
            for name, tensor in sent.items():
                whole = torch.zeros(len(samples), *tensor.shape[1:])
                fused[name].append(whole.index_add(0, torch.tensor(rows), tensor))
        return {
            level: torch.cat(fused[name], dim=1) for level, name in zip(self.levels, self.names, strict=True)
        }

    def assert_exact(self) -> None:
        assert self.scene.losses() == self.losses
        for who, seats in (("site-t1", ("flair", "mri")), ("site-t1ce", ("t1ce",))):
            (run,) = [p for p in (self.scene.folder / who / "state").iterdir() if [*p.glob("step-*")]]
            tensors, _, _ = checkpoint.load(run, self.scene.settings.training.steps)
            for seat in seats:
                prefix = f"{seat}/model/" if len(seats) > 1 else "model/"
                for name, tensor in self.encoders[seat].state_dict().items():
                    assert torch.equal(tensors[prefix + name], tensor), (seat, name)


@pytest.mark.parametrize("gap", [False, True], ids=["all complete", "a patient lacks a channel"])
async def test_it_is_one_process_bit_for_bit(stage: Scene, gap: bool) -> None:
    """Also where a seat has no row in some batches, and in the evaluation."""
    if gap:
        for key in (stage.patients()[0][0], stage.patients()[1][0]):
            (patient,) = [one for one in PATIENTS if stage.key(one) == key]
            (stage.folder / "images" / "site-t1" / "t2" / f"{patient}.nii.gz").unlink()
    ran = await stage.together()
    assert ran.result is not None, ran
    assert all(error is None for error in ran.clients.values()), ran.clients
    Reference(stage).train().assert_exact()
    status = json.loads((stage.folder / "site-t1" / "state" / "status.json").read_text())
    assert status["modality"] == "t1, flair, t2"
    assert status["work"]["seats"] == {"flair": 6, "mri (t2, t1)": 4 if gap else 6}


def test_a_site_that_is_killed_comes_back_with_all_its_seats(stage: Scene) -> None:
    """One checkpoint holds both encoders; the run is the same as if nobody had been killed."""
    stage.job(
        sites={"site-t1": ["t1", "flair", "t2"], "site-t1ce": "t1ce"},
        seats={"mri": ["t2", "t1"]},
        training={"steps": 24, "batch": 3, "checkpoint_every": 5},
        data={"min_seats": 1, "augment": True},
    )
    hub, clients = stage.start_all()
    stage.until_step(7)
    clients["t1"].signal(9)
    clients["t1"].code()
    again = stage.start("site-t1")
    assert [one.code() for one in (hub, again, clients["t1ce"])] == [0, 0, 0], hub.said + again.said
    Reference(stage).train().assert_exact()


async def test_an_encoder_of_ones_own_in_a_run(stage: Scene) -> None:
    """SP-11.8-4: the coordinator sees the same cut, and never learns of it."""
    own(stage, model={"network": "residual-unet", "features": [2, 4, 4, 8, 8]})
    ran = await stage.together()
    assert ran.result is not None, ran
    assert ran.result.complete
    assert stage.losses() != Reference(stage).train().losses
