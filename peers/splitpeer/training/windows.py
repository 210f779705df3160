"""Sliding windows as coordinates: every site cuts the same window, the coordinator puts the predictions together.

MONAI's `sliding_window_inference` needs image and network in one process. Here only an origin crosses the
wire. The grid, the weights and the sums are MONAI's; a test compares. A slice is a window of depth 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

GAUSSIAN_SIGMA = 0.125  # of the window, as in MONAI and nnU-Net
LEAST_IMPORTANCE = 1e-3  # where the Gaussian is as good as zero: every voxel of a window counts


def window_origins(
    shape: Sequence[int], window: Sequence[int], overlap: float = 0.5
) -> list[tuple[int, int, int]]:
    """Lowest corners, in voxels, of the windows that cover a volume [H, W, D], in a fixed order.

    Windows step by window * (1 - overlap); the last one of an axis is moved back inside. On an axis shorter
    than the window there is one window, centred, whose origin is negative: the volume counts as padded with
    zeros.

    Raises:
        ValueError: sizes are not three positive numbers, or `overlap` is not in [0, 1).
    """
    _check(shape, window)
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, not {overlap}")
    padded = [max(size, width) for size, width in zip(shape, window, strict=True)]
    stride = [stride_of(size, width, overlap) for size, width in zip(padded, window, strict=True)]
    before = [max(width - size, 0) // 2 for size, width in zip(shape, window, strict=True)]
    x, y, z = (
        [min(step, size - width) - margin for step in range(0, size - width + pace, pace)]
        for size, width, pace, margin in zip(padded, window, stride, before, strict=True)
    )
    return list(itertools.product(x, y, z))


def stride_of(size: int, width: int, overlap: float) -> int:
    """How far apart neighbouring windows begin on one axis, in voxels; no two fit on an axis no longer than one."""
    return width if size <= width else max(1, int(width * (1 - overlap)))


class WindowMerger:
    """Weighted mean of overlapping windows' predictions.

    Weights are Gaussian, since a window's border sees the least context (Isensee et al., Nature Methods 18,
    203-211, 2021), or constant for slices.

    Args:
        shape: the volume [H, W, D].
        window: [h, w, d]; d = 1 for slices.
        channels: channels of the predictions.
    """

    def __init__(self, shape: Sequence[int], window: Sequence[int], channels: int) -> None:
        _check(shape, window)
        self._shape, self._window = tuple(shape), tuple(window)
        self._importance = _importance(self._window)
        self._sum = np.zeros((channels, *self._shape), dtype=np.float32)
        self._weight = np.zeros(self._shape, dtype=np.float32)

    def add(self, origin: Sequence[int], prediction: np.ndarray) -> None:
        """Add one window's prediction, float [channels, h, w, d]; voxels outside the volume are cut off.

        Raises:
            ValueError: the prediction has another shape, or the window lies outside the volume.
        """
        expected = (self._sum.shape[0], *self._window)
        if prediction.shape != expected:
            raise ValueError(f"prediction is {prediction.shape}, expected {expected}")
        inside, within = _overlap(self._shape, origin, self._window)
        importance = self._importance[within]
        self._sum[:, *inside] += prediction[:, *within] * importance
        self._weight[inside] += importance

    def result(self) -> np.ndarray:
        """The merged volume, float32 [channels, H, W, D].

        Raises:
            ValueError: some voxels were in no window.
        """
        uncovered = int((self._weight == 0).sum())
        if uncovered:
            raise ValueError(f"{uncovered} voxels were in no window: the volume is not complete")
        return self._sum / self._weight


def _importance(window: Sequence[int]) -> np.ndarray:
    """Weights of a window's voxels, float32."""
    weights = np.ones(tuple(window))
    if 1 not in window:
        for axis, width in enumerate(window):
            away = np.arange(width) - (width - 1) / 2
            bell = np.exp(-(away**2) / (2 * (GAUSSIAN_SIGMA * width) ** 2))
            weights *= bell.reshape([-1 if other == axis else 1 for other in range(3)])
    return np.maximum(weights, LEAST_IMPORTANCE).astype(np.float32)


def _overlap(
    shape: Sequence[int], origin: Sequence[int], window: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where volume and window overlap: in the volume's coordinates, and in the window's."""
    inside = tuple(
        slice(max(start, 0), min(start + width, size))
        for start, width, size in zip(origin, window, shape, strict=True)
    )
    if any(part.start >= part.stop for part in inside):
        raise ValueError(f"window {tuple(window)} at {tuple(origin)} lies outside the volume {tuple(shape)}")
    within = tuple(slice(p.start - start, p.stop - start) for p, start in zip(inside, origin, strict=True))
    return inside, within


def _check(shape: Sequence[int], window: Sequence[int]) -> None:
    if len(shape) != 3 or len(window) != 3 or min(*shape, *window) < 1:
        raise ValueError(f"volume {list(shape)} and window {list(window)} must be three positive sizes each")
