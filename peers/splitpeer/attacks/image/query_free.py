"""Query-free reconstruction: a surrogate for the site's encoder instead of queries to it, then white-box on that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, View
from splitpeer.attacks.image.whitebox import WhiteBox
from splitpeer.attacks.learning import Best
from splitpeer.attacks.surrogates import Surrogates
from splitpeer.training.optimiser import Adam


@dataclass(frozen=True, kw_only=True)
class QueryFree(Attack):
    """Train the surrogate through the frozen decoder on labelled images of other patients, then find the image
    whose surrogate activations are those that were seen.

    Published: cross-entropy until the surrogate fits, then 500 iterations of Adam at 0.1 with total variation 2.
    Here: `epochs` of the segmentation's loss, the best surrogates kept by patients held out, then `WhiteBox` as it
    is (its schedules and its weight of total variation, in units of the likelihood).
    """

    name = "query-free"
    title = "Surrogate, then white-box (query-free)"
    source = "He, Zhang, Lee, ACSAC 2019 and IEEE IoT-J 2020, doi 10.1109/JIOT.2020.3022358"
    goal = "image"
    role = "coordinator"
    needs = ("shadow of all", "shadow masks", "decoder")
    uses = frozenset({"shadow", "shadow_masks", "decoder", "architecture", "adaptive"})
    budget: ClassVar[tuple[str, ...]] = ("epochs", "steps", "iterations")
    published = "500 iterations of Adam at 0.1, total variation 2"
    plain = "The coordinator imitates the hospital's network, and searches for images that the imitation would send so."

    epochs: int = 20
    """How often surrogates are shown each of the other patients' samples."""
    steps: int | None = None
    """Batches that train them, instead."""
    batch: int = 8
    """Samples of each."""
    rate: float = 1e-3
    """Learning rate of Adam."""
    iterations: int = 50
    """See `WhiteBox`."""
    tv: float = 3.0
    """See `WhiteBox`."""

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """Images in the intensities that the surrogate takes; gain and offset are lost to normalisation."""
        world = Surrogates(view, knowledge, self.name, batch=self.batch, seed=self.seed, device=self.device)
        optimiser = Adam(world.encoders.parameters(), self.rate)
        history: list[float] = []
        steps = world.steps(self.epochs, self.steps)
        best = Best(world.encoders, partial(_unfit, world), steps)
        for step, indices in world.batches(steps):
            drawn = world.draw(indices, step)
            loss = world.task_loss(drawn.sent, drawn.masks)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            history.append(loss.item())
            progress(f"{self.title}: surrogates", step + 1, steps)
            if best.stop(step):
                break
        best.restore()
        search = WhiteBox(iterations=self.iterations, tv=self.tv, seed=self.seed, device=self.device)
        imitation = world.encoders[view.seat.name].eval()
        with torch.enable_grad():
            found = search.recover(
                view, replace(knowledge, model=imitation, queries=False, weights_step=None), progress
            )
        return replace(found, history={"loss": tuple(history)}, merit=None)


def _unfit(world: Surrogates) -> float:
    """The segmentation's loss with the surrogates, of patients held out."""
    drawn = world.judged()
    return world.task_loss(drawn.sent, drawn.masks).item()
