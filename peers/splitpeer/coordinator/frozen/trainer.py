"""The steps of a run with frozen encoders: the decoder learns from the feature bank, and no site is asked.

A step is committed when the decoder has made it, so what a crash costs is what came after the last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from splitpeer.coordinator.exclusion import UnusableBySite
from splitpeer.coordinator.frozen.ahead import BankBatch, BatchesAhead
from splitpeer.coordinator.frozen.evaluator import BankEvaluator
from splitpeer.coordinator.frozen.exclusion import BankExclusion
from splitpeer.coordinator.frozen.features import Features
from splitpeer.coordinator.run import Run
from splitpeer.coordinator.savepoints import Savepoints
from splitpeer.daemon import happenings as h
from splitpeer.errors import DataError, PatientUnusable
from splitpeer.federation.batches import TrainingStream


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
        batches = BatchesAhead(run, features, stream)
        scored = -1
        try:
            while scored < run.job.steps and not run.draining:
                await batches.settled()
                if await self._exclusion.listed(stream):
                    features.forget(self._exclusion.keys)
                if run.committed < run.job.steps:
                    while unusable := await self._step(batches):
                        await self._exclusion.drop(unusable, stream)
                    if run.due(run.settings.training.checkpoint_every):
                        await self._save()
                if run.due(run.settings.evaluation.every):
                    await batches.settled()
                    await evaluator.evaluate(validation, stream)
                    scored = run.committed
        finally:
            await batches.close()
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

    async def _step(self, batches: BatchesAhead) -> UnusableBySite:
        """Make the next step; it is not made where masks in it cannot be used, and their patients are returned."""
        run, step, began = self._run, self._run.committed + 1, time.monotonic()
        run.report(h.TrainingBegan(run.committed, run.job.steps))
        try:
            batch = await batches.take(step)
        except PatientUnusable as error:
            return self._exclusion.own(error)
        waited = time.monotonic() - began
        batches.begin(step + 1)
        loss = await run.computed(self._learn, batch, what=f"step {step} of the decoder", part="decoder")
        run.committed = run.result.step = step
        seconds = time.monotonic() - began
        names = () if run.job.fusion is not None else run.seating.seats.names
        without = [seat for seat in names if seat not in batch.activations]
        timing = run.spans.take(began)
        run.report(h.StepCommitted(step, loss, without, [], seconds, waited, seconds - waited, {}, timing))
        return {}

    def _learn(self, batch: BankBatch) -> float:
        """The loss; not a number where all seats sit the step out."""
        half = self._run.half
        if not batch.activations:
            half.advance(batch.forward.step)
            return math.nan
        absent = [seat for seat in half.seats if seat not in batch.activations]
        return half.learn(batch.activations, batch.target, absent, batch.have)
