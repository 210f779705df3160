"""Against noise that is drawn once and kept: two releases of one sample under two sets of weights.

Kept noise leaves nothing to average while the encoder does not change. An encoder that learns does change: the
noise is the same but not what it hides, so an adversary who knows both sets of weights has two equations for
every unknown number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, Shot, View
from splitpeer.attacks.evidence import Evidence, gather, require_shots, weights_of
from splitpeer.attacks.networks import frozen
from splitpeer.attacks.optimise import lbfgs, total_variation
from splitpeer.attacks.pose import pose_images
from splitpeer.defences.activation.noise import rms
from splitpeer.defences.kinds import parse_all
from splitpeer.defences.specs import by_place
from splitpeer.errors import AttackImpossible

FLOOR = 0.02
"""Least scatter that is assumed, as a share of a level's own spread."""


@dataclass(frozen=True, kw_only=True)
class KeptNoise(Attack):
    """Searches the image for which one and the same noise explains all releases.

    With z_e = f_e(x) + a_e n for weights e = 1..E, a_e = scale * RMS(f_e(x)), the best n for a given x is a
    least-squares fit and is eliminated (variable projection: Golub & Pereyra, SIAM J. Numer. Anal. 10, 1973). What is
    left unexplained is minimised over x, with total variation.

    Args:
        iterations: of L-BFGS. tv: weight of the total variation.
    """

    name = "kept-noise"
    title = "kept noise, eliminated"
    source = "derived here: one noise, several sets of weights"
    goal = "image"
    role = "coordinator"
    needs = ("several weights", "shadow")
    uses = frozenset({"models", "shadow", "architecture", "adaptive"})
    has_naive_form = False
    plain = "Knows the site's half at two moments, and finds the image for which the noise was the same both times."

    iterations: int = 200
    tv: float = 1.0

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """See `Attack.recover`. Raises AttackImpossible where no noise is kept, or all weights are the same."""
        scales = _scales(view)
        models = {step: frozen(model, self.device) for step, model in knowledge.models.items()}
        chosen = [[s for s in t.shots if s.activations and weights_of(s) in models] for t in view.targets]
        require_shots(chosen, " from two sets of weights that are known")
        groups = gather(chosen, view.seat.modalities, masked=False, device=self.device, same=weights_of)
        steps = [weights_of(next(iter(shots))) for shots in _firsts(chosen, len(groups))]
        if len(set(steps)) < 2:
            raise AttackImpossible(
                "every release was made with the same weights: record evaluations of two steps"
            )
        mean = np.asarray(knowledge.shadow[view.seat.name], np.float32).mean(0)
        start = torch.from_numpy(np.repeat(mean[None], len(chosen), 0)).to(self.device)
        nets = [models[step] for step in steps]

        def objective(x: Tensor) -> Tensor:
            return _unexplained(x, groups, nets, scales) + self.tv * total_variation(x)

        found = lbfgs(objective, start, self.iterations, progress=progress, what=self.title)
        return Recovered(found.cpu().numpy(), len(groups), settings={"weights": sorted(models)})


def _firsts(chosen: list[list[Shot]], count: int) -> list[list[Shot]]:
    """For each group of `gather`, in its order, the shots of the first target that belong to it."""
    order: dict[int, list[Shot]] = {}
    for shot in chosen[0]:
        order.setdefault(weights_of(shot), []).append(shot)
    if len(order) != count:
        raise AttackImpossible("the samples were not all sent under the same sets of weights, unaugmented")
    return list(order.values())


def _scales(view: View) -> dict[str, float]:
    """Level to the kept noise's width, as a multiple of the level's RMS; 0 where nothing is added."""
    scales = dict.fromkeys(view.channels, 0.0)
    for defence in parse_all(by_place(view.defences).activations, "activations"):
        if defence.kind.additive_noise and defence.kept:
            for name in scales:
                if defence.covers(name):
                    scales[name] = float(np.hypot(scales[name], float(defence.values["scale"])))
        elif not defence.kind.structural and defence.kind.offline:
            raise AttackImpossible(f"{defence.kind.name} is between the noise and the weights: use whitebox")
    if not any(scales.values()):
        raise AttackImpossible("no kept noise is among this site's defences: use whitebox")
    return scales


def _unexplained(
    x: Tensor, groups: list[Evidence], models: list[nn.Module], scales: dict[str, float]
) -> Tensor:
    """[B]: squares that no single noise explains, in units of the assumed scatter."""
    found = [model(pose_images(x, group.poses)) for model, group in zip(models, groups, strict=True)]
    total = x.new_zeros(len(x))
    for name, scale in scales.items():
        if name not in groups[0].levels:
            continue
        rests = [group.levels[name].mean - f[name] for group, f in zip(groups, found, strict=True)]
        widths = [scale * rms(f[name]).view(-1, *[1] * (f[name].ndim - 1)) for f in found]
        noise = 0.0
        if scale:
            power: Any = sum(width.square() for width in widths)
            noise = sum(width * rest for width, rest in zip(widths, rests, strict=True)) / power.clamp_min(
                1e-12
            )
        for group, rest, width in zip(groups, rests, widths, strict=True):
            spread = group.levels[name].mean.flatten(1).std(1).clamp_min(1e-6)
            squares = (rest - width * noise).square().flatten(1).sum(1)
            total = total + squares / (2 * (FLOOR * spread).square())
    return total
