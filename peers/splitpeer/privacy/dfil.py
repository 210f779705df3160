"""dFIL: how well any attacker could estimate an image from its noisy activations.

With z_k = f_k(x) + N(0, sigma_k^2) the Fisher information of z about x is sum_k J_k^T J_k / sigma_k^2; its trace
by the number of pixels d is dFIL = sum_k |J_k|_F^2 / (d sigma_k^2) (Maeng et al. 2023, arXiv 2305.04146). Noise whose
width follows the data tells of it too: 2 n_k |d log sigma_k / dx|^2 is added for n_k values of one width.

- An *unbiased* attacker's mean squared error per pixel is at least 1 / dFIL, for every image (Cramer-Rao).
- *Any* attacker's, biased ones with a prior included, is at least 1 / (E dFIL + J) on average over images from a prior
  with information J (van Trees 1968; `prior.py`).

Independent noise adds up: T releases have T times the dFIL. Both bound noise only: without any, dFIL is infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

Model = Callable[[Tensor], Mapping[str, Tensor]]
"""Images [N, 1, *spatial] to {"x0": [N, C, *spatial], ...}, samples independent of each other."""


def dfil(
    model: Model,
    images: np.ndarray | Tensor,
    sigma: Mapping[str, float],
    *,
    follows: bool = False,
    inside: np.ndarray | None = None,
    probes: int = 32,
    seed: int = 0,
) -> np.ndarray:
    """dFIL of one release of each image, estimated: |J|_F^2 = E |J^T v|^2, v of random signs (Hutchinson).

    Args:
        model: what is released, before the noise; deterministic and differentiable.
        images: float32 [N, 1, *spatial].
        sigma: standard deviation of the noise of every level; infinite for one that does not leave.
        follows: `sigma` is a multiple of the root mean square of the level's channels that are not all zero.
        inside: bool, as `images`: the pixels that are counted, where the others are known; None: all.
        probes: backward passes; its relative standard error is at most sqrt(2 / probes) and usually far below.
        seed: of the signs.

    Returns:
        float64 [N], in 1 / (image unit)^2; infinite where a released level has no noise.

    Raises:
        ValueError: `sigma` does not name the levels that the model gives, or is negative; probes < 1.
    """
    _check(sigma, probes)
    x = torch.as_tensor(images, dtype=torch.float32).detach().clone().requires_grad_()
    # Callers may be inside no_grad.
    with torch.enable_grad():
        levels = model(x)
    if set(sigma) != set(levels):
        raise ValueError(
            f"sigma names {', '.join(sorted(sigma))}; the model gives {', '.join(sorted(levels))}"
        )
    if any(value == 0 for value in sigma.values()):
        return np.full(len(x), np.inf)
    counted = torch.ones_like(x) if inside is None else torch.as_tensor(inside).to(x)

    def squares(values: list[Tensor], weights: list[Tensor]) -> np.ndarray:
        (gradient,) = torch.autograd.grad(values, x, weights, retain_graph=True)
        found: np.ndarray = (counted * gradient.double().square()).flatten(1).sum(1).cpu().numpy()
        return found

    widths, total = {}, np.zeros(len(x))
    for name in sorted(sigma):
        widths[name] = torch.full((len(x),), float(sigma[name])).to(x)
        if follows and np.isfinite(sigma[name]):
            width, logarithm, values = _following(levels[name])
            widths[name] = sigma[name] * width
            total += 2 * values * squares([logarithm], [torch.ones_like(logarithm)])
    source = np.random.Generator(np.random.PCG64(seed))
    for _ in range(probes):
        signs = _signs(levels, source)
        weights = [sign / widths[name].view(-1, *[1] * (sign.ndim - 1)) for name, sign in signs.items()]
        total += squares([levels[name] for name in signs], weights) / probes
    found: np.ndarray = total / counted.flatten(1).sum(1).double().cpu().numpy()
    return found


def _check(sigma: Mapping[str, float], probes: int) -> None:
    if probes < 1:
        raise ValueError(f"at least one probe, not {probes}")
    if any(not value >= 0 for value in sigma.values()):
        raise ValueError(f"sigma must not be negative: {dict(sigma)}")


def _signs(levels: Mapping[str, Tensor], source: np.random.Generator) -> dict[str, Tensor]:
    """Of every value of every level, by name, in the order of names."""
    return {
        name: torch.from_numpy(source.integers(0, 2, tuple(level.shape), dtype=np.int8)).to(level) * 2 - 1
        for name, level in sorted(levels.items())
    }


def _following(level: Tensor) -> tuple[Tensor, Tensor, np.ndarray]:
    """Root mean square over the channels that are not all zero, its logarithm with a graph, and how many values those
    have, each [B]; infinite, 0 and 0 where nothing leaves."""
    values = level.detach().flatten(2).any(2).sum(1) * level[0, 0].numel()
    with torch.enable_grad():
        power = level.flatten(1).square().sum(1) / values.clamp_min(1)
        logarithm = torch.where(values > 0, power.clamp_min(1e-30).log() / 2, 0.0)
    width = torch.where(values > 0, power.detach().sqrt(), torch.inf)
    return width, logarithm, values.double().cpu().numpy()


def mse_floor(dfil: np.ndarray | float, releases: int = 1) -> np.ndarray | float:
    """Least mean squared error per pixel of an unbiased attacker after `releases` releases, (image unit)^2."""
    return 1 / (dfil * releases)


def mean_floor(dfil: np.ndarray, prior: float, releases: int = 1) -> float:
    """Least mean squared error per pixel of *any* attacker, on average over images: 1 / (releases E dFIL + J).

    Args:
        dfil: of images from the prior.
        prior: its information J per pixel, 1 / (image unit)^2 (`prior.prior_information`).
    """
    return float(1 / (releases * np.mean(dfil) + prior))
