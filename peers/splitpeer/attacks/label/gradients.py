"""What an image site reads off the gradients it is sent: where the tumour is, and in which slices.

A gradient of a segmentation loss is spatial. At the logits it is about p - y, and the decoder's backward pass
keeps it in place, so its size at a voxel of a skip tensor tells how wrong the network still is there: before
training, that is the tumour. No network, no data and no label is needed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.networks.layers import GaussianFilter
from torch import Tensor
from torch.nn import functional

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, Shot, View
from splitpeer.attacks.pose import pose_of, turn_back
from splitpeer.errors import AttackImpossible
from splitpeer.models.cut import level_name, level_number

_TINY = 1e-30
_MODES = {2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True, kw_only=True)
class FromGradients(Attack):
    """Walks over the steps of a view: all its samples of one step at once, one level at a time."""

    goal = "mask"
    role = "client"
    evidence = "the gradients this site was sent"

    levels: tuple[int, ...] | None = None
    """Those to combine; None: all that were sent."""
    steps: int | None = None
    """Use only this many training steps, the first ones; None: all."""

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """Scores float32 [N, *spatial], in the orientation of the sample and not of its augmented copies."""
        levels = self._check(view)
        steps = by_step(view, self.steps)
        total = torch.zeros((len(view.targets), *view.window), device=self.device)
        count = torch.zeros(len(view.targets), device=self.device)
        base = 2.0 if _adaptive(view, knowledge) else 4.0
        for done, shots in enumerate(steps, 1):
            maps: Any = sum(
                base**-level * self._scores(self._stack(shots, level), view, knowledge) for level in levels
            )
            for row, (target, shot) in zip(maps, shots, strict=True):
                total[target] += turn_back(row[None], pose_of(shot, None))[0]
                count[target] += 1
            progress(self.title, done, len(steps))
        total /= count.reshape(-1, *[1] * view.dimensions).clamp(min=1)
        unseen = int((count == 0).sum())
        notes = (f"{unseen} samples were sent no gradient: their score is zero",) if unseen else ()
        return Recovered(
            self._finish(total, view, knowledge).float().cpu().numpy(),
            int(count.max()),
            (*notes, *self._notes()),
            {"levels": list(levels), "steps": len(steps)},
        )

    def _scores(self, gradient: Tensor, view: View, knowledge: Knowledge) -> Tensor:
        """Gradients [n, C, *level's spatial] of one step and level to scores [n, *window], mean about 1."""
        raise NotImplementedError

    def _finish(self, scores: Tensor, view: View, knowledge: Knowledge) -> Tensor:
        """Means over steps [N, *window] to the reported scores."""
        return scores

    def _notes(self) -> tuple[str, ...]:
        return ()

    def _check(self, view: View) -> tuple[int, ...]:
        sent = levels_sent(view, self.name)
        missing = sorted(set(self.levels or ()) - set(sent))
        if missing:
            raise AttackImpossible(f"{self.name}: level {missing[0]} is not in this view, only {list(sent)}")
        return self.levels or sent

    def _stack(self, shots: list[tuple[int, Shot]], level: int) -> Tensor:
        arrays = [np.asarray(shot.gradients[level_name(level)], np.float32) for _, shot in shots]
        return torch.from_numpy(np.stack(arrays)).to(self.device)


@dataclass(frozen=True, kw_only=True)
class GradientNorm(FromGradients):
    """Tumour is where the gradient is large.

    Plain: the norm over channels, upsampled, smoothed, divided by its mean over the step's samples (losses
    differ between steps), averaged over steps after undoing the augmentation, and over levels with weights
    4**-level. Where the label holder defends its gradients and the adversary knows, the adaptive form (ours):
    noise that is drawn voxel by voxel has neither neighbours nor a preferred direction, the gradient has both. So
    the gradient itself is smoothed, signs and all, before its energy is taken; 3-wide patches are projected on the
    step's leading principal components; what the weak components hold is taken for noise and subtracted; energies
    are averaged over steps, and over levels with weights 2**-level. It also undoes noise that multiplies (max-norm)
    or is matched to the difference of the classes (Marvell): both are drawn for each voxel alone.
    """

    name = "gradient-norm"
    title = "Size of the gradient, voxel by voxel"
    source = "Li et al. 2022 (arXiv 2102.08504), here voxel by voxel on the gradients of a segmentation loss"
    plain = "Another hospital looks where the training signal it is sent is strong: there is the target."

    smooth: float = 1.0
    """Smoothing of the scores: standard deviation in voxels at full resolution."""
    field: float = 2.0
    """Smoothing of the gradient itself; adaptive form only."""
    components: int = 2
    """Principal components of 3-wide patches; adaptive form only."""

    def _scores(self, gradient: Tensor, view: View, knowledge: Knowledge) -> Tensor:
        total = None
        if _adaptive(view, knowledge):
            gradient = blurred(gradient, self.field * gradient.shape[2] / view.window[0])
            score, total = patch_energy(gradient, self.components)
        else:
            score = gradient.square().sum(dim=1, keepdim=True).sqrt()
        # Losses differ between steps. Where noise was subtracted, by all that was there: what is mostly noise then
        # weighs little.
        scale = score.mean() if total is None else total
        return smoothed(upsampled(score / scale.clamp(min=_TINY), view), self.smooth)

    def _finish(self, scores: Tensor, view: View, knowledge: Knowledge) -> Tensor:
        return scores.clamp(min=0).sqrt() if _adaptive(view, knowledge) else scores


@dataclass(frozen=True, kw_only=True)
class GradientCosine(FromGradients):
    """Tumour is where the gradient points against the majority: minus its cosine with the mean direction.

    The direction attack of Li et al., per voxel. It ignores sizes, so it withstands noise that equalises them
    (max-norm) as long as one direction prevails, which is so in the first steps. Later it is about chance: the
    decoder's LeakyReLU and normalisation turn the gradient's direction from voxel to voxel.
    """

    name = "gradient-cosine"
    title = "Direction of the gradient, voxel by voxel"
    source = "Li et al. 2022 (arXiv 2102.08504), here voxel by voxel"
    plain = (
        "Another hospital looks where the training signal points the other way than it does in most places."
    )

    def _scores(self, gradient: Tensor, view: View, knowledge: Knowledge) -> Tensor:
        axes = (0, *range(2, gradient.ndim))
        majority = functional.normalize(gradient, dim=1).mean(dim=axes, keepdim=True)
        against = -functional.cosine_similarity(gradient, majority, dim=1).unsqueeze(1)
        return smoothed(upsampled(against, view), 1.0)

    def _notes(self) -> tuple[str, ...]:
        return ("fit for first steps; later a convolutional decoder turns directions from voxel to voxel",)


@dataclass(frozen=True, kw_only=True)
class GradientSlice(FromGradients):
    """Whether a sample holds tumour at all: the norm of its whole gradient, the classical attack.

    Every voxel of a sample gets the same score.
    """

    name = "gradient-slice"
    title = "Size of the gradient, sample by sample"
    source = "Li et al. 2022 (arXiv 2102.08504)"
    plain = "Another hospital compares how strong the training signal is from slice to slice."

    def _scores(self, gradient: Tensor, view: View, knowledge: Knowledge) -> Tensor:
        norm = gradient.flatten(1).square().mean(dim=1).sqrt()
        norm = norm / norm.mean().clamp(min=_TINY)
        return norm.reshape(-1, *[1] * view.dimensions).expand(-1, *view.window)

    def _notes(self) -> tuple[str, ...]:
        return ("one score per sample: it tells whether there is any target, not where",)


def upsampled(score: Tensor, view: View) -> Tensor:
    """[n, 1, *level's spatial] to [n, *window], linearly."""
    return functional.interpolate(score, size=view.window, mode=_MODES[view.dimensions], align_corners=False)[
        :, 0
    ]


def smoothed(score: Tensor, sigma: float) -> Tensor:
    """[n, *spatial] through a Gaussian of `sigma` voxels that does not darken at the border."""
    if sigma <= 0:
        return score
    weight = blurred(torch.ones_like(score[:1, None]), sigma)
    return (blurred(score[:, None], sigma) / weight)[:, 0]


def blurred(field: Tensor, sigma: float) -> Tensor:
    """[n, C, *spatial] through a Gaussian of `sigma` voxels, zero outside."""
    return GaussianFilter(field.ndim - 2, sigma).to(field.device)(field) if sigma > 0 else field


def patch_energy(gradient: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Energy [n, 1, *spatial] that 3-wide patches of `gradient` [n, C, *spatial] have in their leading principal
    components, less what the other components let expect of noise; and the mean energy with that noise."""
    spatial = gradient.ndim - 2
    width = 1 if min(gradient.shape[2:]) < 3 else 3
    pad = width // 2
    padded = functional.pad(gradient, [pad] * 2 * spatial)
    shifts = itertools.product(range(width), repeat=spatial)
    patches = torch.cat(
        [
            padded[:, :, *(slice(s, s + n) for s, n in zip(shift, gradient.shape[2:], strict=True))]
            for shift in shifts
        ],
        dim=1,
    ).movedim(1, -1)
    flat = patches.flatten(0, -2).double()
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    kept = min(components, len(values) // 2)
    if kept == 0:
        energy = gradient.square().sum(dim=1, keepdim=True)
        return energy, energy.mean()
    noise = values[:-kept].median() * kept
    energy = (patches @ vectors[:, -kept:].to(patches)).square().sum(dim=-1)
    return (energy - noise.to(energy)).unsqueeze(1), energy.mean()


def levels_sent(view: View, name: str) -> tuple[int, ...]:
    """The levels of which a view holds gradients. Raises AttackImpossible: it holds none."""
    shots = [shot for target in view.targets for shot in target.shots if shot.gradients]
    if not shots:
        raise AttackImpossible(f"{name}: no gradient in this view; evaluation has none, take training steps")
    return tuple(sorted(level_number(name) for name in shots[0].gradients))


def by_step(view: View, limit: int | None) -> list[list[tuple[int, Shot]]]:
    """The first `limit` steps of a view: (number of the target, its release) of every sample with a gradient."""
    steps: dict[int, list[tuple[int, Shot]]] = {}
    for number, target in enumerate(view.targets):
        for shot in target.shots:
            if shot.gradients:
                steps.setdefault(shot.step, []).append((number, shot))
    return [steps[step] for step in sorted(steps)][:limit]


def _adaptive(view: View, knowledge: Knowledge) -> bool:
    """Whether there is anything to adapt to, and the adversary knows."""
    return bool(view.gradient_defences) and knowledge.adaptive
