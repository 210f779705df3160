"""What may give away, in one sample's levels, that the encoder has seen the patient: many numbers, none chosen by hand.

Which of them tell, and in which direction, is learned from encoders of the adversary's own (`references.py`). All are
independent of how an encoder numbers its channels, so that they mean the same in another encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_TINY = 1e-12
NEAREST = 3
"""Strangers to whom the distance is taken."""
OF_A_LEVEL = ("L1", "RMS", "largest", "small values", "kurtosis", "energy over channels", "roughness")


@dataclass(frozen=True)
class SampleSigns:
    """Samples as one encoder sends them."""

    signs: np.ndarray
    """float64 [N, signs]: what each sample says by itself."""
    pooled: np.ndarray
    """float64 [N, channels of all levels]: the logarithm of each channel's RMS, to compare samples by."""

    def of(self, rows: np.ndarray) -> SampleSigns:
        """Some of them."""
        return SampleSigns(self.signs[rows], self.pooled[rows])


def seen(levels: Mapping[str, Tensor]) -> SampleSigns:
    """Of {"x0": [B, C, *spatial], ...}: `OF_A_LEVEL` for each level in order of name."""
    signs, pooled = [], []
    for name in sorted(levels):
        level = levels[name].double()
        flat = level.flatten(1)
        power = flat.square().mean(1).clamp_min(_TINY)
        rms = power.sqrt()
        energy = level.flatten(2).square().mean(2)
        share = energy / energy.sum(1, keepdim=True).clamp_min(_TINY)
        signs += [
            flat.abs().mean(1).clamp_min(_TINY).log(),
            rms.log(),
            flat.abs().amax(1).clamp_min(_TINY).log(),
            (flat.abs() < 0.1 * rms[:, None]).double().mean(1),
            (flat.pow(4).mean(1) / power.square()).clamp_min(_TINY).log(),
            -(share * share.clamp_min(_TINY).log()).sum(1),
            (_changes(level) / power).clamp_min(_TINY).log(),
        ]
        pooled.append(energy.clamp_min(_TINY).log() / 2)
    return SampleSigns(torch.stack(signs, 1).cpu().numpy(), torch.cat(pooled, 1).cpu().numpy())


def _changes(level: Tensor) -> Tensor:
    """Mean square of the differences between neighbours, [B]."""
    total = level.new_zeros(len(level))
    for axis in range(2, level.ndim):
        if level.shape[axis] > 1:
            total = total + torch.diff(level, dim=axis).square().flatten(1).mean(1)
    return total


def read_by(logits: Tensor, masks: Tensor | None) -> np.ndarray:
    """What a decoder says of each sample, float64 [B, 4]: loss and Dice with the masks (or with what it draws itself),
    how sure it is, and how much it draws.

    Args:
        logits: [B, regions, *spatial].
        masks: of the same shape; None: not known.
    """
    logits = logits.double()
    drawn = (logits > 0).double()
    goal = drawn if masks is None else masks.to(logits)
    apart = functional.binary_cross_entropy_with_logits(logits, goal, reduction="none").flatten(1)
    inside = goal.flatten(1)
    hit = (apart * inside).sum(1) / inside.sum(1).clamp_min(1)
    missed = (apart * (1 - inside)).sum(1) / (1 - inside).sum(1).clamp_min(1)
    chance = logits.sigmoid().flatten(1)
    dice = (2 * (chance * inside).sum(1) + 1) / (chance.sum(1) + inside.sum(1) + 1)
    sure = logits.flatten(1).abs().mean(1)
    found = [((hit + missed) / 2).clamp_min(1e-6).log(), dice, sure.clamp_min(_TINY).log(), chance.mean(1)]
    return torch.stack(found, 1).cpu().numpy()


def distances(of: SampleSigns, to: SampleSigns) -> np.ndarray:
    """How far each sample is from strangers: the logarithm of the mean distance to the `NEAREST`, and of that to their
    centre, float64 [N, 2]; channels in units of the strangers' deviation."""
    centre, scale = to.pooled.mean(0), np.maximum(to.pooled.std(0), 1e-6)
    a, b = (of.pooled - centre) / scale, (to.pooled - centre) / scale
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    apart = np.sqrt(np.maximum(squares, 0) / a.shape[1])
    near = np.sort(apart, 1)[:, : min(NEAREST, apart.shape[1])].mean(1)
    found: np.ndarray = np.log(np.stack([near, np.sqrt((a**2).mean(1))], 1) + 1e-6)
    return found
