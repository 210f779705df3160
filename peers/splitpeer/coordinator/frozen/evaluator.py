"""Scores over the patients held out, from the feature bank: no site is asked."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import numpy as np

from splitpeer.coordinator.frozen.exclusion import BankExclusion
from splitpeer.coordinator.frozen.features import Features
from splitpeer.coordinator.run import Run, finite
from splitpeer.coordinator.scored import note_scores, scorings_of
from splitpeer.daemon import happenings as h
from splitpeer.errors import PatientUnusable
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.evaluation import Plan
from splitpeer.federation.terms import window_of
from splitproto.messages import Forward


class BankEvaluator:
    """Evaluates one run.

    Args:
        run: the run.
        features: of its bank.
        exclusion: of patients whose masks turn out to be bad.
    """

    def __init__(self, run: Run, features: Features, exclusion: BankExclusion) -> None:
        self._run, self._features, self._exclusion = run, features, exclusion

    async def evaluate(self, keys: Sequence[bytes], stream: TrainingStream) -> None:
        """Score the decoder of the committed step over the patients `keys`.

        Raises:
            JobFailed: a prediction is not finite.
            DataError: a release cannot be read.
        """
        run, began = self._run, time.monotonic()
        run.report(h.PhaseBegan("evaluating"))
        some = run.settings.evaluation.sample if run.committed < run.job.steps else 0
        while True:
            left = [key for key in keys if key not in self._exclusion.keys]
            try:
                volumes = await self._score(left[-some:])
                break
            except PatientUnusable as error:
                await self._exclusion.drop(self._exclusion.own(error), stream)
        result = run.result
        run.report(
            h.Evaluated(
                run.committed,
                volumes,
                result.dice,
                result.made_from,
                result.missing,
                result.hd95,
                result.volume_ml,
                time.monotonic() - began,
            )
        )

    async def _score(self, keys: Sequence[bytes]) -> int:
        run, settings = self._run, self._run.settings.evaluation
        seating = run.seating
        made_from = {key: [s for s in seating.seats.names if s in seating.filled[key]] for key in keys}
        plan = Plan.of(keys, run.labels, window_of(run.job), settings.overlap, settings.batch, run.committed)
        seats = [seat for seat in seating.seats.names if seating.fillers(seat)]
        scorings = scorings_of(run, plan, made_from, seats)
        for index, forward in enumerate(plan.forwards):
            for missing, scoring in scorings.items():
                if made_from[plan.keys[index]] == [missing]:
                    continue  # without it there is nothing of this patient
                what = f"the prediction of batch {index}"
                predicted = await run.computed(self._predict, forward, {missing}, what=what)
                await run.computed(scoring.add, index, predicted, what=f"the score of batch {index}")
            run.report(h.BatchScored(index + 1, len(plan.forwards)))
        note_scores(run, scorings, made_from, seats)
        return len(scorings[""].dice)

    def _predict(self, forward: Forward, without: Collection[str]) -> np.ndarray:
        half = self._run.half
        activations, _ = self._features.batch(forward, without)
        return finite(half.predict(activations, [seat for seat in half.seats if seat not in activations]))
