"""How good a segmentation is: Dice, the 95 % Hausdorff distance and volumes, per region, averaged over patients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from splitpeer.data.task import GLIOMA_REGIONS
from splitpeer.training.scores import Scores

PERCENTILE = 95.0
LEAF_VOXELS = 32
"""Of the search tree; twice scipy's default, since each tree is asked once only."""


class VolumeDice:
    """Mean Dice over volumes (cases), each volume scored whole and counted once.

    Dice = 2 |P n T| / (|P| + |T|) (Dice, Ecology 26, 297-302, 1945). Where a volume's mask lacks a region, Dice is
    undefined, and BraTS's convention holds: 1 if the prediction lacks it too, else 0. A region that no mask holds has
    no score at all: such ones and zeros would not say how well it is segmented.
    """

    def __init__(self, regions: Sequence[str] = GLIOMA_REGIONS) -> None:
        self._regions = tuple(regions)
        self._scores: list[np.ndarray] = []
        self._held = np.zeros(len(self._regions), bool)

    def add(self, prediction: np.ndarray | Tensor, truth: np.ndarray | Tensor) -> dict[str, float]:
        """Score one volume; returns its own Dice per region.

        Args:
            prediction: boolean (or 0/1) [regions, *spatial] in the order of the regions.
            truth: the same shape.

        Raises:
            ValueError: the shapes differ or do not hold so many regions.
        """
        found, true = (masks.reshape(len(masks), -1) for masks in _checked(prediction, truth, self._regions))
        size = found.sum(1) + true.sum(1)
        scores = np.where(size > 0, 2 * (found & true).sum(1) / np.maximum(size, 1), 1.0)
        self._held |= true.any(1)
        self._scores.append(scores)
        return {region: float(score) for region, score in zip(self._regions, scores, strict=True)}

    def __len__(self) -> int:
        """Volumes scored so far."""
        return len(self._scores)

    def means(self) -> list[float]:
        """Each volume's mean, in the order of `add`, over the regions that some mask holds: for paired comparisons."""
        return [float(scores[self._held].mean()) for scores in self._scores] if self._held.any() else []

    def result(self) -> Scores:
        """Means over volumes, then over the regions that some mask holds."""
        return means(self._regions, self._scores, self._held)


class Surfaces:
    """Mean 95 % Hausdorff distance over volumes, in mm, and mean volumes, in ml.

    The distance is MONAI's: of the distances from each surface voxel of one mask to the nearest surface voxel of the
    other, the 95th percentile, and of the two directions the greater. (A surface voxel has a face that is not shared
    with another voxel of the mask.) Where one of the two masks is empty there is none, and BraTS's convention holds:
    the diagonal of the whole volume; where both are, 0. A region that no mask holds has no score at all.
    """

    def __init__(self, regions: Sequence[str] = GLIOMA_REGIONS) -> None:
        self._regions = tuple(regions)
        self._distances: list[np.ndarray] = []
        self._volumes: list[np.ndarray] = []
        self._held = np.zeros(len(self._regions), bool)

    def add(
        self, prediction: np.ndarray | Tensor, truth: np.ndarray | Tensor, spacing: Sequence[float]
    ) -> dict[str, float]:
        """Measure one volume; returns its own distances per region, in mm.

        Args:
            prediction: boolean (or 0/1) [regions, x, y, z] in the order of the regions.
            truth: the same shape.
            spacing: mm between voxels along x, y and z.

        Raises:
            ValueError: the shapes differ or do not hold so many regions.
        """
        found, true = _checked(prediction, truth, self._regions)
        distances = np.array([hausdorff(one, other, spacing) for one, other in zip(found, true, strict=True)])
        millilitres = float(np.prod(np.asarray(spacing, np.float64))) / 1000
        counts = np.array([masks.reshape(len(masks), -1).sum(1) for masks in (found, true)])
        self._distances.append(distances)
        self._volumes.append(counts * millilitres)
        self._held |= counts[1] > 0
        return {region: float(mm) for region, mm in zip(self._regions, distances, strict=True)}

    def __len__(self) -> int:
        """Volumes measured so far."""
        return len(self._distances)

    def distances(self) -> Scores:
        """In mm: means over volumes, then over the regions that some mask holds."""
        return means(self._regions, self._distances, self._held)

    def volumes(self) -> dict[str, dict[str, float]]:
        """In ml, means over volumes: region to {"predicted", "true"}."""
        if not self._volumes:
            return {}
        predicted, true = np.mean(self._volumes, axis=0).tolist()
        return {
            region: {"predicted": predicted[index], "true": true[index]}
            for index, region in enumerate(self._regions)
        }


def hausdorff(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> float:
    """The 95 % Hausdorff distance of two boolean masks [x, y, z], in mm; see `Surfaces` for empty ones."""
    if not prediction.any() and not truth.any():
        return 0.0
    if not prediction.any() or not truth.any():
        return float(np.linalg.norm(np.multiply(truth.shape, spacing)))
    # They take a quarter of a second to import, and most processes never measure.
    from scipy.ndimage import binary_erosion
    from scipy.spatial import KDTree

    # Beyond the volume nothing is foreground: a mask that is cut off there has its surface there.
    surfaces = [
        np.argwhere(mask & ~binary_erosion(mask)) * np.asarray(spacing, np.float64)
        for mask in (prediction, truth)
    ]
    there, back = (KDTree(to, LEAF_VOXELS).query(of)[0] for of, to in (surfaces, surfaces[::-1]))
    return float(max(np.percentile(there, PERCENTILE), np.percentile(back, PERCENTILE)))


def _checked(
    prediction: np.ndarray | Tensor, truth: np.ndarray | Tensor, regions: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    shapes = tuple(prediction.shape), tuple(truth.shape)
    if shapes[0] != shapes[1] or shapes[0][0] != len(regions):
        raise ValueError(
            f"prediction is {shapes[0]}, truth {shapes[1]}: expected [{len(regions)}, ...] of both"
        )
    return np.asarray(prediction).astype(bool), np.asarray(truth).astype(bool)


def means(regions: Sequence[str], scores: Sequence[np.ndarray], held: np.ndarray) -> Scores:
    """Means over volumes, then over the regions that some mask holds.

    Args:
        scores: of each volume, [regions].
        held: bool [regions].
    """
    found = {
        region: _mean([float(of_volume[index]) for of_volume in scores]) if held[index] else None
        for index, region in enumerate(regions)
    }
    return {**found, "mean": _mean([score for score in found.values() if score is not None])}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
