"""Distorted windows, from which an encoder learns to restore the true ones, without anybody's labels.

The four distortions of Models Genesis (Zhou et al., MICCAI 2019, arXiv 1908.06912), by MONAI's transforms: intensities
mapped along a curve, voxels shuffled within small boxes, and boxes painted over, or all but a few boxes. What is drawn
depends on the octets of the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from monai.transforms import RandCoarseDropout, RandCoarseShuffle, RandHistogramShift

CURVE, SHUFFLE, PAINT, INSIDE = 0.9, 0.5, 0.9, 0.2
"""How often each is done; and how often painting is inside the boxes and not around them: the paper's figures."""
POINTS = (5, 10)
"""A curve has so many, from and to."""
_SHUFFLED = (4, 24)
"""Boxes, each an eighth of the window at most."""
_BOXES = (1, 5)
"""Boxes that are painted over, a third of the window at most; or kept, four sevenths at most."""


class Distortion:
    """Distorts windows of one size.

    Args:
        spatial: voxels along each axis, two or three.
    """

    def __init__(self, spatial: Sequence[int]) -> None:
        self._curve = RandHistogramShift(POINTS, prob=CURVE)
        self._shuffle = RandCoarseShuffle(
            _SHUFFLED[0], _part(spatial, 1, 16), _SHUFFLED[1], _part(spatial, 1, 8), prob=SHUFFLE
        )
        least, most = _BOXES
        self._inside = RandCoarseDropout(
            least, _part(spatial, 1, 6), True, 0.0, most, _part(spatial, 1, 3), prob=1.0
        )
        self._around = RandCoarseDropout(
            least, _part(spatial, 3, 7), False, 0.0, most, _part(spatial, 4, 7), prob=1.0
        )

    def __call__(self, window: np.ndarray, seed: Sequence[int]) -> np.ndarray:
        """float32 [channels, *spatial], distorted, all channels in the same places; as it is where all values are one.

        Args:
            window: is not changed.
            seed: whole numbers, none negative.
        """
        low, high = float(window.min()), float(window.max())
        if low == high:
            return window.copy()
        # MONAI takes numpy's older generator, which may draw from PCG64's whole state.
        source = np.random.RandomState(np.random.PCG64(np.random.SeedSequence(seed)))
        for transform in (self._curve, self._shuffle, self._inside, self._around):
            transform.set_random_state(state=source)
        # Zero, outside the head, is no intensity.
        curved = np.stack([_plain(self._curve(channel[None]))[0] for channel in window])
        out = _plain(self._shuffle(np.where(window != 0, curved, window)))
        if source.uniform() < PAINT:
            paint = self._inside if source.uniform() < INSIDE else self._around
            paint.fill_value = (low, high)
            out = _plain(paint(out))
        return np.ascontiguousarray(out, dtype=np.float32)


def _part(spatial: Sequence[int], of: int, parts: int) -> tuple[int, ...]:
    """A share of each axis in voxels, at least one."""
    return tuple(max(1, size * of // parts) for size in spatial)


def _plain(array: object) -> np.ndarray:
    return np.asarray(array, dtype=np.float32)
