"""What an adversary saw, sample by sample: answers are joined to the orders that they answer."""

from __future__ import annotations

from pathlib import Path

from splitpeer.attacks.base import Target
from splitpeer.attacks.view import coordinator_view, site_view
from splitproto.capture import Party
from tests.splitpeer.taped import Said, answer, coordinators, graded, order, samples, sites, tape

NORTH, EAST = Party("north", "t1"), Party("east", "t2")


def seen(target: Target) -> list[float]:
    return [round(float(shot.activations["x0"].flat[0]), 3) for shot in target.shots]


def test_an_answer_belongs_to_the_order_of_its_digest(tmp_path: Path) -> None:
    """A patient was withdrawn: the batch was drawn again while the answers to the first were under way."""
    first, again = order(4, samples(1, 2)), order(4, samples(2, 3))
    said: list[Said] = [
        *((site, "out", first) for site in ("north", "east")),
        *((site, "out", again) for site in ("north", "east")),
        ("north", "in", answer(first, 1.0)), ("east", "in", answer(first, 2.0)),
        ("north", "in", answer(again, 3.0)), ("east", "in", answer(again, 4.0)),
    ]  # fmt: skip
    capture = tape(tmp_path / "hub.cap", coordinators(NORTH, EAST), said)
    view = coordinator_view(capture, "t1", mode="train", choose=lambda of: of)
    found = {target.sample.key[0]: target for target in view.targets}
    assert {key: seen(target) for key, target in found.items()} == {1: [1.0], 2: [1.1, 3.0], 3: [3.1]}
    assert round(float(found[2].shots[0].others["t2"]["x0"].max()), 3) == 2.1


def test_a_batch_that_is_sent_twice_is_two_releases(tmp_path: Path) -> None:
    """East was lost before it answered, and work went back: the same order, answered by both."""
    batch = order(4, samples(1))
    said: list[Said] = [
        ("north", "out", batch), ("east", "out", batch), ("north", "in", answer(batch, 1.0)),
        ("north", "out", batch), ("east", "out", batch),
        ("north", "in", answer(batch, 2.0)), ("east", "in", answer(batch, 3.0)),
    ]  # fmt: skip
    capture = tape(tmp_path / "hub.cap", coordinators(NORTH, EAST), said)
    (target,) = coordinator_view(capture, "t1", mode="train", choose=lambda of: of).targets
    assert seen(target) == [1.0, 2.0]
    assert [sorted(shot.others) for shot in target.shots] == [[], ["t2"]]


def test_gradients_belong_to_the_batch_that_was_answered_last(tmp_path: Path) -> None:
    first, again = order(4, samples(1, 2)), order(4, samples(2, 3))
    said: list[Said] = [
        ("hub", "in", first), ("hub", "out", answer(first, 1.0)),
        ("hub", "in", again), ("hub", "out", answer(again, 3.0)), ("hub", "in", graded(again, 0.5)),
    ]  # fmt: skip
    view = site_view(tape(tmp_path / "north.cap", sites(modality="t1"), said))
    graded_of = {
        target.sample.key[0]: [
            round(float(s.gradients["x0"].max()), 3) if s.gradients else None for s in target.shots
        ]
        for target in view.targets
    }
    assert graded_of == {1: [None], 2: [0.5, None], 3: [0.6]}
