"""What an evaluation of a run scores, and where the scores go, wherever the activations come from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from splitpeer.coordinator.label_site import conclude, score
from splitpeer.coordinator.labels import MasksUnusable
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.run import Run
from splitpeer.daemon import happenings as h
from splitpeer.data.sampling import batch_digest
from splitpeer.federation.evaluation import Assembly, Plan, Scoring
from splitpeer.federation.masks import MASK, task_of
from splitpeer.federation.terms import window_of
from splitpeer.training.scores import Scores
from splitproto.messages import Conclude, Prediction, Withdraw
from splitproto.records import Sample


def to_score(run: Run, keys: Sequence[bytes], out: Collection[bytes]) -> list[bytes]:
    """Those of the patients `keys` who are scored now, without those who are `out`."""
    left = [key for key in keys if key not in out]
    # The last ones (none: all), as the demonstration records and attacks the first.
    some = run.settings.evaluation.sample if run.committed < run.job.steps else 0
    return left[-some:]


class _Evaluation:
    """One evaluation under way: batch by batch, with all seats and, where the job asks for it, without each.

    Args:
        run: the run.
        keys: patients to score; whom `sites` fill no seat of is left out.
        sites: names of those whose activations there are.
    """

    def __init__(self, run: Run, keys: Sequence[bytes], sites: Collection[str]) -> None:
        self._run, seating, settings = run, run.seating, run.settings.evaluation
        self._window = window = window_of(run.job)
        self._made_from = {key: seats for key in keys if (seats := seating.seats_of(key, sites))}
        self._seats = [seat for seat in seating.seats.names if not seating.fillers(seat).isdisjoint(sites)]
        self.plan = Plan.of(
            list(self._made_from), run.labels, window, settings.overlap, settings.batch, run.committed
        )
        self._without = self._seats if settings.missing and len(self._seats) > 1 else []

    async def add(self, index: int, predict: Callable[[str], np.ndarray]) -> None:
        """Score batch `index` of the plan.

        Args:
            predict: probabilities, without the seat that it is given unless that is empty.

        Raises:
            JobFailed: a prediction is not finite.
            PatientUnusable, MasksUnusable: a mask is bad.
        """
        run = self._run
        for missing in ("", *self._without):
            if self._made_from[self.plan.keys[index]] == [missing]:
                continue  # without it there is nothing of this patient
            predicted = await run.computed(predict, missing, what=f"the prediction of batch {index}")
            await self._score(index, missing, predicted)
        run.report(h.BatchScored(index + 1, len(self.plan.forwards)))

    async def close(self) -> int:
        """The scores are the run's; returns how many volumes there were."""
        result = self._run.result
        result.made_from = list(self._seats)
        every = len(self._run.seating.seats.names)
        result.scored = len(self._made_from)
        result.scored_complete = sum(len(had) == every for had in self._made_from.values())
        return await self._close()

    async def _score(self, index: int, missing: str, predicted: np.ndarray) -> None:
        raise NotImplementedError

    async def _close(self) -> int:
        raise NotImplementedError


class _ScoredHere(_Evaluation):
    """With the coordinator's own masks."""

    def __init__(self, run: Run, keys: Sequence[bytes], sites: Collection[str]) -> None:
        super().__init__(run, keys, sites)
        final, window = run.committed == run.job.steps, self._window
        to = run.files.predictions if final else None
        self._whole = Scoring(self.plan, run.masks, window, to, made_from=self._made_from, measure=final)
        self._scorings = {
            "": self._whole,
            **{seat: Scoring(self.plan, run.masks, window, None) for seat in self._without},
        }

    async def _score(self, index: int, missing: str, predicted: np.ndarray) -> None:
        scoring = self._scorings[missing]
        await self._run.computed(scoring.add, index, predicted, what=f"the score of batch {index}")

    async def _close(self) -> int:
        result, whole = self._run.result, self._whole
        scores = {name: s.dice.result() if len(s.dice) else {} for name, s in self._scorings.items()}
        result.dice = scores.pop("")
        result.missing = scores
        if (surfaces := whole.surfaces) is not None and len(surfaces):
            result.hd95, result.volume_ml = surfaces.distances(), surfaces.volumes()
        return len(whole.dice)


class _ScoredThere(_Evaluation):
    """SP-11.20-9: at the site of the labels, which keeps the scores and tells what it likes.

    Args:
        site: holds the labels.
    """

    def __init__(self, run: Run, keys: Sequence[bytes], sites: Collection[str], site: RemoteSite) -> None:
        super().__init__(run, keys, sites)
        self._site, self._sent = site, 0
        self._task = task_of(run.settings.task)
        self._assemblies = {
            missing: Assembly(self.plan, run.labels, self._window, self._task)
            for missing in ("", *self._without)
        }

    async def _score(self, index: int, missing: str, predicted: np.ndarray) -> None:
        run, site = self._run, self._site
        assembly = self._assemblies[missing]
        mask = await run.computed(assembly.add, index, predicted, what=f"the prediction of batch {index}")
        if mask is None:
            return
        sample = Sample(self.plan.keys[index], (0, 0, 0))
        asked = Prediction(
            run.committed,
            self._sent,
            sample,
            batch_digest(run.committed, (sample,), None),
            tuple(seat for seat in self._made_from[sample.key] if seat != missing),
            missing or None,
            {MASK: np.ascontiguousarray(mask, np.uint8)},
        )
        answers = await run.team.ask_all(lambda one: score(one, asked), [site])
        if isinstance(answer := answers[site], Withdraw):
            raise MasksUnusable(site, answer.patients)
        self._sent += 1

    async def _close(self) -> int:
        run, site, result = self._run, self._site, self._run.result
        told: Mapping[str, float] = {}
        if self._sent:
            asked = Conclude(run.committed, self._sent)
            told = (await run.team.ask_all(lambda one: conclude(one, asked), [site]))[site]
        names = (*self._task.region_names, "mean")

        def scores(first: str, last: str = "") -> Scores:
            found = {name: told.get(f"{first}_{name}{last}") for name in names}
            return found if any(value is not None for value in found.values()) else {}

        result.told = sorted(told)
        result.dice, result.hd95 = scores("dice"), scores("hd95")
        result.missing = {seat: scores("dice", f"_without_{seat}") for seat in self._without}
        result.volume_ml = {
            name: {"predicted": told[f"volume_{name}"], "true": told[f"true_volume_{name}"]}
            for name in self._task.region_names
            if f"volume_{name}" in told and f"true_volume_{name}" in told
        }
        return len(self._made_from)


def scored_with(run: Run, keys: Sequence[bytes], sites: Collection[str]) -> _Evaluation:
    """An evaluation, wherever the masks are; see `_Evaluation`."""
    site = run.label_site
    return _ScoredHere(run, keys, sites) if site is None else _ScoredThere(run, keys, sites, site)


def evaluated(run: Run, volumes: int, seconds: float) -> h.Evaluated:
    """What there is to tell of an evaluation of so many volumes."""
    result = run.result
    return h.Evaluated(
        run.committed, volumes, result.dice, result.made_from, result.missing, result.hd95, result.volume_ml, seconds
    )  # fmt: skip
