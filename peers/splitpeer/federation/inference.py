"""A volume as windows, and the windows' predictions as a volume: for evaluation and for inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from splitpeer.data.geometry import Triple
from splitpeer.data.sampling import batch_digest
from splitpeer.data.task import Task
from splitpeer.training.windows import WindowMerger, window_origins
from splitproto import records
from splitproto.messages import Forward
from splitproto.records import Sample


def windows_of(
    key: bytes, shape: Triple, window: Triple, overlap: float, batch: int
) -> list[tuple[Sample, ...]]:
    """The windows that cover a patient's volume of `shape` voxels, at most `batch` together."""
    origins = window_origins(shape, window, overlap)
    return [
        tuple(Sample(key, origin) for origin in origins[first : first + batch])
        for first in range(0, len(origins), batch)
    ]


def questions(
    mode: str, step: int, windows: Sequence[tuple[Sample, ...]], number: Callable[[], int]
) -> list[Forward]:
    """A `forward` for each of these batches.

    Args:
        step: whose weights are used.
        number: called for the number of each.
    """
    return [Forward(mode, step, number(), some, batch_digest(step, some, None)) for some in windows]


class Volume:
    """One patient's predictions, window by window.

    Args:
        shape: of the patient's volume, in voxels.
        window: in voxels; depth 1 for slices.
    """

    def __init__(self, shape: Triple, window: Triple) -> None:
        self._shape, self._window = shape, window
        self._merger: WindowMerger | None = None

    def add(self, samples: Sequence[Sample], probabilities: np.ndarray) -> None:
        """`probabilities`: float32 [B, channels, *spatial] of these windows."""
        if self._merger is None:
            self._merger = WindowMerger(self._shape, self._window, probabilities.shape[1])
        volumes = probabilities[..., None] if self._window[2] == 1 else probabilities
        for sample, volume in zip(samples, volumes, strict=True):
            self._merger.add(sample.origin, volume)

    def probabilities(self) -> np.ndarray:
        """float32 [channels, x, y, z]. Raises ValueError: windows are missing."""
        if self._merger is None:
            raise ValueError("no window was added")
        return self._merger.result()


def task_on_wire(task: Task) -> records.TaskTerms:
    """SP-11.19-11: what the channels of a result mean."""
    return records.TaskTerms(
        tuple(records.Label(value, name) for value, name in task.names.items()),
        tuple(records.MaskRegion(one.name, one.values, one.title[:100] or None) for one in task.regions),
        task.exclusive,
        task.convention,
    )
