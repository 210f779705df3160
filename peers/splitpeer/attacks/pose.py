"""A batch's augmentation, as an adversary who knows its seed does and undoes it (compare `data/augment.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from splitpeer.attacks.base import Shot
from splitpeer.data.augment import Augmentation, derive


def pose_of(shot: Shot, modality: str | None) -> Augmentation | None:
    """How the sample was augmented for this release; None: not at all."""
    return None if shot.seed is None else derive(shot.seed, shot.index, modality)


def turn(array: Tensor, pose: Augmentation | None) -> Tensor:
    """One sample [C, *spatial] flipped and turned as the site did before it ran its encoder."""
    if pose is None:
        return array
    axes = [axis for axis in range(1, array.ndim) if pose.flips[axis - 1]]
    array = torch.flip(array, axes)
    return torch.rot90(array, pose.turns, (1, 2)) if array.shape[1] == array.shape[2] else array


def turn_back(array: Tensor, pose: Augmentation | None) -> Tensor:
    """The inverse of `turn`."""
    if pose is None:
        return array
    if array.shape[1] == array.shape[2]:
        array = torch.rot90(array, -pose.turns, (1, 2))
    return torch.flip(array, [axis for axis in range(1, array.ndim) if pose.flips[axis - 1]])


def pose_images(images: Tensor, poses: Sequence[Augmentation | None]) -> Tensor:
    """[B, 1, *spatial], each sample in its own pose and gain; differentiable.

    The shift of grey values is left out: it spares the background, whose place the adversary does not know, and
    it is a tenth of a standard deviation at most.
    """
    if all(pose is None for pose in poses):
        return images
    return torch.stack([turn(x, p) * (p.scale if p else 1.0) for x, p in zip(images, poses, strict=True)])


def unpose_images(images: Tensor, poses: Sequence[Augmentation | None]) -> Tensor:
    """The inverse of `pose_images`."""
    if all(pose is None for pose in poses):
        return images
    return torch.stack(
        [turn_back(x, p) / (p.scale if p else 1.0) for x, p in zip(images, poses, strict=True)]
    )
