"""Against noise that is drawn once and kept: releases of one sample over which the noise is the same, the content not.

Kept noise leaves nothing to average while the same question gets the same answer. An encoder that learns answers
differently, and so does one that stands still and is shown the sample in another pose or gain, as augmentation does
in every epoch. With two such releases an adversary who knows the weights has two equations for every unknown number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, View
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

    With z_e = f_e(p_e(x)) + a_e n for weights and poses e = 1..E, a_e = scale * RMS(f_e(p_e(x))), the best n for a
    given x is a least-squares fit and is eliminated (variable projection: Golub & Pereyra, SIAM J. Numer. Anal. 10,
    1973). What is left unexplained is minimised over x, with total variation.

    Args:
        iterations: of L-BFGS. tv: weight of the total variation.
    """

    name = "kept-noise"
    title = "kept noise, eliminated"
    source = "derived here: one noise, several poses or sets of weights"
    goal = "image"
    role = "coordinator"
    needs = ("weights of any step", "shadow")
    uses = frozenset({"model", "models", "shadow", "architecture", "adaptive"})
    budget = ("iterations",)
    has_naive_form = False
    plain = "Knows the site's half, and finds the image for which the noise was the same in every pose."

    iterations: int = 200
    tv: float = 1.0

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """See `Attack.recover`. Raises AttackImpossible where no noise is kept, or a sample was sent in one pose from
        one set of weights only."""
        scales = _scales(view)
        models: dict[int | None, nn.Module] = dict(knowledge.models.items())
        if not models and knowledge.model is not None:
            models[knowledge.weights_step] = knowledge.model
        at = (lambda shot: None) if None in models else weights_of
        chosen = [[s for s in t.shots if s.activations and at(s) in models] for t in view.targets]
        require_shots(chosen, " from a set of weights that is known")
        groups = gather(chosen, view.seat.modalities, masked=False, device=self.device, same=at)
        if min(int(torch.stack([group.views > 0 for group in groups]).sum(0).min()), len(groups)) < 2:
            raise AttackImpossible(
                "every release was made with the same weights, in the same pose: "
                "record evaluations of two steps, or training steps"
            )
        known = {step: frozen(model, self.device) for step, model in models.items()}
        nets = [known[group.of] for group in groups]  # type: ignore[index]  # `at` gives what `models` is keyed by
        mean = np.asarray(knowledge.shadow[view.seat.name], np.float32).mean(0)
        start = torch.from_numpy(np.repeat(mean[None], len(chosen), 0)).to(self.device)

        def objective(x: Tensor) -> Tensor:
            return _unexplained(x, groups, nets, scales) + self.tv * total_variation(x)

        found = lbfgs(objective, start, self.iterations, progress=progress, what=self.title)
        steps = sorted({group.of for group in groups if isinstance(group.of, int)})
        return Recovered(found.cpu().numpy(), len(groups), settings={"weights": steps})


def applies(view: View) -> bool:
    """Whether kept noise is among the defences of `view`, and nothing that this attack cannot handle."""
    try:
        return bool(_scales(view))
    except AttackImpossible:
        return False


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
        used = [(group.views > 0).view(-1, *[1] * (rests[0].ndim - 1)) for group in groups]
        noise = torch.zeros_like(rests[0])
        if scale:
            power: Any = sum(width.square() * use for width, use in zip(widths, used, strict=True))
            fitted: Any = sum(w * rest * use for w, rest, use in zip(widths, rests, used, strict=True))
            noise = fitted / power.clamp_min(1e-12)
        for group, rest, width, use in zip(groups, rests, widths, used, strict=True):
            spread = group.levels[name].mean.flatten(1).std(1).clamp_min(1e-6)
            squares = (use * (rest - width * noise).square()).flatten(1).sum(1)
            total = total + squares / (2 * (FLOOR * spread).square())
    return total
