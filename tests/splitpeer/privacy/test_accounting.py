"""Two accountants of a library and one formula, against the closed forms written out here, and a table."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm

from splitpeer.privacy.accounting import (
    epsilon,
    epsilon_of_mu,
    mu,
    mu_within,
    noise_for,
    releases,
    unknown_noise,
)
from tests.splitpeer.privacy.accountants import epsilon_pld, epsilon_rdp, releases_within

DELTA = 1e-5
TABLE = [
    (8, 1, 1.20), (8, 50, 8.5), (8, 100, 12.0), (8, 7750, 106),
    (1, 1, 7.5), (1, 50, 53), (1, 100, 75), (1, 7750, 657),
]  # fmt: skip
"""epsilon, releases, sigma / C at delta = 1e-5."""


def delta_gdp(eps: float, m: float) -> float:
    return norm.cdf(-eps / m + m / 2) - math.exp(eps + norm.logcdf(-eps / m - m / 2))


def closed_gdp(noise: float, times: int) -> float:
    m = 2 * math.sqrt(times) / noise
    return brentq(lambda eps: delta_gdp(eps, m) - DELTA, 0, 100)


def closed_rdp(noise: float, times: int) -> float:
    """min over alpha of T alpha (2C)^2 / (2 sigma^2) + ln(1/delta) / (alpha - 1)."""
    cost = times * 4 / (2 * noise**2)
    return minimize_scalar(
        lambda a: cost * a - math.log(DELTA) / (a - 1), bounds=(1.0001, 1000), method="bounded"
    ).fun


@pytest.mark.parametrize(("eps", "times", "noise"), TABLE)
def test_the_table_and_the_closed_forms(eps: float, times: int, noise: float) -> None:
    counts = {noise: times}
    assert noise_for(eps, DELTA, times) == pytest.approx(noise, rel=0.01)
    assert epsilon(counts, DELTA) == pytest.approx(eps, rel=0.01)
    assert epsilon(counts, DELTA) == pytest.approx(closed_gdp(noise, times), rel=1e-6)
    # The numerical accountant errs upwards, by little.
    assert 0 <= epsilon_pld(counts, DELTA) - epsilon(counts, DELTA) < 1e-3
    # Renyi is an upper bound; the library converts better than the textbook formula.
    assert epsilon(counts, DELTA) < epsilon_rdp(counts, DELTA) <= closed_rdp(noise, times)
    assert epsilon_rdp(counts, DELTA) > 0.7 * closed_rdp(noise, times)


@pytest.mark.parametrize(("noise", "times"), [(1.2, 1), (12.0, 100), (75.0, 100)])
def test_renyi_orders_add_up_as_the_formula_says(noise: float, times: int) -> None:
    from dp_accounting import GaussianDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    accountant.compose(GaussianDpEvent(noise / 2), times)
    orders = np.array(accountant.orders)
    assert accountant.rdp == pytest.approx(times * orders * 4 / (2 * noise**2), rel=1e-9)
    best = (accountant.rdp + np.log1p(-1 / orders) - (math.log(DELTA) + np.log(orders)) / (orders - 1)).min()
    assert epsilon_rdp({noise: times}, DELTA) == pytest.approx(best, rel=1e-9)


def test_unlike_noise_adds_in_squares() -> None:
    mixed = {10.0: 30, 20.0: 80}
    assert mu(mixed) == pytest.approx(mu({10.0: 50}))
    for account in (epsilon, epsilon_rdp, epsilon_pld):
        assert account(mixed, DELTA) == pytest.approx(account({10.0: 50}, DELTA), rel=1e-3)


def test_budget_noise_and_releases_are_inverse() -> None:
    for times in (1, 2, 17, 7750):
        noise = noise_for(2.0, DELTA, times)
        assert epsilon({noise: times}, DELTA) == pytest.approx(2.0)
        assert releases_within(2.0, DELTA, noise) == times
        assert releases_within(2.0, DELTA, noise * (1 - 1e-9)) == times - 1
    assert epsilon_of_mu(mu_within(3.0, DELTA), DELTA) == pytest.approx(3.0)


def test_the_sensitivity_is_that_of_replacement() -> None:
    """Of C instead of 2C half the noise would do: what a library that forgets replacement claims."""
    assert noise_for(8, DELTA, 1) == pytest.approx(2 / mu_within(8, DELTA))


def test_a_study_composes_over_epochs_windows_and_evaluation() -> None:
    assert releases(epochs=50, windows=155) == 7750
    assert releases(epochs=50, windows=155, evaluations=5) == 55 * 155
    assert releases(epochs=50, windows=4, patients=300) == 60_000


def test_nothing_and_no_noise() -> None:
    for account in (epsilon, epsilon_rdp, epsilon_pld):
        assert account({}, DELTA) == account({1.0: 0}, DELTA) == 0
        assert account({0.0: 1}, DELTA) == math.inf
    assert releases_within(8, DELTA, 0.0) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: epsilon({1.0: 1}, 0.0),
        lambda: epsilon({1.0: 1}, 1.0),
        lambda: epsilon({-1.0: 1}, DELTA),
        lambda: epsilon({1.0: -1}, DELTA),
        lambda: mu_within(0.0, DELTA),
        lambda: mu_within(math.inf, DELTA),
        lambda: noise_for(1.0, DELTA, 0),
    ],
)
def test_impossible_figures(wrong) -> None:
    with pytest.raises(ValueError):
        wrong()


def test_the_library_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, splitpeer.privacy.accounting; print('dp_accounting' in sys.modules, 'scipy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_what_a_test_finds_at_most() -> None:
    """At one per cent of false alarms: nothing left, some, and something bare."""
    from splitpeer.privacy.accounting import detected

    assert detected(0.0) == pytest.approx(0.01)
    assert detected(1.0) == pytest.approx(0.0923, abs=1e-4)
    assert detected(math.inf) == 1.0
    assert detected(1.0, alarms=0.5) == pytest.approx(0.8413, abs=1e-4)


@pytest.mark.parametrize(("sites", "honest"), [(1, 1), (4, 4), (4, 3), (4, 1)])
def test_shared_noise_counts_as_far_as_it_is_not_told(sites: int, honest: int) -> None:
    """Of a sum sigma / sqrt(n) each, k unknown: (2C / sigma) sqrt(n / k), by hand."""
    whole, times = 12.0, 100
    counted = unknown_noise(whole, sites, honest)
    m = 2 * math.sqrt(times) / whole * math.sqrt(sites / honest)
    assert mu({counted: times}) == pytest.approx(m, rel=1e-12)
    exact = brentq(lambda eps: delta_gdp(eps, m) - DELTA, 0, 200)
    assert epsilon({counted: times}, DELTA) == pytest.approx(exact, rel=1e-6)
    with pytest.raises(ValueError, match="honest"):
        unknown_noise(whole, sites, sites + 1)
    with pytest.raises(ValueError, match="honest"):
        unknown_noise(whole, sites, 0)
