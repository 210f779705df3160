"""Encoders of one seat become one: the mean of their weights, by how many patients each site fills there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from splitpeer.training.split_step import Arrays

MOST_WEIGHT = 1024.0
"""SP-11.16-3: largest absolute value of a weight in an average: far above any of a trained encoder, far below what
overflows in the next layers."""


def flaw(weights: Mapping[str, np.ndarray]) -> str | None:
    """SP-11.16-3: what in these weights, float32 by name, must not be in an average; None: nothing."""
    if not all(np.isfinite(array).all() for array in weights.values()):
        return "values that are not finite"
    if any((np.abs(array) > MOST_WEIGHT).any() for array in weights.values()):
        return f"values beyond {MOST_WEIGHT:g}"
    return None


def average(weights: Sequence[Mapping[str, np.ndarray]], patients: Sequence[int]) -> Arrays:
    """SP-11.16-4: the mean, float32 by name.

    Args:
        weights: float32 by name, of each site, ordered by the names of the sites.
        patients: of each site, in the same order.

    Raises:
        ValueError: the names differ, or no site has a patient.
    """
    total = sum(patients)
    if not total:
        raise ValueError("an average over no patients")
    if any(one.keys() != weights[0].keys() for one in weights):
        raise ValueError("an average of different networks")
    result = {}
    for name in weights[0]:
        # From the left, in float64; rounded once.
        summed = weights[0][name].astype(np.float64) * patients[0]
        for one, count in zip(weights[1:], patients[1:], strict=True):
            summed += one[name].astype(np.float64) * count
        result[name] = (summed / total).astype(np.float32)
    return result
