"""UnSplit: neither weights nor data, only which network it is; image and weights are found in turns."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Adam

from splitpeer.attacks.base import Attack, Knowledge, Progress, Result, View, silent
from splitpeer.attacks.evidence import Evidence
from splitpeer.attacks.image.sdar import seen
from splitpeer.attacks.pose import unpose_images
from splitpeer.errors import AttackImpossible
from splitpeer.models import build_encoder, site_seed


class UnSplit(Attack):
    """Alternate: some steps on the images with the network fixed, some on the network with the images fixed.

    Images: MSE(f(x), z) + tv * TV(x) + l2 * mean(x^2), TV the mean of squared differences, from a constant;
    network: MSE(f(x), z); AMSGrad at 1e-3 for both. Published: 1,000 rounds of 100 + 100 steps from 0.5, tv 0.1,
    l2 1, on images of range 0 to 1. Here images are normalised, so they start at 0 and the rate of the images
    is ten times larger; levels count alike, each by its own variance; rounds are as many as fit a minute of a core.
    The published errors are of small digits; on a normalising U-Net it stays near or below the floor.
    """

    name = "unsplit"
    title = "Image and network in turns (UnSplit)"
    source = "Erdogan, Küpçü, Çiçek 2022 (arXiv 2108.09033)"
    goal = "image"
    role = "coordinator"
    plain = "The coordinator, knowing only the network's plan, guesses weights and images that fit what it was sent."

    def __init__(
        self,
        *,
        rounds: int = 10,
        image_steps: int = 10,
        network_steps: int = 10,
        image_rate: float = 1e-2,
        network_rate: float = 1e-3,
        tv: float = 0.1,
        l2: float = 1.0,
        batch: int = 32,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        """
        Args:
            rounds: of both.
            image_steps, network_steps: within a round.
            image_rate, network_rate: of AMSGrad.
            tv, l2: weights of the priors.
            batch: samples that share one guessed network.
        """
        super().__init__(seed=seed, device=device)
        self.rounds, self.image_steps, self.network_steps = rounds, image_steps, network_steps
        self.image_rate, self.network_rate = image_rate, network_rate
        self.tv, self.l2, self.batch = tv, l2, batch
        self.history: list[float] = []
        """MSE of the activations after each round of the last run, in units of their variance."""

    def run(self, view: View, knowledge: Knowledge, progress: Progress = silent) -> Result:
        """Images up to gain and offset, and often up to sign."""
        started = time.monotonic()
        if not knowledge.architecture:
            raise AttackImpossible(f"{self.name} needs to know which network it is; the job names it")
        group = seen(view, knowledge, self.name, self.device)[0]  # the first pose of every sample
        total = len(view.targets)
        self.history, images = [], []
        for first in range(0, total, self.batch):
            rows = slice(first, min(first + self.batch, total))
            images.append(self._solve(view, group, rows, progress))
        return Result(
            attack=self.name,
            goal="image",
            images=torch.cat(images).cpu().numpy(),
            adaptive=knowledge.adaptive,
            assumptions=("the architecture named in the job", knowledge.assumptions()[-1]),
            settings={
                "rounds": self.rounds, "image_steps": self.image_steps, "network_steps": self.network_steps,
                "image_rate": self.image_rate, "network_rate": self.network_rate, "tv": self.tv, "l2": self.l2,
                "batch": self.batch, "seed": self.seed, "published": "1000 rounds of 100 + 100 steps at 1e-3",
            },
            views=int(group.views.max()),
            seconds=time.monotonic() - started,
        )  # fmt: skip

    def _solve(self, view: View, group: Evidence, rows: slice, progress: Progress) -> Tensor:
        network = build_encoder(view.backbone, seed=site_seed(self.seed, "guess")).to(self.device)
        count = rows.stop - rows.start
        images = torch.zeros((count, 1, *view.window), device=self.device, requires_grad=True)
        with torch.no_grad():  # a constant has no gradient through normalisation: start a hair beside it
            source = torch.Generator().manual_seed(self.seed)
            images += 1e-3 * torch.randn(images.shape, generator=source).to(images)
        image_steps = Adam([images], self.image_rate, amsgrad=True)
        network_steps = Adam(network.parameters(), self.network_rate, amsgrad=True)
        for number in range(self.rounds):
            for _ in range(self.image_steps):
                loss = (
                    _misfit(network(images), group, rows)
                    + self.tv * _roughness(images)
                    + self.l2 * images.square().mean()
                )
                image_steps.zero_grad()
                loss.backward()
                image_steps.step()
            for _ in range(self.network_steps):
                loss = _misfit(network(images.detach()), group, rows)
                network_steps.zero_grad()
                loss.backward()
                network_steps.step()
            self.history.append(loss.item())
            progress(self.title, number + 1, self.rounds)
        return unpose_images(images.detach(), group.poses[rows])


def _misfit(found: dict[str, Tensor], group: Evidence, rows: slice) -> Tensor:
    """Mean over levels of the mean squared error, in units of the level's variance."""
    terms = []
    for name, level in group.levels.items():
        wanted = level.mean[rows]
        terms.append(functional.mse_loss(found[name], wanted) / wanted.var().clamp(min=1e-12))
    return torch.stack(terms).mean()


def _roughness(images: Tensor) -> Tensor:
    """Total variation as in the published code: mean squared differences of neighbours, summed over axes."""
    return torch.stack([torch.diff(images, dim=axis).square().mean() for axis in range(2, images.ndim)]).sum()
