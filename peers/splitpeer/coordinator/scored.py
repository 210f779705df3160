"""What an evaluation of a run scores, and where the scores go, wherever the activations come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitpeer.coordinator.run import Run
from splitpeer.federation.evaluation import Plan, Scoring
from splitpeer.federation.terms import window_of


def scorings_of(
    run: Run, plan: Plan, made_from: Mapping[bytes, Sequence[str]], seats: Sequence[str]
) -> dict[str, Scoring]:
    """By the seat that is left out of it; "": with all that there is. All of the same activations."""
    final, window = run.committed == run.job.steps, window_of(run.job)
    masks = run.files.predictions if final else None
    without = seats if run.settings.evaluation.missing and len(seats) > 1 else []
    return {
        "": Scoring(plan, run.labels, window, masks, made_from=made_from, measure=final),
        **{seat: Scoring(plan, run.labels, window, None) for seat in without},
    }


def note_scores(
    run: Run, scorings: Mapping[str, Scoring], made_from: Mapping[bytes, Sequence[str]], seats: Sequence[str]
) -> None:
    """In the run's result."""
    result = run.result
    scores = {name: s.dice.result() if len(s.dice) else {} for name, s in scorings.items()}
    result.dice, result.made_from = scores.pop(""), list(seats)
    result.missing = scores
    every = len(run.seating.seats.names)
    result.scored = len(made_from)
    result.scored_complete = sum(len(had) == every for had in made_from.values())
    if (surfaces := scorings[""].surfaces) is not None and len(surfaces):
        result.hd95, result.volume_ml = surfaces.distances(), surfaces.volumes()
