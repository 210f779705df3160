"""Scores over the patients held out, made with the sites: each is asked for the patients that it fills."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Awaitable, Sequence

import numpy as np

from splitpeer.coordinator.exclusion import Exclusion, UnusableBySite, told_apart
from splitpeer.coordinator.remote_site import RemoteSite, Sent, Unable
from splitpeer.coordinator.run import Arrived, Run, finite
from splitpeer.coordinator.scored import note_scores, scorings_of
from splitpeer.daemon import happenings as h
from splitpeer.errors import JobFailed, PatientUnusable
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.evaluation import Plan
from splitpeer.federation.seating import Parts
from splitpeer.federation.terms import window_of
from splitpeer.training.split_round import gathered
from splitproto.messages import Withdraw


class Evaluator:
    """Evaluates one run.

    Args:
        run: the run.
        exclusion: of patients whose files turn out to be bad.
    """

    def __init__(self, run: Run, exclusion: Exclusion) -> None:
        self._run, self._exclusion = run, exclusion
        self._window = window_of(run.job)

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
        result = run.result
        await run.tell(
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

    def _sites(self) -> list[RemoteSite]:
        """SP-10-8: a site without the feature trains, and evaluations are made without it."""
        return [site for site in self._run.team.present if "evaluate" in site.features]

    async def _evaluate_with(
        self, sites: Sequence[RemoteSite], keys: Sequence[bytes]
    ) -> int | UnusableBySite:
        """Score with these sites: how many volumes; or the patients that cannot be used, none if one of the sites
        was left out meanwhile, or cannot evaluate any more."""
        run = self._run
        try:
            left = [key for key in keys if key not in self._exclusion.keys]
            # The last ones (none: all), as the demonstration records and attacks the first.
            some = run.settings.evaluation.sample if run.committed < run.job.steps else 0
            return await self._score(sites, left[-some:])
        except PatientUnusable as error:
            return self._exclusion.own(error)

    async def _score(self, sites: Sequence[RemoteSite], keys: Sequence[bytes]) -> int | UnusableBySite:
        run, settings = self._run, self._run.settings.evaluation
        names = {site.name for site in sites}
        made_from = {key: seats for key in keys if (seats := run.seating.seats_of(key, names))}
        plan = Plan.of(
            list(made_from), run.labels, self._window, settings.overlap, settings.batch, run.committed
        )
        seats = [seat for seat in run.seating.seats.names if run.seating.fillers(seat) & names]
        scorings = scorings_of(run, plan, made_from, seats)
        turns = {site: _Turns(run, site, plan) for site in sites}
        for index, forward in enumerate(plan.forwards):
            until = index + run.settings.training.ahead
            asked = [site for site, turn in turns.items() if turn.has(index)]

            def compute(
                site: RemoteSite, index: int = index, until: int = until
            ) -> Awaitable[Sent | Withdraw | Unable]:
                turn = turns[site]
                return site.compute(turn.parts, turn.before(index), turn.before(until))

            answers = await run.team.ask_all(compute, asked)
            arrived, unusable = told_apart(answers)
            if unusable or len(arrived) < len(asked):
                return unusable
            key = plan.keys[index]
            for missing, scoring in scorings.items():
                if made_from[key] == [missing]:
                    continue  # without it there is nothing of this patient
                try:
                    predicted = await run.computed(
                        self._predict, arrived, missing, len(forward.samples),
                        what=f"the prediction of batch {index}",
                    )  # fmt: skip
                except JobFailed:
                    if not await run.blamed(arrived):
                        raise
                    return {}
                await run.computed(scoring.add, index, predicted, what=f"the score of batch {index}")
            run.report(h.BatchScored(index + 1, len(plan.forwards)))
        note_scores(run, scorings, made_from, seats)
        return len(scorings[""].dice)

    def _predict(self, arrived: Arrived, missing: str, samples: int) -> np.ndarray:
        """Probabilities of what arrived, without the seat `missing` if one is named."""
        half = self._run.half
        arrays, rows = self._run.at_places(arrived)
        used = {p: a for p, a in arrays.items() if p.seat != missing and rows[p].used}
        # All samples are one patient's, who has a seat or not.
        activations, _ = gathered(used, rows, samples)
        return finite(half.predict(activations, [seat for seat in half.seats if seat not in activations]))


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
