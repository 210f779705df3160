"""The cost of releases under the Gaussian mechanism: epsilon at delta, exactly.

The mechanism (`defences/dp.py`): all released levels of one record (one window of one patient) are one vector,
clipped to L2 norm <= C, plus N(0, sigma^2) on every value. `noise` is sigma / C everywhere here.

- **Adjacency is replacement**: the patient's images are exchanged for any others, so a record moves by at most
  2C and not by C. Who takes part is known anyway.
- **Composition**: a release that is mu-GDP with mu = 2C / sigma; T of them with unlike noise are
  sqrt(sum mu_t^2)-GDP, exactly (Dong, Roth, Su, J. R. Stat. Soc. B 84, 2022, section 3). So the squares add, and all
  that ever left of a person is one number. That the noise and the number of releases may themselves be chosen while
  releases go on, and sending stops when a fixed sum is reached, is a privacy filter: Smith and Thakurta 2022, arXiv
  2210.17520, show that for Gaussian noise the filter costs nothing on top of the sum.
- **The unit is the person**: T counts every record that depends on this person's images, over scans, epochs, windows,
  evaluation and inference, in all jobs and federations. Which records these are depends on whether the encoder
  learns: see `ledger.py`.
- **Noise that sites share**: in a secure sum each of n sites may add sigma / sqrt(n) to its part, and of the sum an
  observer sees sigma in all. What counts is the noise that the observer does not know: sigma sqrt(k / n) where k sites
  tell nobody theirs (`unknown_noise`); with k = 1 that is this site's own. A site's record moves the sum by 2C as
  before, but a person whose images at all n sites are exchanged moves it by up to 2Cn: mu is then n times as large.
- **No amplification by subsampling**: it needs the choice of batches to be secret. The coordinator, against whom
  this protects, draws the batches itself and knows who is in each.

`dp_accounting` takes most of a second to import, so functions import it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist

SENSITIVITY = 2.0
"""Sensitivity of one clipped record under replacement, in units of the clip."""

FPR = 0.01
"""False positive rate at which `detected` is told."""

FARTHEST = 8.58
"""No noise of ours is more standard deviations wide: sqrt(-2 ln 2^-53) (`defences.activation.dp.normals`)."""

Counts = Mapping[float, int]
"""Releases by noise (sigma / clip)."""


def mu(counts: Counts) -> float:
    """The Gaussian-DP parameter of all releases together; infinite where one had no noise.

    Raises:
        ValueError: noise or count is negative.
    """
    total = 0.0
    for noise, count in counts.items():
        if noise < 0 or count < 0:
            raise ValueError(f"noise and count must not be negative, not {noise} and {count}")
        if count:
            total += count * (SENSITIVITY / noise) ** 2 if noise else math.inf
    return math.sqrt(total)


def epsilon(counts: Counts, delta: float) -> float:
    """The exact epsilon: delta(epsilon) = Phi(-epsilon/mu + mu/2) - e^epsilon Phi(-epsilon/mu - mu/2), solved
    (Balle and Wang 2018, Theorem 8; Dong, Roth, Su 2022, Corollary 1)."""
    return epsilon_of_mu(mu(counts), delta)


def epsilon_of_mu(total: float, delta: float) -> float:
    """The same from the Gaussian-DP parameter; 0 where nothing left, infinite where something left bare.

    Raises:
        ValueError: delta is not between 0 and 1.
    """
    _check_delta(delta)
    if total == 0 or math.isinf(total):
        return total
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(1 / total, delta))


def detected(total: float, alarms: float = FPR) -> float:
    """What epsilon means in practice: the largest true positive rate of any test at that false positive rate, from
    the Gaussian-DP parameter: Phi(Phi^-1(alarms) + mu) (Dong, Roth, Su 2022, section 2)."""
    if math.isinf(total):
        return 1.0
    normal = NormalDist()
    return normal.cdf(normal.inv_cdf(alarms) + total)


def mu_within(epsilon: float, delta: float) -> float:
    """The largest Gaussian-DP parameter that still is (epsilon, delta)-DP.

    Raises:
        ValueError: epsilon is not positive, or delta not between 0 and 1.
    """
    _check_delta(delta)
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be positive, not {epsilon}")
    from dp_accounting import get_sigma_gaussian

    return 1 / float(get_sigma_gaussian(epsilon, delta))


def unknown_noise(noise: float, sites: int, honest: int) -> float:
    """Noise of a sum that an observer does not know who learns that of all but `honest` of `sites`: each adds
    noise / sqrt(sites), and independent ones add up by their squares.

    Raises:
        ValueError: not 1 <= honest <= sites.
    """
    if not 1 <= honest <= sites:
        raise ValueError(f"from 1 to {sites} of {sites} sites can be honest, not {honest}")
    return noise * math.sqrt(honest / sites)


def noise_for(epsilon: float, delta: float, releases: int) -> float:
    """sigma / clip by which `releases` records stay within the budget."""
    if releases < 1:
        raise ValueError(f"at least one release, not {releases}")
    return SENSITIVITY * math.sqrt(releases) / mu_within(epsilon, delta)


def releases(*, epochs: int, windows: int, evaluations: int = 0, patients: int = 1) -> int:
    """Records that count for one patient of a study.

    Args:
        epochs: how often each window of a patient is sent in training.
        windows: windows (slices, patches) of a patient.
        evaluations: how often a patient's windows are sent for evaluation or inference.
        patients: 1 if the encoder is frozen; all patients of the site if it learns, for then every record that
            leaves carries what the weights have seen of each of them.
    """
    return (epochs + evaluations) * windows * patients


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, not {delta}")
