"""Query-free reconstruction: a surrogate for the site's encoder instead of queries to it, then white-box on that."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.optim import Adam

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, View
from splitpeer.attacks.image.whitebox import WhiteBox
from splitpeer.attacks.surrogates import Surrogates


@dataclass(frozen=True, kw_only=True)
class QueryFree(Attack):
    """Train the surrogate through the frozen decoder on labelled images of other patients, then find the image
    whose surrogate activations are those that were seen.

    Published: cross-entropy until the surrogate fits, then 500 iterations of Adam at 0.1 with total variation 2.
    Here: `steps` batches of the segmentation's loss, then `WhiteBox` as it is (its schedules and its weight of
    total variation, in units of the likelihood).
    """

    name = "query-free"
    title = "Surrogate, then white-box (query-free)"
    source = "He, Zhang, Lee, ACSAC 2019 and IEEE IoT-J 2020, doi 10.1109/JIOT.2020.3022358"
    goal = "image"
    role = "coordinator"
    needs = ("shadow of all", "shadow masks", "decoder")
    uses = frozenset({"shadow", "shadow_masks", "decoder", "architecture", "adaptive"})
    published = "500 iterations of Adam at 0.1, total variation 2"
    plain = "The coordinator imitates the hospital's network, and searches for images that the imitation would send so."

    steps: int = 100
    """Batches that train the surrogates."""
    batch: int = 8
    """Samples of each."""
    rate: float = 1e-3
    """Learning rate of Adam."""
    iterations: int = 25
    """See `WhiteBox`."""
    tv: float = 3.0
    """See `WhiteBox`."""

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """Images in the intensities that the surrogate takes; gain and offset are lost to normalisation."""
        world = Surrogates(view, knowledge, self.name, batch=self.batch, seed=self.seed, device=self.device)
        optimiser = Adam(world.encoders.parameters(), self.rate)
        history: list[float] = []
        for step, indices in world.batches(self.steps):
            drawn = world.draw(indices, step)
            loss = world.task_loss(drawn.sent, drawn.masks)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            history.append(loss.item())
            progress(f"{self.title}: surrogates", step + 1, self.steps)
        search = WhiteBox(iterations=self.iterations, tv=self.tv, seed=self.seed, device=self.device)
        imitation = world.encoders[view.seat.name].eval()
        with torch.enable_grad():
            found = search.recover(
                view, replace(knowledge, model=imitation, queries=False, weights_step=None), progress
            )
        return replace(found, history={"loss": tuple(history)})
