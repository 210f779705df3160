"""Dice, distances and volumes of whole patients, and how missing regions are reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from scipy import ndimage

from splitpeer.training.metrics import Surfaces, VolumeDice, hausdorff
from splitpeer.training.scores import shown


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


def test_volumes_of_their_own_are_over_the_regions_that_some_mask_holds() -> None:
    dice = VolumeDice(("a", "b", "never"))
    assert dice.means() == []
    one = np.array([[1, 0], [1, 1], [0, 0]], bool)
    dice.add(one, one)
    dice.add(one, np.array([[1, 1], [1, 1], [0, 0]], bool))
    assert dice.means() == [1.0, pytest.approx((2 / 3 + 1) / 2)]
    assert dice.result()["mean"] == pytest.approx(np.mean(dice.means()))


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


def test_regions_of_any_task() -> None:
    dice = VolumeDice(("organ", "lesion"))
    assert dice.add(volume(8, 4, 0)[:2], volume(8, 2, 0)[:2]) == pytest.approx(
        {"organ": 1.0, "lesion": 2 * 2 / 6}
    )
    assert list(dice.result()) == ["organ", "lesion", "mean"]
    with pytest.raises(ValueError, match=r"expected \[2, \.\.\.\] of both"):
        dice.add(volume(8, 4, 0), volume(8, 2, 0))


# --- distances and volumes ------------------------------------------------------------------------------------

SPACING = (0.5, 2.0, 3.0)


def box(x: tuple[int, int], y: tuple[int, int], z: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((20, 16, 12), bool)
    mask[slice(*x), slice(*y), slice(*z)] = True
    return mask


@pytest.mark.parametrize(
    ("moved", "millimetres"),
    [
        (((6, 12), (4, 10), (3, 8)), 2 * 0.5),
        (((4, 10), (6, 12), (3, 8)), 2 * 2.0),
        (((4, 10), (4, 10), (4, 9)), 3.0),
    ],
)
def test_a_box_that_is_moved_is_as_far_away_as_it_was_moved(moved, millimetres: float) -> None:
    """Along one axis at a time, in the millimetres of that axis: more than a twentieth of the surface moves so far."""
    assert hausdorff(box((4, 10), (4, 10), (3, 8)), box(*moved), SPACING) == pytest.approx(millimetres)


def test_monai_agrees_on_distances_with_voxels_of_three_sizes() -> None:
    """Scattered voxels, some of them where the volume ends, and compact masks that are cut off there."""
    source = np.random.default_rng(5)
    for size in (1, 1, 1, 1, 3, 5):
        found = ndimage.binary_dilation(
            source.random((2, 14, 12, 10)) > 0.9**size**3, np.ones((1, *[size] * 3))
        )
        truth = np.roll(found, (1, 2), (1, 3)) & (source.random(found.shape) > 0.2)
        theirs = compute_hausdorff_distance(
            torch.from_numpy(found)[None].float(), torch.from_numpy(truth)[None].float(), include_background=True,
            percentile=95, spacing=SPACING,
        )  # fmt: skip
        ours = Surfaces(("a", "b")).add(found, truth, SPACING)
        # In float32 there: a rounding of each distance, and three of a rank among n voxels, which moves the percentile
        # by no more than that part of the way to the next distance. In float64 here.
        longest, voxels = np.linalg.norm(np.multiply(found.shape[1:], SPACING)), found[0].size
        assert list(ours.values()) == pytest.approx(
            theirs[0].tolist(), rel=2**-22, abs=3 * voxels * 2**-24 * longest
        )
        exact = [by_hand(*pair) for pair in zip(found, truth, strict=True)]
        assert list(ours.values()) == pytest.approx(exact, rel=1e-12)


def by_hand(one: np.ndarray, other: np.ndarray) -> float:
    """The distances of all pairs of surface voxels."""
    places = []
    for mask in (one, other):
        wide = np.pad(mask, 1)
        inside = [np.roll(wide, step, axis)[1:-1, 1:-1, 1:-1] for axis in range(3) for step in (-1, 1)]
        places.append(np.argwhere(mask & ~np.logical_and.reduce(inside)) * np.array(SPACING))
    apart = np.linalg.norm(places[0][:, None] - places[1][None], axis=2)
    return float(max(np.percentile(apart.min(axis), 95) for axis in (0, 1)))


def test_of_empty_masks_the_rule_of_brats_holds() -> None:
    """0 where both are empty, the diagonal of the volume where one is: 373.13 mm on BraTS's grid."""
    nothing, something = box((0, 0), (0, 0), (0, 0)), box((4, 10), (4, 10), (3, 8))
    assert hausdorff(nothing, nothing, SPACING) == 0
    diagonal = float(np.linalg.norm([10, 32, 36]))
    assert (
        hausdorff(nothing, something, SPACING)
        == hausdorff(something, nothing, SPACING)
        == pytest.approx(diagonal)
    )
    brats = np.zeros((240, 240, 155), bool)
    one = brats.copy()
    one[0, 0, 0] = True
    assert hausdorff(one, brats, (1, 1, 1)) == pytest.approx(373.13, abs=0.005)


def test_distances_and_volumes_of_several_patients() -> None:
    surfaces = Surfaces(("organ", "lesion", "absent"))
    nothing, small, large = (
        box((0, 0), (0, 0), (0, 0)),
        box((4, 10), (4, 10), (3, 8)),
        box((4, 10), (4, 10), (4, 9)),
    )
    assert (
        surfaces.distances() == dict.fromkeys(("organ", "lesion", "absent", "mean"))
        and surfaces.volumes() == {}
    )
    surfaces.add(np.stack([small, small, small]), np.stack([small, large, nothing]), SPACING)
    surfaces.add(np.stack([small, nothing, nothing]), np.stack([small, nothing, nothing]), SPACING)
    assert len(surfaces) == 2
    assert surfaces.distances() == pytest.approx({"organ": 0.0, "lesion": 1.5, "absent": None, "mean": 0.75})
    millilitres = 6 * 6 * 5 * 3.0 / 1000
    assert surfaces.volumes() == {
        "organ": pytest.approx({"predicted": millilitres, "true": millilitres}),
        "lesion": pytest.approx({"predicted": millilitres / 2, "true": millilitres / 2}),
        "absent": pytest.approx({"predicted": millilitres / 2, "true": 0.0}),
    }


def test_a_single_slice_has_distances_too() -> None:
    one, other = np.zeros((10, 10, 1), bool), np.zeros((10, 10, 1), bool)
    one[2:5, 2:5], other[3:6, 2:5] = True, True
    assert hausdorff(one, other, (2.0, 1.0, 5.0)) == pytest.approx(2.0)
