"""Means, intervals and worst tenths are over patients, not slices."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from splitpeer.leakage.scores import Score, interval, of_each_worst, per_patient, share_interval, summarise


def test_each_patient_counts_once() -> None:
    score = summarise([0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"])
    assert (score.mean, score.patients, score.samples) == (0.5, 2, 4)
    np.testing.assert_array_equal(per_patient([1, 3, 5], ["a", "b", "a"]), [3, 3])


def test_samples_without_value_do_not_count() -> None:
    score = summarise([np.nan, 0.5, np.nan], [1, 1, 2])
    assert (score.mean, score.patients, score.samples) == (0.5, 1, 1)
    assert summarise([np.nan], [1]).mean is None


def test_the_worst_tenth_is_where_most_is_seen() -> None:
    values = np.arange(20) / 20
    assert summarise(values, range(20)).worst == pytest.approx((0.95 + 0.9) / 2)
    assert summarise([0.2, 0.7], [0, 1]).worst == 0.7


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(60):
        low, high = interval(random.normal(1, 1, 40), seed=trial)
        assert low is not None and high is not None
        hits += low <= 1 <= high
    assert hits >= 52  # 95 % of 60 is 57; 52 or fewer has probability 0.006


@pytest.mark.parametrize(("patients", "draw"), [(8, "normal"), (30, "lognormal")])
def test_few_or_unlike_patients_are_covered_too(patients: int, draw: str) -> None:
    """The percentile bootstrap covers 89 % of these means instead of 95 %."""
    random, mean = np.random.default_rng(1), {"normal": 0.0, "lognormal": np.exp(0.125)}[draw]
    trials, hits = 300, 0
    for trial in range(trials):
        values = random.normal(size=patients) if draw == "normal" else random.lognormal(0, 0.5, patients)
        low, high = interval(values, seed=trial)
        assert low is not None and high is not None
        hits += low <= mean <= high
    # 93 % for skewed values, of which BCa still misses some; three standard errors of 300 trials are .04.
    assert hits / trials > {"normal": 0.95, "lognormal": 0.93}[draw] - 0.035


def test_a_share_has_its_exact_interval() -> None:
    """Eight of eight is not certainty: the patient after them may well not be told apart."""
    score = summarise(np.ones(8), range(8), shares=True)
    assert (score.mean, score.high, score.patients) == (1, 1, 8)
    assert score.low == pytest.approx(0.025 ** (1 / 8))  # .63: all of eight hit with probability .025
    low, high = share_interval(np.array([1.0, 0, 0, 0]))
    assert (low, high) == pytest.approx((stats.beta.ppf(0.025, 1, 4), stats.beta.ppf(0.975, 2, 3)))
    tied = share_interval(np.array([1.0, 0.5, 0, 0]))
    assert tied[0] == low and tied[1] > high


def test_the_worst_attack_is_another_one_for_each_patient() -> None:
    first, second = summarise([0.9, 0.1, np.nan], "abc"), summarise([0.2, 0.8, 0.3], "abc")
    assert first.each == (0.9, 0.1, None)
    both = of_each_worst([first, second])
    assert both.each == (0.9, 0.8, 0.3) and both.mean == pytest.approx(2 / 3) and both.worst == 0.9
    assert max(first.mean, second.mean) < both.mean  # what a maximum over means hides
    assert of_each_worst([]).mean is None
    with pytest.raises(ValueError, match="not of the same"):
        of_each_worst([first, summarise([0.5], "a")])


def test_no_interval_goes_beyond_what_a_metric_can_be() -> None:
    assert summarise([0.8, 1.0, 1.0], range(3), most=1.0).high == 1
    assert summarise([0.8, 1.0, 1.0], range(3)).high > 1


def test_interval_agrees_with_the_normal_one_and_repeats() -> None:
    values = np.random.default_rng(0).normal(0, 1, 200)
    low, high = interval(values)
    expected = stats.norm.interval(0.95, values.mean(), values.std() / np.sqrt(200))
    assert (low, high) == pytest.approx(expected, abs=0.02)
    assert interval(values) == (low, high)
    assert interval(values[:1]) == (None, None)
    assert interval(np.ones(5)) == (1, 1)


def test_slices_of_one_patient_do_not_narrow_the_interval() -> None:
    values, patients = np.random.default_rng(0).random(8), np.arange(8)
    once, often = summarise(values, patients), summarise(np.repeat(values, 50), np.repeat(patients, 50))
    assert (once.low, once.high) == pytest.approx((often.low, often.high))


def test_json_and_back() -> None:
    score = summarise([0.1, 0.2, np.nan], "abc", floors={"chance": 0.05, "none": None}, ceiling=0.9)
    text = json.dumps(score.to_json(), allow_nan=False)
    assert Score(**json.loads(text)) == score
