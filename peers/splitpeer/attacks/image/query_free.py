"""Query-free reconstruction: a surrogate for the site's encoder instead of queries to it, then white-box on that."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch.optim import Adam

from splitpeer.attacks.base import Attack, Knowledge, Progress, Result, View, silent
from splitpeer.attacks.image.whitebox import WhiteBox
from splitpeer.attacks.surrogates import Surrogates


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
    needs = frozenset({"shadow", "shadow_masks", "decoder"})
    plain = "The coordinator imitates the hospital's network, and searches for images that the imitation would send so."

    def __init__(
        self,
        *,
        steps: int = 100,
        batch: int = 8,
        rate: float = 1e-3,
        iterations: int = 25,
        tv: float = 3.0,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        """
        Args:
            steps: batches that train the surrogates.
            batch: samples of each.
            rate: of Adam.
            iterations: see `WhiteBox`.
            tv: see `WhiteBox`.
        """
        super().__init__(seed=seed, device=device)
        self.steps, self.batch, self.rate, self.iterations, self.tv = steps, batch, rate, iterations, tv
        self.history: list[float] = []
        """The segmentation's loss of the last run, step by step."""

    def run(self, view: View, knowledge: Knowledge, progress: Progress = silent) -> Result:
        """Images in the intensities that the surrogate takes; gain and offset are lost to normalisation."""
        started = time.monotonic()
        world = Surrogates(view, knowledge, self.name, batch=self.batch, seed=self.seed, device=self.device)
        optimiser = Adam(world.encoders.parameters(), self.rate)
        self.history = []
        for step, indices in world.batches(self.steps):
            drawn = world.draw(indices, step)
            loss = world.task_loss(drawn.sent, drawn.masks)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            self.history.append(loss.item())
            progress(f"{self.title}: surrogates", step + 1, self.steps)
        search = WhiteBox(iterations=self.iterations, tv=self.tv, seed=self.seed, device=self.device)
        imitation = world.encoders[view.modality].eval()
        with torch.enable_grad():
            found = search.run(
                view, replace(knowledge, model=imitation, queries=False, weights_step=None), progress
            )
        return Result(
            attack=self.name,
            goal="image",
            images=found.images,
            adaptive=knowledge.adaptive,
            assumptions=replace(knowledge, model=None, initial_model=None).assumptions(),
            settings={
                "steps": self.steps, "batch": self.batch, "rate": self.rate, "iterations": self.iterations,
                "tv": self.tv, "seed": self.seed, "published": "500 iterations of Adam at 0.1, total variation 2",
            },
            views=found.views,
            seconds=time.monotonic() - started,
            notes=found.notes,
        )  # fmt: skip
