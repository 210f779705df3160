"""Inference where each window leaves once (SP-11.19-14), and where only a sum can be read (SP-11.18-13)."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import nibabel as nib
import pytest

from splitpeer.errors import ConfigError

from .scene import Running, Scene
from .served import (
    SLOW,
    assert_mask,
    cast_with_folders,
    comes,
    held_out,
    nobody_asks,
    refused,
    segmented,
    serving,
    stop,
)

PRIVATE = ("t1", "t1ce", "t2")
SUM = {"features": [2, 4, 4, 8, 8, 4], "fusion": "secure-sum", "widths": [1, 1, 2, 2, 4], "sum_range": 64.0}


def cast_sum(scene: Scene, modalities: tuple[str, ...], own: dict[str, object], **job: object) -> Scene:
    """Sites that answer each other, under masks."""
    names = [f"site-{one}" for one in modalities]
    policy = {
        modality: {
            "inference": "listed",
            "inference_for": names,
            "partners": [name for name in names if name != f"site-{modality}"],
            **own,
        }
        for modality in modalities
    }
    return cast_with_folders(
        scene, policy, **{"model": SUM, "evaluation": {"overlap": 0.25, "batch": 16}, **job}
    )


def answers(scene: Scene, modality: str) -> list[str]:
    """What a site has released, as it has it in its run's folder."""
    (path,) = (scene.folder / f"site-{modality}" / "state").glob("try-*/answers.jsonl")
    return path.read_text().splitlines()


async def leaves_once(scene: Scene, running: AbstractAsyncContextManager[Running]) -> str:
    """SP-11.19-14: of a patient of the run, nobody is asked; of a new one, each window once, whoever asks and however
    often, and whichever process of the coordinator. Returns why there is no segmentation from all seats but one."""
    modalities = scene.modalities
    async with running as on:
        patient = held_out(scene)[0]
        own = await segmented(scene, "t1ce", patient)
        before = {one: answers(scene, one) for one in modalities}
        assert_mask(own, nib.load(scene.output / "predictions" / f"{patient}.nii.gz"))
        comes(scene, "NEW_Nora", 77)
        first = await segmented(scene, "t1ce", "NEW_Nora")
        assert first.provenance.used == modalities
        after = {one: answers(scene, one) for one in modalities}
        assert all(len(after[one]) > len(before[one]) for one in modalities)
        again = await segmented(scene, "t2", "NEW_Nora", want="probabilities")
        assert (again.regions == first.regions).all()
        await stop(on, "hub")
        assert on.tasks["hub"].result().complete
        # What was kept of the patient goes, and is asked for again as it was.
        nobody_asks(scene, "NEW_Nora")
        async with serving(scene, only=["hub"]):
            third = await segmented(scene, "t1ce", "NEW_Nora")
            assert (third.values == first.values).all()
            comes(scene, "NEW_Otto", 78, modalities=modalities[1:])
            status = await refused(scene, "t2", "NEW_Otto", require="all")
        assert {one: answers(scene, one) for one in modalities} == after
    assert (status.cause, status.exit) == ("incomplete", 1)
    return status.reason


async def test_each_window_leaves_once(frozen) -> None:
    assert "1 of 2 seats, 2 are required" in await leaves_once(frozen, serving(frozen))


async def test_each_window_of_a_sum_leaves_once(scene) -> None:
    """SP-11.18-14: all seats are required, whatever was asked for."""
    any_encoder = {"min_encoder_noise": 0, "min_encoder_rate": 0}
    policy = {"preset": "private", "min_partners": 2, "max_runs_per_patient": 4, **any_encoder}
    cast_sum(scene, PRIVATE, policy, training={"encoders": "frozen", **SLOW})
    reason = await leaves_once(scene, scene.running())
    assert "2 of 3 seats, 3 are required (t1: site-t1: no image that can be used)" in reason


async def test_a_sum_whose_encoders_have_learnt(scene) -> None:
    """A lost coordinator repeats no number (SP-11.19-8). That masks are those of the history of the step (SP-11.18-12),
    test_summing_history.py shows."""
    cast_sum(scene, ("t1ce", "t2"), {"min_partners": 1}, training=SLOW)
    async with scene.running() as on:
        patient = held_out(scene)[0]
        own = await segmented(scene, "t1ce", patient)
        assert_mask(own, nib.load(scene.output / "predictions" / f"{patient}.nii.gz"))
        comes(scene, "NEW_Nora", 77)
        first = await segmented(scene, "t1ce", "NEW_Nora")
        await stop(on, "hub")
        async with serving(scene, only=["hub"]):
            again = await segmented(scene, "t2", "NEW_Nora")
            assert (again.values == first.values).all()


def test_what_inference_of_frozen_encoders_cannot_have(scene) -> None:
    for inference in ({"serve": "always"}, {"overlap": 0.5}, {"batch": 3}):
        scene.cast("t1", "t2", inference=inference, training={"encoders": "frozen"})
        with pytest.raises(ConfigError, match=r"\[inference\]"):
            _ = scene.settings
