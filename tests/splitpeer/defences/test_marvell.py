"""Marvell's optimisation against brute force, over classes of every kind."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitpeer.defences.gradient.marvell import (
    NONE,
    Classes,
    Covariance,
    NoSolution,
    allowed_divergence,
    cheapest,
    strongest,
)
from splitpeer.errors import JobFailed

ROUNDING = 1e-9
"""Some hundred roundings of 1e-16 each, magnified by the condition of the divergence: it is a difference of terms up to
1 / (1 - 2 error)^2, 2,500 at error .49, so about 1e-11."""


def variances() -> st.SearchStrategy[float]:
    """Zero, or anything from the square of a vanishing gradient to that of an exploding one."""
    return st.one_of(st.just(0.0), st.floats(-24, 4).map(lambda exponent: 10.0**exponent))


CLASSES = st.builds(
    Classes, st.integers(1, 256), st.floats(1e-5, 1 - 1e-5), variances(), variances(), variances()
)
ERRORS = st.floats(0.01, 0.49)


def others(found: Covariance, classes: Classes) -> np.ndarray:
    """Noises to compare with, one a row (along0, across0, along1, across1): near `found` and all over the place."""
    point = np.array([found.along0, found.across0, found.along1, found.across1])
    scale = classes.variance0 + classes.variance1 + classes.gap
    near = [np.unique([x * factor for factor in (0, 0.9, 0.999, 1, 1.001, 1.1)]) for x in point]
    far = [np.unique([0.0, *(scale * np.geomspace(1e-4, 1e4, 9)), x]) for x in point]
    rows = np.concatenate([np.array(list(itertools.product(*axes))) for axes in (near, far)])
    return rows[(rows[:, 0] >= rows[:, 1]) & (rows[:, 2] >= rows[:, 3])]


def judged(noises: np.ndarray, classes: Classes) -> tuple[np.ndarray, np.ndarray]:
    """(power, divergence) of each row, written down once more from the definitions of the two."""
    u, v, gap, p, rest = (
        classes.variance0,
        classes.variance1,
        classes.gap,
        classes.share,
        classes.dimensions - 1,
    )
    power = noises @ np.array([1 - p, (1 - p) * rest, p, p * rest])
    b1, b2, a1, a2 = (noises + np.array([u, u, v, v])).T
    with np.errstate(all="ignore"):
        across = np.where((a2 == 0) & (b2 == 0), 0.0, a2 / b2 + b2 / a2 - 2)
        along = np.where((a1 == 0) & (b1 == 0) & (gap == 0), 0.0, (a1 + gap) / b1 + (b1 + gap) / a1 - 2)
        return power, (along + (rest * across if rest else 0.0)) / 2


@given(CLASSES, ERRORS)
def test_no_feasible_noise_is_cheaper(classes: Classes, error: float) -> None:
    found, most = cheapest(classes, error), allowed_divergence(error)
    assert found.divergence(classes) <= most
    assert found.along0 >= found.across0 >= 0
    assert found.along1 >= found.across1 >= 0
    power, divergence = judged(others(found, classes), classes)
    feasible = power[divergence <= most]
    assert found.power(classes) <= feasible.min(initial=math.inf) * (1 + ROUNDING)
    assert found == NONE or found.divergence(classes) >= most * (1 - ROUNDING), "all that is allowed is used"


@given(CLASSES, st.floats(1e-3, 1e3))
def test_no_noise_of_that_power_hides_more(classes: Classes, times: float) -> None:
    allowed = times * (classes.variance0 + classes.variance1 + classes.gap)
    found = strongest(classes, allowed)
    assert found.power(classes) <= allowed
    power, divergence = judged(others(found, classes), classes)
    # Beside the relative tolerance an absolute one: of classes that are as good as alike nothing is left but rounding.
    least = divergence[power <= allowed].min(initial=math.inf)
    assert found.divergence(classes) <= least * (1 + ROUNDING) + 1e-12 * classes.dimensions


@given(CLASSES, st.lists(ERRORS, min_size=2, max_size=5))
def test_more_error_never_costs_less(classes: Classes, errors: list[float]) -> None:
    powers = [cheapest(classes, error).power(classes) for error in sorted(errors)]
    assert all(more >= less * (1 - ROUNDING) for less, more in itertools.pairwise(powers))


@given(CLASSES, ERRORS)
def test_both_questions_have_one_answer(classes: Classes, error: float) -> None:
    power = cheapest(classes, error).power(classes)
    again = strongest(classes, power)
    assert again.power(classes) <= power
    assert again == NONE or again.divergence(classes) <= allowed_divergence(error) * (1 + ROUNDING)


@given(CLASSES, ERRORS, st.floats(-12, 12))
def test_units_do_not_matter(classes: Classes, error: float, exponent: float) -> None:
    """A power of two changes no digit, so the answer must be that of the other unit to the bit."""
    factor = 2.0 ** round(exponent)
    other = Classes(classes.dimensions, classes.share, classes.variance0 * factor,
                    classes.variance1 * factor, classes.gap * factor)  # fmt: skip
    assert cheapest(other, error).power(other) == cheapest(classes, error).power(classes) * factor


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("place", ["variance0", "variance1", "gap"])
def test_what_cannot_be_solved_is_said(wrong: float, place: str) -> None:
    classes = Classes(4, 0.2, **{"variance0": 1.0, "variance1": 1.0, "gap": 1.0, place: wrong})
    for question in (lambda: cheapest(classes, 0.3), lambda: strongest(classes, 1.0)):
        with pytest.raises(JobFailed, match="not finite"):
            question()


def test_an_error_of_a_half_needs_infinite_noise() -> None:
    with pytest.raises(NoSolution, match="smaller error"):
        cheapest(Classes(4, 0.2, 1.0, 2.0, 1.0), 0.5)


def test_one_class_without_any_variance_is_not_a_special_case() -> None:
    """Li et al.'s four variances at the bound: against a fine grid over the two that matter, both classes 1-D."""
    classes = Classes(1, 0.2, 0.0, 1.0, 1.0)
    found = cheapest(classes, 0.1)
    b, extra = np.meshgrid(np.linspace(1e-3, 3, 3000), np.linspace(0, 1, 1001))
    a = 1 + extra
    feasible = ((a + 1) / b + (b + 1) / a - 2) / 2 <= allowed_divergence(0.1)
    best = (0.8 * b + 0.2 * extra)[feasible].min()
    # The grid's step is 1e-3 in each variance, and the best grid point is at most one step from the optimum.
    assert best - 2e-3 <= found.power(classes) <= best
