"""Scores over the patients held out, from the feature bank: no site is asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from splitpeer.coordinator.frozen.exclusion import BankExclusion
from splitpeer.coordinator.frozen.features import Features
from splitpeer.coordinator.run import Run, finite
from splitpeer.coordinator.scored import evaluated, scored_with, to_score
from splitpeer.daemon import happenings as h
from splitpeer.errors import PatientUnusable
from splitpeer.federation.batches import TrainingStream
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
        while True:
            try:
                volumes = await self._score(to_score(run, keys, self._exclusion.keys))
                break
            except PatientUnusable as error:
                await self._exclusion.drop(self._exclusion.own(error), stream)
        run.report(evaluated(run, volumes, time.monotonic() - began))

    async def _score(self, keys: Sequence[bytes]) -> int:
        scored = scored_with(self._run, keys, self._run.seating.seats.filled)
        for index, forward in enumerate(scored.plan.forwards):
            await scored.add(index, partial(self._predict, forward))
        return await scored.close()

    def _predict(self, forward: Forward, missing: str) -> np.ndarray:
        half = self._run.half
        activations, _ = self._features.batch(forward, {missing})
        return finite(half.predict(activations, [seat for seat in half.seats if seat not in activations]))
