"""Defences of the gradients that a label holder sends, which otherwise show each site where the tumour is.

One example of the published, whole-sample defences is here one voxel: its vector of channels g in R^d, its label
whether it lies in any region at the level's resolution, where a coarse voxel is positive if any voxel
below it is. All statistics are those of one level of one batch, over all its voxels.

Source: Li et al. 2021, arXiv 2102.08504 (max-norm, iso, Marvell), for one gradient vector per sample.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, adaptive_max_pool3d

from splitpeer.defences import kinds
from splitpeer.defences.base import Defence, Tensors
from splitpeer.defences.gradient.marvell import Classes, cheapest, strongest
from splitpeer.defences.randomness import Draw


class _VoxelNoise(Defence):
    """Adds noise of mean zero to every voxel's vector: the gradient stays right on average."""

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        changed = dict(tensors)
        for name, tensor in tensors.items():
            if self.covers(name):
                vectors = tensor.detach().double().movedim(1, -1)
                noise = self._noise(name, vectors, draw)
                changed[name] = (vectors + noise).movedim(-1, 1).to(tensor.dtype).contiguous()
        return changed

    @abstractmethod
    def _noise(self, name: str, vectors: Tensor, draw: Draw) -> Tensor:
        """Noise for `vectors`, float64 [batch, *spatial, channels]."""


class MaxNorm(_VoxelNoise):
    """g (1 + xi) with xi ~ N(0, |g_max|^2 / |g|^2 - 1): all voxels' vectors are equally long on average."""

    kind = kinds.MAX_NORM

    def _noise(self, name: str, vectors: Tensor, draw: Draw) -> Tensor:
        squared = (vectors**2).sum(-1, keepdim=True)
        length = squared.sqrt()
        xi = _normal(draw, f"{name} length", (*vectors.shape[:-1], 1), vectors.device)
        direction = vectors / length.clamp_min(torch.finfo(torch.float64).tiny)
        if not (length > 0).all():
            # A vector of zeros has no direction to hide behind, and zero is what gives it away: any other will do.
            other = _normal(draw, f"{name} direction", vectors.shape, vectors.device)
            direction = torch.where(length > 0, direction, other / other.norm(dim=-1, keepdim=True))
        return direction * (squared.max() - squared).sqrt() * xi


class Iso(_VoxelNoise):
    """N(0, (s / d) |g_max|^2) on every coordinate."""

    kind = kinds.ISO

    def _noise(self, name: str, vectors: Tensor, draw: Draw) -> Tensor:
        return _isotropic(name, vectors, draw, float(self.values["s"]))


class Marvell(_VoxelNoise):
    """The least noise by which an optimal detector of positive voxels errs in at least the share `error`.

    With `power` > 0 instead: the noise of power `power` times |Delta|^2 that makes detection hardest. Noise differs
    between the classes, and along the difference Delta of their means from across it. A batch of one class
    alone has no Delta: it gets isotropic noise (`iso`, s = 1).
    """

    kind = kinds.MARVELL

    def _noise(self, name: str, vectors: Tensor, draw: Draw) -> Tensor:
        positive = labels_at(draw.release.target, tuple(vectors.shape[:-1])).to(vectors.device)
        if positive.all() or not positive.any():
            return _isotropic(name, vectors, draw, 1.0)
        classes, direction = estimate(vectors, positive)
        power, error = float(self.values["power"]), float(self.values["error"])
        covariance = strongest(classes, power * classes.gap) if power else cheapest(classes, error)
        across = torch.where(positive, covariance.across1, covariance.across0).sqrt()[..., None]
        extra = torch.where(positive, covariance.along1 - covariance.across1,
                            covariance.along0 - covariance.across0).sqrt()[..., None]  # fmt: skip
        every = _normal(draw, f"{name} across", vectors.shape, vectors.device)
        along = _normal(draw, f"{name} along", (*vectors.shape[:-1], 1), vectors.device)
        return across * every + extra * along * direction


# --- voxels ----------------------------------------------------------------------------------------------


def labels_at(target: np.ndarray | None, shape: tuple[int, ...]) -> Tensor:
    """Where any region is at a level: `target` [batch, regions, *fine] to bool [batch, *coarse] of `shape`.

    Raises:
        ValueError: there is no target: only the holder of the labels can use this defence.
    """
    if target is None:
        raise ValueError("a defence that needs the labels was given none")
    whole = torch.from_numpy(np.ascontiguousarray(target.max(axis=1, keepdims=True), dtype=np.float32))
    pool = adaptive_max_pool2d if len(shape) == 3 else adaptive_max_pool3d
    return pool(whole, shape[1:])[:, 0] > 0.5


def estimate(vectors: Tensor, positive: Tensor) -> tuple[Classes, Tensor]:
    """The two classes of float64 `vectors` [..., channels], and the unit vector of their means' difference."""
    rest, tumour = vectors[~positive], vectors[positive]
    mean0, mean1 = rest.mean(0), tumour.mean(0)
    difference = mean1 - mean0
    gap = float((difference**2).sum())
    classes = Classes(
        vectors.shape[-1],
        len(tumour) / (len(tumour) + len(rest)),
        float(((rest - mean0) ** 2).mean()),
        float(((tumour - mean1) ** 2).mean()),
        gap,
    )
    return classes, difference / max(gap, 1e-300) ** 0.5


def _isotropic(name: str, vectors: Tensor, draw: Draw, s: float) -> Tensor:
    longest = (vectors**2).sum(-1).max()
    return (
        _normal(draw, f"{name} iso", vectors.shape, vectors.device) * (s / vectors.shape[-1] * longest).sqrt()
    )


def _normal(draw: Draw, purpose: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal float64 of `shape`, sample by sample."""
    drawn = [draw.fresh(purpose, index).standard_normal(shape[1:]) for index in range(shape[0])]
    return torch.from_numpy(np.stack(drawn)).to(device)
