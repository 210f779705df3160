"""Inference (SP-11.19): a site asks for a patient, and gets what the whole network would say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from splitpeer.coordinator.inference.segmenting import PatientSegmenter
from splitpeer.coordinator.run import Run
from splitpeer.daemon.spool import Spool, folder_of
from splitpeer.daemon.spooled import SpoolRequest, SpoolResult, Status, now

BOTH = {"inference": "listed", "inference_for": ["site-t1ce", "site-t2"]}
# One window a slice.
DATA = {"window": [48, 48], "validation": 1}
# Slow, so that masks hold some voxels with any kernels: at .05 three steps of Adam may leave none.
SLOW = {"steps": 3, "batch": 1, "checkpoint_every": 3, "learning_rate": 1e-5}
LONG_S = 60.0


@pytest.fixture
def serving(scene):
    """Two sites, and a job that serves when it is complete."""

    def cast(policy: Mapping[str, Mapping[str, Any]] = {}, **job):
        job = {"training": SLOW, "data": DATA, "inference": {}, "evaluation": {"batch": 16}, **job}
        scene.cast("t1ce", "t2", **job)
        for modality in ("t1ce", "t2"):
            scene.client(modality, policy={"coordinators": ["hub"], **policy.get(modality, BOTH)})
        return scene

    return cast


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while not holds():  # noqa: ASYNC110 (files have no events)
            await asyncio.sleep(0.02)


def spool(scene, modality: str) -> Spool:
    return Spool(folder_of(scene.folder / f"site-{modality}" / "state"))


def request(patient: str, **more: Any) -> SpoolRequest:
    return SpoolRequest(patient=patient, created=now(), asker="somebody", **more)


async def asked(scene, modality: str, patient: str, **more: Any) -> str:
    """Ask, as soon as the site's daemon takes requests."""
    here = spool(scene, modality)
    await until(here.folder.exists)
    return here.ask(request(patient, **more))


async def ended(scene, modality: str, name: str) -> Status:
    here = spool(scene, modality)
    await until(lambda: here.status(name).final)
    return here.status(name)


async def segmented(scene, modality: str, patient: str, **more: Any) -> SpoolResult:
    name = await asked(scene, modality, patient, **more)
    status = await ended(scene, modality, name)
    assert status.state == "done", status
    return spool(scene, modality).result(name)


def held_out(scene) -> list[str]:
    masks = scene.masks()
    return [masks.case(key).patient for key in scene.patients()[1]]


def assert_mask(result: SpoolResult, image: nib.Nifti1Image) -> None:
    """It is that of the run; and not an empty one, which would be equal to any other."""
    assert result.regions.any()
    assert (result.task.labels(result.regions) == np.asarray(image.dataobj)).all()


async def test_a_mask_is_that_of_the_runs_own_prediction(serving) -> None:
    """SP-11.19-11, bit for bit; and whoever asks gets the same, on the grid of the image."""
    scene = serving()
    async with scene.running() as on:
        for patient in held_out(scene):
            results = [await segmented(scene, modality, patient) for modality in ("t1ce", "t2")]
            image = nib.load(scene.output / "predictions" / f"{patient}.nii.gz")
            for result in results:
                about = result.provenance
                assert result.values.dtype == np.uint8
                assert_mask(result, image)
                assert np.allclose(result.grid.affine, image.affine)
                assert (about.used, about.missing, about.step) == (("t1ce", "t2"), (), 3)
                assert about.modalities == {"t1ce": ("t1ce",), "t2": ("t2",)}
            assert results[0].provenance.digest == results[1].provenance.digest
        assert not any(task.done() for task in on.tasks.values())
        on.stops["hub"].set()
        await asyncio.wait({on.tasks["hub"]}, timeout=LONG_S)
        assert on.tasks["hub"].result().complete


async def test_a_patient_who_came_after_the_start_and_what_is_missing(serving, make, tmp_path) -> None:
    """SP-11.19-4, SP-11.19-7: files are looked for anew; what is missing is said, or is too much."""
    scene, data = serving(), tmp_path / "mine"
    for modality in ("t1ce", "t2"):
        (data / modality).mkdir(parents=True)
        for path in (scene.federation.data / modality).iterdir():
            (data / modality / path.name).symlink_to(path)
        scene.client(
            modality, data={"images": str(data / modality)}, policy={"coordinators": ["hub"], **BOTH}
        )
    async with scene.running():
        await segmented(scene, "t1ce", held_out(scene)[0])
        make.patient(tmp_path / "new", "NEW_Nora", 77)
        come = {m: tmp_path / "new" / m / "NEW_Nora.nii.gz" for m in ("t1ce", "t2")}
        come["t1ce"].rename(data / "t1ce" / "NEW_Nora.nii.gz")
        alone = await segmented(scene, "t1ce", "NEW_Nora", want="probabilities")
        about = alone.provenance
        assert (about.used, about.missing) == (("t1ce",), ("t2",))
        name = await asked(scene, "t1ce", "NEW_Nora", require="all")
        status = await ended(scene, "t1ce", name)
        assert (status.cause, status.exit) == ("incomplete", 1)
        assert "1 of 2 seats, 2 are required (t2: site-t2: no image that can be used)" in status.reason
        # SP-11.19-5: nobody is sent a mask of a patient of whom it has no image.
        status = await ended(scene, "t2", await asked(scene, "t2", "NEW_Nora"))
        assert (status.cause, status.exit) == ("unknown", 4)
        come["t2"].rename(data / "t2" / "NEW_Nora.nii.gz")
        both = await segmented(scene, "t2", "NEW_Nora", want="probabilities", require=2)
        assert both.provenance.missing == ()
        assert both.values.dtype == np.float32
        assert (both.values != alone.values).any()
        # SP-11.19-6.
        make.patient(tmp_path / "other", "NEW_Otto", 78)
        make.patient(tmp_path / "turned", "NEW_Otto", 78, (38, 45, 34))
        (tmp_path / "other" / "t1ce" / "NEW_Otto.nii.gz").rename(data / "t1ce" / "NEW_Otto.nii.gz")
        (tmp_path / "turned" / "t2" / "NEW_Otto.nii.gz").rename(data / "t2" / "NEW_Otto.nii.gz")
        status = await ended(scene, "t2", await asked(scene, "t2", "NEW_Otto"))
        assert (status.cause, status.exit) == ("misaligned", 1)
        assert "at site-t1ce is on another grid than that at site-t2" in status.reason
        assert "34" not in status.reason


async def test_policy_decides_for_whom(serving, caplog) -> None:
    """SP-11.19-4: `own` answers nobody else; the asking site goes without. SP-11.19-16: the trails say who asked."""
    scene = serving({"t2": {"inference": "own"}})
    async with scene.running():
        patient = held_out(scene)[0]
        theirs = await segmented(scene, "t1ce", patient)
        assert theirs.provenance.missing == ("t2",)
        own = await segmented(scene, "t2", patient)
        assert own.provenance.missing == ()
    said = (scene.folder / "site-t2" / "state" / "audit.jsonl").read_text()
    assert '"asker":"site-t1ce","outcome":"refused"' in said.replace(": ", ":").replace(", ", ",")


async def test_a_job_without_inference_serves_none(serving) -> None:
    """SP-11.19-1: the feature is not agreed on, and the site says so."""
    scene = serving(inference={})
    scene.job(training={**SLOW, "steps": 40}, data=DATA)
    async with scene.running():
        status = await ended(scene, "t1ce", await asked(scene, "t1ce", held_out(scene)[0]))
    assert (status.cause, status.exit) == ("not-served", 1)


async def test_the_queue_is_bounded_and_a_request_can_be_given_up(serving, monkeypatch) -> None:
    """SP-11.19-2, SP-11.19-12, SP-11.19-13."""
    scene, gate, busy = serving(inference={"max_queue": 1}), asyncio.Event(), asyncio.Event()
    right = PatientSegmenter.segment

    async def slow(self, *args):
        busy.set()
        await gate.wait()
        return await right(self, *args)

    monkeypatch.setattr(PatientSegmenter, "segment", slow)
    async with scene.running():
        patient = held_out(scene)[0]
        working = await asked(scene, "t1ce", patient)
        here = spool(scene, "t1ce")
        await busy.wait()
        names = [await asked(scene, "t1ce", patient) for _ in range(2)]
        status = await ended(scene, "t1ce", names[1])
        assert (status.cause, status.exit) == ("busy", 3)
        here.cancel(names[0])
        assert (await ended(scene, "t1ce", names[0])).state == "cancelled"
        other = await asked(scene, "t2", patient)
        gate.set()
        assert (await ended(scene, "t1ce", working)).state == "done"
        assert (await ended(scene, "t2", other)).state == "done"


async def test_the_service_outlives_its_coordinator_and_does_without_a_site(serving) -> None:
    """SP-11.19-3, SP-11.19-15: a new process goes on with the newest weights. SP-11.19-2: a request that nobody
    answered is asked again. SP-11.19-13: a site that does not come back is done without."""
    scene = serving(deadlines={"join_s": 60, "step_s": 60, "return_s": 2})
    async with scene.running() as on:
        patient = held_out(scene)[0]
        before = await segmented(scene, "t1ce", patient)
        on.stops["hub"].set()
        await asyncio.wait({on.tasks["hub"]}, timeout=LONG_S)
        assert on.tasks["hub"].result().complete
        name = await asked(scene, "t1ce", patient)
        await until(lambda: spool(scene, "t1ce").status(name).reason != "")
        async with scene.running(only=["hub"], resume=None) as again:
            assert (await ended(scene, "t1ce", name)).state == "done"
            after = spool(scene, "t1ce").result(name)
            assert (after.values == before.values).all()
            assert after.provenance.digest == before.provenance.digest
            on.stops["site-t2"].set()
            await asyncio.wait({on.tasks["site-t2"]}, timeout=LONG_S)
            alone = await segmented(scene, "t1ce", patient)
            assert alone.provenance.missing == ("t2",)
            assert not again.tasks["hub"].done()
            # A new process of the site, which is brought back to the step.
            async with scene.running(only=["site-t2"]):
                await until(
                    lambda: again.coordinator is not None and all(s.here for s in again.coordinator.sites)
                )
                back = await segmented(scene, "t2", patient)
                assert (back.values == before.values).all()


async def test_a_service_that_was_taken_out_of_the_job_ends(serving) -> None:
    scene = serving()
    async with scene.running() as on:
        await segmented(scene, "t2", held_out(scene)[0])
        on.stops["hub"].set()
        await asyncio.wait({on.tasks["hub"]}, timeout=LONG_S)
        scene.job(training=SLOW, data=DATA, evaluation={"batch": 16})
        async with scene.running(only=["hub"], resume=None) as again:
            done = {again.tasks["hub"], on.tasks["site-t1ce"], on.tasks["site-t2"]}
            await asyncio.wait(done, timeout=LONG_S)
            assert [task.exception() for task in done] == [None] * 3
            assert again.tasks["hub"].result().complete


async def test_a_file_that_turns_out_bad_is_one_sites_loss(serving, tmp_path) -> None:
    """SP-11.19-9: the header is fine, the voxels are not; the request goes on without this site, and the run's patient
    stays; once the file is whole again, the site takes part again."""
    scene, data = serving(), tmp_path / "mine" / "t2"
    data.mkdir(parents=True)
    for path in (scene.federation.data / "t2").iterdir():
        (data / path.name).symlink_to(path)
    scene.client("t2", data={"images": str(data), "cache_mib": 0}, policy={"coordinators": ["hub"], **BOTH})
    async with scene.running():
        patient = held_out(scene)[0]
        await segmented(scene, "t1ce", patient)
        file = data / f"{patient}.nii.gz"
        whole = file.read_bytes()
        file.unlink()
        file.write_bytes(whole[:-300])
        result = await segmented(scene, "t1ce", patient)
        assert result.provenance.missing == ("t2",)
        file.write_bytes(whole)
        result = await segmented(scene, "t1ce", patient)
        assert result.provenance.missing == ()


async def test_between_two_steps_of_a_training_that_notices_nothing(serving) -> None:
    """SP-11.19-8, SP-11.19-10: exact all the same; the weights are those of the committed step."""
    scene = serving(
        training={**SLOW, "steps": 40, "checkpoint_every": 20},
        inference={"serve": "always", "share": 0.9},
        evaluation={"batch": 16, "every": 10, "sample": 1},
    )
    async with scene.running():
        patient = held_out(scene)[0]
        steps = [(await segmented(scene, "t1ce", patient)).provenance.step for _ in range(2)]
        assert 0 < steps[0] < steps[1] <= 40
        await until(lambda: (scene.output / "result.json").exists())
        last = await segmented(scene, "t2", patient)
        assert last.provenance.step == 40
    scene.assert_exact()


async def test_a_request_that_takes_too_long_ends_and_the_next_one_is_taken(serving, monkeypatch) -> None:
    """SP-11.19-12; what was announced to the sites is void then: nothing of it comes in the place of other answers."""
    scene = serving(inference={"batch": 1})
    right, late = Run.computed, asyncio.Event()

    async def computed(self, function, *args, what):
        if what.startswith("windows 4 ") and not late.is_set():
            late.set()
            # As the request's own deadline does.
            raise TimeoutError
        return await right(self, function, *args, what=what)

    monkeypatch.setattr(Run, "computed", computed)
    async with scene.running():
        patient = held_out(scene)[0]
        name = await asked(scene, "t1ce", patient)
        status = await ended(scene, "t1ce", name)
        assert (status.cause, status.exit) == ("deadline", 3)
        assert (await segmented(scene, "t1ce", patient)).provenance.missing == ()
