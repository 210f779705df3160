"""The losses that runs train with, and what a network's output means: one pair for regions, one for classes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, cat
from torch.nn import functional

BCE_WEIGHT = 2.0
SMOOTH = 1e-5


def task_loss(logits: Tensor, target: Tensor, *, exclusive: bool) -> Tensor:
    """`class_loss` where the task's regions exclude each other, else `region_loss`."""
    return class_loss(logits, target) if exclusive else region_loss(logits, target)


def loss_gradient(
    logits: np.ndarray, target: np.ndarray, *, exclusive: bool, device: str = "cpu"
) -> tuple[float, np.ndarray]:
    """The loss, and its gradient by the logits, float32 of their shape: what the holder of the labels computes.

    Args:
        logits: float32 [B, channels, *spatial].
        target: [B, regions, *spatial], zeros and ones.
    """
    leaf = torch.from_numpy(np.array(logits, np.float32, order="C")).to(device).requires_grad_()
    wanted = torch.from_numpy(np.array(target, np.float32, order="C")).to(device)
    loss = task_loss(leaf, wanted, exclusive=exclusive)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.item(), gradient.cpu().numpy()


def probabilities(logits: Tensor, *, exclusive: bool) -> Tensor:
    """float32, the shape of `logits` [B, channels, *spatial]: per region, or per class with the background first."""
    return logits.float().softmax(1) if exclusive else logits.float().sigmoid()


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
    dice = _dice(logits.sigmoid(), target)
    return BCE_WEIGHT * cross_entropy + (1 - dice).sum()


def class_loss(logits: Tensor, target: Tensor) -> Tensor:
    """CE(logits, target) + mean over regions r of (1 - Dice_r), a float32 scalar.

    Dice_r as in `region_loss`, with p = softmax(logits), the background left out; CE is the mean over all voxels.

    Args:
        logits: [B, 1 + regions, *spatial], any floating type; channel 0 is the background.
        target: [B, regions, *spatial], zeros and at most one 1 per voxel.
    """
    logits, target = logits.float(), target.float()
    background = 1 - target.sum(1, keepdim=True)
    cross_entropy = -(functional.log_softmax(logits, 1) * cat((background, target), 1)).sum(1).mean()
    dice = _dice(logits.softmax(1)[:, 1:], target)
    return cross_entropy + (1 - dice).mean()


def _dice(probability: Tensor, target: Tensor) -> Tensor:
    """Soft Dice [regions] of the whole batch."""
    axes = (0, *range(2, target.ndim))
    both, either = (probability * target).sum(axes), probability.sum(axes) + target.sum(axes)
    return (2 * both + SMOOTH) / (either + SMOOTH)
