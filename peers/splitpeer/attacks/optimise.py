"""Minimising over images, a whole batch at once, each sample on its own.

Samples do not influence each other: what an attack recovers of one patient must not depend on who else was in
the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from splitpeer.attacks.base import Progress, silent
from splitpeer.training.optimiser import Adam

Objective = Callable[[Tensor], Tensor]
"""Images [B, ...] to one value per sample [B], differentiable."""

ARMIJO = 1e-4
TRIES = 12  # halvings of a step before a sample counts as converged
PATIENCE, LEAST = 20, 1e-3  # it has also converged if that many iterations gained less than this share


def total_variation(images: Tensor, smooth: float = 1e-2) -> Tensor:
    """Isotropic total variation per sample [B] of [B, C, *spatial], summed over voxels.

    Rudin, Osher & Fatemi, Physica D 60, 1992; `smooth` rounds the corner at zero so that gradients exist. In units
    of each image's own standard deviation: an encoder with instance norm does not see the gain, and an image
    must not look smoother by being fainter.
    """
    images = _wide(1 / images.flatten(1).std(1).clamp_min(1e-6), images) * images
    squares = torch.zeros_like(images)
    for axis in range(2, images.ndim):
        step = torch.diff(images, dim=axis)
        last = torch.zeros_like(images.narrow(axis, 0, 1))
        squares = squares + torch.cat([step, last], dim=axis).square()
    return ((squares + smooth**2).sqrt() - smooth).flatten(1).sum(1)


def lbfgs(
    objective: Objective,
    start: Tensor,
    iterations: int,
    *,
    memory: int = 10,
    progress: Progress = silent,
    what: str = "L-BFGS",
) -> Tensor:
    """L-BFGS (Liu & Nocedal, Math. Programming 45, 1989) with backtracking, separately for every sample.

    torch's own treats the batch as one vector with one step length. Stops early where every sample has converged.
    Returns a tensor like `start` [B, ...].
    """
    x = start.detach().clone()
    value, gradient = _evaluate(objective, x)
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    weights: list[Tensor] = []  # 1 / <s, y>, zero where a pair must not be used
    running = torch.ones(len(x), dtype=torch.bool, device=x.device)
    earlier = value
    for iteration in range(iterations):
        direction = -_two_loops(gradient, steps, changes, weights)
        slope = _dot(gradient, direction)
        downhill = slope < 0
        direction = torch.where(_wide(downhill, x), direction, -gradient)
        slope = torch.where(downhill, slope, -_dot(gradient, gradient))
        length = torch.ones_like(value)
        if not steps:
            length = length / gradient.flatten(1).abs().sum(1).clamp_min(1e-12) * x[0].numel() ** 0.5
        moved, new_value, new_gradient = x, value, gradient
        wanted = running.clone()
        for _ in range(TRIES):
            tried = x + _wide(length, x) * direction
            tried_value, tried_gradient = _evaluate(objective, tried)
            good = wanted & (tried_value <= value + ARMIJO * length * slope)
            moved = torch.where(_wide(good, x), tried, moved)
            new_value = torch.where(good, tried_value, new_value)
            new_gradient = torch.where(_wide(good, x), tried_gradient, new_gradient)
            wanted = wanted & ~good
            if not wanted.any():
                break
            length = length / 2
        running = running & ~wanted
        step, change = moved - x, new_gradient - gradient
        curvature = _dot(step, change)
        enough = curvature > 1e-10 * _dot(change, change)
        steps.append(step)
        changes.append(change)
        weights.append(torch.where(enough, 1 / curvature.clamp_min(1e-30), torch.zeros_like(curvature)))
        if len(steps) > memory:
            del steps[0], changes[0], weights[0]
        x, value, gradient = moved, new_value, new_gradient
        progress(what, iteration + 1, iterations)
        if (iteration + 1) % PATIENCE == 0:
            running = running & (earlier - value > LEAST * value.abs())
            earlier = value
        if not running.any():
            break
    return x


def adam(
    objective: Objective,
    start: Tensor,
    iterations: int,
    *,
    rate: float = 0.03,
    progress: Progress = silent,
    what: str = "Adam",
) -> Tensor:
    """AMSGrad, as in He et al.'s code, its rate falling to zero along a cosine. Returns a tensor like `start`."""
    x = start.detach().clone().requires_grad_()
    optimiser = Adam([x], lr=rate, amsgrad=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(iterations, 1))
    for iteration in range(iterations):
        _, x.grad = _evaluate(objective, x.detach())
        optimiser.step()
        schedule.step()
        progress(what, iteration + 1, iterations)
    return x.detach()


def _evaluate(objective: Objective, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    values = objective(leaf)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


def _two_loops(gradient: Tensor, steps: list[Tensor], changes: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The inverse Hessian's estimate times the gradient."""
    if not steps:
        return gradient
    q, shares = gradient, []
    for s, y, rho in zip(reversed(steps), reversed(changes), reversed(weights), strict=True):
        share = rho * _dot(s, q)
        shares.append(share)
        q = q - _wide(share, q) * y
    s, y = steps[-1], changes[-1]
    usable = weights[-1] > 0
    scale = torch.where(usable, _dot(s, y) / _dot(y, y).clamp_min(1e-30), torch.ones_like(weights[-1]))
    q = _wide(scale, q) * q
    for s, y, rho, share in zip(steps, changes, weights, reversed(shares), strict=True):
        q = q + _wide(share - rho * _dot(y, q), q) * s
    return q


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _wide(per_sample: Tensor, like: Tensor) -> Tensor:
    return per_sample.view(-1, *[1] * (like.ndim - 1))
