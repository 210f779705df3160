"""Distorted windows: drawn from the seed alone, and different from the true ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from splitpeer.pretraining.distortion import Distortion
from splitpeer.pretraining.stage import squared_error


def head(channels: int, *spatial: int) -> np.ndarray:
    window = np.random.default_rng(3).normal(size=(channels, *spatial)).astype(np.float32)
    window[:, :4] = 0
    return window


@pytest.mark.parametrize("spatial", [(32, 32), (48, 16), (16, 16, 32)])
def test_equal_seeds_distort_alike_and_others_otherwise(spatial: tuple[int, ...]) -> None:
    window = head(2, *spatial)
    before = window.copy()
    distort, again = Distortion(spatial), Distortion(spatial)
    many = [distort(window, (7, 1, place)) for place in range(12)]
    assert np.array_equal(window, before)
    # What was drawn before does not matter.
    assert all(np.array_equal(again(window, (7, 1, place)), many[place]) for place in reversed(range(12)))
    assert len({one.tobytes() for one in many}) == 12
    assert all(one.dtype == np.float32 and one.shape == window.shape for one in many)
    assert all(np.isfinite(one).all() for one in many)
    low, high = window.min() - 1e-5, window.max() + 1e-5
    assert all(low <= one.min() and one.max() <= high for one in many)
    state = np.random.get_state()[1].copy()
    distort(window, (1, 2, 3))
    assert np.array_equal(state, np.random.get_state()[1])


def test_all_of_128_bits_of_the_seed_count() -> None:
    """MONAI's own seeds have 32."""
    window, distort = head(1, 32, 32), Distortion((32, 32))
    one = distort(window, (5, 0, 0))
    assert not np.array_equal(one, distort(window, (5 + (1 << 100), 0, 0)))


def test_some_boxes_are_painted_inside_and_most_around() -> None:
    window, distort = head(1, 64, 64), Distortion((64, 64))
    changed = [float((distort(window, (1, 0, place)) != window).mean()) for place in range(100)]
    assert min(changed) < 0.95
    assert 0.3 < np.mean(changed) < 0.99


def test_a_window_without_anything_in_it_stays() -> None:
    window = np.zeros((1, 16, 16), np.float32)
    assert np.array_equal(Distortion((16, 16))(window, (0, 0, 0)), window)


def test_the_gradient_of_the_squared_error_is_torchs() -> None:
    prediction = torch.from_numpy(head(2, 8, 8)[None].copy()).requires_grad_()
    true = head(2, 8, 8)[None][:, :, ::-1].copy()
    loss = torch.nn.functional.mse_loss(prediction, torch.from_numpy(true))
    loss.backward()
    value, gradient = squared_error(prediction.detach().numpy(), true)
    assert value == pytest.approx(loss.item(), rel=1e-6)
    assert prediction.grad is not None
    np.testing.assert_allclose(gradient, prediction.grad.numpy(), rtol=1e-5, atol=1e-9)
    assert gradient.dtype == np.float32
