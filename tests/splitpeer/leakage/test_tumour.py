"""A tumour is found in what is left of an image, and dFIL agrees with the algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from splitpeer.leakage.floors import Floors, Others
from splitpeer.leakage.tumour import SAME_ANSWER, presentable, score_tumour, train_segmenter

X, Y = np.mgrid[:32, :32] - 15.5


def cohort(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Discs of noise with a bright spot: images [count, 1, 32, 32], masks [count, 1, 32, 32]."""
    random = np.random.default_rng(seed)
    x, y = (random.uniform(-6, 6, (count, 1, 1)) for _ in range(2))
    spot = (X - x) ** 2 + (Y - y) ** 2 < 20
    image = np.where(X**2 + Y**2 < 196, 3 * spot + 0.3 * random.standard_normal((count, 32, 32)), 0)
    return image[:, None].astype(np.float32), spot[:, None]


def test_the_tumour_shows_in_a_blurred_reconstruction() -> None:
    state = torch.random.get_rng_state()
    # After 50 steps what it finds in nothing still depends on the processor's roundings.
    segmenter = train_segmenter(*cohort(40, 0), steps=120)
    assert torch.equal(torch.random.get_rng_state(), state)
    truth, masks = cohort(8, 1)
    floors = Floors.make(truth, range(8), Others(cohort(20, 2)[0], range(100, 120)))
    blurred = np.stack([-3 * gaussian_filter(image, (0, 1.5, 1.5)) + 9 for image in truth])
    scores, found = score_tumour(segmenter, truth, blurred, masks, range(8), floors=floors)
    score = scores["tumour_dice"]
    assert found.shape == (8, 32, 32)
    assert score.ceiling > 0.85
    assert score.mean > 0.75 > 0.6 > max(score.floors.values())
    nothing, _ = score_tumour(segmenter, truth, np.full_like(truth, np.nan), masks, range(8))
    assert nothing["tumour_dice"].mean < 0.3
    again = train_segmenter(*cohort(40, 0), steps=120)
    np.testing.assert_array_equal(again(truth), segmenter(truth))
    with pytest.raises(ValueError, match="do not fit"):
        score_tumour(segmenter, truth, truth[:4], masks, range(8))
    with pytest.raises(ValueError, match="do not fit"):
        train_segmenter(truth, masks[:4])


def test_what_one_would_tell_the_patient() -> None:
    """Presence, size and side are read off what is found, patient by patient, each with a floor and a ceiling."""
    segmenter = train_segmenter(*cohort(40, 0), steps=50)
    truth, masks = cohort(10, 1)
    healthy = np.where(X**2 + Y**2 < 196, 0.3 * np.random.default_rng(3).standard_normal((2, 1, 32, 32)), 0)
    truth, masks = (
        np.concatenate([truth, healthy.astype(np.float32)]),
        np.concatenate([masks, np.zeros_like(masks[:2])]),
    )
    floors = Floors.make(truth, range(12), Others(cohort(20, 2)[0], range(100, 120)))
    seen, _ = score_tumour(segmenter, truth, truth, masks, range(12), floors=floors)
    assert seen["tumour_side"].mean >= 0.9 > 0.8 > max(f for f in seen["tumour_side"].floors.values())
    assert seen["tumour_volume"].mean > 0.75 and seen["tumour_volume"].patients == 10
    assert seen["tumour_presence"].mean >= 10 / 12 and seen["tumour_presence"].floors[
        SAME_ANSWER
    ] == pytest.approx(10 / 12)
    assert seen["tumour_side"].each[-2:] == (None, None) and len(seen["tumour_side"].each) == 12
    assert all(seen[name].ceiling == seen[name].mean for name in seen)
    mirrored, _ = score_tumour(segmenter, truth, truth[:, :, ::-1].copy(), masks, range(12), floors=floors)
    assert mirrored["tumour_side"].mean <= 0.2  # the other side, every time
    assert (
        mirrored["tumour_volume"].mean > 0.5
    )  # the size shows all the same; the body is cut as the truth's is
    blind, _ = score_tumour(segmenter, truth, np.full_like(truth, np.nan), masks, range(12))
    assert blind["tumour_side"].mean == pytest.approx(0.5, abs=0.25)
    assert blind["tumour_volume"].mean < seen["tumour_volume"].mean - 0.2


def test_presentable_has_the_truths_spread_inside_and_nothing_outside() -> None:
    truth, _ = cohort(2, 0)
    shown = presentable(-0.001 * truth + 5, truth)
    np.testing.assert_allclose(shown, truth, atol=1e-3)
    assert not presentable(np.full_like(truth, np.nan), truth)[truth == 0].any()


def test_volumes() -> None:
    images = np.random.default_rng(0).standard_normal((2, 1, 32, 16, 16)).astype(np.float32)
    segmenter = train_segmenter(images, images > 1, steps=2)
    assert segmenter(images).shape == (2, 1, 32, 16, 16)
