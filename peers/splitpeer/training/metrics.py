"""How good a segmentation is: Dice per region and volume, averaged over volumes."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from monai.metrics import compute_dice
from torch import Tensor

from splitpeer.models.unet import REGIONS

Empty = Literal["one", "skip"]


class VolumeDice:
    """Mean Dice over volumes (cases), each volume scored whole and counted once.

    Dice = 2 |P n T| / (|P| + |T|) (Dice, Ecology 26, 297-302, 1945). Where a volume's truth lacks a region,
    Dice has no meaning and a convention must do:

    - `empty="one"`, as BraTS scores: 1 if the prediction lacks it too, else 0;
    - `empty="skip"`: the volume does not count for that region.
    """

    def __init__(self, empty: Empty = "one") -> None:
        if empty not in ("one", "skip"):
            raise ValueError(f'empty must be "one" or "skip", not {empty!r}')
        self._empty = empty
        self._scores: list[np.ndarray] = []

    def add(self, prediction: np.ndarray | Tensor, truth: np.ndarray | Tensor) -> dict[str, float]:
        """Score one volume; returns its own Dice per region (NaN where skipped).

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
        scores = compute_dice(
            torch.as_tensor(prediction).float()[None],
            torch.as_tensor(truth).float()[None],
            ignore_empty=self._empty == "skip",
        )[0].numpy()
        self._scores.append(scores)
        return {region: float(score) for region, score in zip(REGIONS, scores, strict=True)}

    def __len__(self) -> int:
        """Volumes scored so far."""
        return len(self._scores)

    def result(self) -> dict[str, float]:
        """{"WT", "TC", "ET", "mean"}: means over volumes, then over regions; NaN where no volume counts."""
        means = {
            region: _mean([scores[index] for scores in self._scores]) for index, region in enumerate(REGIONS)
        }
        return {**means, "mean": _mean(list(means.values()))}


def _mean(values: list[float]) -> float:
    counted = [float(value) for value in values if not math.isnan(value)]
    return sum(counted) / len(counted) if counted else math.nan
