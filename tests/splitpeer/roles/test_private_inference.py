"""Inference where each window leaves once (SP-11.19-14), and where only a sum can be read (SP-11.18-13)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import nibabel as nib
import pytest

from splitpeer.errors import ConfigError

from .test_inference import DATA, LONG_S, SLOW, asked, assert_mask, ended, held_out, segmented

EVALUATION = {"overlap": 0.25, "batch": 16}
FROZEN = {"encoders": "frozen", **SLOW}
SUM = {"features": [2, 4, 4, 8, 8, 4], "fusion": "secure-sum", "widths": [1, 1, 2, 2, 4], "sum_range": 64.0}


def cast(scene, folder: Path, modalities, policy, **job):
    """Sites whose images are links in folders of their own, so that patients can come."""
    scene.cast(*modalities, data=DATA, evaluation=EVALUATION, inference={}, **job)
    names = [f"site-{one}" for one in modalities]
    for modality in modalities:
        images = folder / "mine" / modality
        images.mkdir(parents=True)
        for path in (scene.federation.data / modality).iterdir():
            (images / path.name).symlink_to(path)
        private = policy.get("preset") == "private"
        scene.client(
            modality,
            data={"images": str(images)},
            policy={
                "coordinators": ["hub"],
                "inference": "listed",
                "inference_for": names,
                **(
                    {"partners": [one for one in names if one != f"site-{modality}"]}
                    if "fusion" in str(job)
                    else {}
                ),
                **policy,
            },
            **({"runtime": {"initial_weights": "private"}} if private else {}),
        )
    return scene


def comes(make, folder: Path, patient: str, number: int, *modalities: str) -> None:
    make.patient(folder / patient, patient, number)
    for modality in modalities:
        file = folder / patient / modality / f"{patient}.nii.gz"
        file.rename(folder / "mine" / modality / file.name)


def answers(scene, modality: str) -> list[str]:
    """What a site has released, as it has it in its run's folder."""
    (path,) = (scene.folder / f"site-{modality}" / "state").glob("try-*/answers.jsonl")
    return path.read_text().splitlines()


@pytest.mark.parametrize("private", [False, True], ids=["frozen", "private"])
async def test_each_window_leaves_once(scene, make, tmp_path, private) -> None:
    """SP-11.19-14: of a patient of the run, nobody is asked; of a new one, each window once, whoever asks and however
    often, and whichever process of the coordinator."""
    modalities = ("t1", "t1ce", "t2") if private else ("t1ce", "t2")
    any_encoder = {"min_encoder_noise": 0, "min_encoder_rate": 0}
    policy = (
        {"preset": "private", "min_partners": 2, "max_runs_per_patient": 4, **any_encoder} if private else {}
    )
    more = {"model": SUM} if private else {}
    scene = cast(scene, tmp_path, modalities, policy, training=FROZEN, **more)
    async with scene.running() as on:
        patient = held_out(scene)[0]
        own = await segmented(scene, "t1ce", patient)
        before = {one: answers(scene, one) for one in modalities}
        image = nib.load(scene.output / "predictions" / f"{patient}.nii.gz")
        assert_mask(own, image)
        comes(make, tmp_path, "NEW_Nora", 77, *modalities)
        first = await segmented(scene, "t1ce", "NEW_Nora")
        assert first.provenance.used == modalities
        after = {one: answers(scene, one) for one in modalities}
        assert all(len(after[one]) > len(before[one]) for one in modalities)
        again = await segmented(scene, "t2", "NEW_Nora", want="probabilities")
        assert (again.regions == first.regions).all()
        on.stops["hub"].set()
        await asyncio.wait({on.tasks["hub"]}, timeout=LONG_S)
        assert on.tasks["hub"].result().complete
        async with scene.running(only=["hub"], resume=None):
            third = await segmented(scene, "t1ce", "NEW_Nora")
            assert (third.values == first.values).all()
            comes(make, tmp_path, "NEW_Otto", 78, *modalities[1:])
            name = await asked(scene, "t2", "NEW_Otto", **({} if private else {"require": "all"}))
            status = await ended(scene, "t2", name)
            if private:
                # SP-11.18-14.
                assert (status.cause, status.exit) == ("incomplete", 1)
                assert (
                    "2 of 3 seats, 3 are required (t1: site-t1: no image that can be used)" in status.reason
                )
            else:
                assert status.cause == "incomplete"
        assert {one: answers(scene, one) for one in modalities} == after


async def test_a_sum_whose_encoders_have_learnt(scene, make, tmp_path) -> None:
    """SP-11.18-12: masked with the history of the step; a lost coordinator repeats no number (SP-11.19-8)."""
    policy = {"min_partners": 1}
    scene = cast(
        scene, tmp_path, ("t1ce", "t2"), policy,
        training=SLOW, model=SUM,
    )  # fmt: skip
    async with scene.running() as on:
        patient = held_out(scene)[0]
        own = await segmented(scene, "t1ce", patient)
        image = nib.load(scene.output / "predictions" / f"{patient}.nii.gz")
        assert_mask(own, image)
        comes(make, tmp_path, "NEW_Nora", 77, "t1ce", "t2")
        first = await segmented(scene, "t1ce", "NEW_Nora")
        on.stops["hub"].set()
        await asyncio.wait({on.tasks["hub"]}, timeout=LONG_S)
        async with scene.running(only=["hub"], resume=None):
            again = await segmented(scene, "t2", "NEW_Nora")
            assert (again.values == first.values).all()


def test_what_inference_of_frozen_encoders_cannot_have(scene) -> None:
    for inference in ({"serve": "always"}, {"overlap": 0.5}, {"batch": 3}):
        scene.cast("t1", "t2", inference=inference, training={"encoders": "frozen"})
        with pytest.raises(ConfigError, match=r"\[inference\]"):
            _ = scene.settings
