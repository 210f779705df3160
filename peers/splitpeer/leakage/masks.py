"""How much of a mask a map of scores gives away: ROC area and Dice, one sample at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from skimage.filters import threshold_otsu

Scores = NDArray[np.floating]
Target = NDArray[np.bool_]


def finite(given: Scores) -> NDArray[np.float64]:
    """`given` as float64; NaN and infinity become the lowest number, as they point at nothing."""
    scores = np.asarray(given, dtype=np.float64)
    good = np.isfinite(scores)
    if good.all():
        return scores
    return np.where(good, scores, scores[good].min() if good.any() else 0.0).astype(scores.dtype, copy=False)


def auc(target: Target, scores: Scores) -> float:
    """Area under the ROC curve: how often a voxel of the target scores higher than another one, ties counting half.

    NaN where the target is empty or full.
    """
    target = np.asarray(target, dtype=bool).ravel()
    positive, negative = int(target.sum()), int((~target).sum())
    if not positive or not negative:
        return float("nan")
    ranks = rankdata(np.ravel(scores))[target].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * negative))


def dice(target: Target, predicted: Target) -> float:
    """2 |P n T| / (|P| + |T|); NaN where the target is empty."""
    target, predicted = np.asarray(target, dtype=bool), np.asarray(predicted, dtype=bool)
    if not target.any():
        return float("nan")
    return float(2 * (target & predicted).sum() / (target.sum() + predicted.sum()))


def otsu(scores: Scores) -> Target:
    """The mask that an adversary without the truth draws: scores above Otsu's threshold; empty if all are equal."""
    scores = np.asarray(scores, dtype=np.float64)
    if np.ptp(scores) == 0:
        return np.zeros(scores.shape, dtype=bool)
    chosen: NDArray[np.bool_] = scores > threshold_otsu(scores)
    return chosen


def oracle_dice(target: Target, scores: Scores) -> float:
    """Dice of the best of all thresholds, chosen with the truth: more than any adversary can count on."""
    target, values = np.asarray(target, dtype=bool).ravel(), np.ravel(scores)
    if not target.any():
        return float("nan")
    order = np.argsort(-values, kind="stable")
    hits, taken = np.cumsum(target[order]), np.arange(1, len(order) + 1)
    last = np.append(np.diff(values[order]) != 0, True)  # equal scores fall on one side together
    return float((2 * hits / (taken + target.sum()))[last].max())
