"""A batch's augmentation, as an adversary who knows its seed does and undoes it (compare `data/augment.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitpeer.attacks.base import Shot
from splitpeer.data.augment import derive


@dataclass(frozen=True)
class Pose:
    """How all channels of one sample were turned together, and each was scaled."""

    flips: tuple[bool, bool, bool]
    turns: int
    scales: tuple[float, ...] = (1.0,)
    """By channel."""

    def gain(self, like: Tensor) -> Tensor:
        """The scales, to multiply images [C, *spatial] with."""
        return like.new_tensor(self.scales).reshape(-1, *[1] * (like.ndim - 1))


def pose_of(shot: Shot, modalities: Sequence[str] | None) -> Pose | None:
    """How the sample was augmented for this release; None: not at all.

    Args:
        modalities: of its channels; None: of a mask, whose values stay.
    """
    if shot.seed is None:
        return None
    plans = [derive(shot.seed, shot.index, modality) for modality in modalities or (None,)]
    return Pose(plans[0].flips, plans[0].turns, tuple(plan.scale for plan in plans))


def turn(array: Tensor, pose: Pose | None) -> Tensor:
    """One sample [C, *spatial] flipped and turned as the site did before it ran its encoder."""
    if pose is None:
        return array
    axes = [axis for axis in range(1, array.ndim) if pose.flips[axis - 1]]
    array = torch.flip(array, axes)
    return torch.rot90(array, pose.turns, (1, 2)) if array.shape[1] == array.shape[2] else array


def turn_back(array: Tensor, pose: Pose | None) -> Tensor:
    """The inverse of `turn`."""
    if pose is None:
        return array
    if array.shape[1] == array.shape[2]:
        array = torch.rot90(array, -pose.turns, (1, 2))
    return torch.flip(array, [axis for axis in range(1, array.ndim) if pose.flips[axis - 1]])


def pose_images(images: Tensor, poses: Sequence[Pose | None]) -> Tensor:
    """[B, channels, *spatial], each sample in its own pose and gain; differentiable.

    The shift of grey values is left out: it spares the background, whose place the adversary does not know, and
    it is a tenth of a standard deviation at most.
    """
    if all(pose is None for pose in poses):
        return images
    return torch.stack([turn(x, p) * p.gain(x) if p else x for x, p in zip(images, poses, strict=True)])


def unpose_images(images: Tensor, poses: Sequence[Pose | None]) -> Tensor:
    """The inverse of `pose_images`."""
    if all(pose is None for pose in poses):
        return images
    return torch.stack([turn_back(x, p) / p.gain(x) if p else x for x, p in zip(images, poses, strict=True)])
