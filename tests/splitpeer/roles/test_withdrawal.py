"""SP-11.13: one patient's file goes bad in the middle of a run, and the run goes on without that patient, exactly."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from splitpeer.errors import JobFailed
from splitpeer.logs import handle
from splitpeer.roles.view import LogView

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

    def withdrawn(self) -> dict[bytes, int]:
        """As the record of the run has it."""
        record = json.loads((self.scene.folder / "hub" / "state" / "try.run.json").read_text())
        return {bytes.fromhex(item["key"]): item["step"] for item in record["withdrawn"]}

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


async def test_no_name_no_path_and_no_key_leaves(scene, stage, said) -> None:
    """SP-15-1, SP-11.13-2: in what others keep there is neither the patient nor the file."""
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
