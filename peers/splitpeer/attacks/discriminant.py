"""One number from many: a discriminant with a ridge, learned from encoders of which it is known whom they have seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

RIDGES = (0.1, 1.0, 10.0, 100.0)
"""Multiples of the mean variance that are tried."""
GUESSED = 0.5


@dataclass(frozen=True)
class Table:
    """People as one encoder sends them, in units of its own strangers."""

    signs: np.ndarray
    """float64 [people, signs]."""
    seen: np.ndarray
    """bool [people]."""
    people: np.ndarray
    """int [people]: who they are, the same number in every table."""

    @property
    def both(self) -> bool:
        """Whether there are people of both kinds."""
        return bool(self.seen.any() and not self.seen.all())

    def of(self, half: int) -> Table:
        """Every second of them."""
        rows = self.people % 2 == half
        return Table(self.signs[rows], self.seen[rows], self.people[rows])


@dataclass(frozen=True)
class Discriminant:
    """signs @ weights: higher for people who were seen."""

    weights: np.ndarray
    ridge: float
    told: float
    """How well it told them apart on encoders that were left out in turn: an AUC."""

    def __call__(self, signs: np.ndarray) -> np.ndarray:
        """float64 [people, signs] to [people]."""
        found: np.ndarray = signs @ self.weights
        return found


def learn(tables: Sequence[Table]) -> Discriminant:
    """Fisher's discriminant with the ridge that tells best where neither the encoder nor the people were learned from.

    Encoders are left out two by two (a half and its rest), and with them half of the people: the same people in another
    encoder are easier to tell than others.

    Raises:
        ValueError: fewer than two pairs of encoders.
    """
    pairs = [tables[n : n + 2] for n in range(0, len(tables), 2)]
    if len(pairs) < 2:
        raise ValueError("two pairs of encoders are needed, to leave one out")
    told = [float(np.mean(list(_trials(pairs, ridge)) or [GUESSED])) for ridge in RIDGES]
    best = int(np.argmax(told))
    return Discriminant(_fit(tables, RIDGES[best]), RIDGES[best], told[best])


def _trials(pairs: Sequence[Sequence[Table]], ridge: float) -> Iterator[float]:
    """How well it tells those who were left out, each time."""
    for number, left_out in enumerate(pairs):
        others = [one for n, pair in enumerate(pairs) if n != number for one in pair]
        for half in (0, 1):
            learned = [one for one in (table.of(1 - half) for table in others) if one.both]
            tried = [one for one in (table.of(half) for table in left_out) if one.both]
            if learned:
                weights = _fit(learned, ridge)
                yield from (_area(one.seen, one.signs @ weights) for one in tried)


def _fit(tables: Sequence[Table], ridge: float) -> np.ndarray:
    """Means of both kinds apart, in units of the scatter within them: [signs]. Every encoder counts for itself."""
    apart, within = [], []
    for one in tables:
        means = [one.signs[kind].mean(0) for kind in (one.seen, ~one.seen)]
        apart.append(means[0] - means[1])
        within += [one.signs[one.seen] - means[0], one.signs[~one.seen] - means[1]]
    rows = np.concatenate(within)
    covariance = rows.T @ rows / len(rows)
    level = ridge * max(float(np.trace(covariance)) / len(covariance), 1e-12)
    found: np.ndarray = np.linalg.solve(covariance + level * np.eye(len(covariance)), np.mean(apart, 0))
    return found


def _area(seen: np.ndarray, scores: np.ndarray) -> float:
    ranks = rankdata(scores)[seen].sum()
    inside, outside = int(seen.sum()), int((~seen).sum())
    return float((ranks - inside * (inside + 1) / 2) / (inside * outside))
