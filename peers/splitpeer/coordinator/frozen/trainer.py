"""The steps of a run with frozen encoders: the decoder learns from the feature bank, and no site is asked.

A step is committed when the decoder has made it, so what a crash costs is what came after the last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence

import numpy as np

from splitpeer.coordinator.exclusion import UnusableBySite
from splitpeer.coordinator.frozen.evaluator import BankEvaluator
from splitpeer.coordinator.frozen.exclusion import BankExclusion
from splitpeer.coordinator.frozen.features import Features
from splitpeer.coordinator.run import Run
from splitpeer.coordinator.savepoints import Savepoints
from splitpeer.daemon import happenings as h
from splitpeer.data.augment import posed
from splitpeer.data.loader import SiteData
from splitpeer.errors import DataError, PatientUnusable
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.terms import window_of
from splitpeer.training.dropout import left_out
from splitproto.messages import Forward


class BankTrainer:
    """Trains the decoder of one run.

    Args:
        run: the run.
        exclusion: of patients whose masks turn out to be bad.
        savepoints: of the run; the coordinator's own half alone is saved.
    """

    def __init__(self, run: Run, exclusion: BankExclusion, savepoints: Savepoints) -> None:
        self._run, self._exclusion, self.savepoints = run, exclusion, savepoints

    async def train(self, features: Features, stream: TrainingStream, validation: Sequence[bytes]) -> None:
        """Go on until the last step is committed and scored, or the run is draining.

        Args:
            features: of a bank that is complete.

        Raises:
            JobFailed, DataError, ConfigError: the run cannot continue.
        """
        run = self._run
        self._exclusion.note(stream)
        evaluator = BankEvaluator(run, features, self._exclusion)
        scored = -1
        while scored < run.job.steps and not run.draining:
            await self._exclusion.listed(stream)
            if run.committed < run.job.steps:
                while unusable := await self._step(features, stream):
                    await self._exclusion.drop(unusable, stream)
                if run.due(run.settings.training.checkpoint_every):
                    await self._save()
            if run.due(run.settings.evaluation.every):
                await evaluator.evaluate(validation, stream)
                scored = run.committed
        run.result.complete = scored == run.job.steps

    async def _save(self) -> None:
        """Raises DataError: the last step cannot be saved."""
        run = self._run
        run.report(h.PhaseBegan("saving"))
        try:
            await self.savepoints.save_own()
        except DataError as error:
            if run.committed == run.job.steps:
                raise
            run.report(h.CheckpointMissed(run.committed, cause=str(error)))
        else:
            run.report(h.CheckpointCommitted(run.files.run.hex(), run.committed, {}))

    async def _step(self, features: Features, stream: TrainingStream) -> UnusableBySite:
        """Make the next step; it is not made where masks in it cannot be used, and their patients are returned."""
        run, step, began = self._run, self._run.committed + 1, time.monotonic()
        run.report(h.TrainingBegan(run.committed, run.job.steps))
        try:
            await run.computed(
                stream.prepare, step - 1, step, what="the masks of the next batch", part="masks"
            )
            forward = stream[step - 1]
            out = self._left_out(features, forward)
            loss, used, waited = await run.computed(
                self._learn, features, forward, out, what=f"step {step} of the decoder"
            )
        except PatientUnusable as error:
            return self._exclusion.own(error)
        run.committed = run.result.step = step
        seconds = time.monotonic() - began
        names = () if run.job.fusion is not None else run.seating.seats.names
        without = [seat for seat in names if seat not in used]
        timing = run.spans.take(began)
        run.report(h.StepCommitted(step, loss, without, [], seconds, waited, seconds - waited, {}, timing))
        return {}

    def _left_out(self, features: Features, forward: Forward) -> frozenset[str]:
        """SP-11-37: seats that sit the step out."""
        settings = self._run.settings
        chance = settings.training.seat_dropout
        if not chance:
            return frozenset()
        return left_out(settings.job.seed, forward.step, features.seats(forward), chance)

    def _learn(
        self, features: Features, forward: Forward, out: Collection[str]
    ) -> tuple[float, Collection[str], float]:
        """Loss, seats that were used, and seconds that reading took."""
        half, spans, began = self._run.half, self._run.spans, time.monotonic()
        with spans.of("features"):
            activations, have = features.batch(forward, out)
        if not activations:
            half.advance(forward.step)
            return math.nan, (), 0.0
        with spans.of("masks"):
            target = self._target(features, forward)
        waited = time.monotonic() - began
        absent = [seat for seat in half.seats if seat not in activations]
        with spans.of("decoder"):
            return half.learn(activations, target, absent, have), activations.keys(), waited

    def _target(self, features: Features, forward: Forward) -> np.ndarray:
        """The masks, in the poses of the activations."""
        masks = SiteData(self._run.masks).batch(forward.samples, window_of(self._run.job), None, None)
        poses = [features.pose(forward.seed, place) for place in range(len(masks))]
        return np.stack([posed(mask, pose) for mask, pose in zip(masks, poses, strict=True)])
