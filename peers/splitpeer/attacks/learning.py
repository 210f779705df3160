"""Training a network of an adversary's: it is judged on patients that it has not seen, and its best weights are kept.

Neighbouring slices of one patient are alike: a network that is judged on slices of patients whom it has learned by
heart looks better than it is on the patients under attack.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from splitpeer.attacks.base import Progress
from splitpeer.training.optimiser import Adam

HELD_OUT = 0.1
"""Share of the patients by whom an adversary judges its own network."""
CHECKS = 10
"""How often it is judged while it is trained."""
PATIENCE = 5
"""Judgements in a row without a better one, after which it is not trained on."""
JUDGED = 24
"""Samples that are judged, at most."""


def held_out(patients: Sequence[str], count: int) -> np.ndarray:
    """Which of `count` samples are kept for judging, bool [count]: those of the last tenth of the patients, of one at
    least.

    Args:
        patients: who each sample is of. Where nobody said so, or all are of one patient, the last samples are taken.
    """
    names = list(dict.fromkeys(patients))
    if len(patients) != count or len(names) < 2:
        return np.arange(count) >= count - max(1, round(HELD_OUT * count))
    last = set(names[-max(1, round(HELD_OUT * len(names))) :])
    return np.array([name in last for name in patients])


def spread(held: np.ndarray) -> np.ndarray:
    """Indices of at most `JUDGED` of those that are held out, evenly."""
    places = np.flatnonzero(held)
    chosen = np.linspace(0, len(places) - 1, min(JUDGED, len(places))).round().astype(int)
    found: np.ndarray = places[chosen]
    return found


def steps_of(epochs: int, samples: int, batch: int, steps: int | None) -> int:
    """`steps` where they are given, else those of so many epochs."""
    return steps if steps is not None else epochs * math.ceil(samples / batch)


class Best:
    """The best weights of networks so far, by an error that is asked for from time to time.

    Args:
        networks: what is trained.
        error: lower is better, of patients held out; no graph is needed.
        steps: of the whole training.
    """

    def __init__(self, networks: nn.Module, error: Callable[[], float], steps: int) -> None:
        self._networks, self._judge = networks, error
        self._every, self._steps = max(1, steps // CHECKS), steps
        self._kept: dict[str, Any] | None = None
        self._idle = 0
        self.error = math.inf
        self.steps = 0
        """After which the best weights were there."""

    def stop(self, step: int) -> bool:
        """Judge after `step` (from 0), if it is time; whether training on is useless."""
        if (step + 1) % self._every and step + 1 != self._steps:
            return False
        self._networks.eval()
        with torch.no_grad():
            found = self._judge()
        self._networks.train()
        self._idle += 1
        if found < self.error:
            self._kept = copy.deepcopy(self._networks.state_dict())
            self.error, self.steps, self._idle = found, step + 1, 0
        return self._idle >= PATIENCE

    def restore(self) -> None:
        """Give the networks their best weights, for use; where nothing was better than nothing, those they have."""
        if self._kept is not None:
            self._networks.load_state_dict(self._kept)
        self._networks.eval().requires_grad_(False)


def train(
    network: nn.Module, loss: Callable[[int], Tensor], error: Callable[[], float], steps: int, *, rate: float,
    progress: Progress, what: str,
) -> Best:  # fmt: skip
    """Adam along one cycle of its rate; `network` has its best weights afterwards.

    Args:
        loss: of the step with this number, from 0: a scalar with its graph.
        error: see `Best`.
    """
    optimiser = Adam(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps + 1)
    best = Best(network, error, steps)
    for step in range(steps):
        now = loss(step)
        optimiser.zero_grad(set_to_none=True)
        now.backward()
        optimiser.step()
        schedule.step()
        progress(what, step + 1, steps)
        if best.stop(step):
            break
    best.restore()
    return best


def rounds(count: int, batch: int, source: np.random.Generator) -> Callable[[], np.ndarray]:
    """The next `batch` of `count` indices, in shuffled rounds."""
    order: list[int] = []

    def following() -> np.ndarray:
        nonlocal order
        while len(order) < batch:
            order += source.permutation(count).tolist()
        chosen, order = order[:batch], order[batch:]
        return np.array(chosen)

    return following


def turned(images: np.ndarray, source: np.random.Generator, *, mirrored: bool) -> np.ndarray:
    """Every image of [N, C, *spatial] flipped and turned at random, as augmentation does; `mirrored`: only left and
    right exchanged."""
    found = []
    for image in images:
        axes = range(1, 2 if mirrored else image.ndim)
        image = np.flip(image, tuple(axis for axis in axes if source.random() < 0.5))
        if not mirrored and image.shape[1] == image.shape[2]:
            image = np.rot90(image, int(source.integers(4)), (1, 2))
        found.append(image)
    return np.ascontiguousarray(np.stack(found))
