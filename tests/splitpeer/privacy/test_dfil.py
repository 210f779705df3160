"""dFIL against explicit Jacobians, and its bound against an attacker that attains it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from splitpeer.privacy.dfil import dfil, mean_floor, mse_floor
from splitpeer.privacy.prior import prior_information


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


def test_noise_that_follows_the_level_tells_of_it_too(images) -> None:
    """z ~ N(f, (s rms)^2) of n values: |J|^2 / sigma^2 + 2 n |d log rms / dx|^2, with explicit Jacobians."""
    model, scale = Tiny(), 0.5
    for image in images:
        trace = 0.0
        for name in ("x0", "x1"):
            level = model(image[None])[name].detach()
            width = scale * float(level.square().mean().sqrt())
            trace += explicit(model, image, {name: width}) * image.numel()
            slope = torch.autograd.functional.jacobian(
                lambda x, n=name: model(x)[n].square().mean().log() / 2, image[None]
            )
            trace += 2 * level.numel() * float(slope.double().square().sum())
        found = dfil(model, image[None], {"x0": scale, "x1": scale}, follows=True, probes=600)
        assert found == pytest.approx([trace / image.numel()], rel=0.05)


def test_one_value_under_noise_of_its_own_size() -> None:
    x = np.full((1, 1, 1, 1), 3.0, np.float32)
    found = dfil(lambda image: {"x0": 1 * image, "x1": 0 * image}, x, {"x0": 0.5, "x1": 1.0}, follows=True)
    assert found == pytest.approx([1 / 1.5**2 + 2 / 3**2], rel=1e-6)


def test_pixels_that_are_known_are_not_counted() -> None:
    x = np.ones((2, 1, 2, 2), np.float32)
    inside = np.zeros((2, 1, 2, 2), bool)
    inside[0, 0, 0, 0] = inside[1, 0, 0] = True
    slopes = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = dfil(lambda image: {"x0": slopes * image}, x, {"x0": 1.0}, inside=inside)
    assert found == pytest.approx([1, (1 + 4) / 2], rel=1e-6)


def test_a_normal_prior_attains_the_bound_on_any_attacker() -> None:
    """x ~ N(0, s^2), z = x + N(0, sigma^2), T times: the posterior mean errs by 1 / (T / sigma^2 + 1 / s^2)."""
    source, s, sigma, times = np.random.default_rng(5), 1.5, 0.7, 3
    x = source.normal(size=200_000) * s
    z = x + source.normal(size=x.size) * sigma / times**0.5
    guess = z * s**2 / (s**2 + sigma**2 / times)  # biased: it shrinks
    floor = mean_floor(np.full(4, 1 / sigma**2), 1 / s**2, times)
    # The mean of n squares is off by (2 / n)^.5, .3 %; unbiased ones would err by 22 % of s^2 more.
    assert np.square(guess - x).mean() == pytest.approx(floor, rel=0.015)
    assert floor < mse_floor(1 / sigma**2, times)


def field(count: int, size: int, smooth: float, seed: int) -> tuple[np.ndarray, float]:
    """A Gaussian field on a torus of which each voxel depends on its 4 neighbours alone, and its information."""
    angle = 2 * np.pi * np.fft.fftfreq(size)
    precision = 1 - smooth * (np.cos(angle)[:, None] + np.cos(angle)) / 2
    white = np.random.default_rng(seed).normal(size=(count, 1, size, size))
    made = np.fft.ifft2(np.fft.fft2(white) / np.sqrt(precision)).real
    return made.astype(np.float32), float(precision.mean())


@pytest.mark.parametrize("smooth", [0.0, 0.95])
def test_score_matching_finds_the_information_of_a_field(smooth: float) -> None:
    images, information = field(24, 32, smooth, 7)
    # About 11,000 voxels on each side: squares are off by (2 / 11,000)^.5 = 1.3 %, correlated ones by more.
    assert prior_information(images) == pytest.approx(information, rel=0.06)
    # Who counted the marginal variance alone would take an attacker for weaker; it is off by (2 / 24,576)^.5 = .9 %.
    assert 1 / images.var() <= information * 1.04


def test_what_neighbours_tell_is_counted_and_the_outside_is_not() -> None:
    images, _ = field(8, 32, 0.95, 1)
    smooth = (images + np.roll(images, 1, 2) + np.roll(images, 1, 3)) / 3
    assert prior_information(smooth) > 2 * prior_information(images)
    ringed = np.zeros((8, 1, 48, 48), np.float32)
    ringed[..., 8:40, 8:40] = images
    assert prior_information(ringed) == pytest.approx(prior_information(images), rel=1e-9)
    with pytest.raises(ValueError, match="at least two"):
        prior_information(images[:1])
    with pytest.raises(ValueError, match="too few"):
        prior_information(np.zeros((2, 1, 8, 8), np.float32))


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
