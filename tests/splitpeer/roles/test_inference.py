"""Inference (SP-11.19): a site asks for a patient, and gets what the whole network would say."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import nibabel as nib
import numpy as np

from splitpeer.coordinator.inference.segmenting import PatientSegmenter
from splitpeer.coordinator.run import Run
from splitpeer.daemon.trail import NAME, entries

from .scene import Scene
from .served import (
    DATA,
    LONG_S,
    SLOW,
    asked,
    assert_mask,
    cast_joint,
    comes,
    ended,
    held_out,
    images_of,
    refused,
    segmented,
    serving,
    spool,
    stop,
    until,
)


def counts_of(scene: Scene, who: str, name: str) -> dict[str, Any]:
    """Of requests, in a peer's `status.json`; empty: it says nothing of them."""
    document = json.loads((scene.folder / who / "state" / "status.json").read_text())
    found: dict[str, Any] = document["work"].get(name, {})
    return found


async def test_a_mask_is_that_of_the_runs_own_prediction(joint) -> None:
    """SP-11.19-11, bit for bit; and whoever asks gets the same, on the grid of the image."""
    async with serving(joint) as on:
        for patient in held_out(joint):
            results = [await segmented(joint, modality, patient) for modality in ("t1ce", "t2")]
            image = nib.load(joint.output / "predictions" / f"{patient}.nii.gz")
            for result in results:
                about = result.provenance
                assert result.values.dtype == np.uint8
                assert_mask(result, image)
                assert np.allclose(result.grid.affine, image.affine)
                assert (about.used, about.missing, about.step) == (("t1ce", "t2"), (), 3)
                assert about.modalities == {"t1ce": ("t1ce",), "t2": ("t2",)}
            assert results[0].provenance.digest == results[1].provenance.digest
        assert not any(task.done() for task in on.tasks.values())
        await stop(on, "hub")
        assert on.tasks["hub"].result().complete


async def test_a_patient_who_came_after_the_start_and_what_is_missing(joint, make) -> None:
    """SP-11.19-4, SP-11.19-7: files are looked for anew; what is missing is said, or is too much."""
    async with serving(joint):
        await segmented(joint, "t1ce", held_out(joint)[0])
        comes(joint, "NEW_Nora", 77, modalities=["t1ce"])
        alone = await segmented(joint, "t1ce", "NEW_Nora", want="probabilities")
        about = alone.provenance
        assert (about.used, about.missing) == (("t1ce",), ("t2",))
        assert about.causes == {"t2": "site-t2: no image that can be used"}
        status = await refused(joint, "t1ce", "NEW_Nora", require="all")
        assert (status.cause, status.exit) == ("incomplete", 1)
        assert "1 of 2 seats, 2 are required (t2: site-t2: no image that can be used)" in status.reason
        # SP-11.19-7: the coordinator's own trail says more.
        *_, last = (line for line in entries(joint.folder / "hub" / "state" / NAME) if "causes" in line)
        assert (last["outcome"], last["causes"]) == ("few-seats", "site-t2: no image of the patient")
        # SP-11.19-5: nobody is sent a mask of a patient of whom it has no image.
        status = await refused(joint, "t2", "NEW_Nora")
        assert (status.cause, status.exit) == ("unknown", 4)
        comes(joint, "NEW_Nora", 77, modalities=["t2"])
        both = await segmented(joint, "t2", "NEW_Nora", want="probabilities", require=2)
        assert both.provenance.missing == ()
        assert both.values.dtype == np.float32
        assert (both.values != alone.values).any()
        # SP-11.19-6.
        comes(joint, "NEW_Otto", 78, modalities=["t1ce"])
        comes(joint, "NEW_Otto", 78, (38, 45, 34), ["t2"])
        status = await refused(joint, "t2", "NEW_Otto")
        assert (status.cause, status.exit) == ("misaligned", 1)
        assert "at site-t1ce is on another grid than that at site-t2" in status.reason
        assert "34" not in status.reason


async def test_policy_decides_for_whom(joint) -> None:
    """SP-11.19-4: `own` answers nobody else; the asking site goes without. SP-11.19-16: the trails say who asked."""
    cast_joint(joint, {"t2": {"inference": "own"}})
    async with serving(joint):
        patient = held_out(joint)[0]
        theirs = await segmented(joint, "t1ce", patient)
        assert theirs.provenance.causes == {"t2": "site-t2: its policy refuses"}
        own = await segmented(joint, "t2", patient)
        assert own.provenance.missing == ()
    trail = entries(joint.folder / "site-t2" / "state" / NAME)
    said = [(line["asker"], line["outcome"]) for line in trail if line["event"] == "inference.located"]
    assert said == [("site-t1ce", "refused"), ("site-t2", "used")]
    counted = counts_of(joint, "site-t2", "inference")["askers"]
    assert counted == {
        "others": {"answered": 0, "refused": 1, "unable": 0},
        "site-t2": {"answered": 1, "refused": 0, "unable": 0},
    }
    # Numbers, and no patient.
    for who in ("hub", "site-t1ce", "site-t2"):
        text = (joint.folder / who / "state" / "status.json").read_text()
        assert patient not in text and joint.key(patient).hex()[:8] not in text


async def test_a_job_without_inference_serves_none(scene) -> None:
    """SP-11.19-1: the feature is not agreed on, and the site says so."""
    cast_joint(scene)
    scene.job(training={**SLOW, "steps": 40}, data=DATA)
    async with scene.running():
        status = await refused(scene, "t1ce", held_out(scene)[0])
    assert (status.cause, status.exit) == ("not-served", 1)


async def test_the_queue_is_bounded_and_a_request_can_be_given_up(joint, monkeypatch) -> None:
    """SP-11.19-2, SP-11.19-12, SP-11.19-13."""
    cast_joint(joint, inference={"max_queue": 1})
    gate, busy = asyncio.Event(), asyncio.Event()
    right = PatientSegmenter.segment

    async def slow(self, *args):
        busy.set()
        await gate.wait()
        return await right(self, *args)

    monkeypatch.setattr(PatientSegmenter, "segment", slow)
    async with serving(joint):
        patient = held_out(joint)[0]
        working = await asked(joint, "t1ce", patient)
        here = spool(joint, "t1ce")
        await busy.wait()
        names = [await asked(joint, "t1ce", patient) for _ in range(2)]
        status = await ended(joint, "t1ce", names[1])
        assert (status.cause, status.exit) == ("busy", 3)
        await until(lambda: counts_of(joint, "hub", "serving").get("finished") == 1)
        served = counts_of(joint, "hub", "serving")
        assert (served["serves"], served["step"], served["waiting"], served["running"]) == (True, 3, 1, 1)
        assert served["askers"] == {
            "site-t1ce": {
                "waiting": 1,
                "running": 1,
                "segmented": 0,
                "refused": 1,
                "cancelled": 0,
                "failed": 0,
            }
        }
        here.cancel(names[0])
        assert (await ended(joint, "t1ce", names[0])).state == "cancelled"
        other = await asked(joint, "t2", patient)
        gate.set()
        assert (await ended(joint, "t1ce", working)).state == "done"
        assert (await ended(joint, "t2", other)).state == "done"
        for who in ("site-t1ce", "site-t2"):
            await until(lambda who=who: counts_of(joint, who, "inference").get("segmented") == 1)
    own, theirs = (counts_of(joint, f"site-{modality}", "inference") for modality in ("t1ce", "t2"))
    assert {name: own[name] for name in ("waiting", "running", "segmented", "cancelled", "failed")} == {
        "waiting": 0, "running": 0, "segmented": 1, "cancelled": 1, "failed": 1,
    }  # fmt: skip
    assert (theirs["segmented"], theirs["policy"]) == (1, "listed")
    once = {"answered": 1, "refused": 0, "unable": 0}
    assert own["askers"] == theirs["askers"] == {"site-t1ce": once, "site-t2": once}
    (counts,) = (joint.folder / "hub" / "state").glob("try-*/requests.json")
    assert json.loads(counts.read_text())["sites"] == {
        "site-t1ce": {"segmented": 1, "refused": 1, "cancelled": 1, "failed": 0},
        "site-t2": {"segmented": 1, "refused": 0, "cancelled": 0, "failed": 0},
    }
    trail = entries(joint.folder / "hub" / "state" / NAME)
    assert [line["request"] for line in trail if line["event"] == "inference.cancelled"] == [names[0]]


async def test_the_service_outlives_its_coordinator(joint) -> None:
    """SP-11.19-3, SP-11.19-15: a new process goes on with the newest weights. SP-11.19-2: a request that nobody
    answered is asked again."""
    async with serving(joint) as on:
        patient = held_out(joint)[0]
        before = await segmented(joint, "t1ce", patient)
        await stop(on, "hub")
        name = await asked(joint, "t1ce", patient)
        await until(lambda: spool(joint, "t1ce").status(name).reason != "")
        async with serving(joint, only=["hub"]):
            assert (await ended(joint, "t1ce", name)).state == "done"
            after = spool(joint, "t1ce").result(name)
            assert (after.values == before.values).all()
            assert after.provenance.digest == before.provenance.digest


async def test_a_site_that_does_not_come_is_done_without_until_it_comes(joint) -> None:
    """SP-11.19-13; then it is brought back to the step (SP-11.19-15)."""
    cast_joint(joint, deadlines={"join_s": 60, "step_s": 60, "return_s": 1})
    patient = held_out(joint)[0]
    async with serving(joint, only=["hub", "site-t1ce"]) as on:
        alone = await segmented(joint, "t1ce", patient)
        assert alone.provenance.causes == {"t2": "site-t2: its site is away"}
        async with serving(joint, only=["site-t2"]):
            await until(lambda: on.coordinator is not None and all(s.here for s in on.coordinator.sites))
            back = await segmented(joint, "t2", patient)
            assert back.provenance.missing == ()
            assert_mask(back, nib.load(joint.output / "predictions" / f"{patient}.nii.gz"))


async def test_a_service_that_was_taken_out_of_the_job_ends(joint) -> None:
    joint.job(training=SLOW, data=DATA, evaluation={"batch": 16})
    async with serving(joint) as on:
        await asyncio.wait(on.tasks.values(), timeout=LONG_S)
        assert [task.exception() for task in on.tasks.values()] == [None] * 3
        assert on.tasks["hub"].result().complete


async def test_a_file_that_turns_out_bad_is_one_sites_loss(joint) -> None:
    """SP-11.19-9: the header is fine, the voxels are not; the request goes on without this site, and the run's patient
    stays; once the file is whole again, the site takes part again."""
    patient = held_out(joint)[0]
    file = images_of(joint, "t2") / f"{patient}.nii.gz"
    async with serving(joint):
        await segmented(joint, "t1ce", patient)
        whole = file.read_bytes()
        file.unlink()
        file.write_bytes(whole[:-300])
        result = await segmented(joint, "t1ce", patient)
        assert result.provenance.missing == ("t2",)
        file.write_bytes(whole)
        result = await segmented(joint, "t1ce", patient)
        assert result.provenance.missing == ()


async def test_between_two_steps_of_a_training_that_notices_nothing(scene) -> None:
    """SP-11.19-8, SP-11.19-10: exact all the same; the weights are those of the committed step."""
    cast_joint(
        scene,
        training={**SLOW, "steps": 24, "checkpoint_every": 12},
        inference={"serve": "always", "share": 0.9},
        evaluation={"batch": 16, "every": 12, "sample": 1},
    )
    async with scene.running():
        patient = held_out(scene)[0]
        steps = [(await segmented(scene, "t1ce", patient)).provenance.step for _ in range(2)]
        assert 0 < steps[0] < steps[1] <= 24
        await until(lambda: (scene.output / "result.json").exists())
        last = await segmented(scene, "t2", patient)
        assert last.provenance.step == 24
    scene.assert_exact()


async def test_a_request_that_takes_too_long_ends_and_the_next_one_is_taken(joint, monkeypatch) -> None:
    """SP-11.19-12; what was announced to the sites is void then: nothing of it comes in the place of other answers."""
    cast_joint(joint, inference={"batch": 1})
    right, late = Run.computed, asyncio.Event()

    async def computed(self, function, *args, what):
        if what.startswith("batch 4 ") and not late.is_set():
            late.set()
            # As the request's own deadline does.
            raise TimeoutError
        return await right(self, function, *args, what=what)

    monkeypatch.setattr(Run, "computed", computed)
    async with serving(joint):
        patient = held_out(joint)[0]
        status = await refused(joint, "t1ce", patient)
        assert (status.cause, status.exit) == ("deadline", 3)
        assert late.is_set()
        assert (await segmented(joint, "t1ce", patient)).provenance.missing == ()
