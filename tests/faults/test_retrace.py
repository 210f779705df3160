"""A recomputed history fits what is on the disks, and notices what should not have happened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from splitpeer.storage import checkpoint

from .federation import HUB, Setting
from .laboratory import Laboratory
from .retrace import Deed, differences, noted
from .schedules import GOING_ON, Fault, When, arm
from .verdict import Bench

SITE = "site-t2"
SKIP, DROP = GOING_ON[0], GOING_ON[-1]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@pytest.fixture
def away(bench: Bench) -> Iterator[tuple[Laboratory, list[Deed]]]:
    """A run in which a site was away for some steps, came back and took part again."""
    yield from _played(bench, SKIP, Fault("part", SITE, When(SITE, "got", "gradients", 4), {"seconds": 32.0}))


def _played(bench: Bench, setting: Setting, fault: Fault) -> Iterator[tuple[Laboratory, list[Deed]]]:
    lab, history = bench.laboratory(setting, 1, manager=True), []
    try:
        arm(lab, [fault])
        with noted(history):
            lab.run()
        assert [node.error for node in lab.nodes.values()] == [None] * 4
        yield lab, history
    finally:
        lab.close()


def _without(lab: Laboratory) -> list[int]:
    return [line["step"] for line in lab.metrics() if "t2" in line.get("without", ())]


def test_a_history_gives_the_result(away) -> None:
    lab, history = away
    assert 0 < len(_without(lab)) < lab.setting.steps - 4
    assert lab.result["absences"] == {SITE: len(_without(lab))}
    assert {deed.deed for deed in history} == {"new", "train", "apply", "advance", "save"}
    assert differences(lab, history) == ""


def test_so_does_one_with_a_crash_and_dropout(bench) -> None:
    for lab, history in _played(
        bench, DROP, Fault("kill", SITE, When(SITE, "got", "gradients", 4), {"back": 8.0})
    ):
        assert _without(lab)
        assert "back" in {deed.deed for deed in history}
        assert differences(lab, history) == ""


def test_gradients_applied_twice_are_noticed(away) -> None:
    lab, history = away
    place = next(n for n, deed in enumerate(history) if deed == Deed(SITE, "apply", 3))
    assert "cannot be followed: KeyError" in differences(
        lab, [*history[:place], history[place], *history[place:]]
    )


@pytest.mark.parametrize("deed", ["apply", "advance"])
def test_what_was_left_out_is_noticed(away, deed) -> None:
    lab, history = away
    place = next(n for n, one in enumerate(history) if (one.who, one.deed) == (SITE, deed))
    assert differences(lab, history[:place] + history[place + 1 :])


def test_a_step_without_another_site_is_noticed(away) -> None:
    lab, history = away
    trained = [
        replace(d, modalities=("flair", "t2")) if d.deed == "train" and d.step == 8 else d for d in history
    ]
    kept = [d for d in trained if (d.who, d.deed, d.step) != ("site-t1", "apply", 8)]
    assert differences(lab, kept)


def test_other_weights_on_a_disk_are_noticed(away) -> None:
    lab, history = away
    folder = lab.folder / HUB / "state" / f"try-{lab.result['run']}"
    step = lab.setting.steps
    tensors, meta, _ = checkpoint.load(folder, step)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1e-3
    checkpoint.save(folder, step, tensors, meta)
    assert (
        differences(lab, history)
        == f"the weights of {HUB} at step {step} are not those of its history ({name})"
    )
