"""dFIL against explicit Jacobians, and its bound against an attacker that attains it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from splitpeer.privacy.dfil import dfil, mse_floor


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.InstanceNorm2d(3), nn.LeakyReLU(0.1))
        self.second = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.LeakyReLU(0.1))

    def forward(self, x):
        x0 = self.first(x)
        return {"x0": x0, "x1": self.second(x0)}


def explicit(model, image: torch.Tensor, sigma: dict[str, float]) -> float:
    squares = 0.0
    for name, value in sigma.items():
        jacobian = torch.autograd.functional.jacobian(lambda x, n=name: model(x)[n], image[None])
        squares += float(jacobian.double().pow(2).sum()) / value**2
    return squares / image.numel()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32))


@pytest.mark.parametrize("sigma", [{"x0": 0.5, "x1": 2.0}, {"x0": np.inf, "x1": 0.3}])
def test_the_estimate_is_the_jacobians_norm(images, sigma) -> None:
    model = Tiny()
    found = dfil(model, images, sigma, probes=600)
    assert found == pytest.approx([explicit(model, image, sigma) for image in images], rel=0.05)


def test_inside_no_grad_and_repeatable(images) -> None:
    model, sigma = Tiny(), {"x0": 1.0, "x1": np.inf}
    with torch.no_grad():
        first = dfil(model, images, sigma, probes=2)
    assert (first == dfil(model, images.numpy(), sigma, probes=2)).all()
    assert all(p.grad is None for p in model.parameters())


def test_without_noise_on_any_released_level_nothing_is_bounded(images) -> None:
    assert np.isinf(dfil(Tiny(), images, {"x0": 1.0, "x1": 0.0})).all()
    assert mse_floor(np.inf) == 0


def test_the_floor_is_attained_by_least_squares() -> None:
    """An orthogonal linear map: averaging T noisy copies and inverting is unbiased, and optimal."""
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))
    matrix = torch.from_numpy(turn.astype(np.float32))
    x = np.random.default_rng(2).normal(size=(1, 1, 4, 4)).astype(np.float32)
    sigma, times = 0.7, 5
    found = dfil(lambda image: {"x0": image.flatten(1) @ matrix.T}, x, {"x0": sigma})
    assert found == pytest.approx([1 / sigma**2], rel=1e-4)
    noise = np.random.default_rng(4).normal(size=(4000, times, 16)) * sigma
    error = ((noise.mean(1) @ turn) ** 2).mean()
    assert error == pytest.approx(float(mse_floor(found[0], times)), rel=0.05)


@pytest.mark.parametrize(
    ("sigma", "probes", "words"),
    [
        ({"x7": 1.0}, 1, "names x7; the model gives x0, x1"),
        ({"x0": 1.0}, 1, "names x0; the model gives x0, x1"),
        ({"x0": -1.0}, 1, "negative"),
        ({"x0": 1.0}, 0, "one probe"),
    ],
)
def test_impossible_questions(images, sigma, probes, words) -> None:
    with pytest.raises(ValueError, match=words):
        dfil(Tiny(), images, sigma, probes=probes)
