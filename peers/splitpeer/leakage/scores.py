"""A figure with what makes it readable: interval over patients, worst tenth, floors, ceiling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, t

RESAMPLES = 2000
CONFIDENCE = 0.95
FEW = 20
"""Patients below which the bootstrap covers the mean too seldom, and Student's t does not."""


@dataclass(frozen=True)
class Score:
    """One metric over patients. Higher is more leakage, for every metric of this package; None: has no value."""

    mean: float | None
    """Mean over patients, each the mean of its samples."""
    low: float | None = None
    """95 % interval of the mean over patients; None with fewer than two of them (`interval`, `share_interval`)."""
    high: float | None = None
    worst: float | None = None
    """Mean of the tenth of the patients (at least one) who leak most."""
    patients: int = 0
    samples: int = 0
    floors: Mapping[str, float | None] = field(default_factory=dict)
    """What an adversary reaches that has seen nothing of these patients, by its name."""
    ceiling: float | None = None
    """What the truth itself reaches, where that is not the metric's largest value."""
    each: tuple[float | None, ...] = ()
    """By patient, in the order of the samples; None: has no value. Attacks on one view have the same order."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "each", tuple(self.each))  # JSON has lists

    def to_json(self) -> dict[str, Any]:
        """For `json.dump(..., allow_nan=False)`."""
        return asdict(self)


def number(value: float) -> float | None:
    """`value`, or None where it is not finite (JSON has no other word)."""
    return float(value) if math.isfinite(value) else None


def per_patient(
    values: Sequence[float] | NDArray[np.floating], patients: Sequence[Any]
) -> NDArray[np.float64]:
    """The mean of each patient's values, in the order of the samples; NaN values do not count.

    A patient without any other value is NaN.

    Raises:
        ValueError: other counts.
    """
    rows = np.asarray(values, dtype=np.float64)
    if len(rows) != len(patients):
        raise ValueError(f"{len(rows)} values of {len(patients)} samples")
    groups: dict[Any, list[float]] = {patient: [] for patient in patients}
    for value, patient in zip(rows, patients, strict=True):
        if not math.isnan(value):
            groups[patient].append(float(value))
    return np.asarray([np.mean(group) if group else np.nan for group in groups.values()])


def summarise(
    values: Sequence[float] | NDArray[np.floating],
    patients: Sequence[Any],
    *,
    floors: Mapping[str, float | None] | None = None,
    ceiling: float | None = None,
    most: float = math.inf,
    shares: bool = False,
    seed: int = 0,
) -> Score:
    """A `Score` from one value per sample.

    Args:
        values: [N]; NaN where a sample has none.
        patients: [N]; slices of one patient are no independent evidence.
        floors, ceiling: see `Score`.
        most: the largest value of the metric: no interval goes beyond it.
        shares: each value is a hit (1), a miss (0) or a tie: the interval is exact.
        seed: of the bootstrap.
    """
    each = per_patient(values, patients)
    means = each[~np.isnan(each)]
    every = tuple(number(value) for value in each)
    if not len(means):
        return Score(None, floors=floors or {}, ceiling=ceiling, each=every)
    low, high = share_interval(means) if shares else interval(means, seed)
    samples = int(np.isfinite(np.asarray(values, dtype=np.float64)).sum())
    return Score(
        number(means.mean()), low, None if high is None else min(high, most), worst_tenth(means), len(means), samples,
        dict(floors or {}), ceiling, every,
    )  # fmt: skip


def of_each_worst(scores: Sequence[Score]) -> Score:
    """For each patient the largest of `scores`, which are one metric of several attacks on the same patients.

    An adversary runs every attack: what counts for a patient is the one that works on this patient.

    Raises:
        ValueError: the scores are of different numbers of patients.
    """
    rows = [[math.nan if value is None else value for value in score.each] for score in scores]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"scores of {sorted({len(row) for row in rows})} patients are not of the same ones")
    table = np.asarray(rows, dtype=np.float64)
    if not table.size:
        return Score(None)
    known = np.where(np.isnan(table), -np.inf, table).max(axis=0)
    return summarise(np.where(np.isinf(known), np.nan, known), range(len(known)), most=1.0)


def highest_floor(score: Score) -> float | None:
    """The best that an adversary reaches who has seen nothing; None if no floor is known."""
    return max((value for value in score.floors.values() if value is not None), default=None)


def worst_tenth(means: NDArray[np.floating]) -> float | None:
    """Mean of the largest tenth of [patients], of one at least."""
    return number(np.sort(means)[-max(len(means) // 10, 1) :].mean())


def interval(means: NDArray[np.floating], seed: int = 0) -> tuple[float | None, float | None]:
    """95 % interval of the mean of [patients]; None with fewer than two.

    Below `FEW` patients Student's t (a bootstrap resamples too little spread from few values), from there on
    the bias-corrected and accelerated bootstrap (Efron, JASA 82, 171-185, 1987).
    """
    if len(means) < 2:
        return None, None
    if np.ptp(means) == 0:
        return number(means[0]), number(means[0])
    if len(means) < FEW:
        half = t.ppf((1 + CONFIDENCE) / 2, len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means))
        return number(means.mean() - half), number(means.mean() + half)
    found = bootstrap(
        (means,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return number(found.low), number(found.high)


def share_interval(means: NDArray[np.floating], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Exact interval of a share of [patients], by default of 95 % (Clopper & Pearson, Biometrika 26, 404-413, 1934).

    A tie is a part of a hit: it counts as a miss for the lower end and as a hit for the upper one.
    """
    hits, count = float(means.sum()), len(means)
    fewest, most = math.floor(hits + 1e-9), math.ceil(hits - 1e-9)
    low = binomtest(fewest, count).proportion_ci(confidence, "exact").low
    high = binomtest(most, count).proportion_ci(confidence, "exact").high
    return float(low), float(high)
