"""The loss that every run trains with."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

BCE_WEIGHT = 2.0
SMOOTH = 1e-5


def region_loss(logits: Tensor, target: Tensor) -> Tensor:
    """2 * BCE(logits, target) + sum over regions r of (1 - Dice_r), a float32 scalar.

    Dice_r = (2 * sum(p * t) + e) / (sum(p) + sum(t) + e) with p = sigmoid(logits), sums over the whole
    batch and all voxels, e = 1e-5 (soft Dice after Milletari et al., arXiv 1606.04797). Over the batch and
    not per image, since many slices have no enhancing tumour at all. BCE is the mean over everything.

    Args:
        logits: [B, regions, *spatial], any floating type.
        target: [B, regions, *spatial], zeros and ones.
    """
    logits, target = logits.float(), target.float()
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, target)
    probability, axes = logits.sigmoid(), (0, *range(2, logits.ndim))
    both, either = (probability * target).sum(axes), probability.sum(axes) + target.sum(axes)
    dice = (2 * both + SMOOTH) / (either + SMOOTH)
    return BCE_WEIGHT * cross_entropy + (1 - dice).sum()
