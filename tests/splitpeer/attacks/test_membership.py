"""Membership is told from an encoder that remembers, and from no other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from splitpeer.attacks.base import Knowledge
from splitpeer.attacks.membership import Membership
from splitpeer.attacks.runner import run
from splitpeer.errors import AttackImpossible
from splitpeer.leakage.masks import auc

from .image_attacks import encoder, heads, look

MEMBERS = np.arange(16) < 8


def masks(images: np.ndarray) -> np.ndarray:
    """What is bright, uint8 [N, 1, *spatial]."""
    return (images > 0.8).astype(np.uint8)


class Remembers(nn.Module):
    """An encoder with the labels in one channel, blurred by noise: less of it for those that it was trained on."""

    def __init__(self, members: np.ndarray, noise: float) -> None:
        super().__init__()
        self.inner, self.noise = encoder(), noise
        self.backbone, self.levels = self.inner.backbone, self.inner.levels
        self.dimensions = self.inner.dimensions
        self.members = torch.from_numpy(members)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = self.inner(x)
        known = (x[:, None] - self.members[None]).abs().flatten(2).amax(2).amin(1) < 1e-6
        noise = torch.randn(x.shape[0], *x.shape[2:], generator=torch.Generator().manual_seed(len(x)))
        noise = noise * torch.where(known, 1 - self.noise, torch.ones(len(x)))[:, None, None]
        x0 = torch.zeros_like(levels["x0"])
        x0[:, 0] = (x[:, 0] > 0.8).float() + noise
        return {name: torch.zeros_like(level) for name, level in levels.items()} | {"x0": x0}


def scene(noise: float, labels: bool = True):
    images, strangers = heads(16, 1), heads(40, 2)
    network = Remembers(images[MEMBERS], noise).eval()
    knowledge = Knowledge(
        model=network, weights_step=5, shadow={"t1": strangers}, shadow_masks=masks(strangers),
        labels=masks(images) if labels else None,
    )  # fmt: skip
    return look(images, network), knowledge


@pytest.mark.parametrize(("noise", "labels", "low", "high"), [
    (0.5, True, 0.9, 1.0), (0.5, False, 0.8, 1.0), (0.0, True, 0.2, 0.8),
])  # fmt: skip
def test_who_was_trained_on_is_told_only_where_it_is_remembered(
    noise: float, labels: bool, low: float, high: float
) -> None:
    view, knowledge = scene(noise, labels)
    result = run(Membership(references=0), view, knowledge)
    assert result.goal == "member" and result.images.shape == (16, 1)
    assert low <= auc(MEMBERS, result.images[:, 0]) <= high


def test_what_is_missing_is_said() -> None:
    view, knowledge = scene(0.0)
    with pytest.raises(AttackImpossible, match="masks of the other"):
        run(Membership(references=0), view, replace(knowledge, shadow_masks=None))
    with pytest.raises(AttackImpossible, match="at least eight"):
        run(Membership(references=0), view, replace(knowledge, shadow={"t1": heads(3, 4)}))
    turned = replace(view, targets=tuple(
        replace(t, shots=tuple(replace(s, seed=1) for s in t.shots)) for t in view.targets
    ))  # fmt: skip
    with pytest.raises(AttackImpossible, match="not augmented"):
        run(Membership(references=0), turned, knowledge)
