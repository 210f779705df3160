"""`splitpeer segment` and `evaluate` at a hospital whose daemon, partners and coordinator are real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from splitpeer.cli import main

POLICY = {"coordinators": ["hub"], "inference": "listed", "inference_for": ["site-t1ce", "site-t2"]}


def command(site: Path, *arguments: str | Path) -> list[str]:
    name, *others = (str(argument) for argument in arguments)
    return [name, *others, "--config", str(site / "peer.toml")]


@pytest.fixture
def splitpeer(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """`splitpeer ARGUMENTS` at a site; returns what it printed."""

    def call(site: Path, *arguments: str | Path, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as left:
            main(command(site, *arguments))
        out, err = capsys.readouterr()
        assert left.value.code == code, err
        return out, err

    return call


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj)


def test_a_hospital_asks(scene, make, splitpeer, tmp_path: Path) -> None:
    images = tmp_path / "images"
    scene.cast(
        "t1ce", "t2", inference={}, data={"window": [48, 48], "validation": 2}, evaluation={"batch": 16},
        training={"steps": 3, "batch": 1, "checkpoint_every": 3, "learning_rate": 1e-5},
    )  # fmt: skip
    for modality in scene.modalities:
        (images / modality).mkdir(parents=True)
        for path in (scene.federation.data / modality).iterdir():
            (images / modality / path.name).symlink_to(path)
        scene.client(modality, data={"images": str(images / modality)}, policy=POLICY)
    hub, _ = scene.start_all()
    site, out = scene.folder / "site-t1ce", tmp_path / "out"
    held_out = [scene.masks().case(key).patient for key in scene.patients()[1]]
    hub.until(r"inference\.")

    # What the run predicted, on the grid of this hospital's file.
    said, _ = splitpeer(site, "segment", *held_out, "--out", out, "--json")
    assert {row["patient"] for row in json.loads(said)} == set(held_out)
    for patient in held_out:
        theirs = scene.output / "predictions" / f"{patient}.nii.gz"
        assert voxels(theirs).any()
        assert np.array_equal(voxels(out / f"{patient}.nii.gz"), voxels(theirs))

    # Compared with the masks of people: the figures of the run.
    splitpeer(
        site, "evaluate", *held_out, "--labels", scene.federation.data / "labels", "--convention", "msd", "--out",
        tmp_path / "study",
    )  # fmt: skip
    found = json.loads((tmp_path / "study" / "evaluation.json").read_text())["summary"]
    result = json.loads((scene.output / "result.json").read_text())
    assert {name: one["dice"] for name, one in found.items()} == pytest.approx(
        {name: dice for name, dice in result["dice"].items() if dice is not None}
    )
    assert {name: found[name]["hd95"] for name in found if name != "mean"} == pytest.approx(
        {name: mm for name, mm in result["hd95"].items() if mm is not None and name != "mean"}
    )

    # A new patient, of whom nobody has a mask and only this hospital an image.
    make.patient(tmp_path / "new", "NEW_Nora", 77)
    (tmp_path / "new" / "t1ce" / "NEW_Nora.nii.gz").rename(images / "t1ce" / "NEW_Nora.nii.gz")
    mask = tmp_path / "nora.nii.gz"
    _, said = splitpeer(site, "segment", "NEW_Nora", "--out", mask, "--require", "all", code=1)
    assert "1 of 2 seats, 2 are required" in said.splitlines()[-1] and not mask.exists()
    _, said = splitpeer(site, "segment", "NEW_Nora", "--out", mask)
    assert "warning: NEW_Nora: Made without t2" in said
    assert json.loads((tmp_path / "nora.json").read_text())["modalities"]["missing"] == ["t2"]
    assert os.listdir(site / "state" / "inference") == []


def test_a_request_outlives_coordinator_and_daemon(scene, splitpeer, tmp_path: Path) -> None:
    scene.cast(
        "t1ce", "t2", inference={}, data={"window": [48, 48], "validation": 1}, evaluation={"batch": 16},
        training={"steps": 1, "batch": 1, "checkpoint_every": 1, "learning_rate": 1e-5},
    )  # fmt: skip
    for modality in scene.modalities:
        scene.client(modality, policy=POLICY)
    hub, clients = scene.start_all()
    hub.until(r"inference\.")
    hub.signal(signal.SIGKILL)
    hub.code()
    site, mask = scene.folder / "site-t1ce", tmp_path / "mask.nii.gz"
    (patient,) = (scene.masks().case(key).patient for key in scene.patients()[1])
    asks = subprocess.Popen(
        [sys.executable, "-m", "splitpeer.cli", *command(site, "segment", patient, "--out", mask)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert asks.stderr is not None
    assert asks.stderr.readline() == f"{patient}: waiting: waits for the coordinator\n"
    clients["t1ce"].signal(signal.SIGKILL)
    clients["t1ce"].code()
    scene.start("site-t1ce")
    scene.start("hub")
    _, said = asks.communicate(timeout=90)
    assert asks.returncode == 0, said
    assert np.array_equal(voxels(mask), voxels(scene.output / "predictions" / f"{patient}.nii.gz"))
