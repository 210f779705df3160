"""The first-step attack: who hands out the initial weights knows the encoder when it sends for the first time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, View
from splitpeer.attacks.evidence import weights_of
from splitpeer.attacks.image.whitebox import WhiteBox
from splitpeer.errors import AttackImpossible


@dataclass(frozen=True, kw_only=True)
class FirstStep(Attack):
    """White-box optimisation of what was sent before the first update, with the weights that were handed out.

    Works on the samples that were sent before any step was applied (the first batch, an evaluation of fresh
    weights); the others are left blank, and the notes count them.

    Args: see `WhiteBox`.
    """

    name = "first-step"
    title = "first step, weights handed out"
    source = "this project, after He, Zhang, Lee 2019; compare measurements of untrained encoders there"
    goal = "image"
    role = "coordinator"
    needs = ("initial weights",)
    uses = frozenset({"initial_model", "shadow", "architecture", "adaptive"})
    budget, published = ("iterations",), "5000 iterations of Adam at 0.01 on CIFAR"
    plain = "Hands out the initial weights itself, and so can invert the first batch that it is sent."

    iterations: int = 400
    tv: float = 1.0
    batch: int = 16

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """See `Attack.recover`. Raises AttackImpossible where no shot was made with these weights."""
        first = [
            n
            for n, t in enumerate(view.targets)
            if any(s.activations and weights_of(s) == 0 for s in t.shots)
        ]
        if not first:
            raise AttackImpossible(
                "none of the samples was sent before the first update: record the job from its beginning"
            )
        granted = replace(
            knowledge, model=knowledge.initial_model, weights_step=0, queries=False, decoder=None
        )
        seen = replace(view, targets=tuple(view.targets[n] for n in first))
        search = WhiteBox(
            iterations=self.iterations, tv=self.tv, batch=self.batch, seed=self.seed, device=self.device
        )
        found = search.recover(seen, granted, progress)
        images = np.zeros((len(view.targets), *found.images.shape[1:]), np.float32)
        images[first] = found.images
        count = f"{len(first)} of {len(view.targets)} samples were sent before the first update"
        return replace(found, images=images, notes=(*found.notes, count))
