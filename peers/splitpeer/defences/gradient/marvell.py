"""Marvell's optimisation: the noise that makes two classes of gradients hardest to tell apart.

Source: Li et al. 2021, arXiv 2102.08504, where it is a problem in four variances.

Let b1 and b2 be the negatives' total variance (their own plus the noise) along the difference of means and across it,
a1 and a2 the positives'. Power and divergence are sums of products of powers of these four, so both are convex in their
logarithms, and the best trade-offs are the minimisers of

    power + weight * divergence        over a >= variance1, b >= variance0

for one weight after another. The problem splits into one in (a1, b1) and one in (a2, b2):

- Across, only the ratio of a2 and b2 matters, so the class of the larger variance gets no noise, and the other's total
  variance is a square root.
- Along, the best b1 for a given a1 is a square root, and a1 is the root of an increasing function.

The paper's constraint, at least as much noise along as across, then holds by itself: the two problems differ only by
the gap between the means, and a larger gap never asks for less noise. As the weight grows, power grows and divergence
falls, both continuously, so a bisection finds the weight. Nothing here depends on a linear-algebra library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, sqrt

from splitpeer.errors import JobFailed

LEAST, MOST = 2.0**-500, 2.0**500
"""Range in which weights and variances are searched, in units of the classes' own scale; their squares fit float64
too."""


class NoSolution(JobFailed):
    """The noise cannot be computed: the classes' variances are not finite, or the question is beyond float64."""


@dataclass(frozen=True)
class Classes:
    """Two isotropic Gaussians: 0 negative, 1 positive."""

    dimensions: int
    share: float
    """Share of positives, in (0, 1)."""
    variance0: float
    variance1: float
    """Per coordinate."""
    gap: float
    """Squared distance of the means."""


@dataclass(frozen=True)
class Covariance:
    """Variances of the noise of each class, along the difference of means and across it."""

    along0: float
    across0: float
    along1: float
    across1: float

    def power(self, classes: Classes) -> float:
        """Expected squared length of the noise of a random voxel."""
        p, rest = classes.share, classes.dimensions - 1
        return (1 - p) * (self.along0 + rest * self.across0) + p * (self.along1 + rest * self.across1)

    def divergence(self, classes: Classes) -> float:
        """KL(0 | 1) + KL(1 | 0) of the two classes with this noise; infinite where only one has no variance."""
        u, v, rest = classes.variance0, classes.variance1, classes.dimensions - 1
        along = _unlikeness(self.along1 + v, self.along0 + u, classes.gap)
        across = _unlikeness(self.across1 + v, self.across0 + u, 0.0)
        return (along + (rest * across if rest else 0.0)) / 2


NONE = Covariance(0.0, 0.0, 0.0, 0.0)


def allowed_divergence(error: float) -> float:
    """The sum of both KL divergences up to which every detector errs in at least the share `error`."""
    return (2 - 4 * error) ** 2


def cheapest(classes: Classes, error: float) -> Covariance:
    """The noise of least power that leaves detection error `error` in (0, 0.5).

    Raises:
        NoSolution: there is none that float64 can hold.
    """
    most = allowed_divergence(error)
    unit, scale = _scaled(classes)
    if scale == 0 or NONE.divergence(classes) <= most:
        return NONE

    def enough(weight: float) -> bool:
        return _at(unit, weight, scale).divergence(classes) <= most

    if not enough(MOST):
        raise NoSolution(
            "marvell: noise strong enough for this error is beyond float64; choose a smaller error"
        )
    return _at(unit, _edge(enough, LEAST, MOST)[1], scale)


def strongest(classes: Classes, power: float) -> Covariance:
    """The noise of at most this power (squared length, mean over voxels) that makes detection hardest.

    Raises:
        NoSolution: there is none that float64 can hold.
    """
    unit, scale = _scaled(classes)
    if scale == 0 or power <= 0:
        return NONE

    def too_strong(weight: float) -> bool:
        return _at(unit, weight, scale).power(classes) > power

    if too_strong(LEAST):
        return NONE
    # Classes whose means agree become alike at some power, and more than that changes nothing.
    weight = _edge(too_strong, LEAST, MOST)[0] if too_strong(MOST) else MOST
    return _at(unit, weight, scale)


# --- inside ----------------------------------------------------------------------------------------------


def _scaled(classes: Classes) -> tuple[Classes, float]:
    """(The classes in units of, their scale): gradients are of the order of 1e-8, their squares of 1e-16."""
    scale = classes.variance0 + classes.variance1 + classes.gap
    if not isfinite(scale) or min(classes.variance0, classes.variance1, classes.gap) < 0:
        raise NoSolution("marvell: the gradients are not finite numbers; lower [training] learning_rate")
    unit = scale or 1.0
    return Classes(classes.dimensions, classes.share, classes.variance0 / unit,
                   classes.variance1 / unit, classes.gap / unit), scale  # fmt: skip


def _unlikeness(a: float, b: float, gap: float) -> float:
    """Twice both KL divergences of N(0, a) and N(sqrt(gap), b): (a + gap) / b + (b + gap) / a - 2."""
    if a == b == gap == 0:
        return 0.0
    if a <= 0 or b <= 0:
        return inf
    return ((a - b) / a) * ((a - b) / b) + gap / a + gap / b


def _at(classes: Classes, weight: float, scale: float) -> Covariance:
    """`scale` times the noise that minimises power + weight * divergence."""
    u, v = classes.variance0, classes.variance1
    a2, b2 = _across(classes, weight) if classes.dimensions > 1 else (v, u)
    a1, b1 = _along(classes, weight) if classes.gap else _across(classes, weight)
    across0, across1 = b2 - u, a2 - v
    # As much along as across, in rounded numbers too.
    along0, along1 = max(b1 - u, across0), max(a1 - v, across1)
    return Covariance(along0 * scale, across0 * scale, along1 * scale, across1 * scale)


def _across(classes: Classes, weight: float) -> tuple[float, float]:
    """Total variances (positives', negatives') without a gap: the smaller one is raised towards the larger."""
    u, v, p = classes.variance0, classes.variance1, classes.share

    def raised(small: float, large: float, share: float) -> float:
        # share * b + weight / 2 * (large / b + b / large) is least here, or at the bound.
        return min(max(large / sqrt(1 + 2 * share * large / weight), small), large)

    return (v, raised(u, v, 1 - p)) if u < v else (raised(v, u, p), u)


def _along(classes: Classes, weight: float) -> tuple[float, float]:
    """Total variances (positives', negatives') that minimise (1 - p) b + p a + weight / 2 * unlikeness."""
    u, v, gap, p, half = classes.variance0, classes.variance1, classes.gap, classes.share, weight / 2

    def best(a: float) -> float:
        return max(u, sqrt((a + gap) / ((1 - p) / half + 1 / a)))

    def uphill(a: float) -> bool:
        """The derivative by log a, of the minimum over b, is positive: it increases with a."""
        b = best(a)
        return p * a / half + (a - b) * (1 / a + 1 / b) - gap / a > 0

    if v > 0 and uphill(v):
        return v, best(v)
    _, a = _edge(uphill, max(v, LEAST), MOST)
    return a, best(a)


def _edge(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """(The last float64 at which `holds` is false, the first at which it is true), for one that is true from some point
    on, `high` at the latest: bisection, geometric until the ends are within a factor of two.

    Both ends have been tried, but for a `low` at which it is true already: rounding may move them, not swap them.
    """
    while True:
        middle = sqrt(low) * sqrt(high) if high > 2 * low else low + (high - low) / 2
        if not low < middle < high:
            return low, high
        if holds(middle):
            high = middle
        else:
            low = middle
