"""A figure with what makes it readable: interval over patients, worst tenth, floors, ceiling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """One metric over patients. Higher is more leakage, for every metric of this package; None: has no value."""

    mean: float | None
    """Mean over patients, each the mean of its samples."""
    low: float | None = None
    """95 % bootstrap interval of the mean over patients; None with fewer than two of them."""
    high: float | None = None
    worst: float | None = None
    """Mean of the tenth of the patients (at least one) who leak most."""
    patients: int = 0
    samples: int = 0
    floors: Mapping[str, float | None] = field(default_factory=dict)
    """What an adversary reaches that has seen nothing of these patients, by its name."""
    ceiling: float | None = None
    """What the truth itself reaches, where that is not the metric's largest value."""

    def to_json(self) -> dict[str, Any]:
        """For `json.dump(..., allow_nan=False)`."""
        return asdict(self)


def number(value: float) -> float | None:
    """`value`, or None where it is not finite (JSON has no other word)."""
    return float(value) if math.isfinite(value) else None


def per_patient(
    values: Sequence[float] | NDArray[np.floating], patients: Sequence[Any]
) -> NDArray[np.float64]:
    """The mean of each patient's values; NaN values do not count, nor do patients without others.

    Raises:
        ValueError: other counts.
    """
    rows = np.asarray(values, dtype=np.float64)
    if len(rows) != len(patients):
        raise ValueError(f"{len(rows)} values of {len(patients)} samples")
    groups: dict[Any, list[float]] = {}
    for value, patient in zip(rows, patients, strict=True):
        if not math.isnan(value):
            groups.setdefault(patient, []).append(float(value))
    return np.asarray([np.mean(group) for group in groups.values()])


def summarise(
    values: Sequence[float] | NDArray[np.floating],
    patients: Sequence[Any],
    *,
    floors: Mapping[str, float | None] | None = None,
    ceiling: float | None = None,
    seed: int = 0,
) -> Score:
    """A `Score` from one value per sample.

    Args:
        values: [N]; NaN where a sample has none.
        patients: [N]; slices of one patient are no independent evidence.
        floors, ceiling: see `Score`.
        seed: of the bootstrap.
    """
    means = per_patient(values, patients)
    if not len(means):
        return Score(None, floors=floors or {}, ceiling=ceiling)
    low, high = interval(means, seed)
    worst = np.sort(means)[-max(len(means) // 10, 1) :].mean()
    samples = int(np.isfinite(np.asarray(values, dtype=np.float64)).sum())
    return Score(
        number(means.mean()), low, high, number(worst), len(means), samples, dict(floors or {}), ceiling
    )


def interval(means: NDArray[np.floating], seed: int = 0) -> tuple[float | None, float | None]:
    """95 % percentile bootstrap interval of the mean of [patients] (Efron 1979); None with fewer than two."""
    if len(means) < 2:
        return None, None
    found = bootstrap(
        (means,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return number(found.low), number(found.high)
