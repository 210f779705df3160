"""The next batch from the bank, read in a thread of its own while the decoder learns from the one before."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from splitpeer.coordinator.frozen.features import Features
from splitpeer.coordinator.run import Run
from splitpeer.data.augment import posed
from splitpeer.data.loader import SiteData
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.terms import window_of
from splitpeer.training.dropout import left_out
from splitpeer.training.split_step import Arrays
from splitproto.messages import Forward

THREAD = "reader"


@dataclass(frozen=True)
class BankBatch:
    """All that a step of the decoder needs."""

    forward: Forward
    activations: Mapping[str, Arrays]
    """By seat and level, float32 [B, C, *spatial]; none: all seats sit the step out."""
    have: Mapping[str, np.ndarray]
    """Of seats that only some samples have, which do: bool [B]."""
    target: np.ndarray
    """Masks uint8 [B, regions, *spatial], in the poses of the activations."""


@dataclass(frozen=True)
class _BatchBegun:
    step: int
    patients: tuple[bytes, ...]
    task: asyncio.Task[BankBatch]


class BatchesAhead:
    """Batches of one run, one at a time.

    While one is read, nothing else may use the masks, the features or the stream: `settled` waits until that is so.
    """

    def __init__(self, run: Run, features: Features, stream: TrainingStream) -> None:
        self._run, self._features, self._stream = run, features, stream
        self._thread = run.compute.beside(THREAD)
        self._begun: _BatchBegun | None = None

    async def take(self, step: int) -> BankBatch:
        """The batch of `step`.

        Raises:
            PatientUnusable: masks of it cannot be used.
            DataError: a release is torn or altered.
            JobFailed: a window is not in the bank.
            DeadlinePassed: a disk hangs.
        """
        begun, self._begun = self._begun, None
        if begun is not None:
            if (begun.step, begun.patients) == (step, tuple(self._stream.patients)):
                return await begun.task
            # Drawn with patients who have left since: it is of no use, and neither is why it could not be read.
            with suppress(Exception):
                await begun.task
        return await self._read(step)

    def begin(self, step: int) -> None:
        """Read the batch of `step`, if there is such a step; once after each `take`."""
        if step <= len(self._stream):
            task = asyncio.create_task(self._read(step))
            self._begun = _BatchBegun(step, tuple(self._stream.patients), task)

    async def settled(self) -> None:
        """Nothing is being read; what was is kept for `take`."""
        if self._begun is not None:
            await asyncio.wait({self._begun.task})

    async def close(self) -> None:
        """Read no more."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.task.cancel()
            await asyncio.gather(begun.task, return_exceptions=True)
        self._thread.close()

    async def _read(self, step: int) -> BankBatch:
        return await self._thread.run(
            self._made, step, what="a batch of the feature bank", timeout=self._run.job.seconds_per_step
        )

    def _made(self, step: int) -> BankBatch:
        spans, settings = self._run.spans, self._run.settings
        with spans.of("masks"):
            self._stream.prepare(step - 1, step)
            forward = self._stream[step - 1]
        chance, out = settings.training.seat_dropout, frozenset[str]()
        if chance:
            # SP-11-37: seats that sit the step out.
            out = left_out(settings.job.seed, step, self._features.seats(forward), chance)
        with spans.of("features"):
            activations, have = self._features.batch(forward, out)
        with spans.of("masks"):
            return BankBatch(forward, activations, have, self._target(forward))

    def _target(self, forward: Forward) -> np.ndarray:
        masks = SiteData(self._run.masks).batch(forward.samples, window_of(self._run.job), None, None)
        poses = [self._features.pose(forward.seed, place) for place in range(len(masks))]
        return np.stack([posed(mask, pose) for mask, pose in zip(masks, poses, strict=True)])
