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
