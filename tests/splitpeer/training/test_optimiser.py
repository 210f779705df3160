"""Rates depend on the step number alone, and equal those of torch's schedulers; one Adam equals several."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from splitpeer.training.optimiser import make_optimiser, make_schedule


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("total", [10, 37, 300])
def test_one_cycle_is_torchs(name: str, total: int) -> None:
    """SP-11-24."""
    ours = make_optimiser([nn.Parameter(torch.zeros(1))], name, lr=5e-3)
    schedule = make_schedule(ours, "one-cycle", total)
    theirs = make_optimiser([nn.Parameter(torch.zeros(1))], name, lr=5e-3)
    oracle = OneCycleLR(theirs, max_lr=5e-3, total_steps=total)
    for step in range(total):
        mine, other = ours.param_groups[0], theirs.param_groups[0]
        assert mine["lr"] == pytest.approx(other["lr"], rel=1e-9), step
        if name == "sgd":
            assert mine["momentum"] == pytest.approx(other["momentum"], rel=1e-12)
        else:
            assert mine["betas"] == pytest.approx(other["betas"], rel=1e-12)
        if step < total - 1:
            theirs.step()
            oracle.step()
            schedule.step()


def test_cosine_is_torchs() -> None:
    ours = make_optimiser([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = make_schedule(ours, "cosine", 20)
    theirs = make_optimiser([nn.Parameter(torch.zeros(1))], lr=0.1)
    oracle = CosineAnnealingLR(theirs, T_max=20)
    for _ in range(19):
        theirs.step()
        oracle.step()
        schedule.step()
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-6)


@pytest.mark.parametrize("kind", ["one-cycle", "cosine", "constant"])
def test_any_step_can_be_sought(kind: str) -> None:
    def settings(schedule_steps: int, seek: bool) -> tuple:
        optimiser = make_optimiser([nn.Parameter(torch.zeros(1))])
        schedule = make_schedule(optimiser, kind, 50)
        if seek:
            schedule.seek(40)
            schedule.seek(schedule_steps)
        else:
            for _ in range(schedule_steps):
                schedule.step()
        return optimiser.param_groups[0]["lr"], optimiser.param_groups[0]["betas"], schedule.position

    for step in (0, 1, 17, 49, 50, 80):
        assert settings(step, seek=True) == settings(step, seek=False)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_very_short_jobs(total: int) -> None:
    optimiser = make_optimiser([nn.Parameter(torch.zeros(1))])
    schedule = make_schedule(optimiser, "one-cycle", total)
    for _ in range(total):
        assert 0 < optimiser.param_groups[0]["lr"] <= 5e-3
        schedule.step()


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_one_optimiser_over_all_equals_one_per_party(name: str) -> None:
    """SP-11-24."""

    def parameters() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(7)
        return [nn.Parameter(torch.randn(5, 3, generator=generator)) for _ in range(6)]

    together, apart = parameters(), parameters()
    one = make_optimiser(together, name, weight_decay=1e-2)
    several = [make_optimiser(apart[i : i + 2], name, weight_decay=1e-2) for i in (0, 2, 4)]
    schedules = [make_schedule(o, "one-cycle", 10) for o in [one, *several]]
    for _ in range(10):
        for parameter in [*together, *apart]:
            parameter.grad = None
            parameter.pow(3).sum().backward()
        for optimiser in [one, *several]:
            optimiser.step()
        for schedule in schedules:
            schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lion"}, "optimiser must be"),
        ({"lr": 0.0}, "learning rate"),
        ({"lr": float("nan")}, "learning rate"),
        ({"weight_decay": -1.0}, "weight decay"),
    ],
)
def test_impossible_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimiser([nn.Parameter(torch.zeros(1))], **settings)


def test_impossible_schedules() -> None:
    optimiser = make_optimiser([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="schedule must be"):
        make_schedule(optimiser, "triangle", 10)
    with pytest.raises(ValueError, match="one step"):
        make_schedule(optimiser, "cosine", 0)


@pytest.mark.parametrize(
    ("name", "theirs", "settings"),
    [
        ("adam", torch.optim.Adam, {}),
        ("adamw", torch.optim.AdamW, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
@pytest.mark.parametrize("theirs_first", [False, True])
def test_steps_and_states_are_torchs_bit_for_bit(
    name: str, theirs, settings: dict, theirs_first: bool
) -> None:
    """Also where torch has changed its own class before, as it does when the first one is made; and each takes up
    the other's state.
    """

    def steps(make, count: int, states: Sequence[dict] = ()) -> tuple[list[torch.Tensor], dict]:
        weights = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 12)]
        optimiser = make(weights)
        for state in states:
            optimiser.load_state_dict(state)
        for step in range(count):
            optimiser.zero_grad()
            sum((w.sin() * (step + 1)).square().sum() for w in weights).backward()
            optimiser.step()
        assert not any(w.grad is None for w in weights)
        optimiser.zero_grad()
        assert all(w.grad is None for w in weights)
        return weights, copy.deepcopy(optimiser.state_dict())

    def our(weights: list) -> torch.optim.Optimizer:
        return make_optimiser(weights, name, lr=0.1, weight_decay=0.01)

    def their(weights: list) -> torch.optim.Optimizer:
        return theirs(weights, lr=0.1, weight_decay=0.01, **settings)

    if theirs_first:
        their([nn.Parameter(torch.zeros(1))])
    (mine, my_state), (others, their_state) = steps(our, 7), steps(their, 7)
    for one, other in zip(mine, others, strict=True):
        assert torch.equal(one, other)
    (mine, _), (others, _) = steps(our, 3, [their_state]), steps(their, 3, [my_state])
    for one, other in zip(mine, others, strict=True):
        assert torch.equal(one, other)


def test_no_optimiser_imports_torchs_compiler() -> None:
    program = (
        "import sys, torch\n"
        "from splitpeer.training.optimiser import OPTIMISERS, make_optimiser\n"
        "for name in OPTIMISERS:\n"
        "    weight = torch.nn.Parameter(torch.ones(3))\n"
        "    optimiser = make_optimiser([weight], name)\n"
        "    weight.square().sum().backward()\n"
        "    optimiser.step()\n"
        "    optimiser.zero_grad()\n"
        "    optimiser.load_state_dict(optimiser.state_dict())\n"
        "print(*{'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.split() == []
