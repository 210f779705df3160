"""Optimisers and learning rates (SP-11-24, SP-11.10-1): one per party; a rate depends on the step alone, so all agree.

No global gradient norm may enter here: no party sees all gradients, and the split run would stop being the
whole one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

OPTIMISERS = ("adam", "adamw", "sgd")
SCHEDULES = ("one-cycle", "cosine", "constant")

# One cycle as in torch's OneCycleLR (Smith & Topin, arXiv 1708.07120), which a test compares with.
WARM_UP = 0.3
START_DIVISOR = 25.0
END_DIVISOR = 1e4
MOMENTUM_LOW, MOMENTUM_HIGH = 0.85, 0.95


class _Uncompiled:
    """torch's own methods without their guards against `torch.compile`, which nothing here uses. The first guard that
    runs imports the compiler: a second of CPU time and 90 MiB.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)


class Adam(_Uncompiled, torch.optim.Adam):
    """`torch.optim.Adam`, uncompiled."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class AdamW(_Uncompiled, torch.optim.AdamW):
    """`torch.optim.AdamW`, uncompiled."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class SGD(_Uncompiled, torch.optim.SGD):
    """`torch.optim.SGD`, uncompiled."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


def make_optimiser(
    params: Iterable[nn.Parameter], name: str = "adam", lr: float = 5e-3, weight_decay: float = 0.0
) -> Optimizer:
    """Adam, AdamW, or SGD with Nesterov momentum .9, at torch's defaults otherwise.

    Raises:
        ValueError: an unknown name, or a rate or decay that is not a usable number.
    """
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"learning rate must be a positive number, not {lr}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight decay must be zero or a positive number, not {weight_decay}")
    match name:
        case "adam":
            return Adam(params, lr=lr, weight_decay=weight_decay)
        case "adamw":
            return AdamW(params, lr=lr, weight_decay=weight_decay)
        case "sgd":
            return SGD(params, lr=lr, weight_decay=weight_decay, momentum=0.9, nesterov=True)
    raise ValueError(f"optimiser must be one of {list(OPTIMISERS)}, not {name!r}")


def rate(kind: str, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (0 is the first), as a factor of the job's rate.

    "one-cycle" climbs from 1/25 to 1 over the first 30 % and falls to 1/250,000, both along a cosine;
    "cosine" falls from 1 towards 0; after the last step the last value stays.
    """
    step = min(step, total_steps - 1)
    match kind:
        case "constant":
            return 1.0
        case "cosine":
            return (1 + math.cos(math.pi * step / total_steps)) / 2
        case "one-cycle":
            return _one_cycle(step, total_steps, 1 / START_DIVISOR, 1.0, 1 / (START_DIVISOR * END_DIVISOR))
    raise ValueError(f"schedule must be one of {list(SCHEDULES)}, not {kind!r}")


class Schedule:
    """Sets an optimiser's rate from the number of steps done; it can go to any step, as after a rollback."""

    def __init__(self, optimiser: Optimizer, kind: str, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"a schedule needs at least one step, not {total_steps}")
        self._optimiser, self._kind, self._total_steps = optimiser, kind, total_steps
        self._full_rate: float = optimiser.defaults["lr"]
        self.position = 0
        self.seek(0)

    def step(self) -> None:
        """Go on to the next step."""
        self.seek(self.position + 1)

    def seek(self, position: int) -> None:
        """Set rate (and, in one cycle, momentum) for step `position`, counted from 0."""
        if position < 0:
            raise ValueError(f"no step {position}")
        self.position = position
        for group in self._optimiser.param_groups:
            group["lr"] = self._full_rate * rate(self._kind, position, self._total_steps)
            if self._kind == "one-cycle":  # momentum mirrors the rate
                step = min(position, self._total_steps - 1)
                momentum = _one_cycle(step, self._total_steps, MOMENTUM_HIGH, MOMENTUM_LOW, MOMENTUM_HIGH)
                if "betas" in group:
                    group["betas"] = (momentum, group["betas"][1])
                else:
                    group["momentum"] = momentum


def make_schedule(optimiser: Optimizer, kind: str, total_steps: int) -> Schedule:
    """A `Schedule` at step 0; the optimiser's own rate is the highest it will use.

    Raises:
        ValueError: an unknown kind, or no steps.
    """
    return Schedule(optimiser, kind, total_steps)


def _one_cycle(step: int, total_steps: int, start: float, peak: float, end: float) -> float:
    turn = WARM_UP * total_steps - 1
    last = total_steps - 1
    if turn > 0 and step <= turn:
        return _cosine(start, peak, step / turn)
    return _cosine(peak, end, (step - max(turn, 0)) / max(last - max(turn, 0), 1))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
