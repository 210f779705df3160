"""How well an attack tells the patients that a network was trained on from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitpeer.leakage.masks import auc
from splitpeer.leakage.scores import CONFIDENCE, Score, per_patient, share_interval

GUESSING = "guessing"
FALSE_ALARMS = 0.01


def score_members(
    scores: NDArray[np.floating], members: NDArray[np.bool_], patients: Sequence[Any]
) -> dict[str, Score]:
    """Each patient by the mean of the samples.

    Args:
        scores: float [N], or [N, tests] of several tests that were fixed beforehand; higher for members. Nothing is
            turned around: a test that is wrong more often than not is.
        members: bool [N].
        patients: [N].

    Returns:
        member_auc, floor .5, with the interval that Clopper and Pearson give for as many trials as the smaller group
        has patients: the variance of an AUC is at most that of such a share (Birnbaum & Klose, Ann. Math. Stat. 28,
        1957). member_tpr: share of the members found when 1 % of the others at most are taken for members, floor .01,
        with the exact interval; below a hundred others that means none of them.

        Of several tests the largest figure. Which one that is was chosen on these patients, so each test's interval
        has a share of the 5 % (Bonferroni): all hold at once, and the largest true figure lies between the largest of
        their lower and the largest of their upper ends.

    Raises:
        ValueError: there are no members, or nobody else.
    """
    belongs = per_patient(np.asarray(members, np.float64), patients) > 0.5
    if belongs.all() or not belongs.any():
        raise ValueError(
            "membership is told between patients who were trained on and others: one kind is missing"
        )
    given = np.asarray(scores, np.float64).reshape(len(scores), -1)
    tests = [per_patient(test, patients) for test in given.T]
    confidence = 1 - (1 - CONFIDENCE) / len(tests)
    areas = [_area(test, belongs, confidence) for test in tests]
    found = [_found(test, belongs, confidence) for test in tests]
    count, samples = len(belongs), len(scores)
    return {
        "member_auc": Score(*_largest(areas), None, count, samples, {GUESSING: 0.5}),
        "member_tpr": Score(*_largest(found), None, count, samples, {GUESSING: FALSE_ALARMS}),
    }


Interval = tuple[float, float, float]
"""A figure and its ends."""


def _area(each: NDArray[np.float64], belongs: NDArray[np.bool_], confidence: float) -> Interval:
    area, few = auc(belongs, each), int(min(belongs.sum(), (~belongs).sum()))
    return area, *share_interval(np.full(few, area), confidence)


def _found(each: NDArray[np.float64], belongs: NDArray[np.bool_], confidence: float) -> Interval:
    inside, outside = each[belongs], np.sort(each[~belongs])
    allowed = int(FALSE_ALARMS * len(outside) + 1e-9)
    hits = (inside > outside[len(outside) - 1 - allowed]).astype(np.float64)
    return float(hits.mean()), *share_interval(hits, confidence)


def _largest(tests: Sequence[Interval]) -> Interval:
    figures, lows, highs = zip(*tests, strict=True)
    return max(figures), max(lows), max(highs)
