"""What an image site reads off the order of windows alone: which slices hold tumour."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, View
from splitpeer.errors import AttackImpossible


@dataclass(frozen=True, kw_only=True)
class WindowOrder(Attack):
    """What the order of windows tells, before any gradient: slices with tumour are drawn more often.

    A coordinator that draws a share of its windows around tumour (`positive_fraction`) tells every site which
    slices those are: the sites must know what to send. For each patient the posterior, over all runs of
    neighbouring slices that could be the tumour, of the draws that were seen; every voxel of a slice gets the
    probability that its slice holds tumour. In 3-D: how often the patient's windows covered a voxel, against
    the mean, since windows crowd around tumour.
    """

    name = "schedule"
    title = "The order of windows alone"
    source = "derived from the sampling rule of the training schedule"
    goal = "mask"
    role = "client"
    uses = frozenset()
    evidence = "which windows were ordered, in training"
    plain = "Another hospital counts how often it is asked for each slice of a patient."

    positive_fraction: float = 0.5
    """Share of windows drawn around tumour; the default of a job."""
    slices: int | None = None
    """Slices of a volume, which the site knows; None: those from the first to the last drawn."""

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """Needs the training windows of the same patients as well as those under attack; uses no tensor at all."""
        draws: dict[bytes, list[tuple[int, int, int]]] = {}
        for target in view.targets:
            times = sum(shot.mode == "train" for shot in target.shots)
            draws.setdefault(target.sample.key, []).extend([target.sample.origin] * times)
        if not any(draws.values()):
            raise AttackImpossible(
                f"{self.name}: no training window in this view; take a capture of training"
            )
        scores = np.zeros((len(view.targets), *view.window), np.float32)
        chances = {key: self._slices(np.array([z for *_, z in seen], int)) for key, seen in draws.items()}
        for number, target in enumerate(view.targets):
            key, origin = target.sample.key, target.sample.origin
            if view.dimensions == 2:
                scores[number] = chances[key].get(origin[2], 0.0)
            else:
                scores[number] = _coverage(draws[key], origin, view.window)
            progress(self.title, number + 1, len(view.targets))
        notes = ("no tensor is used; every voxel of a slice has the same score",)
        if view.dimensions == 3:
            notes = ("no tensor is used",)
        return Recovered(scores, max(len(seen) for seen in draws.values()), notes)

    def _slices(self, drawn: np.ndarray) -> dict[int, float]:
        """Slice to the probability that it holds tumour."""
        if drawn.size == 0:
            return {}
        first, last = (0, self.slices - 1) if self.slices else (int(drawn.min()), int(drawn.max()))
        count = np.bincount(np.clip(drawn, first, last) - first, minlength=last - first + 1)
        n, share = count.size, self.positive_fraction
        before = np.concatenate([[0], np.cumsum(count)])
        runs = list(itertools.combinations(range(n + 1), 2))  # [a, b): every run of neighbouring slices
        inside = np.array([before[b] - before[a] for a, b in runs])
        length = np.array([b - a for a, b in runs])
        chance_in, chance_out = share / length + (1 - share) / n, np.full(len(runs), (1 - share) / n)
        log = inside * np.log(np.maximum(chance_in, 1e-12)) + (drawn.size - inside) * np.log(
            np.maximum(chance_out, 1e-12)
        )
        weight = np.exp(log - log.max())
        weight /= weight.sum()
        covered = np.zeros(n + 1)
        np.add.at(covered, [a for a, _ in runs], weight)
        np.add.at(covered, [b for _, b in runs], -weight)
        return {first + z: float(p) for z, p in enumerate(np.cumsum(covered[:-1]))}


def _coverage(
    origins: list[tuple[int, int, int]], origin: tuple[int, int, int], window: tuple[int, ...]
) -> np.ndarray:
    """How many of the windows at `origins` cover each voxel of the window at `origin`."""
    covered = np.zeros(window, np.float32)
    for other in origins:
        start = [b - a for a, b in zip(origin, other, strict=True)]
        covered[tuple(slice(max(s, 0), max(0, s + n)) for s, n in zip(start, window, strict=True))] += 1
    return covered
