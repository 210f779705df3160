"""The batches of a job's training as messages, in order."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, overload

from splitpeer.data.sampling import Grids, TrainingSchedule, batch_digest
from splitpeer.data.volumes import Volumes
from splitpeer.errors import ConfigError
from splitpeer.federation.terms import window_of
from splitpeer.settings.job import JobConfig
from splitpeer.training.tiles import TiledSchedule
from splitproto.messages import Forward
from splitproto.records import Job


class TrainingStream(Sequence[Forward]):
    """The batches of a job as messages, made when asked for, or ahead by `prepare`."""

    def __init__(self, schedule: TrainingSchedule, augment: bool) -> None:
        self._schedule, self._augment = schedule, augment
        self._made: dict[int, Forward] = {}

    @classmethod
    def of(
        cls,
        settings: JobConfig,
        job: Job,
        training: Sequence[bytes],
        labels: Grids,
        complete: Collection[bytes],
    ) -> TrainingStream:
        """All batches of a run.

        Args:
            training: the patients to train on.
            labels: the masks; their grids, where no window is drawn around tumour.
            complete: patients with every seat.
        """
        drawn: dict[str, Any] = {
            "window": window_of(job),
            "batch": job.batch,
            "steps": job.steps,
            "seed": settings.job.seed,
            "positive_fraction": settings.data.positive_fraction,
            "complete": complete,
            "complete_first": settings.data.complete_first,
        }
        if job.frozen:
            if not isinstance(labels, Volumes):
                raise ConfigError('[labels] at is not for a job with [training] encoders = "frozen"')
            overlap = settings.evaluation.overlap
            schedule: TrainingSchedule = TiledSchedule(training, labels, overlap=overlap, **drawn)
        else:
            schedule = TrainingSchedule(training, labels, **drawn)
        return cls(schedule, settings.data.augment)

    def __len__(self) -> int:
        return len(self._schedule)

    @overload
    def __getitem__(self, index: int) -> Forward: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Forward]: ...
    def __getitem__(self, index: int | slice) -> Forward | Sequence[Forward]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._made.get(index) or self._make(index)

    @property
    def patients(self) -> Sequence[bytes]:
        """Those in use."""
        return self._schedule.keys

    def prepare(self, first: int, until: int) -> None:
        """Have the batches from `first` up to `until` ready. Slow where a mask is read for the first time."""
        self._made = {i: self._made.get(i) or self._make(i) for i in range(first, min(until, len(self)))}

    def withdraw(self, keys: Iterable[bytes]) -> None:
        """Batches from now on do not hold these patients. Raises JobFailed if no patient is left."""
        self._made.clear()
        self._schedule.withdraw(keys)

    def _make(self, index: int) -> Forward:
        samples, drawn = self._schedule.batch(index)
        seed = drawn if self._augment else None
        return Forward("train", index + 1, 0, tuple(samples), batch_digest(index + 1, samples, seed), seed)
