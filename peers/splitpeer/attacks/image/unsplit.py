"""UnSplit: neither weights nor data, only which network it is; image and weights are found in turns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, View
from splitpeer.attacks.evidence import Evidence
from splitpeer.attacks.image.sdar import all_evidence
from splitpeer.attacks.pose import unpose_images
from splitpeer.models import build_encoder, site_seed
from splitpeer.training.optimiser import Adam


@dataclass(frozen=True, kw_only=True)
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
    needs = ("architecture",)
    uses = frozenset({"architecture", "adaptive"})
    budget, published = ("rounds",), "1000 rounds of 100 + 100 steps at 1e-3"
    plain = "The coordinator, knowing only the network's plan, guesses weights and images that fit what it was sent."

    rounds: int = 10
    """Rounds of both."""
    image_steps: int = 10
    network_steps: int = 10
    """Within a round."""
    image_rate: float = 1e-2
    network_rate: float = 1e-3
    """Learning rate of AMSGrad."""
    tv: float = 0.1
    l2: float = 1.0
    """Weights of the priors."""
    batch: int = 32
    """Samples that share one guessed network."""

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """Images up to gain and offset, and often up to sign."""
        group = all_evidence(view, knowledge, self.device)[0]  # the first pose of every sample
        total = len(view.targets)
        history: list[float] = []
        images = [
            self._solve(view, group, slice(first, min(first + self.batch, total)), history, progress)
            for first in range(0, total, self.batch)
        ]
        return Recovered(
            torch.cat(images).cpu().numpy(), int(group.views.max()), history={"loss": tuple(history)}
        )

    def _solve(
        self, view: View, group: Evidence, rows: slice, history: list[float], progress: Progress
    ) -> Tensor:
        width, seed = len(view.seat.modalities), site_seed(self.seed, "guess")
        network = build_encoder(view.backbone, width, seed=seed).to(self.device)
        count = rows.stop - rows.start
        images = torch.zeros((count, width, *view.window), device=self.device, requires_grad=True)
        with torch.no_grad():  # a constant has no gradient through normalisation: start slightly away from it
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
            history.append(loss.item())
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
