"""Fusion of decisions, the cheap alternative: each site has a whole network, and sends what it would decide.

What leaves a site is a map of bounded logits for each region, and the coordinator reads their sum over all sites. The
benchmark alone has it: a registry's network has an encoder that is coarser than its image.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from splitpeer.models import site_seed
from splitpeer.models.seeding import seeded
from splitpeer.settings.job import COORDINATOR, JobConfig
from splitpeer.training.loss import task_loss
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_round import Parties, Place
from splitpeer.training.split_step import ClientHalf, CoordinatorHalf
from splitpeer.training.sums import SUM
from splitproto.records import Job

CLIP = 4.0
"""Logits stay below this: e^-4 is two in a hundred. The sum's range by default, too."""
FEATURES = (8, 8, 16, 32, 64, 8)
LEVEL = "x0"


class Opinion(nn.Module):
    """A site's network: an image [B, 1, *spatial] to {"x0": [B, regions, *spatial]}."""

    def __init__(self, regions: int) -> None:
        super().__init__()
        self.network = BasicUNet(2, 1, regions, FEATURES)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Bounded logits."""
        return {LEVEL: CLIP * torch.tanh(self.network(image) / CLIP)}


class Verdict(nn.Module):
    """The coordinator's: the mean of the sites' logits, and what a small network corrects of it, nothing at first."""

    def __init__(self, sites: int, regions: int) -> None:
        super().__init__()
        self.sites, self.seats = sites, (SUM,)
        self.network = BasicUNet(2, regions, regions, FEATURES)

    def forward(
        self, sent: Mapping[str, Mapping[str, Tensor]], absent: Collection[str] = (), have: object = None
    ) -> Tensor:
        """{"sum": {"x0": [B, regions, *spatial]}} to logits of the same shape."""
        mean = sent[SUM][LEVEL] / self.sites
        corrected: Tensor = mean + self.network(mean)
        return corrected


def logit_halves(job: Job, contrasts: Sequence[str], regions: int, seed: int) -> Parties:
    """All halves, drawn from `seed`."""
    sites = {}
    for contrast in contrasts:
        network = seeded(lambda: Opinion(regions), site_seed(seed, contrast))
        optimiser = make_optimiser(network.parameters(), job.optimiser, job.learning_rate, job.weight_decay)
        schedule = make_schedule(optimiser, job.schedule, job.steps)
        sites[Place(contrast, contrast)] = ClientHalf(network, optimiser, schedule)  # type: ignore[arg-type]
    verdict = seeded(lambda: Verdict(len(contrasts), regions), site_seed(seed, COORDINATOR))
    for weight in verdict.network.final_conv.parameters():
        nn.init.zeros_(weight)
    optimiser = make_optimiser(verdict.parameters(), job.optimiser, job.learning_rate, job.weight_decay)
    schedule = make_schedule(optimiser, job.schedule, job.steps)
    return Parties(CoordinatorHalf(verdict, optimiser, schedule), sites)  # type: ignore[arg-type]


class Opinions:
    """Trains all halves as one network. Each site's own logits count too, so that what it sends is what it would
    decide, and not just anything that the sum can use."""

    def __init__(self, parties: Parties, settings: JobConfig, steps: int) -> None:
        self._sites = {place.seat: half.network.train() for place, half in parties.sites.items()}
        self._verdict, training = parties.coordinator.network.train(), settings.training
        networks: list[nn.Module] = [*self._sites.values(), self._verdict]
        weights = [one for network in networks for one in network.parameters()]
        self._optimiser = make_optimiser(
            weights, training.optimiser, training.learning_rate, training.weight_decay
        )
        self._schedule = make_schedule(self._optimiser, training.schedule, steps)

    def step(self, images: Mapping[str, np.ndarray], target: np.ndarray) -> float:
        """One batch; returns the loss of all together."""
        sent = [network(torch.from_numpy(images[seat]))[LEVEL] for seat, network in self._sites.items()]
        truth = torch.from_numpy(target).float()
        own = torch.stack([task_loss(logits, truth, exclusive=False) for logits in sent]).mean()
        total = {SUM: {LEVEL: torch.stack(sent).sum(0)}}
        loss = task_loss(self._verdict(total), truth, exclusive=False)
        self._optimiser.zero_grad(set_to_none=True)
        (loss + own).backward()
        self._optimiser.step()
        self._schedule.step()
        return float(loss.detach())
