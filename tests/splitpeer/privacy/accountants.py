"""References for the exact figures: two accountants of a library, and the budget solved for releases."""

from __future__ import annotations

import math

from dp_accounting import GaussianDpEvent, NeighboringRelation
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from splitpeer.privacy.accounting import SENSITIVITY, Counts, mu, mu_within


def epsilon_rdp(counts: Counts, delta: float) -> float:
    """An upper bound by Renyi DP: per release alpha (2C)^2 / (2 sigma^2), added up, the best alpha
    (Mironov 2017; converted as Canonne, Kamath, Steinke 2020, Proposition 12)."""
    return _accounted(RdpAccountant, counts, delta)


def epsilon_pld(counts: Counts, delta: float) -> float:
    """A numerical upper bound by composing discretised privacy-loss distributions (Koskela et al. 2020). Slow
    and memory-hungry where epsilon is in the hundreds."""
    return _accounted(PLDAccountant, counts, delta)


def releases_within(epsilon: float, delta: float, noise: float) -> int:
    """How many records at this noise (sigma / clip) the budget allows."""
    if not noise > 0:
        return 0
    # A hair of slack, or `noise_for` and this would disagree by one through rounding.
    return math.floor((mu_within(epsilon, delta) * noise / SENSITIVITY) ** 2 * (1 + 1e-12))


def _accounted(kind: type, counts: Counts, delta: float) -> float:
    if math.isinf(mu(counts)):
        return math.inf
    # The factor 2 of replacement is in the noise multiplier, and the accountant is told of plain sensitivity 1:
    # under REPLACE_ONE the library's PLD doubles the sensitivity itself and its RDP does not (0.6).
    accountant = kind(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    composed = False
    for noise, count in counts.items():
        if count:
            accountant.compose(GaussianDpEvent(noise / SENSITIVITY), count)
            composed = True
    return float(accountant.get_epsilon(delta)) if composed else 0.0
