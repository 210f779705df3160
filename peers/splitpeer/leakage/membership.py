"""How well an attack tells the patients that a network was trained on from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitpeer.leakage.masks import auc
from splitpeer.leakage.scores import Score, per_patient, share_interval

GUESSING = "guessing"
FALSE_ALARMS = 0.01


def score_members(
    scores: NDArray[np.floating], members: NDArray[np.bool_], patients: Sequence[Any]
) -> dict[str, Score]:
    """Each patient by the mean of the samples.

    Args:
        scores: float [N]; higher for members. Nothing is turned around: a test that is wrong more often than not is.
        members: bool [N].
        patients: [N].

    Returns:
        member_auc, floor .5, with the interval that Clopper and Pearson give for as many trials as the smaller group
        has patients: the variance of an AUC is at most that of such a share (Birnbaum & Klose, Ann. Math. Stat. 28,
        1957). member_tpr: share of the members found when 1 % of the others at most are taken for members, floor .01,
        with the exact interval; below a hundred others that means none of them.

    Raises:
        ValueError: there are no members, or nobody else.
    """
    each = per_patient(np.asarray(scores, np.float64), patients)
    belongs = per_patient(np.asarray(members, np.float64), patients) > 0.5
    inside, outside = np.sort(each[belongs]), np.sort(each[~belongs])
    if not len(inside) or not len(outside):
        raise ValueError(
            "membership is told between patients who were trained on and others: one kind is missing"
        )
    area, few = auc(belongs, each), min(len(inside), len(outside))
    low, high = share_interval(np.full(few, area))
    allowed = int(FALSE_ALARMS * len(outside) + 1e-9)
    found = (inside > outside[len(outside) - 1 - allowed]).astype(np.float64)
    least, most = share_interval(found)
    count, samples = len(each), len(scores)
    return {
        "member_auc": Score(area, low, high, None, count, samples, {GUESSING: 0.5}),
        "member_tpr": Score(float(found.mean()), least, most, None, count, samples, {GUESSING: FALSE_ALARMS}),
    }
