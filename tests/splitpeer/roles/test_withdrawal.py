"""SP-11.13: one patient's file goes bad in the middle of a run, and the run continues exactly without that patient."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from splitpeer.daemon.console import LogView
from splitpeer.errors import JobFailed
from splitpeer.logs import handle

Spoil = Callable[[Path], None]
STEPS = {"steps": 10, "batch": 2, "checkpoint_every": 4}


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> Callable[..., list[dict[str, Any]]]:
    caplog.set_level(logging.DEBUG, "splitpeer")

    def of(name: str) -> list[dict[str, Any]]:
        return [r.fields for r in caplog.records if r.getMessage() == name]

    return of


# --- what may happen to a file -----------------------------------------------------------------------------


def not_finite(path: Path) -> None:
    image = nib.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(voxels, image.affine), path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def missing(path: Path) -> None:
    path.unlink()


def unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(path: Path) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.float32), image.affine), path)


def other_grid(path: Path) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:-4], image.affine), path)


class AtStep(LogView):
    """Does something when a step is committed."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        super().__init__()
        self._at, self._act = step, act

    def step(self, step: int, *rest: Any) -> None:
        super().step(step, *rest)
        if step == self._at:
            self._act()


class Stage:
    """A scene whose files may be spoilt and repaired."""

    def __init__(self, scene: Any) -> None:
        self.scene = scene
        training, held_out = scene.patients()
        names = {scene.key(patient): patient for patient in scene_patients(scene)}
        self.training = [names[key] for key in training]
        self.held_out = [names[key] for key in held_out]

    def own(self, who: str) -> Path:
        """A copy of the images of a modality, or of the labels, that may be spoilt; read again each time."""
        folder = self.scene.folder / f"data-{who}"
        shutil.copytree(self.scene.federation.data / who, folder)
        if who == "labels":
            self.scene.coordinator(data={"labels": str(folder), "cache_mib": 0})
        else:
            self.scene.client(who, data={"images": str(folder), "cache_mib": 0})
        return folder

    def repair(self, who: str) -> None:
        shutil.rmtree(self.scene.folder / f"data-{who}")
        shutil.copytree(self.scene.federation.data / who, self.scene.folder / f"data-{who}")

    def record(self, what: str) -> Any:
        """As the coordinator has it on disk."""
        path = self.scene.folder / "hub" / "state" / "try.run.json"
        return json.loads(path.read_text())[what] if path.exists() else None

    def withdrawn(self) -> dict[bytes, int]:
        return {bytes.fromhex(item["key"]): item["step"] for item in self.record("withdrawn")}

    def assert_exact(self, *spoilt: str) -> None:
        """As one process that draws with and without the patients at the same steps."""
        for who in spoilt:
            self.repair(who)
        self.scene.assert_exact(self.withdrawn())


def scene_patients(scene: Any) -> list[str]:
    return [path.name.removesuffix(".nii.gz") for path in (scene.federation.data / "labels").iterdir()]


@pytest.fixture
def stage(scene: Any) -> Stage:
    scene.cast("flair", "t1", training=STEPS)
    return Stage(scene)


# --- in the middle of a run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (not_finite, "not-finite"),
        (truncated, "truncated"),
        (missing, "missing"),
        (unreadable, "unreadable"),
        (empty, "empty"),
        (other_grid, "grid"),
    ],
)
async def test_a_file_that_goes_bad_costs_a_patient(scene, stage, said, spoil: Spoil, cause: str) -> None:
    """SP-11.13-1, SP-11.13-4, SP-11.13-5, SP-11.13-8."""
    patient = stage.training[0]
    path = stage.own("t1") / f"{patient}.nii.gz"
    ran = await scene.together(view=AtStep(3, lambda: spoil(path)))
    assert ran.result is not None, ran
    assert ran.result.complete
    assert set(ran.clients.values()) == {None}
    key = scene.key(patient)
    (out,) = ran.result.withdrawn
    assert out == {"patient": handle(key), "step": stage.withdrawn()[key], "site": "site-t1", "cause": cause}
    assert 4 <= out["step"] <= 10
    stage.assert_exact("t1")
    # The owner's log names the file, once; the others' do not.
    (own,) = said("patient.withdraw")
    assert own["file"] == str(path)
    told = said("patient.withdrawn")
    assert len(told) == 3  # the coordinator and both sites
    assert {line["patient"] for line in told} == {handle(key)}
    assert sum("file" in line for line in told) == 1


async def test_what_the_site_lacks_is_not_blamed_on_a_patient(scene, stage, monkeypatch) -> None:
    """SP-11.13-2: nobody is withdrawn for want of descriptors; the others hear the cause."""
    folder, lacking = stage.own("t1"), False
    really = Path.open

    def open_(path: Path, *args: Any, **options: Any) -> Any:
        if lacking and path.parent == folder:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return really(path, *args, **options)

    def now() -> None:
        nonlocal lacking
        lacking = True

    monkeypatch.setattr(Path, "open", open_)
    ran = await scene.together(view=AtStep(3, now))
    assert str(ran.error) == (
        "site site-t1: the peer says: site site-t1 cannot continue: it has too many open files; see its log"
    )
    assert "Too many open files" in str(ran.clients["site-t1"])
    assert stage.withdrawn() == {}


async def test_no_name_no_path_and_no_key_leaves(scene, stage, said) -> None:
    """SP-15-1, SP-11.13-2: what others keep names neither the patient nor the file."""
    patient = stage.training[0]
    path = stage.own("t1") / f"{patient}.nii.gz"
    truncated(path)
    ran = await scene.together()
    assert ran.result.complete
    for who in ("hub", "site-flair"):
        trail = (scene.folder / who / "state" / "audit.jsonl").read_text()
        assert handle(scene.key(patient)) in trail
        for secret in (patient, scene.key(patient).hex(), str(path)):
            assert secret not in trail


async def test_a_mask_that_goes_bad(scene, stage, said) -> None:
    """SP-11.13-11."""
    patient = stage.training[1]
    path = stage.own("labels") / f"{patient}.nii.gz"
    ran = await scene.together(view=AtStep(3, lambda: truncated(path)))
    assert ran.result is not None, ran
    (out,) = ran.result.withdrawn
    assert (out["site"], out["cause"]) == ("", "truncated")
    stage.assert_exact("labels")
    assert str(path) in said("patient.unusable")[0]["cause"]


# --- any peer's file, at any time ------------------------------------------------------------------------


async def test_two_sites_two_patients_one_batch(scene, said) -> None:
    """SP-11.13-4: all answers to the batch count, and both patients are out from the same step."""
    scene.cast("flair", "t1", training={**STEPS, "batch": 4})
    stage = Stage(scene)
    one, other = stage.training[:2]
    truncated(stage.own("t1") / f"{one}.nii.gz")
    not_finite(stage.own("flair") / f"{other}.nii.gz")
    ran = await scene.together()
    assert ran.result is not None, ran
    assert {(w["site"], w["step"]) for w in ran.result.withdrawn} == {("site-t1", 1), ("site-flair", 1)}
    assert set(stage.withdrawn()) == {scene.key(one), scene.key(other)}
    stage.assert_exact("t1", "flair")


async def test_two_patients_of_one_site_are_said_at_once(scene) -> None:
    scene.cast("flair", "t1", training={**STEPS, "batch": 4}, data={"max_withdrawn": 2})
    stage = Stage(scene)
    folder = stage.own("t1")
    for patient in stage.training[:2]:
        truncated(folder / f"{patient}.nii.gz")
    ran = await scene.together()
    assert ran.result is not None, ran
    assert [w["step"] for w in ran.result.withdrawn] == [1, 1]
    stage.assert_exact("t1")


async def test_a_patient_held_out_is_scored_no_more(scene, stage) -> None:
    """SP-11.13-7."""
    patient = stage.held_out[0]
    folder = stage.own("t1")
    scene.job(training=STEPS, evaluation={"every": 4, "overlap": 0.0})
    ran = await scene.together(view=AtStep(6, lambda: missing(folder / f"{patient}.nii.gz")))
    assert ran.result is not None, ran
    assert [line["volumes"] for line in scene.metrics() if "volumes" in line] == [2, 1, 1]
    left = [path.name for path in (scene.output / "predictions").iterdir()]
    assert left == [f"{stage.held_out[1]}.nii.gz"]
    assert [w["step"] for w in ran.result.withdrawn] == [9]
    stage.assert_exact("t1")


async def test_a_mask_held_out_is_scored_no_more(scene, stage) -> None:
    """SP-11.13-7, SP-11.13-11."""
    patient = stage.held_out[1]
    truncated(stage.own("labels") / f"{patient}.nii.gz")
    ran = await scene.together()
    assert ran.result is not None, ran
    assert [line["volumes"] for line in scene.metrics() if "volumes" in line] == [1]
    stage.assert_exact("labels")


# --- what does not bring a patient back --------------------------------------------------------------------


async def test_a_repaired_file_and_a_restart_of_all(scene, stage, said) -> None:
    """SP-11.13-3, SP-11.13-6: going back before the withdrawal does not bring the patient back."""
    patient, key = stage.training[0], scene.key(stage.training[0])
    path = stage.own("t1") / f"{patient}.nii.gz"
    scene.job(training={**STEPS, "steps": 16, "checkpoint_every": 12})
    good = path.read_bytes()
    view = AtStep(3, lambda: truncated(path))
    async with scene.running(view=view) as on:
        while not stage.record("withdrawn") or scene.metrics()[-1]["step"] < 8:
            assert not on.tasks["hub"].done(), on.tasks["hub"]
            await asyncio.sleep(0.01)
        first = stage.withdrawn()[key]
        # All are gone at once, as in a power cut: nobody saves what he has.
    assert first >= 4
    path.write_bytes(good)
    ran = await scene.together(resume=True)
    assert ran.result is not None, ran
    # The newest step that all hold is the beginning.
    assert stage.withdrawn() == {key: 1}
    stage.assert_exact("t1")


async def test_a_header_that_cannot_be_read(scene, stage, said) -> None:
    """SP-11.13-9: the patient takes no part in a new run; nobody else's is lost."""
    path = stage.own("t1") / f"{stage.training[0]}.nii.gz"
    path.write_bytes(b"")
    ran = await scene.together()
    assert ran.result is not None, ran
    assert ran.result.patients == 5
    assert ran.result.withdrawn == []
    assert str(path) in said("patient.unusable")[0]["cause"]
    assert any("1 (" in line.get("unusable", "") for line in said("site.joined"))


async def test_a_header_that_cannot_be_read_when_the_run_is_under_way(scene, stage) -> None:
    """SP-11.13-9: the site comes back without the header; it is asked for the patient, and withdraws it."""
    patient = stage.training[0]
    path = stage.own("t1") / f"{patient}.nii.gz"
    async with scene.running() as on:
        while not any(line["step"] >= 5 for line in scene.metrics()):
            assert not on.tasks["hub"].done(), on.tasks["hub"]
            await asyncio.sleep(0.01)
        for stop in on.stops.values():
            stop.set()
        await asyncio.wait(on.tasks.values())
    path.write_bytes(b"")
    ran = await scene.together(resume=True)
    assert ran.result is not None, ran
    (first,) = stage.withdrawn().values()
    assert first > 5
    stage.assert_exact("t1")


async def test_a_mask_deleted_after_its_patient_withdrew(scene, stage) -> None:
    """The run is resumed with the same patients held out, and the next withdrawal finds no mask to look for."""
    gone, later = stage.training[:2]
    folder = stage.own("labels")
    images = stage.own("t1")
    scene.job(training={**STEPS, "checkpoint_every": 4}, data={"max_withdrawn": 2})
    view = AtStep(2, lambda: truncated(images / f"{gone}.nii.gz"))
    async with scene.running(view=view) as on:
        while not any(line["step"] >= 6 for line in scene.metrics()):
            assert not on.tasks["hub"].done(), on.tasks["hub"]
            await asyncio.sleep(0.01)
        for stop in on.stops.values():
            stop.set()
        await asyncio.wait(on.tasks.values())
    held_out = stage.record("held_out")
    assert held_out == sorted(scene.key(patient).hex() for patient in stage.held_out)
    (folder / f"{gone}.nii.gz").unlink()
    truncated(images / f"{later}.nii.gz")
    ran = await scene.together(resume=True)
    assert ran.result is not None, ran
    assert set(stage.withdrawn()) == {scene.key(gone), scene.key(later)}
    assert stage.record("held_out") == held_out


# --- limits ------------------------------------------------------------------------------------------------


async def test_a_site_that_withdraws_too_many_fails_the_job(scene, stage) -> None:
    """SP-11.13-10."""
    folder = stage.own("t1")
    for patient in stage.training[:3]:
        truncated(folder / f"{patient}.nii.gz")
    ran = await scene.together()
    assert isinstance(ran.error, JobFailed)
    assert "may withdraw 1 ([data] max_withdrawn)" in str(ran.error)
    assert "the file is truncated or damaged" in str(ran.error)
    assert len(stage.withdrawn()) <= 1
    # Everybody reads why, and nobody a name.
    for error in ran.clients.values():
        assert "the file is truncated or damaged" in str(error)
        assert not any(patient in str(error) for patient in stage.training)


async def test_where_a_site_may_be_absent_the_others_go_on_with_all_patients(scene) -> None:
    """SP-11.13-10: the site has failed; nobody is withdrawn by the message with which it went too far."""
    drop = {"absence": {"mode": "drop", "least_sites": 1}}
    scene.cast("flair", "t1", training={**STEPS, "batch": 4}, data={"max_withdrawn": 1}, **drop)
    stage = Stage(scene)
    folder = stage.own("t1")
    for patient in stage.training:
        truncated(folder / f"{patient}.nii.gz")
    async with scene.running() as on:
        await asyncio.wait([on.tasks["hub"]], timeout=60)
        result = on.tasks["hub"].result()
    assert result.complete
    assert result.withdrawn == []
    assert result.made_from == ["flair"]
    assert result.absences == {"site-t1": 10}
    assert [line["without"] for line in scene.metrics() if "loss" in line] == [["t1"]] * 10


async def test_the_limit_may_be_raised_before_the_run_goes_on(scene, stage) -> None:
    """SP-11.13-10: it is not among the terms of the run."""
    folder = stage.own("t1")
    for patient in stage.training[:2]:
        truncated(folder / f"{patient}.nii.gz")
    assert "may withdraw 1" in str((await scene.together()).error)
    scene.job(training=STEPS, data={"max_withdrawn": 2})
    ran = await scene.together(resume=True)
    assert ran.result is not None, ran
    assert set(stage.withdrawn()) == {scene.key(patient) for patient in stage.training[:2]}
    stage.assert_exact("t1")


async def test_too_few_patients_are_left(scene) -> None:
    """SP-11.13-7."""
    scene.cast("flair", "t1", training=STEPS, data={"min_patients": 6})
    stage = Stage(scene)
    truncated(stage.own("t1") / f"{stage.training[0]}.nii.gz")
    ran = await scene.together()
    assert isinstance(ran.error, JobFailed)
    assert str(ran.error) == (
        "5 patients are left, 6 are needed ([data] min_patients): withdrawn were "
        "1 (the file is truncated or damaged: 1)"
    )


async def test_nobody_is_left_to_train_with(scene) -> None:
    """SP-11.13-7."""
    scene.cast("flair", "t1", training={**STEPS, "batch": 1}, data={"max_withdrawn": 6, "validation": 4})
    stage = Stage(scene)
    folder = stage.own("t1")
    for patient in stage.training:
        truncated(folder / f"{patient}.nii.gz")
    ran = await scene.together()
    assert isinstance(ran.error, JobFailed)
    assert "no patient is left to train with" in str(ran.error)


# --- before the start, and with processes ------------------------------------------------------------------


def test_verify_finds_it_before_there_is_a_run(scene, stage) -> None:
    """`serve --verify` reads to the end; without it only the header is read."""
    cut = stage.training[0], stage.training[1]
    truncated(stage.own("t1") / f"{cut[0]}.nii.gz")
    truncated(stage.own("labels") / f"{cut[1]}.nii.gz")
    hub = scene.start("hub", "--verify")
    sites = [scene.start("site-t1", "--verify"), scene.start("site-flair")]
    assert hub.code() == 0, hub.said
    assert [site.code() for site in sites] == [0, 0]
    result = json.loads((scene.output / "result.json").read_text())
    assert (result["patients"], result["withdrawn"]) == (4, [])
    assert f"{cut[0]}.nii.gz: truncated" in sites[0].said
    assert f"{cut[1]}.nii.gz: truncated" in hub.said
    assert cut[0] not in hub.said + sites[1].said


def test_where_no_file_can_be_used_nothing_starts(scene, stage) -> None:
    for who in ("labels", "t1"):
        for path in stage.own(who).iterdir():
            path.write_bytes(b"")
    hub, site = scene.start("hub"), scene.start("site-t1")
    assert (hub.code(), site.code()) == (4, 4)
    for daemon in (hub, site):
        assert "none of 6 patients' files can be used; the last: " in daemon.last


@pytest.mark.timeout(300)
def test_processes_that_are_killed_after_a_withdrawal(scene, stage) -> None:
    """SP-11.13-3, SP-11.13-4, SP-11.13-6: coordinator and owner die at once, and the file is good again."""
    scene.job(training={**STEPS, "steps": 40, "checkpoint_every": 6})
    key = scene.key(stage.training[0])
    path = stage.own("t1") / f"{stage.training[0]}.nii.gz"
    good = path.read_bytes()
    hub, clients = scene.start_all()
    scene.until_step(8)
    os.replace(_half(path), path)
    hub.until(r"patient\.withdrawn .*site=site-t1")
    clients["flair"].until(r"patient\.withdrawn .*truncated")
    first = stage.withdrawn()[key]
    scene.until_step(first + 2)
    for daemon in (hub, clients["t1"]):
        daemon.signal(signal.SIGKILL)
        daemon.code()
    path.write_bytes(good)
    again = scene.start("hub"), scene.start("site-t1")
    assert [daemon.code() for daemon in (*again, clients["flair"])] == [0, 0, 0], again[0].said
    assert set(stage.withdrawn()) == {key}
    assert stage.withdrawn()[key] <= first
    stage.assert_exact("t1")


def _half(path: Path) -> Path:
    """Ready to be put in its place at once, as a copy that broke off leaves it."""
    part = path.with_name("part")
    part.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return part
