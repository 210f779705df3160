"""Diagonal Fisher information leakage: what Gaussian noise alone guarantees against an unbiased adversary."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Encode = Callable[[Tensor], Mapping[str, Tensor]]


def dfil(
    encode: Encode,
    image: Tensor,
    sigma: Mapping[str, float],
    *,
    releases: int = 1,
    probes: int = 16,
    seed: int = 0,
) -> float:
    """dFIL of one image (Maeng et al., arXiv 2305.04146): releases * sum over levels of ||J||_F^2 / sigma^2 / voxels.

    An adversary whose guess is unbiased errs by 1 / dFIL in mean squared error at least; prior knowledge beats that,
    so it is a bound for estimators, not for attackers. ||J||_F^2 is estimated as E ||J^T v||^2, v standard normal
    (Hutchinson 1989).

    Args:
        encode: image [1, 1, *spatial] to the levels that leave, before noise; differentiable.
        image: [1, 1, *spatial].
        sigma: standard deviation of the noise of each level, in the units of its values. A level without noise makes
            the result infinite.
        releases: how often the sample is sent with fresh noise; information adds up.
        probes: random vectors v.

    Raises:
        ValueError: a level that is sent has no sigma given.
    """
    image = image.detach().requires_grad_()
    sent = encode(image)
    if missing := [name for name in sent if name not in sigma]:
        raise ValueError(f"no sigma for {', '.join(missing)}")
    if any(sigma[name] <= 0 for name in sent):
        return float("inf")
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(probes):
        # Scaled by 1 / sigma before the sum: one backward pass for all levels.
        pull = [torch.randn(z.shape, generator=generator).to(z) / sigma[name] for name, z in sent.items()]
        (gradient,) = torch.autograd.grad(list(sent.values()), image, pull, retain_graph=True)
        total += float(gradient.double().square().sum())
    return releases * total / probes / image.numel()
