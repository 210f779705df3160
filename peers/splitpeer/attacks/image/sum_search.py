"""All images of a sum, searched together: what one contrast leaves open, the others of the same head decide.

A sum has fewer values than its images have voxels, so many sets of images explain it. Contrasts of one head change at
the same places and in step, and an inverse network says about where they lie: both are priors of the search.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from splitpeer.attacks.base import Knowledge, Progress, Recovered, View
from splitpeer.attacks.evidence import Evidence
from splitpeer.attacks.image.inverse import InverseAttack, reconstruct
from splitpeer.attacks.image.whitebox import Misfit
from splitpeer.attacks.optimise import lbfgs
from splitpeer.attacks.simulated_defences import SimulatedDefences

SMOOTH = 1e-2
"""Rounds the corner of the variation at zero."""
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class SumSearch(InverseAttack):
    """Minimises misfit + tv * coupled variation + |x - x0|^2 / (2 * prior * e^2) over all images at once.

    x0 is what an inverse network makes of the view, e its error on held-out shadow images. Descents start from x0,
    from the shadow patient whose values are nearest, and from the mean of all; for each sample the one that ends
    lowest is kept. It runs on any view of several contrasts, and is meant for sums over sites, whose rounding is part
    of the view's encoder (`attacks/joint.py`).

    Args:
        iterations: of L-BFGS, for each start; the other settings are the inverse network's.
        tv: weight of the coupled variation, in units of the log-likelihood.
        prior: how much further from x0 than its error it may go.
    """

    name = "sum-search"
    title = "joint search over all contrasts"
    source = (
        "this project: maximum a posteriori around an inverse network (He, Zhang, Lee 2019), with the variation of "
        "several contrasts coupled as in Ehrhardt & Betcke, SIAM J. Imaging Sci. 9, 2016 (vectorial, learned metric)"
    )
    needs = ("weights", "shadow")
    budget = ("epochs", "steps", "iterations")
    published = "ours; of its network 50 epochs of 50000 images of CIFAR"
    plain = "Searches for the images of all hospitals at once that would together have sent what arrived."

    iterations: int = 200
    tv: float = 0.3
    prior: float = 1.0

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """See `InverseAttack.recover`."""
        model, evidence, views = self._prepare(view, knowledge)
        inverter = self._train(view, knowledge, model, evidence, progress)
        guess = reconstruct(inverter, evidence)
        simulation = SimulatedDefences(view, model, self.seed, adaptive=knowledge.adaptive)
        note = f"root mean square error on held-out shadow images {inverter.error**0.5:.2f}"
        if simulation.on_images:  # the view explains the noisy images best; the network knows the clean ones
            return Recovered(guess.cpu().numpy(), views, (note,), saved=inverter.saved)
        misfit = Misfit(model, evidence, knowledge.adaptive)
        misfit.calibrate(simulation, guess)
        shadow = torch.from_numpy(np.asarray(knowledge.shadow[view.seat.name], np.float32)).to(guess)
        metric, narrow = contrast_metric(shadow), 2 * self.prior * max(inverter.error, 1e-4)

        def objective(x: Tensor) -> Tensor:
            pull = (x - guess).square().flatten(1).sum(1) / narrow
            return misfit(x) + self.tv * coupled_variation(x, metric) + pull

        starts = {"the network": guess, "the mean": shadow.mean(0).expand_as(guess)}
        if all(pose is None for pose in evidence[0].poses):
            starts["the nearest patient"] = shadow[nearest(model, shadow, evidence[0])]
        ends = [
            lbfgs(objective, x, self.iterations, progress=progress, what=f"searching from {name}")
            for name, x in starts.items()
        ]
        with torch.no_grad():
            values = torch.stack([objective(x) for x in ends])
        best = torch.where(values.isfinite(), values, torch.inf).argmin(0).tolist()
        images = torch.stack([ends[k][i] for i, k in enumerate(best)])
        won = tuple(f"from {name}: {best.count(k)} of {len(best)} samples" for k, name in enumerate(starts))
        return Recovered(images.cpu().numpy(), views, (note, *won), saved=inverter.saved)


def coupled_variation(images: Tensor, metric: Tensor) -> Tensor:
    """Total variation per sample [B] of all contrasts [B, C, *spatial] together, summed over voxels.

    At each voxel the length of the change of all contrasts, as `metric` [C, C] measures it: a change of all at one
    place costs less than the same changes at several. Each contrast in units of its own deviation.
    """
    factor = torch.linalg.cholesky(metric).mT
    changes = torch.stack([torch.einsum("kc,bc...->bk...", factor, change) for change in _changes(images)])
    length: Tensor = (changes.square().sum((0, 2)) + SMOOTH**2).sqrt() - SMOOTH
    return length.flatten(1).sum(1)


def contrast_metric(images: Tensor) -> Tensor:
    """How contrasts [N, C, *spatial] change together: the inverse of the covariance of their changes, [C, C], scaled to
    be 1 for a single contrast."""
    rows = torch.cat([change.transpose(0, 1).flatten(1) for change in _changes(images)], 1).double()
    covariance = rows @ rows.T / rows.shape[1]
    scale = covariance.trace() / len(covariance)
    covariance = covariance + 1e-2 * scale * torch.eye(len(covariance)).to(covariance)
    metric: Tensor = scale * torch.linalg.inv(covariance)
    return metric.to(images.dtype)


def _changes(images: Tensor) -> list[Tensor]:
    """Along each axis, 0 at its end; each contrast of each sample in units of its deviation."""
    spread = images.flatten(2).std(2).clamp_min(1e-6)
    images = images / spread.view(*spread.shape, *[1] * (images.ndim - 2))
    return [
        torch.cat([torch.diff(images, dim=axis), torch.zeros_like(images.narrow(axis, 0, 1))], dim=axis)
        for axis in range(2, images.ndim)
    ]


@torch.no_grad()
def nearest(model: nn.Module, shadow: Tensor, evidence: Evidence) -> Tensor:
    """For each target the row of `shadow` whose levels are nearest to what was seen, [B]."""
    distances = []
    for first in range(0, len(shadow), BATCH):
        sent = model(shadow[first : first + BATCH])
        total = torch.zeros(len(shadow[first : first + BATCH]), len(evidence.views), device=shadow.device)
        for name, level in evidence.levels.items():
            apart = torch.cdist(sent[name].flatten(1), level.mean.flatten(1)).square()
            total = total + apart / (level.mean[0].numel() * level.mean.var().clamp_min(1e-12))
        distances.append(total)
    return torch.cat(distances).argmin(0)
