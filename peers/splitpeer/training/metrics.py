"""How good a segmentation is: Dice per region and volume, averaged over volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from torch import Tensor

from splitpeer.models.unet import REGIONS

Scores: TypeAlias = dict[str, float | None]
"""{"WT", "TC", "ET", "mean"}; None (null in JSON) for what cannot be scored."""


def shown(score: float | None) -> str:
    """A score for people: three decimals, or a dash where there is none."""
    return "-" if score is None else f"{score:.3f}"


class VolumeDice:
    """Mean Dice over volumes (cases), each volume scored whole and counted once.

    Dice = 2 |P n T| / (|P| + |T|) (Dice, Ecology 26, 297-302, 1945). Where a volume's mask lacks a region, Dice is
    undefined, and BraTS's convention holds: 1 if the prediction lacks it too, else 0. A region that no mask holds has
    no score at all: such ones and zeros would not say how well it is segmented.
    """

    def __init__(self) -> None:
        self._scores: list[np.ndarray] = []
        self._held = np.zeros(len(REGIONS), bool)

    def add(self, prediction: np.ndarray | Tensor, truth: np.ndarray | Tensor) -> dict[str, float]:
        """Score one volume; returns its own Dice per region.

        Args:
            prediction: boolean (or 0/1) [3, *spatial] in the order WT, TC, ET.
            truth: the same shape.

        Raises:
            ValueError: the shapes differ or do not hold three regions.
        """
        shapes = tuple(prediction.shape), tuple(truth.shape)
        if shapes[0] != shapes[1] or shapes[0][0] != len(REGIONS):
            raise ValueError(
                f"prediction is {shapes[0]}, truth {shapes[1]}: expected [{len(REGIONS)}, ...] of both"
            )
        found, true = (
            np.asarray(masks).astype(bool).reshape(len(REGIONS), -1) for masks in (prediction, truth)
        )
        size = found.sum(1) + true.sum(1)
        scores = np.where(size > 0, 2 * (found & true).sum(1) / np.maximum(size, 1), 1.0)
        self._held |= true.any(1)
        self._scores.append(scores)
        return {region: float(score) for region, score in zip(REGIONS, scores, strict=True)}

    def __len__(self) -> int:
        """Volumes scored so far."""
        return len(self._scores)

    def result(self) -> Scores:
        """Means over volumes, then over the regions that some mask holds."""
        means = {
            region: _mean([float(scores[index]) for scores in self._scores]) if self._held[index] else None
            for index, region in enumerate(REGIONS)
        }
        return {**means, "mean": _mean([score for score in means.values() if score is not None])}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
