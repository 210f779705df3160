"""How likely what was seen is, given what the network makes of an image: minus the log, level by level.

Where defences blur, values scatter around what the network yields, and squares say it all. Two kinds of defence leave
more structure than a scatter, which squares would waste:

- values are rounded: what was seen bounds the value from both sides, an interval whose edges noise may have blurred;
- values are left out, and noise or rounding then hides which: each is a noisy value or a noisy zero, a mixture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitpeer.attacks.evidence import AveragedLevel

MOST_VIEWS = 8
"""A mean of more views is taken for normal: of n it is a mixture of n + 1."""
OFF_GRID = 0.02
"""Steps by which a rounded value may lie beside its grid: float32 moves one of 16 bits by .007 at most."""


@dataclass(frozen=True)
class Effect:
    """What the defences do to one level of each sample, on average, where they leave a value at all."""

    gain: Tensor
    """[B]: defended = gain * clean + scatter."""
    scatter: Tensor
    """[B]: its standard deviation, before rounding if `steps`, of those that are left if `left`."""
    left: float = 1.0
    """Share of the values that are left, where it does not show which; 1: all, or it shows."""
    steps: int = 0
    """Of the grid between zero and the largest magnitude of a channel; 0: scatter tells of any rounding."""


def tells(seen: AveragedLevel, left: float, steps: int) -> bool:
    """Whether more can be said of a level than its scatter, given `left` and `steps` of the defences (see `Effect`)."""
    if not steps:
        return 0 < left < 1 and bool(seen.count.max() <= MOST_VIEWS)
    if bool(seen.count.max() > 1):  # a mean of rounded values is none
        return False
    places = seen.mean / _largest(seen.mean).clamp_min(torch.finfo(torch.float32).tiny) * steps
    return bool((places - places.round()).abs().max() < OFF_GRID)


def minus_log(expected: Tensor, seen: AveragedLevel, effect: Effect, floor: Tensor) -> Tensor:
    """Minus the log-likelihood of a level, up to a constant: [B], differentiable.

    Args:
        expected: [B, C, *spatial], what the defences leave of the network's output on average: its gain is applied.
        floor: [B], least scatter.
    """
    variance = effect.scatter.square() + floor.square()
    if effect.left == 1 and not effect.steps:
        return (seen.count * (expected - seen.mean).square()).flatten(1).sum(1) / (2 * variance)
    views = seen.count.flatten(1).amax(1).clamp_min(1)
    deviation = wide((variance / views).sqrt(), expected)
    if effect.left == 1:
        found = _log_density(expected, seen, deviation, effect.steps)
    else:
        parts = [
            wide(log_share, expected)
            + _log_density(wide(k / views, expected) * expected, seen, deviation, effect.steps)
            for k, log_share in enumerate(_log_binomial(views, effect.left))
        ]
        found = torch.logsumexp(torch.stack(parts), 0)
    return -((seen.count > 0) * found).flatten(1).sum(1)


def minus_log_scale(seen: AveragedLevel, effect: Effect, floor: Tensor) -> Tensor:
    """What `minus_log` leaves out where there is only a scatter, [B]: it differs between effects, not between images.

    Only with it can two images be compared of which each says itself how far the defences would scatter its values.
    """
    variance = effect.scatter.square() + floor.square()
    return (seen.count > 0).flatten(1).sum(1) * variance.log() / 2


def _log_density(mean: Tensor, seen: AveragedLevel, deviation: Tensor, steps: int) -> Tensor:
    """Of what was seen around `mean`, of a normal law; of its interval where it was rounded."""
    if not steps:
        return -((mean - seen.mean) / deviation).square() / 2
    most = _largest(seen.mean)
    half = most / (2 * steps)
    # The largest magnitude is on the grid: nothing lay beyond it.
    low = (torch.maximum(seen.mean - half, -most) - mean) / deviation
    high = (torch.minimum(seen.mean + half, most) - mean) / deviation
    # Phi(b) - Phi(a) where both are small, that it does not vanish.
    turned = low + high > 0
    a, b = torch.where(turned, -high, low), torch.where(turned, -low, high)
    outer, inner = torch.special.log_ndtr(b), torch.special.log_ndtr(a)
    found: Tensor = outer + torch.log1p(-torch.exp((inner - outer).clamp_max(-1e-6)))
    return torch.where(most > 0, found, torch.zeros_like(found))  # a channel of zeros carries nothing


def _log_binomial(views: Tensor, left: float) -> Tensor:
    """[n + 1, B]: log of the probability that k of `views` [B] (n at most) hold the value."""
    k = torch.arange(int(views.max()) + 1, device=views.device).to(views).unsqueeze(1)
    share = views.new_tensor(left)
    ways = torch.lgamma(views + 1) - torch.lgamma(k + 1) - torch.lgamma((views - k).clamp_min(0) + 1)
    found = ways + k * share.log() + (views - k) * torch.log1p(-share)
    return torch.where(k <= views, found, torch.full_like(found, -torch.inf))


def _largest(level: Tensor) -> Tensor:
    """Largest magnitude of each channel of each sample: [B, C, 1, ...]."""
    return level.flatten(2).abs().amax(2).reshape(*level.shape[:2], *[1] * (level.ndim - 2))


def wide(per_sample: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...], with as many axes as `like`."""
    return per_sample.view(-1, *[1] * (like.ndim - 1))
