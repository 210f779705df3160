"""Members told from others: figures that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from splitpeer.leakage.membership import score_members


def test_figures_and_exact_intervals() -> None:
    scores = np.array([3.0, 5.0, 1.0, 0.0, 2.0, 2.0])
    members = np.array([True, True, True, False, False, False])
    found = score_members(scores, members, "abcdef")
    # Pairs won: 3 beats 0, 2, 2; 5 likewise; 1 beats 0 only.
    assert found["member_auc"].mean == pytest.approx(7 / 9) and found["member_auc"].floors == {
        "guessing": 0.5
    }
    assert found["member_tpr"].mean == pytest.approx(2 / 3) and found["member_tpr"].floors == {
        "guessing": 0.01
    }
    assert found["member_tpr"].low == pytest.approx(0.0943, abs=1e-3)
    assert found["member_auc"].low < 0.2 and found["member_auc"].high == 1.0


def test_a_hundred_others_allow_one_false_alarm() -> None:
    scores = np.concatenate([np.full(10, 98.5), np.arange(100)])
    members = np.arange(110) < 10
    assert score_members(scores, members, range(110))["member_tpr"].mean == 1
    assert score_members(scores[:109], members[:109], range(109))["member_tpr"].mean == 1
    assert score_members(scores - 1 * members, members, range(110))["member_tpr"].mean == 0


def test_slices_of_a_patient_are_one_patient() -> None:
    scores, members = np.array([0.0, 4.0, 1.0]), np.array([True, True, False])
    found = score_members(scores, members, ["a", "a", "b"])
    assert found["member_auc"].mean == 1 and found["member_auc"].patients == 2
    with pytest.raises(ValueError, match="one kind is missing"):
        score_members(scores[:2], members[:2], ["a", "a"])


def test_the_better_of_two_tests_counts_and_pays_for_the_choice() -> None:
    members = np.arange(20) < 10
    blind, sharp = np.tile([1.0, 2.0], 10), np.where(members, 2.0, 1.0)
    alone = score_members(sharp, members, range(20))["member_auc"]
    both = score_members(np.stack([blind, sharp], 1), members, range(20))["member_auc"]
    assert both.mean == alone.mean == 1
    # Clopper and Pearson, 10 of 10: (.05 / 2)^(1/10), and (.025 / 2)^(1/10) where two tests share the 5 %.
    assert alone.low == pytest.approx(0.025**0.1) and both.low == pytest.approx(0.0125**0.1)
    for figure in score_members(np.stack([blind, -sharp], 1), members, range(20)).values():
        assert figure.low is not None and figure.low < figure.floors["guessing"] < figure.high


def test_the_larger_of_two_guesses_is_seldom_called_a_find() -> None:
    """Twelve of each kind, scores of pure chance: at most 5 % of intervals lie above guessing, and none need to."""
    source, members = np.random.default_rng(0), np.arange(24) < 12
    lows = [
        score_members(source.standard_normal((24, 2)), members, range(24))["member_auc"].low
        for _ in range(200)
    ]
    assert np.mean(np.asarray(lows) > 0.5) <= 0.025
