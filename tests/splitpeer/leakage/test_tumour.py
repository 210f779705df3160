"""A tumour is found in what is left of an image, and dFIL agrees with the algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from splitpeer.leakage import Floors, Others
from splitpeer.leakage.tumour import presentable, score_tumour, train_segmenter

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
    segmenter = train_segmenter(*cohort(40, 0), steps=50)
    assert torch.equal(torch.random.get_rng_state(), state)
    truth, masks = cohort(8, 1)
    floors = Floors.make(truth, range(8), Others(cohort(20, 2)[0], range(100, 120)))
    blurred = np.stack([-3 * gaussian_filter(image, (0, 1.5, 1.5)) + 9 for image in truth])
    score, found = score_tumour(segmenter, truth, blurred, masks, range(8), floors=floors)
    assert found.shape == (8, 32, 32)
    assert score.ceiling > 0.85
    assert score.mean > 0.75 > 0.6 > max(score.floors.values())
    nothing, _ = score_tumour(segmenter, truth, np.full_like(truth, np.nan), masks, range(8))
    assert nothing.mean < 0.3
    again = train_segmenter(*cohort(40, 0), steps=50)
    np.testing.assert_array_equal(again(truth), segmenter(truth))
    with pytest.raises(ValueError, match="do not fit"):
        score_tumour(segmenter, truth, truth[:4], masks, range(8))
    with pytest.raises(ValueError, match="do not fit"):
        train_segmenter(truth, masks[:4])


def test_presentable_has_the_truths_spread_inside_and_nothing_outside() -> None:
    truth, _ = cohort(2, 0)
    shown = presentable(-0.001 * truth + 5, truth)
    np.testing.assert_allclose(shown, truth, atol=1e-3)
    assert not presentable(np.full_like(truth, np.nan), truth)[truth == 0].any()


def test_volumes() -> None:
    images = np.random.default_rng(0).standard_normal((2, 1, 32, 16, 16)).astype(np.float32)
    segmenter = train_segmenter(images, images > 1, steps=2)
    assert segmenter(images).shape == (2, 1, 32, 16, 16)
