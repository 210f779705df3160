"""Another decoder from the feature bank of an earlier run: no site is online, and nothing leaves one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from splitpeer.errors import ConfigError, DataError
from splitpeer.storage.bank import Bank

from . import test_secure_sum as summed
from .scene import Scene
from .test_frozen import FROZEN, Whole, bank_of, digests

COARSE = {"batch": 16, "overlap": 0.0}
SOME = {"window": [48, 48], "validation": 2}


def another(scene: Scene, bank: Path, **over: Any) -> None:
    """A job of other steps, rate and seed of the batches."""
    training = {**FROZEN, "steps": 7, "learning_rate": 0.02, "checkpoint_every": 3, "bank": str(bank)}
    scene.job(**{"training": training, "evaluation": COARSE, "data": SOME, **over})


def some_file(bank: Path) -> Path:
    return next(bank.glob("site-t2/*"))


@pytest.fixture
async def bank(scene: Scene) -> Path:
    """Of a run that is over."""
    scene.cast("t1ce", "t2", training={**FROZEN, "steps": 2}, evaluation=COARSE, data=SOME)
    ran = await scene.together()
    assert ran.error is None and ran.result.complete, ran
    return bank_of(scene)


async def test_it_is_that_of_one_process_and_survives_an_interruption(scene: Scene, bank: Path) -> None:
    before = digests(bank)
    another(scene, bank)
    ran = await scene.together(resume=False, only=["hub"])
    assert ran.error is None and ran.result.complete, ran
    whole = Whole(scene)
    losses = whole.train()
    assert scene.losses() == losses
    assert ran.result.dice == pytest.approx(whole.dice(), abs=1e-6)
    record = scene.folder / "hub" / "state" / "try.run.json"
    assert (json.loads(record.read_text())["state"], ran.result.released_bytes) == ("over", 0)
    assert [*(scene.folder / "hub" / "state").glob("*/bank")] == [bank], (
        "there is one bank, and it was only read"
    )
    assert digests(bank) == before
    # As if it had died after step 6, and a patient had been dropped since.
    (scene.output / "result.json").unlink()
    record.write_text(json.dumps({**json.loads(record.read_text()), "state": "running"}))
    for path in record.parent.glob("*/step-00000007*"):
        path.unlink()
    gone, opened = scene.patients()[0][0], Bank.open(bank)
    assert opened is not None
    opened.drop({gone})
    ran = await scene.together(resume=True, only=["hub"])
    assert ran.error is None and ran.result.complete, ran
    assert [(one["site"], one["step"]) for one in ran.result.withdrawn] == [("", 7)]
    assert scene.losses()[:6] == losses[:6]
    # A run that begins now does not know the patient at all.
    ran = await scene.together(resume=False, only=["hub"])
    assert ran.error is None and (ran.result.patients, ran.result.withdrawn) == (5, []), ran


async def test_from_sums_as_well(scene: Scene) -> None:
    summed.cast(scene, training={**FROZEN, "steps": 2}, evaluation=COARSE, data=SOME)
    ran = await scene.together()
    assert ran.error is None and ran.result.complete, ran
    another(scene, bank_of(scene), model=summed.MODEL)
    ran = await scene.together(resume=False, only=["hub"])
    assert ran.error is None and ran.result.complete, ran
    assert scene.losses() == summed.Summed(scene).train()


async def test_a_bank_that_does_not_fit_is_refused_in_one_line(scene: Scene, bank: Path) -> None:
    async def refused(kind: type[Exception], words: str) -> None:
        ran = await scene.together(resume=False, only=["hub"])
        assert isinstance(ran.error, kind) and words in str(ran.error) and "\n" not in str(ran.error), ran

    for over in (
        {"evaluation": {**COARSE, "overlap": 0.5}},
        {"sites": {"site-t1ce": "t2", "site-t2": "t1ce"}},
        {"model": {"features": [2, 4, 4, 8, 8, 8]}},
    ):
        another(scene, bank, **over)
        await refused(DataError, "was made on other terms ([sites], [seats], [model]")
    another(scene, bank.parent)
    await refused(ConfigError, "no feature bank is there ([training] bank)")
    another(scene, bank)
    some_file(bank).unlink()
    await refused(DataError, "is not complete, 1 releases are missing")
    another(scene, bank, training={"steps": 2, "bank": str(bank)})
    with pytest.raises(ConfigError, match=r"\[training\] bank is for a job with encoders = \"frozen\""):
        assert scene.settings
