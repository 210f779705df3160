"""Dice of whole volumes, and what is said of regions that are not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice

from splitpeer.training.metrics import VolumeDice, shown


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


def test_a_region_that_one_volume_lacks_is_scored_as_brats_does() -> None:
    dice = VolumeDice()
    assert dice.add(volume(4, 4, 0), volume(4, 4, 0))["ET"] == 1.0
    assert dice.add(volume(4, 4, 1), volume(4, 4, 0))["ET"] == 0.0
    assert dice.add(volume(4, 4, 1), volume(4, 4, 1))["ET"] == 1.0
    assert dice.result()["ET"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("predicted", [(0, 0), (0, 1), (1, 1)])
def test_a_region_that_no_mask_holds_has_no_score(predicted: tuple[int, int]) -> None:
    """Not 1, .5 or 0, whatever was predicted; and the mean is that of the others."""
    dice = VolumeDice()
    for voxels in predicted:
        dice.add(volume(4, 2, voxels), volume(4, 4, 0))
    assert dice.result() == {"WT": 1.0, "TC": pytest.approx(2 / 3), "ET": None, "mean": pytest.approx(5 / 6)}


def test_masks_without_anything_have_no_score_at_all() -> None:
    dice = VolumeDice()
    dice.add(volume(0, 0, 0), volume(0, 0, 0))
    assert dice.result() == dict.fromkeys(("WT", "TC", "ET", "mean"))
    assert VolumeDice().result()["mean"] is None
    assert [shown(None), shown(0.7777)] == ["-", "0.778"]


def test_monai_agrees() -> None:
    source = np.random.default_rng(3)
    for chance in (0.0, 0.01, 0.5):
        found, truth = source.random((2, 3, 4, 5, 6)) < chance
        theirs = compute_dice(torch.from_numpy(found)[None].float(), torch.from_numpy(truth)[None].float(),
                              ignore_empty=False)  # fmt: skip
        # float32 there, float64 here: a rounding of 2^-24 for each of the two operations.
        assert list(VolumeDice().add(found, truth).values()) == pytest.approx(theirs[0].tolist(), rel=2**-22)


def test_slices_score_too_and_misuse_is_named() -> None:
    assert VolumeDice().add(volume(8, 4, 2)[..., 0], volume(8, 4, 2)[..., 0])["WT"] == 1.0
    with pytest.raises(ValueError, match="expected"):
        VolumeDice().add(volume(1, 1, 1), volume(1, 1, 1)[..., 0])
