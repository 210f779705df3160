"""What an encoder learns from, batch by batch: windows that it restores, or windows with their masks.

A batch depends on its number and on who may still be used, so a pretraining that was interrupted continues as if it had
not been.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from splitpeer.data.channels import Channels
from splitpeer.data.geometry import Triple, differences
from splitpeer.data.loader import SiteData
from splitpeer.data.sampling import TrainingSchedule
from splitpeer.data.volumes import Box, Volumes
from splitpeer.errors import DataError, PatientUnusable
from splitpeer.logs import event
from splitproto.causes import OF_A_PATIENT
from splitproto.records import Sample

_WHICH = "splitpeer data check names the files"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSource:
    """Images of a seat, or of all that are trained together, and the masks if there are any."""

    channels: Channels
    labels: Volumes | None = None
    withdrawn: Callable[[], set[bytes]] = set
    """Patients whose images are not used, or not any more."""


@dataclass(frozen=True)
class Drawing:
    """How windows are drawn."""

    window: Triple
    batch: int
    steps: int
    entropy: int
    """Everything is drawn from it: 128 bits, or a seed."""
    augment: bool
    positive_fraction: float = 0.0
    """Share of windows around a region; with masks only."""


class Examples:
    """The batches of one stage.

    Args:
        schedule: which windows.
        channels: of the seats.
        draw: see there.
        withdrawn: asked before each batch: patients whose images are not used any more.
    """

    def __init__(
        self,
        schedule: TrainingSchedule,
        channels: Channels,
        draw: Drawing,
        withdrawn: Callable[[], Collection[bytes]],
    ) -> None:
        self._schedule, self._channels, self._draw, self._withdrawn = schedule, channels, draw, withdrawn

    @property
    def patients(self) -> int:
        """How many are used."""
        return len(self._schedule.keys)

    def batch(self, step: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """By seat, images float32 [B, channels, *spatial] of step `step`, from 0, and what they are to become.

        Raises:
            DataError: a file, which it names.
            JobFailed: no patient is left.
        """
        if gone := set(self._schedule.keys).intersection(self._withdrawn()):
            self._schedule.withdraw(gone)
        samples, drawn = self._schedule.batch(step)
        seed = drawn if self._draw.augment else None
        seats = self._channels.seats
        images = {seat: self._channels.batch(seat, samples, self._draw.window, seed) for seat in seats}
        return self._pair(images, samples, seed, step)

    def _pair(
        self, images: dict[str, np.ndarray], samples: Sequence[Sample], seed: int | None, step: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        raise NotImplementedError


class Unlabelled(Examples):
    """Windows from anywhere within the head, distorted, and as they are: both float32 [B, channels, *spatial]."""

    def __init__(self, source: ImageSource, keys: Collection[bytes], draw: Drawing) -> None:
        from splitpeer.pretraining.distortion import Distortion  # MONAI takes seconds to import

        first = next(iter(source.channels.volumes.values()))
        super().__init__(
            _schedule(keys, first, draw, 0.0, _Extents(first)), source.channels, draw, source.withdrawn
        )
        self._distort = Distortion([size for size in draw.window if size > 1])

    def _pair(
        self, images: dict[str, np.ndarray], samples: Sequence[Sample], seed: int | None, step: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        ((seat, true),) = images.items()
        distorted = [self._distort(one, (self._draw.entropy, step, place)) for place, one in enumerate(true)]
        return {seat: np.stack(distorted)}, true


class Labelled(Examples):
    """Windows, and their masks uint8 [B, regions, *spatial], drawn as in a run."""

    def __init__(self, source: ImageSource, labels: Volumes, keys: Collection[bytes], draw: Drawing) -> None:
        schedule = _schedule(keys, labels, draw, draw.positive_fraction, None)
        super().__init__(schedule, source.channels, draw, source.withdrawn)
        self._labels = SiteData(labels)

    def _pair(
        self, images: dict[str, np.ndarray], samples: Sequence[Sample], seed: int | None, step: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return images, self._labels.batch(samples, self._draw.window, seed, None)


class _Extents(Mapping[bytes, Box]):
    """Where the head is, looked up when a patient is first drawn."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes
        self._known: dict[bytes, Box] = {}

    def __getitem__(self, key: bytes) -> Box:
        if key not in self._known:
            self._known[key] = self._volumes.extent(key)
        return self._known[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._volumes.keys())

    def __len__(self) -> int:
        return len(self._volumes.keys())


def _schedule(
    keys: Collection[bytes],
    grids: Volumes,
    draw: Drawing,
    positive: float,
    extents: Mapping[bytes, Box] | None,
) -> TrainingSchedule:
    return TrainingSchedule(
        sorted(keys), grids, window=draw.window, batch=draw.batch, steps=draw.steps, seed=draw.entropy,
        positive_fraction=positive, extents=extents,
    )  # fmt: skip


def examples(source: ImageSource, draw: Drawing, progress: Callable[[int, int], None]) -> Examples:
    """From all patients who fill the seats and whose files can be read to their ends; with masks, who have one.

    Every file is read now, so that who takes part does not depend on when a bad file would have been drawn.

    Args:
        progress: told how many of how many are read.

    Raises:
        DataError: no patient is left.
    """
    channels, labels = source.channels, source.labels
    gone = source.withdrawn()
    whole = len(channels.seats)
    asked = [key for key in channels.keys() if key not in gone and len(channels.fills(key)) == whole]  # noqa: SIM118
    if labels is not None:
        asked = sorted(set(asked) & set(labels.keys()))
        if not asked:
            raise DataError("no patient has both an image and a mask: write the ids alike in both")
    good, causes = [], []
    for number, key in enumerate(asked):
        try:
            _read(channels, labels, key)
        except PatientUnusable as error:
            causes.append(error.cause)
        else:
            good.append(key)
        progress(number + 1, len(asked))
    said = "; ".join(f"{OF_A_PATIENT[cause]}: {n}" for cause, n in sorted(Counter(causes).items()))
    if not good:
        raise DataError("no patient is left to pretrain with" + (f" ({said}): {_WHICH}" if said else ""))
    # In numbers: the command that the hint names shows the files.
    more = {"unusable": len(causes), "causes": said, "hint": _WHICH} if said else {}
    event(log, "pretraining.patients", logging.WARNING if said else logging.INFO, patients=len(good), **more)
    return Unlabelled(source, good, draw) if labels is None else Labelled(source, labels, good, draw)


def _read(channels: Channels, labels: Volumes | None, key: bytes) -> None:
    """Raises PatientUnusable."""
    grid = channels.geometry(key)
    channels.read(key)
    if labels is not None:
        if found := differences(grid, labels.geometry(key)):
            raise PatientUnusable(key, "grid", f"image and mask differ in {'; '.join(found)}: resample them")
        labels.read(key)
