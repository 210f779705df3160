"""Consent that is withdrawn when the run is complete and serves: predictions of the patient go (SP-11.20-12)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from splitpeer.cli import main
from splitpeer.daemon.trail import NAME, entries
from splitpeer.logs import handle

from .scene import Scene
from .served import held_out, refused, segmented, serving, stop, until, withdrawn_at
from .test_labels_and_the_rest import JOB, label_site, moved
from .test_labels_at_a_site import table


def lines(scene: Scene, who: str, event: str) -> list[dict[str, Any]]:
    """Of an audit trail."""
    return [line for line in entries(scene.folder / who / "state" / NAME) if line["event"] == event]


def predictions(folder: Path) -> set[str]:
    return {path.name.removesuffix(".nii.gz") for path in (folder / "predictions").iterdir()}


async def test_on_joining(joint: Scene) -> None:
    """Nobody asks about the patient."""
    (patient,) = held_out(joint)
    key = joint.key(patient)
    async with serving(joint) as on:
        await until(lambda: patient in predictions(joint.output))
        await stop(on, "site-t2")
        withdrawn_at(joint, "t2").write_text(f"{patient}\n")
        async with serving(joint, only=["site-t2"]):
            await until(lambda: bool(lines(joint, "hub", "predictions.removed")))
    assert predictions(joint.output) == set()
    assert [line["patients"] for line in lines(joint, "hub", "predictions.removed")] == [handle(key)]
    (said,) = lines(joint, "hub", "patient.withdrawn")
    assert (said["site"], said["patient"], said["cause"]) == ("site-t2", handle(key), "consent was withdrawn")
    record = json.loads((joint.folder / "hub" / "state" / "try.run.json").read_text())
    assert [(one["key"], one["step"]) for one in record["withdrawn"]] == [(key.hex(), 4)]


async def asked_about(scene: Scene) -> None:
    (patient,) = held_out(scene)
    async with serving(scene) as on:
        await segmented(scene, "t1ce", patient)
        withdrawn_at(scene, "t1ce").write_text(f"{patient}\n")
        assert (await refused(scene, "t1ce", patient)).cause == "unusable"
        await until(lambda: bool(lines(scene, "hub", "predictions.removed")))
        assert predictions(scene.output) == set()
        assert not on.tasks["hub"].done()
    assert [line["site"] for line in lines(scene, "hub", "patient.withdrawn")] == ["site-t1ce"]


async def test_when_it_is_asked_about(joint: Scene) -> None:
    await asked_about(joint)


async def test_with_frozen_encoders(frozen: Scene) -> None:
    await asked_about(frozen)


async def test_who_was_dropped_from_the_bank(frozen: Scene) -> None:
    (patient,) = held_out(frozen)
    with pytest.raises(SystemExit) as left:
        main(
            [
                "bank",
                "drop",
                "try",
                "--patient",
                patient,
                "--config",
                str(frozen.folder / "hub" / "peer.toml"),
            ]
        )
    assert not left.value.code
    async with serving(frozen, only=["hub"]):
        await until(lambda: bool(lines(frozen, "hub", "predictions.removed")))
    assert predictions(frozen.output) == set()


async def test_the_site_of_the_labels_is_told(scene: Scene) -> None:
    """It fills no seat; figures that were told stay what they are."""
    scene.cast("flair", "t1", **JOB)
    patients = held_out(scene)
    moved(scene, "site-t2", inference={})
    policy = {"inference": "listed", "inference_for": ["site-flair", "site-t1"]}
    for one in ("flair", "t1"):
        data = {"withdrawn": str(withdrawn_at(scene, one))}
        scene.client(one, data=data, policy={"coordinators": ["hub"], **policy})
    label_site(scene, "none")
    gone, stays = patients
    async with scene.running(only=["hub", "site-flair", "site-t1", "site-t2"]):
        await segmented(scene, "t1", gone)
        (folder,) = (scene.folder / "site-t2" / "state").glob("try-*")
        assert predictions(folder) == {gone, stays}
        before = table(scene, "site-t2", 3)["rows"]
        withdrawn_at(scene, "t1").write_text(f"{gone}\n")
        await refused(scene, "t1", gone)
        await until(lambda: predictions(folder) == {stays})
        await until(lambda: bool(lines(scene, "site-t2", "predictions.removed")))
    after = table(scene, "site-t2", 3)["rows"]
    assert {row["patient"] for row in after.values()} == {stays, "(withdrawn) 1"}
    assert [row["dice"] for row in after.values()] == [row["dice"] for row in before.values()]
    told = lines(scene, "site-t2", "patient.withdrawn")
    assert [line["patient"] for line in told] == [handle(scene.key(gone))]
