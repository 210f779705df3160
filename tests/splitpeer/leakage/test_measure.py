"""Whole tables of figures on a small cohort: floors, recognition, outlines."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from splitpeer.leakage.floors import (
    MEAN_IMAGE,
    OTHER_PATIENT,
    Floors,
    Gallery,
    Others,
    mean_images,
    other_images,
)
from splitpeer.leakage.measure import (
    CHANCE,
    INSIDE,
    OTHER_MASKS,
    OWN_IMAGE,
    RANDOM,
    SHUFFLED,
    reidentification,
    score_images,
    score_masks,
)
from splitpeer.leakage.metrics import brain_mask
from splitpeer.leakage.own_image import OwnImage, foreground
from tests.splitpeer.leakage.oracles import explained

SIZE = 32
X, Y = np.mgrid[:SIZE, :SIZE] - SIZE / 2 + 0.5
COMMON = gaussian_filter(np.random.default_rng(99).standard_normal((SIZE, SIZE)), 3)


def cohort(count: int, seed: int, slices: int = 1) -> np.ndarray:
    """[count * slices, 1, 32, 32]: a common anatomy, each patient's own, a brain-shaped background."""
    random = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        own = gaussian_filter(random.standard_normal((SIZE, SIZE)), 1.5)
        radius = random.uniform(11, 14)
        for level in range(slices):
            image = COMMON / COMMON.std() + own / own.std() + level
            disc = radius**2 > X**2 + Y**2
            images.append(np.where(disc, (image - image[disc].mean()) / image[disc].std(), 0)[None])
    return np.asarray(images, dtype=np.float32)


TRUTH, PATIENTS = cohort(12, 0), [f"p{i}" for i in range(12)]
OTHERS = Others(cohort(30, 1), [f"s{i}" for i in range(30)])


def test_a_copy_tells_everything_and_noise_nothing_beyond_the_floors() -> None:
    floors = Floors.make(TRUTH, PATIENTS, OTHERS)
    copy = score_images(TRUTH, -2 * TRUTH + 1, PATIENTS, floors=floors)
    assert copy["ssim"].mean == pytest.approx(1)
    assert copy["reidentification"].mean == 1
    assert copy["distance_correlation"].mean == pytest.approx(1)
    noise = np.random.default_rng(0).standard_normal(TRUTH.shape)
    random = score_images(TRUTH, noise, PATIENTS, floors=floors)
    for name in ("ssim", "psnr", "nmi"):
        low, high = random[name], copy[name]
        assert set(low.floors) == {MEAN_IMAGE, OTHER_PATIENT}
        assert low.mean < high.floors[MEAN_IMAGE] < high.mean
    assert random["reidentification"].mean <= 0.25
    assert copy["reidentification"].floors[CHANCE] == pytest.approx(1 / 42)
    assert SHUFFLED in copy["distance_correlation"].floors


def test_floors_are_what_their_images_score() -> None:
    floors = Floors.make(TRUTH, PATIENTS, OTHERS)
    mean = np.broadcast_to(OTHERS.images.mean(0), TRUTH.shape)
    score = score_images(TRUTH, mean, PATIENTS, floors=floors)["ssim"]
    assert score.mean == pytest.approx(score.floors[MEAN_IMAGE], abs=1e-5)


def test_without_others_the_floor_leaves_the_patient_out() -> None:
    truth, patients, z = cohort(3, 0, slices=2), [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1]
    found = mean_images(Others(truth, patients, z), patients, z)
    np.testing.assert_allclose(found[0], (truth[2] + truth[4]) / 2, atol=1e-6)
    np.testing.assert_allclose(found[3], (truth[1] + truth[5]) / 2, atol=1e-6)
    one = other_images(Others(truth, patients, z), patients, z)
    assert any(np.array_equal(one[0], truth[row]) for row in (2, 4))
    assert mean_images(Others(truth[:2], [0, 0]), [0, 0]) is None
    alone = score_images(truth[:2], truth[:2], [0, 0])
    assert alone["ssim"].floors == {} and alone["reidentification"].mean is None


def test_the_gallery_holds_the_same_level_of_others() -> None:
    others = Others(np.zeros((4, 1, 16, 16)), ["a", "a", "b", "b"], [1.0, 9.0, 2.0, 30.0])
    np.testing.assert_array_equal(others.choose("x", 8.0), [1, 2])
    np.testing.assert_array_equal(others.choose("a", 8.0), [2])
    np.testing.assert_array_equal(others.choose("x", None), [0, 1, 2, 3])


def test_recognition_by_hand() -> None:
    """Ten of twelve are sent as they are, two in each other's place."""
    swapped = TRUTH.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    score = reidentification(TRUTH, swapped, PATIENTS, OTHERS)
    assert score.mean == pytest.approx(10 / 12)
    same = reidentification(TRUTH, np.full_like(TRUTH, np.nan), PATIENTS, OTHERS)
    assert same.mean == pytest.approx(same.floors[CHANCE]) == pytest.approx(1 / 42)


def test_a_match_is_the_variance_explained_inside_each_brain() -> None:
    noise = np.random.default_rng(0).standard_normal((SIZE, SIZE))
    image = TRUTH[0, 0] + 0.5 * noise + 40
    found = Gallery(TRUTH).match(image)
    expected = [explained(true[0], image, brain_mask(true[0])) for true in TRUTH]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_windows_beside_the_brain_do_not_count() -> None:
    truth = TRUTH.copy()
    truth[3] = 0
    scores = score_images(truth, truth, PATIENTS, floors=OTHERS)
    assert scores["ssim"].patients == scores["reidentification"].patients == 11


def test_outline_of_a_good_a_random_and_a_reversed_map() -> None:
    masks = np.stack([(X - 4) ** 2 + (Y + i - 6) ** 2 < 16 for i in range(12)])
    regions = np.stack([masks, masks & (X < 4), np.zeros_like(masks)], axis=1)
    noise = np.random.default_rng(0).random(masks.shape)
    good = score_masks(regions, masks + 0.5 * noise, PATIENTS, parts=("TC", "ET"))
    assert good["auc"].mean == good["dice_oracle"].mean == 1 and good["dice_otsu"].mean > 0.95
    assert good["auc_TC"].mean > 0.9 and good["auc_ET"].mean is None
    assert good["auc"].floors[RANDOM] == pytest.approx(0.5, abs=0.05)
    assert 0.5 < good["auc"].floors[OTHER_MASKS] < 1  # tumours lie where tumours lie
    reversed_ = score_masks(masks, -(masks + 0.5 * noise), PATIENTS)
    assert reversed_["auc"].mean == 1 and reversed_["dice_otsu"].mean > 0.95
    random = score_masks(masks, noise, PATIENTS)
    assert 0.5 <= random["auc"].mean < 0.55
    nothing = score_masks(masks, np.full(masks.shape, np.nan), PATIENTS)
    assert nothing["auc"].mean == 0.5 and nothing["dice_otsu"].mean == 0


def test_only_voxels_inside_count_where_asked() -> None:
    masks = np.stack([X**2 + Y**2 < 16] * 2)
    scores = (X**2 + Y**2 < 100) + np.zeros((2, 1, 1))
    inside = np.stack([X**2 + Y**2 < 100] * 2)
    assert score_masks(masks, scores, [0, 1])["auc"].mean > 0.8
    assert score_masks(masks, scores, [0, 1], inside=inside)["auc"].mean == 0.5


def lesions(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Heads with a bright spot: images [count, 1, 32, 32], masks bool [count, 1, 32, 32]."""
    random, images = np.random.default_rng(seed), cohort(count, seed)
    x, y = (random.uniform(-6, 6, (count, 1, 1)) for _ in range(2))
    spot = ((X - x) ** 2 + (Y - y) ** 2 < 16)[:, None]
    return images + 4 * spot.astype(np.float32), spot


def test_a_map_is_worth_what_the_own_image_does_not_show() -> None:
    """Findings C and D: air is no target for anybody, and the site's own image with labelled strangers shows most."""
    images, spots = lesions(10, 5)
    patients = list(range(10))
    inside = foreground(images)
    # A map of a head alone, as a defended gradient may leave it: whole windows flatter it.
    head = inside + 0.01 * np.random.default_rng(0).random(inside.shape)
    flattered = score_masks(spots, head, patients)["auc"].mean
    judged = score_masks(spots, head, patients, inside=inside)
    assert flattered > 0.7 and judged["auc"].mean < 0.6
    assert judged["auc_window"].mean == pytest.approx(flattered)
    assert judged["auc_window"].floors[INSIDE] == pytest.approx(flattered, abs=0.01)
    assert judged["auc"].floors[INSIDE] == 0.5
    strangers, known = lesions(40, 6)
    own = OwnImage.train(strangers, known, range(100, 140), steps=60)
    scores = score_masks(spots, spots[:, 0] + 0.1 * np.random.default_rng(1).random(inside.shape), patients,
                         inside=inside, own=own.maps(images), others=own.masks)  # fmt: skip
    floor = scores["auc"].floors[OWN_IMAGE]
    assert 0.9 < floor < 1 == scores["auc"].mean
    assert scores["advantage_auc"].mean == pytest.approx(1 - floor)
    assert scores["advantage_dice"].mean == pytest.approx(1 - scores["dice_oracle"].floors[OWN_IMAGE])
    assert set(scores["auc"].floors) == {RANDOM, INSIDE, OTHER_MASKS, OWN_IMAGE}
    copied = score_masks(spots, own.maps(images), patients, inside=inside, own=own.maps(images))
    assert copied["advantage_auc"].mean == copied["advantage_dice"].mean == 0
    assert not {"advantage_auc", "auc_window"} & set(score_masks(spots, head, patients))


def test_the_mean_mask_is_of_strangers_at_the_same_level() -> None:
    masks = np.zeros((4, 1, 16, 16), bool)
    masks[:2, :, :4], masks[2:, :, 12:] = True, True
    strangers = Others(np.stack([masks[0, 0], masks[2, 0]] * 2), ["a", "a", "b", "b"], [0.0, 9.0, 0.0, 9.0])
    noise = np.random.default_rng(0).random((4, 16, 16))
    usual = score_masks(masks, noise, [1, 2, 3, 4], others=strangers, z=[0, 0, 9, 9])["auc"].floors
    assert usual[OTHER_MASKS] == 1
    assert score_masks(masks, noise, [1, 2, 3, 4], others=strangers)["auc"].floors[
        OTHER_MASKS
    ] == pytest.approx(5 / 6)


def test_misfits_are_named() -> None:
    with pytest.raises(ValueError, match="samples"):
        score_images(TRUTH, TRUTH, PATIENTS[:3])
    with pytest.raises(ValueError, match="reconstructions"):
        score_images(TRUTH, TRUTH[:, :, :16], PATIENTS)
    with pytest.raises(ValueError, match="do not fit"):
        score_masks(TRUTH[:, 0], TRUTH[:5, 0], PATIENTS)
