"""What an adversary saw, sample by sample: answers are joined to the orders that they answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from splitpeer.attacks.base import Target
from splitpeer.attacks.view import coordinator_view, site_view
from splitpeer.errors import AttackImpossible
from splitproto.capture import Party
from splitproto.messages import Gradients
from splitproto.records import Seat
from tests.splitpeer.taped import (
    SEATS,
    Said,
    answer,
    answers,
    coordinators,
    graded,
    levels,
    lists,
    order,
    samples,
    sites,
    tape,
)

NORTH, EAST = Party("north", SEATS), Party("east", (Seat("t2", ("t2",)),))


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
    east = coordinator_view(capture, "t2", mode="train", choose=lambda of: of)
    assert {target.sample.key[0]: seen(target) for target in east.targets} == {
        1: [2.0],
        2: [2.1, 4.0],
        3: [4.1],
    }


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
    (target,) = coordinator_view(capture, "t2", mode="train", choose=lambda of: of).targets
    assert seen(target) == [3.0]


def test_gradients_belong_to_the_batch_that_was_answered_last(tmp_path: Path) -> None:
    first, again = order(4, samples(1, 2)), order(4, samples(2, 3))
    said: list[Said] = [
        ("hub", "in", first), ("hub", "out", answer(first, 1.0)),
        ("hub", "in", again), ("hub", "out", answer(again, 3.0)), ("hub", "in", graded(again, 0.5)),
    ]  # fmt: skip
    view = site_view(tape(tmp_path / "north.cap", sites(), said))
    graded_of = {
        target.sample.key[0]: [
            round(float(s.gradients["x0"].max()), 3) if s.gradients else None for s in target.shots
        ]
        for target in view.targets
    }
    assert graded_of == {1: [None], 2: [None, 0.5], 3: [0.6]}


def test_the_traffic_of_other_samples_is_at_hand_where_the_encoder_was_nearly_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step n trains the weights after n - 1: those of the evaluation had learned 8 steps."""
    asked = order(8, samples(1, 2), mode="evaluate")
    batches = {n: order(n, samples(1, n)) for n in (3, 5, 9, 18)}
    said: list[Said] = []
    for number, batch in (*batches.items(), (8, asked)):
        said += [("north", "out", batch), ("north", "in", answer(batch, float(number)))]
    capture = tape(tmp_path / "hub.cap", coordinators(NORTH), said)
    view = coordinator_view(capture, "t1", choose=lambda of: of[:1])
    assert [target.sample.key[0] for target in view.targets] == [1]
    sent = sorted(round(float(shot.activations["x0"].flat[0]), 3) for shot in view.traffic())
    # Of all samples but the one under attack, from 4 to 16 learned steps: not of the third step nor the eighteenth.
    assert sent == [5.1, 8.1, 9.1]
    octets = sum(array.nbytes for array in view.targets[0].shots[0].activations.values())
    monkeypatch.setattr("splitpeer.attacks.view.MOST_TRAFFIC", 2 * octets)
    few = coordinator_view(capture, "t1", choose=lambda of: of[:1]).traffic()
    assert sorted(round(float(shot.activations["x0"].flat[0]), 3) for shot in few) == [8.1, 9.1]


# --- seats -------------------------------------------------------------------------------------------------------

T1 = Seat("t1", ("t1",))
MRI = Seat("mri", ("t2", "flair"))


def test_two_sites_of_one_modality_are_told_apart(tmp_path: Path) -> None:
    """Each is sent its own samples of the batch, with their places in it."""
    ours = replace(order(3, samples(1, 4)), places=(0, 3))
    theirs = replace(order(3, samples(2, 3)), places=(1, 2))
    said: list[Said] = [
        ("north", "out", ours), ("south", "out", theirs),
        ("south", "in", answer(theirs, 2.0)), ("north", "in", answer(ours, 1.0)),
    ]  # fmt: skip
    header = coordinators(Party("north", (T1,)), Party("south", (T1,), ("gaussian:1",)))
    capture = tape(tmp_path / "hub.cap", header, said)
    found = {
        site: coordinator_view(capture, "t1", site=site, mode="train", choose=lambda of: of)
        for site in ("north", "south")
    }
    shots = {
        site: {t.sample.key[0]: (seen(t), [s.index for s in t.shots]) for t in view.targets}
        for site, view in found.items()
    }
    assert shots["north"] == {1: ([1.0], [0]), 4: ([1.1], [3])}
    assert shots["south"] == {2: ([2.0], [1]), 3: ([2.1], [2])}
    assert [view.defences for view in found.values()] == [(), ("gaussian:1",)]
    assert [view.seats for view in found.values()] == [(T1,)] * 2
    assert coordinator_view(capture, "t1", mode="train").site == "north"
    with pytest.raises(AttackImpossible, match="west does not fill t1 in this capture; north, south does"):
        coordinator_view(capture, "t1", site="west")


def test_rows_of_a_seat_are_of_the_patients_listed_for_it(tmp_path: Path) -> None:
    """SP-11.8-5: a site with two seats; patient 2 has no MRI, patient 3 nothing else."""
    batch = order(2, samples(1, 2, 3))
    said: list[Said] = [
        ("east", "in", lists((1, None), (2, (1,)), (3, (0,)))), ("east", "out", batch),
        ("east", "in", answers(batch, {"mri": (2, 5.0), "t1": (2, 7.0)})),
    ]  # fmt: skip
    capture = tape(tmp_path / "hub.cap", coordinators(Party("east", (MRI, T1))), said)
    mri, t1 = (coordinator_view(capture, seat, mode="train", choose=lambda of: of) for seat in ("mri", "t1"))
    assert {t.sample.key[0]: (seen(t), t.shots[0].index) for t in mri.targets} == {
        1: ([5.0], 0),
        3: ([5.1], 2),
    }
    assert {t.sample.key[0]: (seen(t), t.shots[0].index) for t in t1.targets} == {
        1: ([7.0], 0),
        2: ([7.1], 1),
    }
    assert mri.seat == MRI and mri.seats == (MRI, T1)


def test_gradients_of_a_seat_that_sat_out_are_none(tmp_path: Path) -> None:
    batch = order(2, samples(1, 2))
    back = Gradients(2, {f"t1/{name}": array for name, array in levels(2, 0.5).items()})
    said: list[Said] = [
        ("hub", "out", lists((1, None), (2, None))), ("hub", "in", batch),
        ("hub", "out", answers(batch, {"mri": (2, 5.0), "t1": (2, 7.0)})), ("hub", "in", back),
    ]  # fmt: skip
    capture = tape(tmp_path / "east.cap", sites(seats=(MRI, T1)), said)
    mri, t1 = (site_view(capture, seat) for seat in ("mri", "t1"))
    assert [bool(s.gradients) for t in mri.targets for s in t.shots] == [False, False]
    assert [round(float(s.gradients["x0"].max()), 3) for t in t1.targets for s in t.shots] == [0.5, 0.6]
    assert site_view(capture).seat == MRI
