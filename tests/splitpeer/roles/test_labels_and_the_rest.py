"""Labels at a site (SP-11.20) together with whatever else a job may ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from splitpeer.coordinator.matching import Matching
from splitpeer.daemon.trail import NAME, entries
from splitpeer.data.loader import SiteData
from splitpeer.data.task import glioma
from splitpeer.training.loss import loss_gradient
from splitproto.messages import JobAccept, Logits, LossGradients

from .scene import PATIENTS, Scene
from .served import until
from .test_inference import held_out, segmented
from .test_labels_at_a_site import (
    Told,
    everybody,
    forget,
    label_site,
    scene_masks,
    table,
    without_labels,
)
from .test_secure_sum import MODEL

FEW = {"steps": 3, "batch": 2, "checkpoint_every": 3, "learning_rate": 0.02}
JOB: dict[str, Any] = {
    "data": {"positive_fraction": 0.0, "validation": 2},
    "training": FEW,
    "evaluation": {"overlap": 0.0, "batch": 64},
}
CLASSES = {"values": {"shell": 1, "core": 2, "rim": 3}, "regions": {"rind": ["shell"], "kernel": ["core", "rim"]},
           "exclusive": True}  # fmt: skip
WIDE = {"lab": {"figures": ["loss", "dice"], "round_to": 1e-6}}


def moved(scene: Scene, name: str, **job: Any) -> None:
    """The labels go from the coordinator to a site."""
    scene.job(**{**JOB, **job, "labels": {"at": name}})
    without_labels(scene)


async def complete(scene: Scene, name: str, **options: Any) -> Any:
    ran = await everybody(scene, name, **options)
    assert ran.error is None and set(ran.clients.values()) == {None} and ran.result.complete, ran
    return ran


def assert_weights(scene: Scene, expected: dict[str, torch.Tensor]) -> None:
    found = scene.weights(FEW["steps"])
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


async def test_classes_that_exclude_each_other_in_three_dimensions(scene: Scene) -> None:
    """SP-11.20-5: bit for bit the training of one process; what is scored is the task's regions."""
    job = {
        **JOB,
        "task": CLASSES,
        "model": {"dimensions": 3},
        "data": {"positive_fraction": 0.0, "validation": 2, "window": [32, 32, 32]},
    }
    scene.cast("flair", "t1", **job, labels={"at": "site-t2"})
    without_labels(scene)
    label_site(scene, "none", figures=["loss", "dice"], round_to=1e-6)
    path = scene.folder / "site-t2" / "peer.toml"
    path.write_text(path.read_text().replace('"msd"', '"task"'))
    ran = await complete(scene, "site-t2")
    assert list(ran.result.dice) == ["rind", "kernel", "mean"]
    rows = table(scene, "site-t2", 3)["rows"].values()
    assert [len(row["dice"]) for row in rows] == [2, 2]
    scene.coordinator(data={"convention": "task"})
    _, network = scene.whole()
    assert_weights(scene, network.state_dict())


async def test_bfloat16_between_encoders_and_decoder(scene: Scene) -> None:
    """SP-11.8-3, SP-11.20-5: the logits and their gradients stay f32, so nothing differs from labels here."""
    training = {**FEW, "precision": "bf16"}
    scene.cast("flair", "t1", **{**JOB, "training": training})
    assert (await scene.together()).error is None
    expected = scene.weights(3)
    forget(scene)
    moved(scene, "site-t2", training=training)
    label_site(scene, "none")
    await complete(scene, "site-t2", curious=["site-t2"])
    assert_weights(scene, expected)
    told = Told(scene.capture("site-t2")).of(LossGradients, "out")
    assert [one.tensors["logits"].dtype for one in told] == [np.float32] * 3


async def test_a_secure_sum_to_which_the_site_of_the_labels_adds(scene: Scene) -> None:
    """SP-11.18-2, SP-11.20-6: the run of labels at the coordinator, bit for bit."""
    job = {"model": MODEL, "deadlines": {"join_s": 40, "step_s": 40, "return_s": 40}}
    scene.cast("flair", "t1", **{**JOB, **job})

    def partner(modality: str, other: str, **policy: Any) -> dict[str, Any]:
        return {"coordinators": ["hub"], "partners": [f"site-{other}"], "min_partners": 1, **policy}

    for modality, other in (("flair", "t1"), ("t1", "flair")):
        scene.client(modality, policy=partner(modality, other))
    ran = await scene.together()
    assert ran.error is None, (ran.error, ran.clients)
    expected = scene.weights(3)
    forget(scene)
    moved(scene, "site-flair", **job)
    label_site(scene, "flair", **partner("flair", "t1"))
    await complete(scene, "site-flair")
    assert_weights(scene, expected)


async def test_defences_of_the_gradient_of_logits(scene: Scene) -> None:
    """SP-11.20-11: what leaves is the gradient with noise, and the run goes on with it."""
    scene.cast("flair", "t1", **JOB)
    moved(scene, "site-t2")
    label_site(scene, "none", label_defences=["gaussian:5"])
    await complete(scene, "site-t2", curious=["site-t2"])
    told, masks = Told(scene.capture("site-t2")), scene_masks(scene, "site-t2")
    asked, answers = told.of(Logits, "in"), told.of(LossGradients, "out")
    assert len(asked) == len(answers) == 3
    noises = []
    for logits, answer in zip(asked, answers, strict=True):
        truth = SiteData(masks).batch(logits.samples, (32, 32, 1), logits.seed, None)
        _, clean = loss_gradient(np.asarray(logits.tensors["logits"]), truth, exclusive=False, device="cpu")
        noise = np.asarray(answer.tensors["logits"]) - clean
        assert noise.std() > 0.1 * np.abs(clean).std() and np.isfinite(noise).all()
        noises.append(noise)
    assert not np.array_equal(noises[0], noises[1])
    assert [one.defences for one in told.of(JobAccept, "out")] == [("gradients/gaussian:scale=5,kept=false",)]


async def test_a_coordinator_that_trains_on_whom_it_scores(scene: Scene, monkeypatch) -> None:
    """SP-11.20-13: no such gradient leaves. The site stays up, and has its checkpoints, as after any refusal."""
    scene.cast("flair", "t1", **JOB)
    moved(scene, "site-t2", evaluation={**JOB["evaluation"], "every": 1}, training={**FEW, "steps": 9})
    label_site(scene, "none")
    right = Matching._split

    def both(self: Matching, seating: Any) -> Any:
        training, held_out = right(self, seating)
        return sorted({*training, *held_out}), held_out

    monkeypatch.setattr(Matching, "_split", both)
    async with scene.running(only=["hub", "site-flair", "site-t1", "site-t2"], curious=["site-t2"]) as on:
        await until(on.tasks["hub"].done)
        (refused,) = [
            line["cause"]
            for line in entries(scene.folder / "site-t2" / "state" / NAME)
            if line["event"] == "policy.refused"
        ]
        assert refused in str(on.tasks["hub"].exception()) and "\n" not in refused
        assert not on.tasks["site-t2"].done()
    (folder,) = (scene.folder / "site-t2" / "state").glob("try-*")
    sides = json.loads((folder / "sides.json").read_text())
    assert set(sides["trained"]).isdisjoint(sides["scored"]) and sides["trained"]
    told = Told(scene.capture("site-t2"))
    asked = {one.step: {sample.key.hex() for sample in one.samples} for one in told.of(Logits, "in")}
    answered = {one.step for one in told.of(LossGradients, "out")}
    assert all(asked[step].isdisjoint(sides["scored"]) for step in answered)


@pytest.mark.parametrize("modality", ["flair", "none"])
async def test_inference_gives_what_the_site_of_the_labels_scored(scene: Scene, modality: str) -> None:
    """SP-11.19-11, SP-11.20-9: the mask of a patient held out, bit for bit."""
    scene.cast("flair", "t1", **JOB)
    patients = held_out(scene)
    name = "site-t2" if modality == "none" else f"site-{modality}"
    # Slow, so that masks hold some voxels: see test_inference.
    moved(scene, name, training={**FEW, "learning_rate": 1e-5}, inference={})
    policy = {"inference": "listed", "inference_for": ["site-flair", "site-t1"]}
    for one in ("flair", "t1"):
        scene.client(one, policy={"coordinators": ["hub"], **policy})
    label_site(scene, modality, **(policy if modality == "flair" else {}))
    only = ["hub", *dict.fromkeys(["site-flair", "site-t1", name])]
    async with scene.running(only=only):
        result = await segmented(scene, "t1", patients[0])
    kept = next((scene.folder / name / "state").glob("try-*/predictions"))
    image = np.asarray(nib.load(kept / f"{patients[0]}.nii.gz").dataobj)
    assert result.regions.any()
    assert (glioma("msd").labels(result.regions) == image).all()
    # A coordinator without masks has no convention; what it uses is told.
    assert result.task.convention == "brats2023"
    assert result.provenance.used == ("flair", "t1")


def scans(folder: Path, scene: Scene) -> None:
    """The same images, as three persons with two scans each."""
    for kind in ("flair", "t1", "labels"):
        (folder / kind).mkdir(parents=True)
        for number, patient in enumerate(PATIENTS):
            name = f"BraTS-GLI-{number // 2:05}-{number % 2:03}.nii.gz"
            (folder / kind / name).symlink_to(scene.federation.data / kind / f"{patient}.nii.gz")


@pytest.mark.parametrize(("least", "told"), [(1, True), (2, False)])
async def test_scans_of_one_person(scene: Scene, tmp_path: Path, least: int, told: bool) -> None:
    """SP-11.20-3, SP-11.20-10: they are held out together, and count as one."""
    scans(tmp_path / "scans", scene)
    job = {"training": {**FEW, "steps": 1}, "data": {"positive_fraction": 0.0, "validation": 1}}
    scene.cast("flair", "t1", **{**JOB, **job})
    moved(scene, "site-t2", **job)
    for one in ("flair", "t1"):
        scene.client(one, data={"images": str(tmp_path / "scans" / one)})
    label_site(scene, "none", tmp_path / "scans" / "labels", figures=["dice"], min_scored=least)
    ran = await complete(scene, "site-t2")
    rows = table(scene, "site-t2", 1)["rows"].values()
    assert len({row["patient"] for row in rows}) == 2 == ran.result.scored
    assert len({row["patient"][:15] for row in rows}) == 1
    assert bool(ran.result.dice) == told
    said = json.loads((scene.folder / "hub" / "state" / "try.run.json").read_text())
    assert "BraTS" not in json.dumps(said)
