"""What a coordinator keeps of patients who were segmented with frozen encoders, and when it goes (SP-11.19-14)."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from splitpeer.cli import main
from splitpeer.daemon.trail import NAME, entries
from splitpeer.logs import handle
from splitpeer.storage.request_banks import RequestBanks

from .scene import PATIENTS, Scene
from .served import (
    comes,
    images_of,
    refused,
    segmented,
    serving,
    stop,
    until,
    withdrawn_at,
)

NORA, OTTO = "NEW_Nora", "NEW_Otto"


def kept(scene: Scene, patient: str) -> list[Path]:
    """Releases of a patient who is not of the run."""
    (run,) = (scene.folder / "hub" / "state").glob("try-*")
    return [*(RequestBanks(run).folder / scene.key(patient).hex()).glob("*/*/*.safetensors")]


def releases(scene: Scene) -> int:
    """In the run's own bank."""
    return len([*(scene.folder / "hub" / "state").glob("try-*/bank/*/*.safetensors")])


async def test_consent_that_is_withdrawn_takes_them_out_when_the_site_joins(frozen) -> None:
    """Nobody asks about the patient; other patients of requests and of the run stay. The next request is told."""
    comes(frozen, NORA, 77)
    known = PATIENTS[0]
    async with serving(frozen) as on:
        await segmented(frozen, "t1ce", NORA)
        await stop(on, "site-t2")
        assert kept(frozen, NORA)
        before = releases(frozen)
        withdrawn_at(frozen, "t2").write_text(f"{NORA}\n{known}\n")
        async with serving(frozen, only=["site-t2"]):
            await until(lambda: not kept(frozen, NORA))
            await until(lambda: releases(frozen) < before)
            assert releases(frozen) > before / 2
            status = await refused(frozen, "t1ce", NORA)
            assert (status.cause, status.exit) == ("unusable", 1)
            # SP-11.19-7: that is for the coordinator alone.
            assert "consent" not in status.reason and "t2" not in status.reason
            assert await refused(frozen, "t1ce", known)
    trail = entries(frozen.folder / "hub" / "state" / NAME)
    served = [line["causes"] for line in trail if line["event"] == "inference.served"]
    assert served[-2:] == ["site-t2: consent was withdrawn", ""]
    said = [line for line in trail if line["event"] == "bank.dropped"]
    assert [set(line["patients"].split(", ")) for line in said] == [
        {handle(frozen.key(name)) for name in (NORA, known)}
    ]


async def test_what_one_site_released_on_another_grid_is_left_out_for_the_others(frozen, make) -> None:
    """What a site told first, rightly or not, does not spoil the patient for everybody, nor lie in a mask."""
    wide = images_of(frozen, "t2") / f"{OTTO}.nii.gz"
    comes(frozen, OTTO, 78, (48, 38, 34), ["t2"])
    here = images_of(frozen, "t1ce") / wide.name
    async with serving(frozen) as on:
        assert (await segmented(frozen, "t2", OTTO)).provenance.missing == ("t1ce",)
        await stop(on, "site-t2")
        wide.unlink()
        make.patient(frozen.folder / "right", OTTO, 78)
        (frozen.folder / "right" / "t1ce" / wide.name).rename(here)
        async with serving(frozen, only=["site-t2"]):
            assert (await segmented(frozen, "t1ce", OTTO)).provenance.missing == ("t2",)
            status = await refused(frozen, "t1ce", OTTO, require="all")
    assert (status.cause, status.exit) == ("incomplete", 1)
    assert "site-t2: no image that can be used" in status.reason


async def test_a_patient_of_the_run_whose_image_has_moved(frozen, make) -> None:
    """The bank shows the patient where the mask of the run is, and nowhere else."""
    patient = PATIENTS[1]
    make.patient(frozen.folder / "moved", patient, 1)
    image = nib.load(frozen.folder / "moved" / "t1ce" / f"{patient}.nii.gz")
    affine = image.affine.copy()
    affine[0, 3] += 20
    path = images_of(frozen, "t1ce") / f"{patient}.nii.gz"
    path.unlink()
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)
    async with serving(frozen, only=["hub", "site-t1ce"]):
        status = await refused(frozen, "t1ce", patient)
    assert (status.cause, status.exit) == ("misaligned", 1)


async def test_they_are_listed_and_deleted_like_those_of_the_run(frozen, capsys) -> None:
    """What is gone stays gone: no site releases a window twice."""

    def bank(*arguments: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(["bank", *arguments, "--config", str(frozen.folder / "hub" / "peer.toml")])
        said = capsys.readouterr()
        assert not left.value.code, said.err
        return said.out

    comes(frozen, NORA, 77)
    async with serving(frozen):
        await segmented(frozen, "t1ce", NORA)
    windows = len(kept(frozen, NORA))
    assert "7 patients, 1 of them for requests" in bank("list")
    assert f"{handle(frozen.key(NORA))}  68 windows, for requests" in bank("list", "try")
    said = bank("drop", "try", "--patient", NORA)
    assert f"{handle(frozen.key(NORA))}: 68 windows of 2 sites are deleted" in said
    assert "was segmented only" in said and "What the decoder has learned" not in said
    assert windows and not kept(frozen, NORA) and releases(frozen)
    assert f"{handle(frozen.key(NORA))}  0 windows, for requests, dropped" in bank("list", "try")
    async with serving(frozen):
        status = await refused(frozen, "t1ce", NORA)
        assert status.cause == "unusable" and "segments the patient no more" in status.reason
        # Its numbers stand for nothing else.
        comes(frozen, OTTO, 78)
        assert (await segmented(frozen, "t1ce", OTTO)).provenance.missing == ()
    assert "all that was released for requests is deleted" in bank("drop", "try", "--all")
    assert not [*(frozen.folder / "hub" / "state").glob("try-*/inference")]
