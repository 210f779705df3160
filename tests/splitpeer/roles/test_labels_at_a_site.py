"""Labels at a hospital: the training of labels at the coordinator, bit for bit, and no mask leaves (SP-11.20)."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from splitpeer.attacks.base import Knowledge
from splitpeer.attacks.catalogue import make_attack
from splitpeer.attacks.runner import run
from splitpeer.attacks.view import labels_view
from splitpeer.captures.reader import open_capture
from splitpeer.coordinator import trainer
from splitpeer.coordinator.coordinator import Coordinator
from splitpeer.coordinator.label_site import loss_gradients
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.daemon.console import LogView
from splitpeer.daemon.happenings import Reporter
from splitpeer.data.geometry import Geometry
from splitpeer.data.layouts import find_labels
from splitpeer.data.loader import SiteData
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.sampling import TrainingSchedule, batch_digest
from splitpeer.data.volumes import Volumes
from splitpeer.errors import ConfigError, JobFailed
from splitpeer.federation.masks import masks_on_wire
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import job_on_wire, judge, seat_descriptors, services
from splitpeer.site import client
from splitpeer.site.budgets import BudgetSpent
from splitpeer.site.encoders import Encoders
from splitpeer.site.opening import open_job
from splitpeer.storage import checkpoint
from splitproto import dial
from splitproto.capture import Recorded
from splitproto.errors import LinkLost, Misaligned, PolicyRefused, SchemaMismatch, StepMismatch
from splitproto.messages import (
    Conclude,
    Forward,
    JobOffer,
    Logits,
    LossGradients,
    Message,
    Prediction,
    Scores,
)
from splitproto.negotiation import FEATURES
from splitproto.records import Masks, Sample
from splitproto.tensors import schema_digest

from .scene import PATIENTS, Federation, Nursery, Scene
from .test_labels_stay import comparable, other_tumours

JOB = {
    "data": {"positive_fraction": 0.0, "validation": 2},
    "training": {"steps": 6, "batch": 3, "checkpoint_every": 3, "learning_rate": 0.02},
}


def without_labels(scene: Scene) -> None:
    """The coordinator has no masks, and no word of them."""
    path = scene.folder / "hub" / "peer.toml"
    path.write_text(re.sub(r"^(labels|convention) = .*\n", "", path.read_text(), flags=re.MULTILINE))


def label_site(scene: Scene, modality: str, folder: Path | None = None, **policy: Any) -> None:
    """A site that holds masks, and images of `modality` unless that is "none"."""
    data = {"labels": str(folder or scene.federation.data / "labels"), "convention": "msd"}
    allowed = {"coordinators": ["hub"], "labels": True, **policy}
    if modality != "none":
        scene.client(modality, data=data, policy=allowed)
        return
    scene.client("t2", data=data, policy=allowed)
    path = scene.folder / "site-t2" / "peer.toml"
    path.write_text(re.sub(r"^(images|modality) = .*\n", "", path.read_text(), flags=re.MULTILINE))


def cast(scene: Scene, modality: str, **job: Any) -> str:
    """Labels at a site; its name."""
    name = "site-t2" if modality == "none" else f"site-{modality}"
    scene.cast("flair", "t1", **{**JOB, **job, "labels": {"at": name}})
    without_labels(scene)
    label_site(scene, modality, figures=["loss", "dice", "hd95", "volume"], round_to=1e-6)
    return name


def forget(scene: Scene) -> None:
    """The next run begins afresh, everywhere."""
    for who in ("hub", "site-flair", "site-t1", "site-t2"):
        shutil.rmtree(scene.folder / who / "state", ignore_errors=True)
    shutil.rmtree(scene.output, ignore_errors=True)


async def everybody(scene: Scene, name: str, **options: Any) -> Any:
    only = ["hub", *dict.fromkeys(["site-flair", "site-t1", name])]
    return await scene.together(only=only, **options)


def table(scene: Scene, name: str, step: int) -> dict[str, Any]:
    (path,) = (scene.folder / name / "state").glob(f"try-*/scores-{step:08d}.json")
    said: dict[str, Any] = json.loads(path.read_text())
    return said


EVALUATION = {"overlap": 0.25, "batch": 32, "missing": True}


@dataclass(frozen=True)
class LabelsHere:
    """What came of a run with the labels at the coordinator."""

    weights: dict[str, torch.Tensor]
    losses: list[float]
    result: Any
    masks: dict[str, np.ndarray]
    """By file name, the predictions."""


@pytest.fixture(scope="module")
def labels_here(
    federation: Federation, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> LabelsHere:
    scene = Scene(federation, tmp_path_factory.mktemp("here"), nursery)
    scene.cast("flair", "t1", **JOB, evaluation=EVALUATION)
    ran = asyncio.run(scene.together())
    assert ran.error is None, ran.error
    predictions = (scene.output / "predictions").iterdir()
    masks = {path.name: np.asarray(nib.load(path).dataobj) for path in predictions}
    assert any(mask.any() for mask in masks.values())
    return LabelsHere(scene.weights(6), scene.losses(), ran.result, masks)


@pytest.mark.parametrize("modality", ["flair", "none"])
async def test_training_and_scores_are_those_of_labels_at_the_coordinator(
    scene: Scene, labels_here: LabelsHere, modality: str
) -> None:
    """SP-11.20-1, SP-11.20-3, SP-11.20-5, SP-11.20-6, SP-11.20-9."""
    here = labels_here.result
    name = cast(scene, modality, evaluation=EVALUATION)
    there = await everybody(scene, name)
    assert there.error is None and set(there.clients.values()) == {None}, there
    split, weights = scene.weights(6), labels_here.weights
    assert split.keys() == weights.keys()
    assert [key for key in weights if not torch.equal(weights[key], split[key])] == []
    # SP-11.20-9: rounded to what the policy says.
    assert scene.losses() == pytest.approx(labels_here.losses, abs=5.1e-7)
    assert there.result.dice == pytest.approx(here.dice, abs=5.1e-7)
    assert there.result.hd95 == pytest.approx(here.hd95, abs=5.1e-7)
    for region, of in here.volume_ml.items():
        assert there.result.volume_ml[region] == pytest.approx(of, abs=5.1e-7)
    missing = {seat: pytest.approx(of, abs=5.1e-7) for seat, of in here.missing.items()}
    assert missing == there.result.missing and missing
    kept = next((scene.folder / name / "state").glob("try-*/predictions"))
    found = {path.name: np.asarray(nib.load(path).dataobj) for path in kept.iterdir()}
    assert found.keys() == labels_here.masks.keys()
    assert [one for one, mask in labels_here.masks.items() if not np.array_equal(mask, found[one])] == []
    predictions = scene.output / "predictions"
    assert not predictions.exists() or not list(predictions.iterdir())
    written = json.loads((scene.output / "result.json").read_text())
    assert written["labels_at"] == name and "dice_WT" in written["told"]
    rows = table(scene, name, 6)["rows"].values()
    assert sum(not row["without"] for row in rows) == there.result.scored == 2


async def test_a_site_that_tells_nothing(scene: Scene) -> None:
    """SP-11.20-9, SP-11.20-10: the run goes on, and the table is at the hospital."""
    name = cast(scene, "none")
    label_site(scene, "none")
    ran = await everybody(scene, name)
    assert ran.error is None and ran.result.complete, ran
    assert ran.result.dice == ran.result.hd95 == {} and ran.result.told == []
    assert all(line.get("loss") is None for line in scene.metrics() if "step" in line)
    rows = table(scene, name, 6)["rows"]
    assert len(rows) == 2 and all(len(row["dice"]) == 3 for row in rows.values())


class Told:
    """What a peer recorded, message by message."""

    def __init__(self, capture: Path) -> None:
        self.records = [one for one in open_capture(capture).records() if isinstance(one, Recorded)]

    def of(self, kind: type[Message], direction: str) -> list[Any]:
        return [r.message for r in self.records if r.direction == direction and isinstance(r.message, kind)]

    def all(self, direction: str) -> list[Any]:
        return [comparable(r.message) for r in self.records if r.direction == direction]


def without_what_is_agreed(message: Any) -> Any:
    """A message as it may be compared: without gradients of the logits and figures."""
    kind, fields = message
    dropped = {"LossGradients": {"tensors", "loss"}, "Scores": {"values"}}.get(kind, set())
    return kind, {name: value for name, value in fields.items() if name not in dropped | CHANCE}


CHANCE = {"incarnation", "holder", "proof", "binding"}
"""What a site draws for every run."""


async def test_nothing_that_depends_on_the_mask_leaves_but_gradients_of_logits_and_figures(
    scene: Scene,
) -> None:
    """SP-11.20-4, SP-11.20-9, SP-11.20-11: two runs that differ in the masks alone, as the site recorded them."""
    # A site that holds nothing else: what an encoder learns follows from what the coordinator made of the gradients.
    name, recorders = (
        cast(scene, "none", training={**JOB["training"], "steps": 3}),
        ("site-t2", "site-t1", "hub"),
    )
    captures = []
    for labels in (None, other_tumours(scene.folder, scene.federation)):
        forget(scene)
        label_site(scene, "none", labels, figures=["loss", "dice"], round_to=0.001)
        ran = await everybody(scene, name, curious=recorders)
        assert ran.error is None and ran.result.complete, ran
        captures.append([Told(scene.capture(who)) for who in recorders])
        for who in recorders:
            scene.capture(who).rename(scene.folder / f"{who}.{len(captures)}.cap")
    (first, first_t1, _), (second, second_t1, _) = captures
    sent, other = first.all("out"), second.all("out")
    assert len(sent) == len(other)
    for one, two in zip(sent, other, strict=True):
        assert without_what_is_agreed(one) == without_what_is_agreed(two)
    gradients = [told.of(LossGradients, "out") for told in (first, second)]
    assert len(gradients[0]) == 3
    assert all(
        not np.array_equal(a.tensors["logits"], b.tensors["logits"]) for a, b in zip(*gradients, strict=True)
    )
    # What is dropped above is what the policy allows: a rounded loss, and figures at the end of an evaluation alone.
    for told, asked_losses in zip((first, second), gradients, strict=True):
        for one in asked_losses:
            assert one.loss == pytest.approx(round(one.loss, 3), abs=1e-12)
        scores = told.of(Scores, "out")
        assert [bool(one.values) for one in scores] == [False] * (len(scores) - 1) + [True]
        assert scores[-1].values.keys() <= {"dice_WT", "dice_TC", "dice_ET", "dice_mean"}
    # The coordinator asks the same windows in the same order, of everybody.
    for one, two in ((first, second), (first_t1, second_t1)):
        asked = [
            [comparable(m) for m in told.of(Forward, "in")]
            + [comparable(m.samples) for m in told.of(Logits, "in")]
            for told in (one, two)
        ]
        assert asked[0] == asked[1] and asked[0]
    # SP-11.20-11: and what does leave is the mask.
    masks = scene_masks(scene, name)
    for logits, answer in zip(second.of(Logits, "in"), gradients[1], strict=True):
        truth = SiteData(masks).batch(logits.samples, (32, 32, 1), logits.seed, None)
        assert ((answer.tensors["logits"] < 0) == truth.astype(bool)).all()
    view = labels_view(open_capture(scene.folder / "hub.2.cap"), "t1", choose=lambda samples: samples)
    found = run(make_attack("logit-gradient"), view, Knowledge()).images
    for score, target in zip(found, view.targets, strict=True):
        truth = masks.window(target.sample.key, target.sample.origin, (32, 32, 1))[..., 0].any(0)
        assert ((score > 0) == truth).all()
    assert view.site == name and len(view.targets) >= 6


def scene_masks(scene: Scene, name: str) -> Volumes:
    config = scene.config(name)
    return Volumes(
        find_labels(config.data.labels, "folder"),
        salt=load_salt(config.data.salt),
        labels=scene.settings.task.task("msd"),
    )


async def test_values_that_are_not_numbers_are_asked_no_loss_for(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11-10: the site that sent them is named, and the site of the labels is not asked."""
    name, right = cast(scene, "none"), Encoders.forward

    def spoilt(self: Encoders, *arguments: Any) -> dict[str, dict[str, np.ndarray]]:
        sent = right(self, *arguments)
        if self.steps_done == 1 and "t1" in sent:
            level = sent["t1"]["x2"].copy()
            level.flat[7] = np.nan
            sent["t1"] = {**sent["t1"], "x2": level}
        return sent

    monkeypatch.setattr(Encoders, "forward", spoilt)
    ran = await everybody(scene, name, curious=[name])
    assert re.search(r"site site-t1 sent activations \(.*x2\) that are not finite", str(ran.error)), ran
    assert [one.step for one in Told(scene.capture(name)).of(Logits, "in")] == [1]


# --- links that break, processes that die ------------------------------------------------------------------


def assert_exact(scene: Scene, withdrawn: Any = None) -> None:
    """All weights are those of the whole network in one process."""
    scene.coordinator()
    _, network = scene.whole(withdrawn)
    split, whole = scene.weights(scene.settings.training.steps), network.state_dict()
    assert split.keys() == whole.keys()
    assert [key for key in whole if not torch.equal(whole[key], split[key])] == []


async def test_a_link_that_breaks_in_the_middle_costs_no_step(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.20-6: a question is lost, or its answer, in a step or in an evaluation; each step is made once."""
    name = cast(scene, "flair", deadlines={"join_s": 40, "step_s": 20, "return_s": 40})
    cuts = [
        ("logits", 2),
        ("gradients", 3),
        ("loss-gradients", 4),
        ("logits", 5),
        ("scores", 6),
        ("prediction", 6),
        ("conclude", 6),
    ]
    heard: list[tuple[str, int]] = []

    async def losing(*arguments: Any, **keywords: Any) -> Any:
        session = await dial(*arguments, **keywords)
        receive, send = session.receive, session.send

        def cut(message: Message) -> None:
            word = message.name, getattr(message, "step", 0)
            if word in cuts:
                cuts.remove(word)
                error = LinkLost("cut by the test")
                session.carrier_lost(error)
                raise error

        async def sending(message: Message, *arguments: Any, **keywords: Any) -> None:
            cut(message)
            await send(message, *arguments, **keywords)

        async def hearing(*arguments: Any, **keywords: Any) -> Message:
            message = await receive(*arguments, **keywords)
            cut(message)
            if isinstance(message, Logits | Prediction):
                heard.append((message.name, message.step))
            return message

        session.receive, session.send = hearing, sending
        return session

    monkeypatch.setattr(client, "dial", losing)
    ran = await everybody(scene, name)
    assert ran.error is None and ran.result.complete, ran
    assert cuts == []
    # Asked again is what had no answer, and nothing else.
    assert [step for kind, step in heard if kind == "logits"] == [1, 2, 3, 4, 4, 5, 6]
    assert [line["step"] for line in scene.metrics() if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert not any(line.get("rollback") for line in scene.metrics())
    assert len(table(scene, name, 6)["rows"]) == 2
    assert_exact(scene)


def test_processes_that_are_killed(scene: Scene) -> None:
    """SP-11-13, SP-11-34, SP-11.20-7: the site of the labels, then the coordinator; the end is the same."""
    training = {"steps": 24, "batch": 2, "checkpoint_every": 5}
    name = cast(scene, "none", training=training, deadlines={"join_s": 40, "step_s": 20, "return_s": 40})
    hub = scene.start("hub")
    others = [scene.start(site) for site in ("site-flair", "site-t1")]
    labels = scene.start(name)
    scene.until_step(7)
    labels.signal(signal.SIGKILL)
    hub.until(r"site\.(left|lost) .*" + name)
    labels = scene.start(name)
    scene.until_step(14)
    hub.signal(signal.SIGKILL)
    hub.code()
    hub = scene.start("hub", "--resume")
    assert hub.code() == 0, hub.said
    assert [one.code() for one in (*others, labels)] == [0, 0, 0], labels.said
    assert "Traceback" not in hub.said + labels.said
    assert "labels.scored" in labels.said
    assert_exact(scene)


async def test_a_site_of_masks_that_is_stopped_finishes_the_step(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11-12: the step that its loss went into is counted, and saved."""
    name = cast(scene, "none")
    async with scene.running(only=["hub", "site-flair", "site-t1", name]) as on:

        async def stopping(site: RemoteSite, asked: Logits) -> Any:
            answer = await loss_gradients(site, asked)
            if asked.step == 2:
                on.stops[name].set()
            return answer

        monkeypatch.setattr(trainer, "loss_gradients", stopping)
        await asyncio.wait_for(on.tasks[name], 60)
    (run,) = (scene.folder / name / "state").glob("try-*")
    assert sorted(checkpoint.available(run)) == [0, 2]


async def test_a_mask_that_goes_bad_costs_its_patient(scene: Scene) -> None:
    """SP-11.20-8, SP-11.13-2: the run goes on exactly without; only the hospital's log names the file."""
    name = cast(scene, "none", training={**JOB["training"], "steps": 8})
    labels = scene.folder / "masks"
    shutil.copytree(scene.federation.data / "labels", labels)
    path = scene.folder / name / "peer.toml"
    label_site(scene, "none", labels, figures=["loss"], round_to=1e-6)
    path.write_text(path.read_text().replace("[data]", "[data]\ncache_mib = 0"))
    scene.coordinator()
    training, _ = scene.patients()
    without_labels(scene)
    names = {scene.key(patient): patient for patient in PATIENTS}
    key = training[0]

    class Spoil(LogView):
        def step(self, step: int, *rest: Any) -> None:
            super().step(step, *rest)
            if step == 3:
                (labels / f"{names[key]}.nii.gz").write_bytes(b"no more")

    async with scene.running(only=["hub", "site-flair", "site-t1", name], view=Spoil()) as on:
        await asyncio.wait(on.tasks.values(), timeout=100)
        result = on.tasks["hub"].result()
    assert result.complete
    (out,) = result.withdrawn
    assert out["site"] == name and 4 <= out["step"] <= 8
    assert_exact(scene, {key: out["step"]})


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "line"),
    [
        ({"data": {"positive_fraction": 0.5}}, "positive_fraction = 0.5: windows around tumour would tell"),
        ({"training": {"encoders": "frozen"}}, 'encoders = "frozen": the decoder would ask for losses'),
        ({"absence": {"mode": "drop"}}, 'mode = "drop": no step can be made without the masks'),
        ({"model": {"fusion": "secure-sum"}}, "site-t2 would be in no sum"),
        ({"defences": {"gradients": ["marvell:0.3"]}}, "acts on what the masks say"),
    ],
)
def test_jobs_that_cannot_be(scene: Scene, job: dict[str, Any], line: str) -> None:
    """SP-11.20-1, SP-11.20-4."""
    scene.modalities = ("flair", "t1")
    scene.job(**{**JOB, **job, "labels": {"at": "site-t2"}})
    with pytest.raises(ConfigError, match=line):
        scene.settings  # noqa: B018


def test_windows_are_drawn_without_masks_unless_told_otherwise(scene: Scene) -> None:
    """SP-11.20-4."""
    scene.modalities = ("flair",)
    scene.job(labels={"at": "site-t2"})
    assert scene.settings.data.positive_fraction == 0
    scene.job()
    assert scene.settings.data.positive_fraction == 0.75
    schedule = TrainingSchedule(
        [b"k" * 16], OnlyGrids(), window=(32, 32, 1), batch=1, steps=1, seed=1, positive_fraction=1.0
    )
    with pytest.raises(ConfigError, match=r"need the masks: set \[data\] positive_fraction = 0"):
        schedule.batch(0)


class OnlyGrids:
    def geometry(self, key: bytes) -> Geometry:
        return Geometry((45, 38, 34), (1.0,) * 3, (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), (0.0,) * 3, (1.0,) * 3)


async def test_a_policy_that_keeps_the_masks(scene: Scene) -> None:
    """SP-11.20-1: and a coordinator that has none, with a job that does not say where they are."""
    name = cast(scene, "flair")
    label_site(scene, "flair", labels=False)
    ran = await everybody(scene, name)
    assert (
        "site-flair declined the job: the job wants to train with this site's masks, and it keeps them"
        in str(ran.error)
    )
    scene.job(**JOB)
    with pytest.raises(
        ConfigError, match=r"a coordinator needs \[data\] labels: name the folder of masks, or write"
    ):
        Coordinator(scene.config("hub"), scene.settings, asyncio.Event(), LogView())


def test_offers_that_are_declined(scene: Scene) -> None:
    """SP-11.20-1, SP-11.20-2."""
    cast(scene, "flair")
    settings, config = scene.settings, scene.config("site-flair")
    job, seats = job_on_wire(settings), seats_of(settings)
    asked = masks_on_wire(settings.task)
    features = tuple(name for name in FEATURES if name != "release")

    def judged(
        masks: Masks | None,
        *,
        agreed: Any = features,
        at: Any = config,
        fills: str = "site-flair",
        **more: Any,
    ) -> None:
        offered = seats.of(fills) if fills else ()
        terms = replace(job, **more)
        judge(
            JobOffer(bytes(16), offered, terms, schema_digest(seat_descriptors(terms, offered)), masks=masks),
            at,
            agreed,
        )

    judged(asked)
    judged(asked, fills="")
    judged(None)
    for line, call in {
        "no images and no masks": lambda: judged(None, fills=""),
        "label was not agreed": lambda: judged(asked, agreed=tuple(n for n in features if n != "label")),
        "masks of lungs are not known": lambda: judged(replace(asked, preset="lungs")),
        "glioma has the regions WT, TC, ET": lambda: judged(replace(asked, regions=asked.regions[:2])),
        "mask values of its own": lambda: judged(replace(asked, preset=None)),
        "labels at a site are for a job that trains": lambda: judged(
            asked, encoders="frozen", agreed=(*services(frozen=True), "label")
        ),
    }.items():
        with pytest.raises((SchemaMismatch, PolicyRefused), match=line):
            call()
    scene.client("flair", policy={"coordinators": ["hub"]})
    with pytest.raises(PolicyRefused, match="it keeps them"):
        judged(asked, at=scene.config("site-flair"))


def test_what_the_site_of_the_labels_does_not_answer(scene: Scene) -> None:
    """SP-11.20-7, SP-11.20-9, SP-11.20-13."""
    name = cast(scene, "flair")
    settings, config = scene.settings, scene.config(name)
    job, seats = job_on_wire(settings), seats_of(settings)
    offered = seats.of(name)
    offer = JobOffer(
        bytes(16),
        offered,
        job,
        schema_digest(seat_descriptors(job, offered)),
        masks=masks_on_wire(settings.task),
    )
    site = open_job(offer, config, Reporter())
    patients, _ = site.inventory()
    assert all(patient.mask and patient.person is None for patient in patients)
    key, held = patients[0].key, patients[1].key
    shape = patients[1].shape

    def logits(
        step: int = 1, count: int = 1, seed: int | None = 5, keys: Sequence[bytes] = (key,), **changed: Any
    ) -> Logits:
        samples = tuple(Sample(key, (6, 3, z)) for z in range(count) for key in keys)
        said = Logits(
            step,
            samples,
            batch_digest(step, samples, seed),
            seed,
            {"logits": np.zeros((len(samples), 3, 32, 32), "f4")},
        )
        return replace(said, **changed)

    answer = site.labels.loss_gradients(logits(), 0)
    assert isinstance(answer, LossGradients) and answer.loss is not None
    again = site.labels.loss_gradients(logits(), 0)
    assert comparable(again) == comparable(answer)
    with_other = (Sample(bytes(16), (6, 3, 0)),)
    cut = (Sample(key, (40, 3, 0)),)
    for wrong, error in (
        (logits(2), StepMismatch),
        (logits(count=4), SchemaMismatch),
        (logits(digest=bytes(32)), Misaligned),
        (logits(tensors={"x": np.zeros((1, 3, 32, 32), "f4")}), SchemaMismatch),
        (logits(tensors={"logits": np.zeros((1, 3, 32, 32), "f8")}), SchemaMismatch),
        (logits(samples=with_other, digest=batch_digest(1, with_other, 5)), SchemaMismatch),
        (logits(samples=cut, digest=batch_digest(1, cut, 5)), PolicyRefused),
        (logits(tensors={"logits": np.full((1, 3, 32, 32), 3e38, "f4")}), JobFailed),
    ):
        with pytest.raises(error):
            site.labels.loss_gradients(wrong, 0)

    def prediction(step: int = 0, mask: Any = None, of: bytes = held, **changed: Any) -> Prediction:
        whole = Sample(of, (0, 0, 0))
        mask = np.zeros((3, *shape), "u1") if mask is None else mask
        return replace(
            Prediction(step, 0, whole, batch_digest(step, (whole,), None), ("flair",), None, {"mask": mask}),
            **changed,
        )

    assert isinstance(site.labels.score(prediction(), 0), Scores)
    for wrong_one, error in (
        (prediction(1), StepMismatch),
        (prediction(digest=bytes(32)), Misaligned),
        (prediction(mask=np.zeros((3, 4, 4, 4), "u1")), SchemaMismatch),
        (prediction(mask=np.full((3, *shape), 2, "u1")), SchemaMismatch),
        (prediction(sample=cut[0]), SchemaMismatch),
    ):
        with pytest.raises(error):
            site.labels.score(wrong_one, 0)
    with pytest.raises(StepMismatch, match="1 of 2 predictions"):
        site.labels.conclude(Conclude(0, 2), 0)
    scores, kept = site.labels.conclude(Conclude(0, 1), 0)
    # SP-11.20-10: of one patient, nothing is told.
    assert scores.values == {} and len(kept) == 1
    for process in (site, open_job(offer, config, Reporter())):
        with pytest.raises(BudgetSpent, match="of a patient whom this run has scored"):
            process.labels.loss_gradients(logits(keys=(held,)), 0)
        with pytest.raises(BudgetSpent, match="of a patient whom this run has scored"):
            process.labels.loss_gradients(logits(keys=(key, held)), 0)
        with pytest.raises(BudgetSpent, match="on whom this run has trained"):
            process.labels.score(prediction(of=key), 0)
        # What may be asked is answered as before.
        assert comparable(process.labels.loss_gradients(logits(), 0)) == comparable(answer)
        process.close()
