"""What many releases of one window say together: the gradient is averaged first, signs and all, and measured then.

Noise that a label holder draws afresh for each release has mean zero: it cancels in the average of the gradients, but
not in the average of their sizes. Directions are the other half of a gradient, and noise along it (max-norm) leaves
them exact; as their sign may change from release to release, what is averaged is the projector on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from splitpeer.attacks.base import Knowledge, Progress, Recovered, Shot, Target, View
from splitpeer.attacks.label.gradients import (
    FromGradients,
    GradientNorm,
    blurred,
    by_step,
    smoothed,
    upsampled,
)
from splitpeer.attacks.pose import pose_of, turn_back
from splitpeer.models.cut import level_name

_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class GradientField(GradientNorm):
    """`gradient-norm` of the mean gradient of several releases.

    Each release is turned back to the sample's own pose, and weighs as one over the energy of its step and level.
    While the network learns, the gradient of a window changes: `together` limits how many releases are averaged before
    their size is taken; the sizes of those groups are then averaged.
    """

    name = "gradient-field"
    title = "Size of the mean gradient of many releases"
    source = "ours; for one release the norm attack of Li et al. 2022 (arXiv 2102.08504)"
    plain = (
        "Another hospital averages the training signal of many rounds, so that noise cancels, "
        "and looks where it is large."
    )

    together: int | None = None
    """Releases of a sample that are averaged before their size is taken; None: all."""

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """As `gradient-norm`."""
        self._check(view)
        found = super().recover(pooled(view, self.together, self.steps), knowledge, progress)
        releases = max(sum(bool(shot.gradients) for shot in target.shots) for target in view.targets)
        return replace(found, views=min(releases, self.steps or releases))


@dataclass(frozen=True, kw_only=True)
class GradientProjector(FromGradients):
    """Tumour is where the gradient keeps its axis, from release to release and from a voxel to its neighbours.

    The projector g g' / |g|^2 has neither size nor sign: noise along the gradient (max-norm) leaves it exact, and a
    gradient that changes its sign while the network learns does not cancel. The score of a voxel is how much is left
    of the projectors' length in their mean over releases and neighbours: all of it where they agree.
    """

    name = "gradient-projector"
    title = "Axis of the gradient, over many releases"
    source = "ours, after the direction attack of Li et al. 2022 (arXiv 2102.08504)"
    plain = (
        "Another hospital looks where the training signal keeps to one line, whatever its strength and sign."
    )

    near: float = 2.0
    """Standard deviation in voxels at full resolution of the neighbourhood."""
    axes: int = 8
    """Principal axes of a level's gradients in which projectors are written."""

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """Scores float32 [N, *spatial]; samples without a gradient have zero."""
        levels = self._check(view)
        rows = [(target, shot) for shots in by_step(view, self.steps) for target, shot in shots]
        total = torch.zeros((len(view.targets), *view.window), device=self.device)
        for done, level in enumerate(levels, 1):
            seen, left = agreement(rows, level, self.near / view.window[0], self.axes)
            left = (left / left.mean().clamp(min=_TINY)).to(self.device)
            total[seen] += 2.0**-level * smoothed(upsampled(left, view), 1.0)
            progress(self.title, done, len(levels))
        releases = np.bincount([target for target, _ in rows])
        return Recovered(total.float().cpu().numpy(), int(releases.max()), (), {"levels": list(levels)})


def agreement(
    rows: Sequence[tuple[int, Shot]], level: int, near: float, axes: int
) -> tuple[list[int], Tensor]:
    """How well projectors agree over releases and neighbours: the squared length of their mean, 1 where they are equal.

    Args:
        rows: number of the target and one of its releases.
        near: standard deviation of the neighbourhood, as a share of the window's first axis.
        axes: principal axes of the level's directions in which projectors are written.

    Returns:
        The targets, and [targets, 1, *level's spatial].
    """

    def unit(shot: Shot) -> Tensor:
        return functional.normalize(turned_back(shot, level_name(level)), dim=0, eps=_TINY)

    _, vectors = torch.linalg.eigh(
        sum(torch.einsum("c...,d...->cd", u, u) for u in (unit(s) for _, s in rows))
    )
    counts = np.bincount([target for target, _ in rows])
    mean: dict[int, Tensor] = {}
    for target, shot in rows:
        within = torch.einsum("ck,c...->k...", vectors[:, -axes:], unit(shot))
        outer = torch.einsum("k...,l...->kl...", within, within).flatten(0, 1) / float(counts[target])
        mean[target] = mean.get(target, torch.zeros_like(outer)) + outer
    stacked = torch.stack(list(mean.values()))
    smooth = blurred(stacked, near * stacked.shape[2])
    return list(mean), smooth.square().sum(dim=1, keepdim=True)


def pooled(view: View, together: int | None = None, steps: int | None = None) -> View:
    """`view` with the mean gradients of several releases in place of each of them.

    Args:
        together: consecutive releases of a sample that become one; None: all.
        steps: use only so many training steps, the first ones; None: all.

    Returns:
        The same targets, their shots numbered from 1, without activations and in the samples' own poses.
    """
    means: list[list[_Mean]] = [[] for _ in view.targets]
    for shots in by_step(view, steps):
        energy = {
            name: float(np.mean([np.square(s.gradients[name], dtype=np.float64).mean() for _, s in shots]))
            for name in shots[0][1].gradients
        }
        for target, shot in shots:
            groups = means[target]
            if not groups or groups[-1].releases == together:
                groups.append(_Mean())
            groups[-1].add({name: (turned_back(shot, name), value) for name, value in energy.items()})
    return replace(
        view,
        targets=tuple(
            Target(
                target.sample,
                tuple(
                    Shot("train", number, 0, None, gradients=group.value())
                    for number, group in enumerate(groups, 1)
                ),
            )
            for target, groups in zip(view.targets, means, strict=True)
        ),
    )


@dataclass
class _Mean:
    """Gradients by level, weighted by one over their step's energy."""

    releases: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, gradients: dict[str, tuple[Tensor, float]]) -> None:
        self.releases += 1
        for name, (gradient, energy) in gradients.items():
            weight = 1 / max(energy, _TINY)
            self.sums[name] = self.sums.get(name, torch.zeros_like(gradient)) + weight * gradient
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def value(self) -> dict[str, np.ndarray]:
        return {name: (total / self.weights[name]).numpy() for name, total in self.sums.items()}


def turned_back(shot: Shot, name: str) -> Tensor:
    """The gradient at a level [channels, *spatial], in the sample's own pose."""
    return turn_back(torch.from_numpy(np.array(shot.gradients[name], np.float32)), pose_of(shot, None))
