"""Checks the encoder's gradients before each step: they derive from data that another peer sent."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch

from splitpeer.errors import JobFailed
from splitpeer.logs import event
from splitproto.errors import PolicyRefused

log = logging.getLogger(__name__)

LARGEST = math.sqrt(torch.finfo(torch.float32).max)
"""Adam squares a gradient: beyond this the square, and from then on the optimiser, is not finite."""


class Guard:
    """Guards one encoder.

    Args:
        most: largest norm of the gradient by all parameters; None: any that can be used.
        refuse: refuse a larger one; else it is scaled down to `most`.
    """

    def __init__(self, most: float | None = None, *, refuse: bool = False) -> None:
        self._most, self._refuse = most, refuse
        self.clipped = 0
        """Steps whose gradient was scaled down."""

    def check(self, parameters: Iterable[torch.nn.Parameter], step: int) -> None:
        """SP-11.15-1: before step `step`, with the gradients in place.

        Raises:
            JobFailed: a gradient is not finite, or too large to be squared.
            PolicyRefused: their norm is beyond the limit.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        largest = max((float(g.abs().max()) for g in gradients if g.numel()), default=0.0)
        if not largest <= LARGEST or any(bool(torch.isnan(g).any()) for g in gradients):
            raise JobFailed(
                f"the gradients of step {step} make the encoder's own gradients unusable (largest {largest:.3g}): "
                "the step was not made and the weights are unchanged"
            )
        if self._most is None:
            return
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        if norm <= self._most:
            return
        if self._refuse:
            raise PolicyRefused(
                f"the encoder's gradient of step {step} has norm {norm:.3g}, allowed is {self._most:g} "
                "(max_gradient_norm)"
            )
        for gradient in gradients:
            gradient.mul_(self._most / norm)
        self.clipped += 1
        # 1, 2, 4, 8, ...: a log that says how often without being a flood.
        if self.clipped & (self.clipped - 1) == 0:
            event(
                log,
                "gradient.clipped",
                logging.WARNING,
                step=step,
                norm=norm,
                limit=self._most,
                times=self.clipped,
            )
