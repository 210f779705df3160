"""SP-11.15-1: gradients come from another peer; the weights stay finite whatever arrives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from splitpeer.errors import JobFailed
from splitpeer.models import build_encoder, unet_backbone
from splitpeer.training.guard import Guard
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import ClientHalf
from splitproto.errors import PolicyRefused

X = np.random.default_rng(3).normal(size=(2, 1, 32, 32)).astype(np.float32)


def half(optimiser: str = "adam", guard: Guard | None = None) -> ClientHalf:
    encoder = build_encoder(unet_backbone(2, (2, 4, 4, 8, 8, 4), (0, 4)), seed=5)
    made = make_optimiser(encoder.parameters(), optimiser, 1e-2, 0.0)
    return ClientHalf(encoder, made, make_schedule(made, "constant", 100), "cpu", guard)


def step(site: ClientHalf, size: float) -> None:
    sent = site.forward(X)
    site.backward({name: np.full(array.shape, size, np.float32) for name, array in sent.items()})


def weights(site: ClientHalf) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in site.state()[0].items()}


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("size", [3e38, -3e38, 1e25])
def test_one_finite_gradient_does_not_ruin_the_encoder(optimiser: str, size: float) -> None:
    site = half(optimiser)
    step(site, 1e-3)
    before = weights(site)
    with pytest.raises(JobFailed, match=r"step 2 .* unchanged"):
        step(site, size)
    after = weights(site)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert site.steps_done == 1
    # It left nothing behind: the next step is the one that would have been made without it.
    step(site, 1e-3)
    untouched = half(optimiser)
    step(untouched, 1e-3)
    step(untouched, 1e-3)
    assert all(torch.equal(tensor, weights(site)[name]) for name, tensor in weights(untouched).items())


def test_a_gradient_beyond_the_policy_is_scaled_down_and_counted(caplog) -> None:
    guard = Guard(1e-3)
    site = half("sgd", guard)
    before = weights(site)
    step(site, 1.0)
    moved = sum(float((tensor - before[name]).double().square().sum()) for name, tensor in weights(site).items()
                if name.startswith("model/") and tensor.is_floating_point() and "running" not in name)  # fmt: skip
    # The learning rate times the limit, and Nesterov's momentum on top.
    assert 0 < moved**0.5 <= 2 * 1e-3 * 1e-2
    for _ in range(4):
        step(site, 1.0)
    assert guard.clipped == 5
    assert len([r for r in caplog.records if r.getMessage() == "gradient.clipped"]) == 3


def test_a_gradient_beyond_the_policy_is_refused() -> None:
    site = half("sgd", Guard(1e-3, refuse=True))
    before = weights(site)
    with pytest.raises(PolicyRefused, match="max_gradient_norm"):
        step(site, 1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(site).items())


def test_what_is_within_the_limit_is_the_same_to_the_bit() -> None:
    limited, free = half("adam", Guard(1e9)), half("adam")
    for site in (limited, free):
        step(site, 0.5)
    assert all(torch.equal(tensor, weights(free)[name]) for name, tensor in weights(limited).items())
