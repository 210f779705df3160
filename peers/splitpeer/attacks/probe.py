"""A linear probe that reads labels off the levels of any encoder, and what makes a sample hard to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

BATCH = 16
VOXELS = 1024
"""Of each shadow sample from which the probe learns."""
RIDGE = 1e-3
Sender = Callable[[np.ndarray], Mapping[str, Tensor]]
"""Rows of samples, at most `BATCH`, to what is sent of them: {"x0": [B, C, *spatial], ...}."""


@dataclass(frozen=True)
class LinearProbe:
    """A linear map from the values above a voxel to its label, by ridge regression."""

    weights: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def learn(cls, world: Sender, labels: np.ndarray, rows: np.ndarray, seed: int) -> LinearProbe:
        """Ridge regression from the levels of some samples to the labels of their voxels.

        Args:
            labels: bool [N, *spatial].
            rows: the samples that are learned from.
        """
        source = np.random.default_rng(seed)
        values, goals = [], []
        for batch in batches(rows):
            for of, label in zip(_stacked(world(batch), labels.shape[1:]), labels[batch], strict=True):
                flat, goal = of.reshape(len(of), -1).T, label.ravel()
                inside = np.flatnonzero(goal)
                few = source.choice(len(goal), min(VOXELS, len(goal)), replace=False)
                places = np.concatenate([few, inside[: VOXELS // 4]])
                values.append(flat[places])
                goals.append(goal[places])
        x, y = np.concatenate(values).astype(np.float64), np.concatenate(goals).astype(np.float64)
        mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
        x = np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], 1)
        weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)
        return cls(weights, mean, scale)

    def errors(
        self, levels: Mapping[str, Tensor], labels: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The reading error of each sample [B], and what tells how hard it is [B, 3].

        Args:
            labels: bool [B, *spatial]; None: the probe's own outline.
        """
        window = _window(levels) if labels is None else labels.shape[1:]
        errors, hardness = [], []
        for number, of in enumerate(_stacked(levels, window)):
            flat = (of.reshape(len(of), -1).T - self.mean) / self.scale
            found = flat @ self.weights[:-1] + self.weights[-1]
            label = found > 0.5 if labels is None else labels[number].ravel()
            squares = np.square(found - label)
            parts = [squares[side].mean() for side in (label, ~label) if side.any()]
            errors.append(float(np.mean(parts)))
            size = float(label.mean())
            hardness.append([1.0, size, size**0.5])
        return np.asarray(errors), np.asarray(hardness)


def read(
    probe: LinearProbe, world: Sender, labels: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`LinearProbe.errors` of samples `rows`, batch by batch."""
    found = [probe.errors(world(batch), labels[batch]) for batch in batches(rows)]
    return np.concatenate([one for one, _ in found]), np.concatenate([other for _, other in found])


def outline(masks: np.ndarray) -> np.ndarray:
    """All that is segmented, bool [N, *spatial]."""
    found: np.ndarray = np.asarray(masks).max(axis=1) != 0
    return found


def batches(rows: np.ndarray) -> list[np.ndarray]:
    """At most `BATCH` at once."""
    return [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]


def _window(levels: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The finest grid of all levels."""
    finest = max(levels.values(), key=lambda tensor: tensor.shape[2])
    return tuple(finest.shape[2:])


def _stacked(levels: Mapping[str, Tensor], window: Sequence[int]) -> np.ndarray:
    """All levels on the grid of the window, float32 [B, channels of all, *spatial]."""
    grown = [functional.interpolate(levels[name].float(), size=tuple(window)) for name in sorted(levels)]
    stacked: np.ndarray = torch.cat(grown, 1).cpu().numpy()
    return stacked
