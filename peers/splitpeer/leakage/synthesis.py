"""The floor of a collusion: what a site's own image already says of another contrast of the same patient.

Contrasts of one head share its anatomy. A coordinator that works with one site draws the victim's contrast from that
site's image, having learned from other patients how the two go together, and reads nothing of what the victim sent.
A reconstruction under collusion reveals something of the victim only as far as it beats this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from monai.losses import SSIMLoss
from monai.networks.nets import BasicUNet
from numpy.typing import NDArray
from torch import nn

from splitpeer.leakage.metrics import Image
from splitpeer.training.optimiser import Adam

FEATURES = (8, 8, 16, 32, 64, 8)
BATCH = 8
LEARNING_RATE = 5e-3
RANGE = 6.0
"""Data range of normalised intensities, for SSIM: about three standard deviations on either side."""


@dataclass(frozen=True)
class Synthesiser:
    """One contrast from others of the same patient."""

    network: nn.Module

    @classmethod
    def train(
        cls, known: Image, wanted: Image, *, steps: int = 200, seed: int = 0, device: str = "cpu"
    ) -> Synthesiser:
        """Learn from patients that no attack is judged on. About 40 ms a step of one core for 96 x 96.

        Args:
            known: [M, channels, *spatial], normalised; every axis a multiple of 16.
            wanted: [M, 1, *spatial], of the same samples.
            steps: of `BATCH` samples each.
            seed: of weights and batches; the global generators are left as they were.

        Raises:
            ValueError: counts or shapes differ.
        """
        if len(known) != len(wanted) or known.shape[2:] != wanted.shape[2:] or not len(known):
            raise ValueError(f"images {known.shape} and {wanted.shape} do not fit")
        x, y = (torch.as_tensor(np.asarray(images, np.float32)) for images in (known, wanted))
        dimensions = x.ndim - 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = BasicUNet(dimensions, x.shape[1], y.shape[1], FEATURES)
        network.to(device).train()
        similarity = SSIMLoss(dimensions, data_range=RANGE, win_size=7)
        optimiser = Adam(network.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=max(steps, 2))
        random = np.random.default_rng(seed)
        for _ in range(steps):
            rows = torch.as_tensor(random.choice(len(x), min(BATCH, len(x)), replace=False))
            flips = [2 + axis for axis in range(dimensions) if random.random() < 0.5]
            image, target = (t[rows].flip(flips).to(device) for t in (x, y))
            guess = network(image)
            head = (target != 0).to(target.dtype)
            weight = head / head.mean().clamp_min(1e-3) + 0.1
            loss = (weight * (guess - target).abs()).mean() + similarity(guess, target)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        return cls(network.eval())

    def __call__(self, known: Image) -> NDArray[np.float32]:
        """[N, channels, *spatial] to the wanted contrast, float32 [N, 1, *spatial]."""
        device = next(self.network.parameters()).device
        found = []
        with torch.inference_mode():
            for start in range(0, len(known), 4 * BATCH):
                batch = torch.as_tensor(np.asarray(known[start : start + 4 * BATCH], np.float32))
                found.append(self.network(batch.to(device)).float().cpu().numpy())
        return np.concatenate(found)
