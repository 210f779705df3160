"""The first-step attack: who hands out the initial weights knows the encoder when it sends for the first time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from splitpeer.attacks.base import Attack, Knowledge, Progress, Result, View, silent
from splitpeer.attacks.evidence import weights_of
from splitpeer.attacks.image.whitebox import WhiteBox
from splitpeer.errors import AttackImpossible


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
    needs = frozenset({"initial_model"})
    plain = "Hands out the initial weights itself, and so can invert the first batch that it is sent."

    def __init__(
        self, *, iterations: int = 400, tv: float = 1.0, batch: int = 16, seed: int = 0, device: str = "cpu"
    ) -> None:
        super().__init__(seed=seed, device=device)
        self._attack = WhiteBox(iterations=iterations, tv=tv, batch=batch, seed=seed, device=device)

    def run(self, view: View, knowledge: Knowledge, progress: Progress = silent) -> Result:
        """See `Attack.run`. Raises AttackImpossible without these weights, or without a shot made with them."""
        if knowledge.initial_model is None:
            raise AttackImpossible("the first-step attack needs the weights that were handed out: grant them")
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
        result = self._attack.run(seen, granted, progress)
        images = np.zeros((len(view.targets), *result.images.shape[1:]), np.float32)
        images[first] = result.images
        count = f"{len(first)} of {len(view.targets)} samples were sent before the first update"
        return replace(
            result, attack=self.name, images=images, notes=(*result.notes, count),
            assumptions=replace(knowledge, model=None, decoder=None).assumptions(),
        )  # fmt: skip
