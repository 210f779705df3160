"""What a coordinator keeps of patients who were segmented with frozen encoders, and when it goes (SP-11.19-14)."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from splitpeer.cli import main
from splitpeer.coordinator.frozen import inference
from splitpeer.coordinator.frozen.inference import BankSegmenter
from splitpeer.daemon.trail import NAME, entries
from splitpeer.errors import DataError
from splitpeer.logs import handle

from .scene import PATIENTS, Scene
from .served import (
    DATA,
    LONG_S,
    SLOW,
    asked,
    cast_frozen,
    comes,
    images_of,
    nobody_asks,
    refused,
    request_banks,
    segmented,
    serving,
    spool,
    stop,
    until,
    withdrawn_at,
)

NORA, OTTO = "NEW_Nora", "NEW_Otto"


def kept(scene: Scene, patient: str) -> list[Path]:
    """Releases of a patient who is not of the run."""
    return [*(request_banks(scene).folder / scene.key(patient).hex()).glob("*/*/*.safetensors")]


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


# --- room, and the end of life ---------------------------------------------------------------------------------


def answers(scene: Scene, modality: str) -> list[str]:
    """What a site has released, as it has it in its run's folder."""
    (path,) = (scene.folder / f"site-{modality}" / "state").glob("try-*/answers.jsonl")
    return path.read_text().splitlines()


def cleared(scene: Scene) -> list[tuple[str, str]]:
    """Patients and causes, as the coordinator's trail has them."""
    trail = entries(scene.folder / "hub" / "state" / NAME)
    return [(line["patients"], line["cause"]) for line in trail if line["event"] == "bank.cleared"]


async def test_what_nobody_asks_about_goes_and_is_released_again_as_it_was(frozen) -> None:
    """SP-11.19-14: the questions stay, so that a site that is asked again notes no new answer."""
    comes(frozen, NORA, 77)
    comes(frozen, OTTO, 78)
    async with serving(frozen) as on:
        first = await segmented(frozen, "t1ce", NORA)
        await segmented(frozen, "t1ce", OTTO)
        await stop(on, "hub")
        nobody_asks(frozen, NORA)
        noted = answers(frozen, "t1ce"), answers(frozen, "t2")
        async with serving(frozen, only=["hub"]) as again:
            await until(lambda: bool(cleared(frozen)))
            await stop(again, "hub")
        assert kept(frozen, OTTO) and not kept(frozen, NORA)
        assert cleared(frozen) == [(handle(frozen.key(NORA)), "nobody asks any more")]
        async with serving(frozen, only=["hub"]):
            second = await segmented(frozen, "t2", NORA)
            assert second.provenance.missing == () and (second.values == first.values).all()
            assert kept(frozen, NORA)
        assert (answers(frozen, "t1ce"), answers(frozen, "t2")) == noted


async def test_a_site_whose_image_has_changed_since_is_done_without_and_stays(frozen, make, caplog) -> None:
    """SP-11.19-14: a second, other answer would show more. With the image of then, it takes part again."""
    caplog.set_level(logging.INFO)
    cast_frozen(frozen, inference={"keep_s": 0})
    comes(frozen, NORA, 77)
    async with serving(frozen) as on:
        first = await segmented(frozen, "t1ce", NORA)
        assert not kept(frozen, NORA)
        assert cleared(frozen) == [(handle(frozen.key(NORA)), "the request is over")]
        file = images_of(frozen, "t2") / f"{NORA}.nii.gz"
        then = file.read_bytes()
        make.patient(frozen.folder / "retouched", NORA, 79)
        os.replace(frozen.folder / "retouched" / "t2" / file.name, file)
        assert (await segmented(frozen, "t1ce", NORA)).provenance.missing == ("t2",)
        assert not on.tasks["site-t2"].done()
        for line in ("inference.served", "bank.cleared"):
            assert [one.message for one in caplog.records].count(line) == 2
        file.write_bytes(then)
        whole = await segmented(frozen, "t1ce", NORA)
        assert whole.provenance.missing == () and (whole.values == first.values).all()


async def test_a_patient_makes_room_for_another_and_too_large_a_one_is_refused(frozen) -> None:
    """[inference] max_kept_mib: two do not fit into 3 MiB, nor one into 2; known before anybody is asked."""
    comes(frozen, NORA, 77)
    comes(frozen, OTTO, 78)
    cast_frozen(frozen, inference={"max_kept_mib": 3})
    async with serving(frozen) as on:
        await segmented(frozen, "t1ce", NORA)
        await segmented(frozen, "t1ce", OTTO)
        assert kept(frozen, OTTO) and not kept(frozen, NORA)
        assert cleared(frozen) == [(handle(frozen.key(NORA)), "room was needed")]
        assert request_banks(frozen).octets() <= 3 << 20
        await stop(on, "hub")
        cast_frozen(frozen, inference={"max_kept_mib": 2})
        async with serving(frozen, only=["hub"]) as again:
            status = await refused(frozen, "t1ce", NORA)
            assert (status.cause, status.exit) == ("unusable", 1)
            assert "keeps at most 2 MiB for requests ([inference] max_kept_mib)" in status.reason
            # Nobody else gave way for nothing; what is there is used.
            assert (await segmented(frozen, "t1ce", OTTO)).provenance.missing == ()
            assert not again.tasks["hub"].done()


async def test_a_service_that_has_ended_keeps_nothing_of_requests(frozen) -> None:
    comes(frozen, NORA, 77)
    async with serving(frozen):
        await segmented(frozen, "t1ce", NORA)
    frozen.job(training={"encoders": "frozen", **SLOW}, data=DATA, evaluation={"overlap": 0.25, "batch": 16})
    async with serving(frozen) as on:
        await asyncio.wait(on.tasks.values(), timeout=LONG_S)
    assert not kept(frozen, NORA) and releases(frozen)
    assert cleared(frozen) == [(handle(frozen.key(NORA)), "the service has ended")]


async def test_what_a_cancelled_request_had_collected_goes(frozen, monkeypatch) -> None:
    """That of one that came to an end before stays."""
    gate, right = asyncio.Event(), inference.infer

    async def slow(site: Any, stream: Any, index: int, *more: Any) -> Any:
        if index == 1:
            await gate.wait()
        return await right(site, stream, index, *more)

    comes(frozen, NORA, 77)
    comes(frozen, OTTO, 78)
    async with serving(frozen) as on:
        await segmented(frozen, "t1ce", OTTO)
        monkeypatch.setattr(inference, "infer", slow)
        name = await asked(frozen, "t1ce", NORA)
        await until(lambda: bool(kept(frozen, NORA)))
        spool(frozen, "t1ce").cancel(name)
        assert on.coordinator is not None
        service = on.coordinator._service
        await until(lambda: service is not None and any(one.cancelled for one in service._requests))
        gate.set()
        await until(lambda: bool(cleared(frozen)))
        assert cleared(frozen) == [(handle(frozen.key(NORA)), "the request was cancelled")]
        assert kept(frozen, OTTO) and not kept(frozen, NORA)
        assert (await segmented(frozen, "t1ce", NORA)).provenance.missing == ()


async def test_a_site_that_releases_nan_takes_no_part(frozen, monkeypatch) -> None:
    """It cannot keep the others from their segmentation, and nothing of it is kept."""
    right = inference.infer

    async def spoilt(site: Any, *more: Any) -> Any:
        answer = await right(site, *more)
        if site.name != "site-t2":
            return answer
        tensors = {name: np.full_like(array, np.nan) for name, array in answer.tensors.items()}
        return dataclasses.replace(answer, tensors=tensors)

    monkeypatch.setattr(inference, "infer", spoilt)
    comes(frozen, NORA, 77)
    async with serving(frozen):
        result = await segmented(frozen, "t1ce", NORA)
    assert result.provenance.missing == ("t2",), result.provenance
    assert kept(frozen, NORA) and all(path.parent.name == "site-t1ce" for path in kept(frozen, NORA))


async def test_why_a_segmentation_failed_is_in_the_coordinators_log_alone(
    frozen, monkeypatch, caplog
) -> None:
    def broken(self: BankSegmenter, *given: Any) -> Any:
        raise DataError("/secret/place: torn")

    monkeypatch.setattr(BankSegmenter, "_decoded", broken)
    async with serving(frozen):
        status = await refused(frozen, "t1ce", PATIENTS[0])
    assert "see its log" in status.reason and "secret" not in status.reason
    assert "a segmentation for site-t1ce failed: /secret/place: torn" in caplog.text
