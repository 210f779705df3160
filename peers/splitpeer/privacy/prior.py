"""How much is known of an image before anything is sent: the Fisher information of a prior, from images of others.

J = E |d log p(x) / dx|^2 / d, per voxel. No attacker beats its sum with what is sent (`dfil.mean_floor`).
Score matching (Hyvarinen, J. Mach. Learn. Res. 6, 2005) estimates it without p: for any field s, J is at least
-E[2 div s + |s|^2] / d, with equality for the score itself. Here s is as simple as can be: (prediction from the
neighbours - voxel) / variance, where the variance depends on how much the neighbours differ.

So the estimate is from below, and a bound made with it is from above: who has a better model of brains than neighbours
of a voxel give knows more, and may come below it.
"""

from __future__ import annotations

from itertools import product

import numpy as np

GROUPS = 8
"""Of voxels, by how much their neighbours differ."""
LEAST = 1e-6
"""Variance that is told apart from none."""


def prior_information(images: np.ndarray) -> float:
    """J per voxel inside the body, in 1 / (image unit)^2: fitted to one half of the images, measured on the other.

    Args:
        images: float32 [N, channels, *spatial], of N other patients, zero outside the body.

    Raises:
        ValueError: fewer than two images, or no voxel has all its neighbours inside the body.
    """
    if len(images) < 2:
        raise ValueError("at least two images are needed: one to fit, one to measure on")
    voxels, around = _neighbourhoods(images[::2])
    held, held_around = _neighbourhoods(images[1::2])
    if len(voxels) < around.shape[1] + GROUPS or not len(held):
        raise ValueError("too few voxels have all their neighbours inside the body")
    design = np.column_stack([around, np.ones(len(around))])
    weights, *_ = np.linalg.lstsq(design, voxels, rcond=None)
    contrast = around.std(1)
    edges = np.quantile(contrast, np.linspace(0, 1, GROUPS + 1)[1:-1])
    squares = np.square(design @ weights - voxels)
    group = np.searchsorted(edges, contrast)
    variance = np.array([
        max(squares[group == n].mean(), LEAST) if (group == n).any() else squares.mean() for n in range(GROUPS)
    ])  # fmt: skip
    rest = np.square(np.column_stack([held_around, np.ones(len(held))]) @ weights - held)
    of = variance[np.searchsorted(edges, held_around.std(1))]
    return max(0.0, float((2 / of - rest / of**2).mean()))


def _neighbourhoods(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels [M] whose neighbours are all inside the body, and those neighbours [M, 3^dimensions - 1]; float64."""
    spatial = images.shape[2:]
    flat = images.reshape(-1, *spatial).astype(np.float64)

    def shifted(step: tuple[int, ...]) -> np.ndarray:
        return flat[(slice(None), *(slice(1 + s, n - 1 + s) for s, n in zip(step, spatial, strict=True)))]

    steps = [step for step in product((-1, 0, 1), repeat=len(spatial)) if any(step)]
    centre = shifted((0,) * len(spatial))
    around = np.stack([shifted(step) for step in steps], -1)
    inside = (centre != 0) & (around != 0).all(-1)
    return centre[inside], around[inside]
