"""Scores of a recovered outline against MONAI's ROC, brute force, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_roc_auc

from splitpeer.leakage.masks import auc, dice, finite, oracle_dice, otsu


def test_auc_is_that_of_monai_with_ties() -> None:
    random = np.random.default_rng(0)
    target = random.random(300) < 0.2
    scores = np.round(random.random(300) + 0.3 * target, 1)
    expected = compute_roc_auc(torch.tensor(scores), torch.tensor(target.astype(int)))
    assert auc(target, scores) == pytest.approx(float(expected))


def test_auc_by_hand() -> None:
    assert auc(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])) == 0.75
    assert auc(np.array([0, 1]), np.array([3.0, 3.0])) == 0.5
    assert math.isnan(auc(np.zeros(4), np.arange(4.0)))
    assert math.isnan(auc(np.ones(4), np.arange(4.0)))


def test_dice_by_hand() -> None:
    assert dice(np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0])) == 0.5
    assert math.isnan(dice(np.zeros(4), np.ones(4)))


def test_oracle_is_the_best_of_all_thresholds() -> None:
    random = np.random.default_rng(1)
    for digits in (1, 6):
        target = random.random(80) < 0.3
        scores = np.round(random.random(80) + 0.4 * target, digits)
        brute = max(dice(target, scores >= cut) for cut in np.unique(scores))
        assert oracle_dice(target, scores) == pytest.approx(brute)


def test_otsu_finds_two_heaps_and_nothing_in_one_value() -> None:
    scores = np.r_[np.linspace(0, 0.3, 50), np.linspace(0.7, 1, 10)]
    # The threshold is the middle of a bin of the histogram: one score of the edge may fall on either side.
    assert dice(np.arange(60) >= 50, otsu(scores)) > 0.9
    assert not otsu(np.full((4, 4), 7.0)).any()


def test_nan_points_at_no_tumour() -> None:
    np.testing.assert_array_equal(finite(np.array([2.0, np.nan, 5.0, np.inf])), [2, 2, 5, 2])
    np.testing.assert_array_equal(finite(np.array([np.nan, np.nan])), [0, 0])
