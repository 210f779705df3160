"""SP-11.17-7: consent that is withdrawn after a patient's activations are in the feature bank takes them out again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from splitpeer.cli import main
from splitpeer.errors import JobFailed
from splitpeer.storage.bank import INDEX, Bank, BankEntry

from . import test_secure_sum as summed
from .scene import PATIENTS, WAIT_S, Scene
from .test_frozen import FROZEN, Whole, bank_of
from .test_frozen_troubles import collected

TRAINING = {**FROZEN, "steps": 6}
COARSE = {"batch": 16, "overlap": 0.0}
SOME = {"window": [48, 48], "validation": 2, "max_withdrawn": 1, "min_patients": 2}


def withdrawn_list(scene: Scene) -> Path:
    return scene.folder / "withdrawn.txt"


@pytest.fixture
def plain(scene: Scene) -> Scene:
    scene.cast("t1ce", "t2", training=TRAINING, evaluation=COARSE, data=SOME)
    scene.client("t2", data={"withdrawn": str(withdrawn_list(scene)), "cache_mib": 0})
    return scene


@pytest.fixture
def sums(scene: Scene) -> Scene:
    summed.cast(scene, training=TRAINING, evaluation=COARSE, data=SOME)
    scene.client(
        "t2",
        data={"withdrawn": str(withdrawn_list(scene)), "cache_mib": 0},
        policy={"coordinators": ["hub"], "partners": ["site-flair", "site-t1"]},
    )
    return scene


def trained_on(scene: Scene, number: int = 0) -> str:
    """The name of a patient who is not held out."""
    return [name for name in PATIENTS if scene.key(name) in scene.patients()[0]][number]


def files_of(scene: Scene, *patients: str) -> list[Path]:
    """Releases of these in the bank, at every site."""
    keys, bank = {scene.key(name).hex() for name in patients}, bank_of(scene)
    index = json.loads((bank / INDEX).read_text())["releases"]
    paths = [
        bank / one["site"] / f"{one['number']:08d}.safetensors" for one in index if one["patient"] in keys
    ]
    return [path for path in paths if path.exists()]


def at_step_five(scene: Scene) -> None:
    """As if the coordinator had died before the last step."""
    for checkpoint in bank_of(scene).parent.glob("step-*"):
        if checkpoint.name != "step-00000005.safetensors":
            checkpoint.unlink()


def torn(scene: Scene) -> None:
    """One release of another patient is not there, so the sites are needed once more."""
    at_step_five(scene)
    files_of(scene, trained_on(scene, 1))[0].unlink()


async def test_between_two_starts_of_a_run(plain: Scene) -> None:
    """The whole patient goes, from what other sites released too, and the rest of the run is without."""
    await collected(plain)
    torn(plain)
    gone = trained_on(plain)
    assert files_of(plain, gone)
    withdrawn_list(plain).write_text(gone)
    ran = await plain.together(resume=True)
    assert ran.error is None and ran.result.complete, ran
    assert files_of(plain, gone) == []
    assert files_of(plain, trained_on(plain, 1)), "the others are as they were"
    assert [(one["site"], one["step"], one["cause"]) for one in ran.result.withdrawn] == [
        ("site-t2", 6, "consent")
    ]
    # What is removed is neither kept nor due.
    index = json.loads((bank_of(plain) / INDEX).read_text())["releases"]
    left = sum(len(one["origins"]) for one in index if one["patient"] != plain.key(gone).hex())
    status = json.loads((plain.folder / "hub" / "state" / "status.json").read_text())["work"]
    assert status["bank"].startswith(f"{left} of {left} windows, ")
    assert plain.losses()[5] == last_loss_without(plain, gone)


async def test_while_sums_are_collected(sums: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator stops when all of the patient's sums are kept; on its return none is left or asked for."""
    key = min(sums.patients()[0])
    gone = next(name for name in PATIENTS if sums.key(name) == key)
    honest, loop = Bank.put, asyncio.get_running_loop()
    async with sums.running() as on:

        def put(self: Bank, release: BankEntry, tensors: Any) -> None:
            honest(self, release, tensors)
            if key not in {one.key for one in self.missing()}:
                loop.call_soon_threadsafe(on.stops["hub"].set)

        monkeypatch.setattr(Bank, "put", put)
        await asyncio.wait([on.tasks["hub"]], timeout=WAIT_S)
    monkeypatch.setattr(Bank, "put", honest)
    assert files_of(sums, gone)
    withdrawn_list(sums).write_text(gone)
    ran = await sums.together(resume=True)
    assert ran.error is None and ran.result.complete, ran
    assert files_of(sums, gone) == []
    assert files_of(sums, *(name for name in PATIENTS if name != gone))
    assert [(one["site"], one["step"], one["cause"]) for one in ran.result.withdrawn] == [
        ("site-t2", 1, "consent")
    ]


def last_loss_without(scene: Scene, patient: str) -> float:
    """Of step 6 in one process: five steps with the patient, the sixth without."""
    whole = Whole(scene)
    *_, last = whole.train(without={scene.key(patient): 6})
    return last


async def test_beyond_the_limit_the_run_fails_and_the_releases_are_gone_all_the_same(plain: Scene) -> None:
    await collected(plain)
    torn(plain)
    gone = [trained_on(plain, number) for number in (0, 2)]
    withdrawn_list(plain).write_text("\n".join(gone))
    ran = await plain.together(resume=True)
    assert isinstance(ran.error, JobFailed) and "may withdraw 1 ([data] max_withdrawn)" in str(ran.error), ran
    assert files_of(plain, *gone) == []


async def test_a_coordinator_that_died_before_it_removed_them(plain: Scene) -> None:
    """The record has the withdrawal, the bank has the files; a mask of its own that was bad takes nothing out."""
    await collected(plain)
    gone, masked = trained_on(plain), trained_on(plain, 1)
    path = plain.folder / "hub" / "state" / "try.run.json"
    record: dict[str, Any] = json.loads(path.read_text())
    record["withdrawn"] = [
        {"key": plain.key(gone).hex(), "step": 1, "site": "site-t2", "cause": "consent"},
        {"key": plain.key(masked).hex(), "step": 1, "site": "", "cause": "truncated"},
    ]
    path.write_text(json.dumps(record))
    ran = await plain.together(resume=True, only=["hub"])
    assert ran.error is None and ran.result.complete, ran
    assert files_of(plain, gone) == []
    assert files_of(plain, masked)


async def test_a_patient_who_is_dropped_by_hand_when_the_sites_have_stopped(
    plain: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """No site is asked: the rest of the run is made without the patient."""
    await collected(plain)
    at_step_five(plain)
    gone = trained_on(plain)
    with pytest.raises(SystemExit) as left:
        main(["bank", "drop", "try", "--patient", gone, "--config", str(plain.folder / "hub" / "peer.toml")])
    assert not left.value.code
    assert "What the decoder has learned by step 5 stays in it" in capsys.readouterr().out
    assert files_of(plain, gone) == []
    ran = await plain.together(resume=True, only=["hub"])
    assert ran.error is None and ran.result.complete, ran
    assert [(one["site"], one["step"], one["cause"]) for one in ran.result.withdrawn] == [("", 6, "consent")]
    assert plain.losses()[5] == last_loss_without(plain, gone)
