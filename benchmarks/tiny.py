"""Vertical split trainings whose steps are short: two encoders, one decoder, no sockets.

`mlp` has steps of about a millisecond, so that the transport takes most of one; `unet` is the smallest network that the
daemons train (that of soak.py). The same halves train over splitproto, NVFlare and Flower (`peers.py`), each in an
environment of its own. Data are random and do not change; everything is drawn from a seed, so over all transports the
losses must be the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from splitpeer.models import build_decoder, build_encoder, unet_backbone
from splitpeer.training.backward import backward
from splitpeer.training.loss import region_loss
from splitpeer.training.optimiser import make_optimiser

Arrays = dict[str, np.ndarray]
"""Activations of one site, or gradients for it: float32 by level."""

SITES = {"site-1": "flair", "site-2": "t1"}
"""Sites, and the seat of each."""
REGIONS, SEED, RATE = 3, 7, 1e-4
WIDTHS = (2, 4, 4, 8, 8, 4)
"""Of the U-Net."""
INPUTS: dict[str, tuple[int, ...]] = {"mlp": (8, 256), "unet": (2, 1, 32, 32)}
"""Shape of a site's batch."""
SENT: dict[str, dict[str, tuple[int, ...]]] = {
    "mlp": {"x0": (8, 64)},
    "unet": {f"x{n}": (2, width, 32 >> n, 32 >> n) for n, width in enumerate(WIDTHS[:5])},
}
"""Shapes of what a site sends in a step, 2 and 27 KiB; gradients have the same."""


class MlpEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x0": self.layers(x)}


class MlpDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Linear(64 * len(SITES), 64), nn.ReLU(), nn.Linear(64, REGIONS)
        )

    def forward(self, seats: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        logits: Tensor = self.layers(torch.cat([seats[seat]["x0"] for seat in SITES.values()], 1))
        return logits


class Encoder:
    """A site's half."""

    def __init__(self, kind: str, site: str) -> None:
        number = list(SITES).index(site)
        torch.manual_seed(SEED + number)
        self.network: nn.Module
        if kind == "mlp":
            self.network = MlpEncoder()
        else:
            self.network = build_encoder(unet_backbone(2, WIDTHS), seed=SEED + number)
        self.optimiser = make_optimiser(self.network.parameters(), "adam", RATE, 0.0)
        drawn = np.random.default_rng(number).standard_normal(INPUTS[kind], np.float32)
        self.image = torch.from_numpy(drawn)
        self._sent: dict[str, Tensor] = {}

    def forward(self) -> Arrays:
        """The batch's activations."""
        self._sent = self.network(self.image)
        return {name: tensor.detach().numpy() for name, tensor in self._sent.items()}

    def backward(self, gradients: Mapping[str, np.ndarray]) -> None:
        """A step, with the gradients of what `forward` returned last."""
        self.optimiser.zero_grad()
        # What a transport delivers may be read-only: torch.tensor copies.
        backward(list(self._sent.values()), [torch.tensor(gradients[name]) for name in self._sent])
        self.optimiser.step()

    def state(self) -> Arrays:
        """Weights and the optimiser's state, for a process that ends after each step."""
        kept = {f"weight.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for number, moments in self.optimiser.state_dict()["state"].items():
            kept |= {f"{number}.{name}": torch.as_tensor(moment) for name, moment in moments.items()}
        return {name: tensor.numpy() for name, tensor in kept.items()}

    def resume(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a `state`."""
        weights, moments = {}, dict[int, dict[str, Tensor]]()
        for key, value in state.items():
            number, _, name = key.partition(".")
            if number == "weight":
                weights[name] = torch.tensor(value)
            else:
                moments.setdefault(int(number), {})[name] = torch.tensor(value)
        self.network.load_state_dict(weights)
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": moments})


class Decoder:
    """The coordinator's half."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(SEED + len(SITES))
        self.network: nn.Module
        if kind == "mlp":
            self.network = MlpDecoder()
        else:
            seats = tuple(SITES.values())
            self.network = build_decoder(unet_backbone(2, WIDTHS), seats, seed=SEED + len(SITES))
        self.optimiser = make_optimiser(self.network.parameters(), "adam", RATE, 0.0)
        drawn = np.random.default_rng(len(SITES)).random(
            (INPUTS[kind][0], REGIONS, *INPUTS[kind][2:]), np.float32
        )
        self.target = torch.from_numpy((drawn > 0.9).astype(np.float32))

    def step(self, activations: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[float, dict[str, Arrays]]:
        """Activations by site to the loss, and the gradients by site."""
        leaves = {
            site: {name: torch.tensor(array, requires_grad=True) for name, array in activations[site].items()}
            for site in SITES
        }
        self.optimiser.zero_grad()
        loss = region_loss(self.network({SITES[site]: leaves[site] for site in SITES}), self.target)
        loss.backward()
        self.optimiser.step()
        gradients = {
            site: {name: _gradient(leaf) for name, leaf in own.items()} for site, own in leaves.items()
        }
        return loss.item(), gradients


def _gradient(leaf: Tensor) -> np.ndarray:
    if leaf.grad is None:
        raise RuntimeError("a level that the loss does not depend on")
    return leaf.grad.numpy()
