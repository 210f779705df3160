"""What an evaluation of a run scores, and where the scores go, wherever the activations come from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from splitpeer.coordinator.run import Run
from splitpeer.daemon import happenings as h
from splitpeer.federation.evaluation import Plan, Scoring
from splitpeer.federation.terms import window_of


def to_score(run: Run, keys: Sequence[bytes], out: Collection[bytes]) -> list[bytes]:
    """Those of the patients `keys` who are scored now, without those who are `out`."""
    left = [key for key in keys if key not in out]
    # The last ones (none: all), as the demonstration records and attacks the first.
    some = run.settings.evaluation.sample if run.committed < run.job.steps else 0
    return left[-some:]


class Scored:
    """One evaluation under way: batch by batch, with all seats and, where the job asks for it, without each.

    Args:
        run: the run.
        keys: patients to score; whom `sites` fill no seat of is left out.
        sites: names of those whose activations there are.
    """

    def __init__(self, run: Run, keys: Sequence[bytes], sites: Collection[str]) -> None:
        self._run, seating, settings = run, run.seating, run.settings.evaluation
        window = window_of(run.job)
        self._made_from = {key: seats for key in keys if (seats := seating.seats_of(key, sites))}
        self._seats = [seat for seat in seating.seats.names if not seating.fillers(seat).isdisjoint(sites)]
        self.plan = Plan.of(
            list(self._made_from), run.labels, window, settings.overlap, settings.batch, run.committed
        )
        final = run.committed == run.job.steps
        masks = run.files.predictions if final else None
        without = self._seats if settings.missing and len(self._seats) > 1 else []
        self._whole = Scoring(self.plan, run.labels, window, masks, made_from=self._made_from, measure=final)
        self._scorings = {
            "": self._whole,
            **{seat: Scoring(self.plan, run.labels, window, None) for seat in without},
        }

    async def add(self, index: int, predict: Callable[[str], np.ndarray]) -> None:
        """Score batch `index` of the plan.

        Args:
            predict: probabilities, without the seat that it is given unless that is empty.

        Raises:
            JobFailed: a prediction is not finite.
            PatientUnusable: a mask is bad.
        """
        run = self._run
        for missing, scoring in self._scorings.items():
            if self._made_from[self.plan.keys[index]] == [missing]:
                continue  # without it there is nothing of this patient
            predicted = await run.computed(predict, missing, what=f"the prediction of batch {index}")
            await run.computed(scoring.add, index, predicted, what=f"the score of batch {index}")
        run.report(h.BatchScored(index + 1, len(self.plan.forwards)))

    def close(self) -> int:
        """The scores are the run's; returns how many volumes there were."""
        result, whole = self._run.result, self._whole
        scores = {name: s.dice.result() if len(s.dice) else {} for name, s in self._scorings.items()}
        result.dice, result.made_from = scores.pop(""), list(self._seats)
        result.missing = scores
        every = len(self._run.seating.seats.names)
        result.scored = len(self._made_from)
        result.scored_complete = sum(len(had) == every for had in self._made_from.values())
        if (surfaces := whole.surfaces) is not None and len(surfaces):
            result.hd95, result.volume_ml = surfaces.distances(), surfaces.volumes()
        return len(whole.dice)


def evaluated(run: Run, volumes: int, seconds: float) -> h.Evaluated:
    """What there is to tell of an evaluation of so many volumes."""
    result = run.result
    return h.Evaluated(
        run.committed, volumes, result.dice, result.made_from, result.missing, result.hd95, result.volume_ml, seconds
    )  # fmt: skip
