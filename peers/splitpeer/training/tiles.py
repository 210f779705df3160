"""Batches for a decoder that is trained from released windows: only these can be drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from splitpeer.data.sampling import TrainingSchedule
from splitpeer.data.volumes import Volumes
from splitpeer.training.windows import window_origins
from splitproto.records import Sample


class TiledSchedule(TrainingSchedule):
    """As its base, but a sample is one of the windows that cover a volume, as in an evaluation.

    With probability `positive_fraction` one of those that hold tumour, where the patient has any; else any.

    Args:
        overlap: of neighbouring windows.
        further: those of the base.
    """

    def __init__(self, keys: Any, labels: Volumes, *, overlap: float, **further: Any) -> None:
        super().__init__(keys, labels, **further)
        self._masks, self._overlap = labels, overlap
        self._tiles: dict[bytes, tuple[list[tuple[int, int, int]], np.ndarray]] = {}

    def _draw(self, key: bytes, rng: np.random.Generator) -> Sample:
        origins, positive = self._tiled(key)
        some = positive if rng.random() < self._positive and positive.size else np.arange(len(origins))
        return Sample(key, origins[int(some[rng.integers(some.size)])])

    def _tiled(self, key: bytes) -> tuple[list[tuple[int, int, int]], np.ndarray]:
        """All windows of a patient, and the numbers of those that hold tumour; the mask is read once."""
        if key not in self._tiles:
            shape = self._masks.geometry(key).shape
            origins = window_origins(shape, self.window, self._overlap)
            tumour = np.asarray(self._masks.window(key, (0, 0, 0), shape).any(axis=0))
            inside = [
                tumour[
                    tuple(slice(max(at, 0), at + size) for at, size in zip(origin, self.window, strict=True))
                ]
                for origin in origins
            ]
            self._tiles[key] = origins, np.flatnonzero([part.any() for part in inside])
        return self._tiles[key]
