"""dFIL: how well any *unbiased* attacker could estimate an image from its noisy activations.

With z_k = f_k(x) + N(0, sigma_k^2) the Fisher information of z about x is sum_k J_k^T J_k / sigma_k^2; its trace
by the number of pixels d is dFIL = sum_k |J_k|_F^2 / (d sigma_k^2), and an unbiased attacker's mean squared error
per pixel is at least 1 / dFIL (Cramer-Rao; Maeng et al. 2023, arXiv 2305.04146).

Independent noise adds up: T releases have T times the dFIL. The bound says nothing of attackers with a prior: an
attacker who knows what brains look like is biased, and does better. It bounds noise only: without any, it is
infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

Model = Callable[[Tensor], Mapping[str, Tensor]]
"""Images [N, 1, *spatial] to {"x0": [N, C, *spatial], ...}, samples independent of each other."""


def dfil(
    model: Model, images: np.ndarray | Tensor, sigma: Mapping[str, float], *, probes: int = 32, seed: int = 0
) -> np.ndarray:
    """dFIL of one release of each image, estimated: |J|_F^2 = E |J^T v|^2, v of random signs (Hutchinson).

    Args:
        model: what is released, before the noise; deterministic and differentiable.
        images: float32 [N, 1, *spatial].
        sigma: standard deviation of the noise of every level; infinite for one that does not leave.
        probes: backward passes; its relative standard error is at most sqrt(2 / probes) and usually far below.
        seed: of the signs.

    Returns:
        float64 [N], in 1 / (image unit)^2; infinite where a released level has no noise.

    Raises:
        ValueError: `sigma` does not name the levels that the model gives, or is negative; probes < 1.
    """
    if probes < 1:
        raise ValueError(f"at least one probe, not {probes}")
    if any(not value >= 0 for value in sigma.values()):
        raise ValueError(f"sigma must not be negative: {dict(sigma)}")
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
    released = [levels[name] for name in sorted(sigma)]
    source = np.random.Generator(np.random.PCG64(seed))
    total = np.zeros(len(x))
    for _ in range(probes):
        signs = [
            torch.from_numpy(source.integers(0, 2, tuple(level.shape), dtype=np.int8)).to(level) * 2 - 1
            for level in released
        ]
        weighted = [sign / sigma[name] for name, sign in zip(sorted(sigma), signs, strict=True)]
        (gradient,) = torch.autograd.grad(released, x, weighted, retain_graph=True)
        total += gradient.double().flatten(1).pow(2).sum(1).cpu().numpy()
    return total / probes / x[0].numel()


def mse_floor(dfil: np.ndarray | float, releases: int = 1) -> np.ndarray | float:
    """Least mean squared error per pixel of an unbiased attacker after `releases` releases, (image unit)^2."""
    return 1 / (dfil * releases)
