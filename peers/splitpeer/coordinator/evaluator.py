"""Scores over the patients held out, made with the sites: each is asked for the patients that it fills."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Awaitable, Sequence
from functools import partial

import numpy as np

from splitpeer.coordinator.exclusion import Exclusion, UnusableBySite, told_apart
from splitpeer.coordinator.labels import MasksUnusable
from splitpeer.coordinator.prediction import predicted
from splitpeer.coordinator.remote_site import RemoteSite, Sent, Unable
from splitpeer.coordinator.run import Arrived, Run
from splitpeer.coordinator.scored import evaluated, scored_with, to_score
from splitpeer.daemon import happenings as h
from splitpeer.errors import JobFailed, PatientUnusable
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.evaluation import Plan
from splitpeer.federation.seating import Parts
from splitproto.messages import Withdraw


class Evaluator:
    """Evaluates one run.

    Args:
        run: the run.
        exclusion: of patients whose files turn out to be bad.
    """

    def __init__(self, run: Run, exclusion: Exclusion) -> None:
        self._run, self._exclusion = run, exclusion

    async def evaluate(self, keys: Sequence[bytes], stream: TrainingStream) -> None:
        """Score the halves of the committed step over the patients `keys`."""
        run, began = self._run, time.monotonic()
        run.octets_from = None
        if not self._sites():
            run.report(h.EvaluationSkipped(run.committed))
            return
        run.report(h.PhaseBegan("evaluating"))
        while not isinstance(volumes := await self._evaluate_with(self._sites(), keys), int):
            # SP-11.13-7, and a score is one of the same sites from the first patient to the last. What was announced
            # is void.
            if volumes:
                await self._exclusion.withdraw(volumes, stream)
            else:
                await run.team.ask_all(lambda site: site.advance(run.committed))
        await run.tell(evaluated(run, volumes, time.monotonic() - began))

    def _sites(self) -> list[RemoteSite]:
        """SP-10-8: a site without the feature trains, and evaluations are made without it."""
        return [site for site in self._run.team.present if "evaluate" in site.features]

    async def _evaluate_with(
        self, sites: Sequence[RemoteSite], keys: Sequence[bytes]
    ) -> int | UnusableBySite:
        """Score with these sites: how many volumes; or the patients that cannot be used, none if one of the sites
        was left out meanwhile, or cannot evaluate any more."""
        try:
            return await self._score(sites, to_score(self._run, keys, self._exclusion.keys))
        except PatientUnusable as error:
            return self._exclusion.own(error)
        except MasksUnusable as error:
            return {error.site: error.patients}

    async def _score(self, sites: Sequence[RemoteSite], keys: Sequence[bytes]) -> int | UnusableBySite:
        run, ahead = self._run, self._run.settings.training.ahead
        scored = scored_with(run, keys, {site.name for site in sites})
        plan = scored.plan
        turns = {site: _Turns(run, site, plan) for site in sites}
        for index, forward in enumerate(plan.forwards):
            until = index + ahead
            asked = [site for site, turn in turns.items() if turn.has(index)]

            def compute(
                site: RemoteSite, index: int = index, until: int = until
            ) -> Awaitable[Sent | Withdraw | Unable]:
                turn = turns[site]
                # The site of the labels is asked for a score after each patient, and has nothing else in hand then.
                end = min(until, plan.end(index)) if site is run.label_site else until
                return site.compute(turn.parts, turn.before(index), turn.before(end))

            answers = await run.team.ask_all(compute, asked)
            arrived, unusable = told_apart(answers)
            if unusable or len(arrived) < len(asked):
                return unusable
            try:
                await scored.add(index, partial(self._predict, arrived, len(forward.samples)))
            except JobFailed:
                if not await run.blamed(arrived):
                    raise
                return {}
        return await scored.close()

    def _predict(self, arrived: Arrived, samples: int, missing: str) -> np.ndarray:
        return predicted(self._run, arrived, samples, missing)


class _Turns:
    """Which batches of an evaluation are a site's."""

    def __init__(self, run: Run, site: RemoteSite, plan: Plan) -> None:
        own = set(run.seating.of(site.name))
        self._indices = [index for index, key in enumerate(plan.keys) if key in own]
        forwards = [plan.forwards[index] for index in self._indices]
        self.parts = Parts(forwards, lambda forward: run.part(site, forward))

    def has(self, index: int) -> bool:
        """Whether batch `index` of the plan is."""
        place = self.before(index)
        return place < len(self._indices) and self._indices[place] == index

    def before(self, index: int) -> int:
        """How many of its batches come before batch `index` of the plan."""
        return bisect_left(self._indices, index)
