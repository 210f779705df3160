"""Dice of whole volumes, with the convention for empty regions that was asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from splitpeer.training.metrics import VolumeDice


def volume(*counts: int) -> np.ndarray:
    """A mask [3, 4, 4, 4] with the first `counts[region]` voxels set."""
    masks = np.zeros((3, 64), dtype=bool)
    for region, count in enumerate(counts):
        masks[region, :count] = True
    return masks.reshape(3, 4, 4, 4)


def test_values_by_hand() -> None:
    dice = VolumeDice()
    first = dice.add(volume(8, 4, 2), volume(4, 4, 6))
    assert first == pytest.approx({"WT": 2 * 4 / 12, "TC": 1.0, "ET": 2 * 2 / 8})
    dice.add(volume(10, 0, 0), volume(10, 5, 1))
    assert len(dice) == 2
    result = dice.result()
    assert result == pytest.approx({"WT": (8 / 12 + 1) / 2, "TC": 0.5, "ET": 0.25, "mean": result["mean"]})
    assert result["mean"] == pytest.approx((result["WT"] + result["TC"] + result["ET"]) / 3)


def test_empty_regions_as_brats_scores() -> None:
    dice = VolumeDice()
    assert dice.add(volume(4, 4, 0), volume(4, 4, 0))["ET"] == 1.0
    assert dice.add(volume(4, 4, 1), volume(4, 4, 0))["ET"] == 0.0
    assert dice.result()["ET"] == 0.5


def test_empty_regions_skipped() -> None:
    dice = VolumeDice(empty="skip")
    assert math.isnan(dice.add(volume(4, 4, 1), volume(4, 4, 0))["ET"])
    assert math.isnan(dice.result()["ET"])
    assert dice.result()["mean"] == 1.0
    dice.add(volume(4, 4, 1), volume(4, 4, 2))
    assert dice.result()["ET"] == pytest.approx(2 / 3)


def test_slices_score_too_and_misuse_is_named() -> None:
    assert VolumeDice().add(volume(8, 4, 2)[..., 0], volume(8, 4, 2)[..., 0])["WT"] == 1.0
    with pytest.raises(ValueError, match="expected"):
        VolumeDice().add(volume(1, 1, 1), volume(1, 1, 1)[..., 0])
    with pytest.raises(ValueError, match="empty must be"):
        VolumeDice(empty="zero")
    assert math.isnan(VolumeDice().result()["mean"])
