"""Runs with frozen encoders: collected once, then trained with no site online, to the bit of one process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from splitpeer.data.augment import derive
from splitpeer.data.loader import SiteData
from splitpeer.federation.evaluation import Plan, Scoring
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import job_on_wire
from splitpeer.storage import checkpoint
from splitpeer.training.forms import WireForm, activations_form
from splitpeer.training.loss import task_loss
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.tiles import TiledSchedule
from splitpeer.training.windows import window_origins
from splitproto.records import Sample

from .scene import Scene

FROZEN = {"encoders": "frozen", "steps": 12, "batch": 3, "checkpoint_every": 5}


# --- the same in one process -----------------------------------------------------------------------------------


class Whole:
    """The whole network in this process, its encoders frozen: what a run must come to, bit for bit."""

    def __init__(self, scene: Scene, network: Any = None) -> None:
        torch.set_num_threads(1)
        self.scene, self.job, self.network = scene, scene.settings, network or scene.network()
        self.masks = scene.masks()
        self.window = (*self.job.data.window, 1)[:3]
        self.images = {seat: SiteData(scene.images(seat)) for seat in seats_of(self.job).names}
        self.network.encoders.eval()

        self._encoded: dict[Sample, dict[str, dict[str, torch.Tensor]]] = {}

    def features(self, sample: Sample) -> dict[str, dict[str, torch.Tensor]]:
        """Of one window, [1, C, *spatial]; each patient is encoded once, in batches as in [evaluation]."""
        if sample not in self._encoded:
            origins = window_origins(
                self.masks.geometry(sample.key).shape, self.window, self.job.evaluation.overlap
            )
            count = self.job.evaluation.batch
            for first in range(0, len(origins), count):
                self._encode([Sample(sample.key, at) for at in origins[first : first + count]])
        return self._encoded[sample]

    def _encode(self, samples: list[Sample]) -> None:
        with torch.no_grad():
            made = {
                seat: self.network.encoders[seat](
                    torch.from_numpy(data.batch(samples, self.window, None, seat))
                )
                for seat, data in self.images.items()
            }
            form = activations_form(job_on_wire(self.job))
            made = {seat: self._read(levels, form) for seat, levels in made.items()}
        for row, sample in enumerate(samples):
            self._encoded[sample] = {
                seat: {name: t[row : row + 1] for name, t in levels.items()} for seat, levels in made.items()
            }

    def _read(self, levels: Mapping[str, torch.Tensor], form: WireForm) -> dict[str, torch.Tensor]:
        """As the coordinator reads them."""
        sent = form.to_wire({name: tensor.numpy() for name, tensor in levels.items()})
        return {name: torch.from_numpy(array) for name, array in form.from_wire(sent).items()}

    def train(self, without: Mapping[bytes, int] | None = None) -> list[float]:
        """Losses of all steps; patients `without` are not drawn from a step on."""
        job, training = self.job, self.job.training
        decoder = self.network.decoder
        optimiser = make_optimiser(
            decoder.parameters(), training.optimiser, training.learning_rate, training.weight_decay
        )
        rates = make_schedule(optimiser, training.schedule, training.steps)
        drawn = TiledSchedule(
            self.scene.patients()[0], self.masks, overlap=job.evaluation.overlap, window=self.window,
            batch=training.batch, steps=training.steps, seed=job.job.seed,
            positive_fraction=job.data.positive_fraction,
        )  # fmt: skip
        losses = []
        for step in range(training.steps):
            if gone := [key for key, first in (without or {}).items() if first == step + 1]:
                drawn.withdraw(gone)
            samples, seed = drawn.batch(step)
            rows = [self.features(sample) for sample in samples]
            target = torch.from_numpy(SiteData(self.masks).batch(samples, self.window, None, None))
            if job.data.augment:
                poses = [derive(seed, place, None) for place in range(len(samples))]
                rows = [
                    {s: {n: turned(t[0], pose)[None] for n, t in levels.items()} for s, levels in row.items()}
                    for row, pose in zip(rows, poses, strict=True)
                ]
                target = torch.stack([turned(t, pose) for t, pose in zip(target, poses, strict=True)])
            loss = task_loss(decoder(together(rows)), target, exclusive=self.scene.task().exclusive)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rates.step()
            losses.append(loss.item())
        return losses

    def dice(self) -> Mapping[str, float | None]:
        job = self.job
        plan = Plan.of(self.scene.patients()[1], self.masks, self.window, job.evaluation.overlap, 4, 0)
        scoring = Scoring(plan, self.masks, self.window, None)
        self.network.decoder.eval()
        for index, forward in enumerate(plan.forwards):
            with torch.no_grad():
                logits = self.network.decoder(together([self.features(one) for one in forward.samples]))
            scoring.add(index, logits.sigmoid().numpy())
        return scoring.dice.result()


def together(rows: Sequence[Mapping[str, Mapping[str, torch.Tensor]]]) -> dict[str, dict[str, torch.Tensor]]:
    """Samples as one batch."""
    return {
        seat: {name: torch.cat([row[seat][name] for row in rows]) for name in levels}
        for seat, levels in rows[0].items()
    }


def turned(tensor: torch.Tensor, pose: Any) -> torch.Tensor:
    """[C, x, y] or [C, x, y, z], with another library than the coordinator's."""
    axes = [axis for axis in range(1, tensor.ndim) if pose.flips[axis - 1]]
    return torch.rot90(torch.flip(tensor, axes), pose.turns, (1, 2)).contiguous()


def assert_same(scene: Scene, whole: Whole | None = None) -> Whole:
    """Losses and decoder are those of one process."""
    whole = whole or Whole(scene)
    losses = whole.train()
    assert scene.losses() == losses
    (run,) = [path for path in (scene.folder / "hub" / "state").iterdir() if [*path.glob("step-*")]]
    tensors, meta, _ = checkpoint.load(run, scene.settings.training.steps)
    assert meta["step"] == len(losses)
    decoder = whole.network.decoder.state_dict()
    assert {name: t for name, t in tensors.items() if name.startswith("model/")}.keys() == {
        f"model/{name}" for name in decoder
    }
    assert [name for name, t in decoder.items() if not torch.equal(t, tensors[f"model/{name}"])] == []
    return whole


def bank_of(scene: Scene) -> Path:
    (bank,) = (scene.folder / "hub" / "state").glob("*/bank")
    return bank


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".part"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# --- exact -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimensions", "augment"), [(2, False), (2, True), (3, True)], ids=["slices", "posed", "volumes"]
)
async def test_the_decoder_is_that_of_one_process(scene, dimensions, augment) -> None:
    """SP-11.17-1: and the Dice of what it predicts for patients whose sites are gone."""
    steps = 12 if dimensions == 2 else 4
    scene.cast(
        "t1ce",
        "t2",
        model={"dimensions": dimensions},
        data={"window": [32] * dimensions, "validation": 2, "augment": augment},
        training={**FROZEN, "steps": steps, "batch": 5 - dimensions},
        evaluation={"overlap": 0.25, "batch": 7, "every": 3},
    )
    ran = await scene.together()
    assert ran.error is None and ran.result.complete, ran
    whole = assert_same(scene)
    assert ran.result.dice == pytest.approx(whole.dice(), abs=1e-6)
    for modality in scene.modalities:
        (folder,) = (scene.folder / f"site-{modality}" / "state").glob("try-*")
        assert checkpoint.available(folder).keys() == {0}, "the encoders are what they were"
        assert (folder / "complete").exists()


async def test_the_sites_are_told_that_they_may_stop_before_the_first_step(scene) -> None:
    """SP-11.17-8: and what they sent is all that ever travels."""
    scene.cast("t1ce", "t2", training={**FROZEN, "steps": 40})
    async with scene.running() as on, asyncio.timeout(90):
        await asyncio.wait([on.tasks["site-t1ce"], on.tasks["site-t2"]])
        assert [task.exception() for name, task in on.tasks.items() if name != "hub"] == [None, None]
        assert len(scene.metrics()) < 40, "the training goes on"
        result = await on.tasks["hub"]
    assert result.complete and result.step == 40
    record = json.loads((scene.folder / "hub" / "state" / "try.run.json").read_text())
    assert (record["state"], record["told"]) == ("over", ["site-t1ce", "site-t2"])
    held = sum(path.stat().st_size for path in bank_of(scene).rglob("*.safetensors"))
    assert held < result.released_bytes < 1.1 * held + 200_000


async def test_a_site_that_keeps_its_encoder_takes_part(scene) -> None:
    """SP-11.17-2: it offers no other feature, so nothing else can be agreed."""
    scene.cast("t1ce", "t2", training=FROZEN)
    for modality in scene.modalities:
        scene.client(modality, policy={"coordinators": ["hub"], "encoders": "frozen"})
    ran = await scene.together()
    assert ran.error is None and ran.result.complete, ran
    scene.job(training={"steps": 2})
    ran = await scene.together(resume=False)
    assert ran.result is None or not ran.result.complete
    assert all("train" in str(error) for error in ran.clients.values()), ran


# --- kill -9 -----------------------------------------------------------------------------------------------


@pytest.mark.timeout(200)
def test_killed_at_any_moment_the_run_is_the_same(scene) -> None:
    """A site while it releases, the coordinator while it collects and while it trains, which needs no site."""
    scene.cast(
        "t1ce",
        "t2",
        training={**FROZEN, "steps": 30, "checkpoint_every": 7},
        evaluation={"batch": 6, "overlap": 0.25},
    )
    hub, sites = scene.start_all()
    bank = scene.folder / "hub" / "state"
    hub.until("bank.planned")
    while len([*bank.glob("*/bank/site-t2/*")]) < 8:
        time.sleep(0.01)
    sites["t2"].signal(signal.SIGKILL)
    sites["t2"].code()
    sites["t2"] = scene.start("site-t2")
    sites["t2"].until("job.accepted")
    while len([*bank.glob("*/bank/site-t2/*")]) < 20:
        time.sleep(0.01)
    hub.signal(signal.SIGKILL)
    hub.code()
    before = digests(bank_of(scene))
    hub = scene.start("hub", "--resume")
    assert [client.code() for client in sites.values()] == [0, 0], [c.said for c in sites.values()]
    assert before.items() <= digests(bank_of(scene)).items(), "nothing was asked again that was there"
    for _ in range(2):
        scene.until_step(9 + len(scene.losses()) // 2)
        hub.signal(signal.SIGKILL)
        hub.code()
        hub = scene.start("hub", "--resume")
    assert hub.code() == 0, hub.said
    assert "site.joined" not in hub.said
    assert_same(scene)
