"""What flips and quarter turns of activations commute with, and what not: docs/feature-bank.md, Augmentation."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from splitpeer.coordinator.frozen.features import Features
from splitpeer.data.augment import Augmentation, derive, posed
from splitpeer.models import build_encoder
from splitpeer.models.backbone import Encoder
from splitpeer.models.cut import Backbone
from splitpeer.models.registry import make_backbone
from splitproto.records import Level

WINDOW = 32
POSES = [
    Augmentation(flips, turns)
    for flips, turns in itertools.product(itertools.product((False, True), repeat=3), range(4))
    if any(flips) or turns
]


def backbone(network: str, dimensions: int) -> Backbone:
    features = (2, 4, 4, 8, 8, 4) if network == "basic-unet" else (2, 4, 4)
    return make_backbone(network, dimensions, {"features": features}, None)


def encoder(network: str, dimensions: int, *, symmetric: bool) -> Encoder:
    """With random weights; symmetric: each kernel the mean of itself in all poses."""
    made = build_encoder(backbone(network, dimensions), seed=3).eval()
    with torch.no_grad():
        for weight in made.parameters() if symmetric else ():
            if weight.ndim == dimensions + 2:
                axes = range(2, weight.ndim)
                flipped = [
                    torch.flip(weight, list(some))
                    for n in range(dimensions + 1)
                    for some in itertools.combinations(axes, n)
                ]
                mean = torch.stack(flipped).mean(0)
                weight.copy_((mean + mean.transpose(2, 3)) / 2)
    return made


def differences(network: str, dimensions: int, pose: Augmentation, *, symmetric: bool) -> dict[str, float]:
    """By level: how far the encoder of a posed image is from the posed activations, of their deviation."""
    encodes = encoder(network, dimensions, symmetric=symmetric)
    image = np.random.default_rng(1).normal(size=(1, *[WINDOW] * dimensions)).astype(np.float32)
    with torch.no_grad():
        straight = encodes(torch.from_numpy(image[None]))
        turned = encodes(torch.from_numpy(posed(image, pose)[None]))
    return {
        name: float(np.abs(turned[name][0].numpy() - posed(level[0].numpy(), pose)).max() / level.std())
        for name, level in straight.items()
    }


@pytest.mark.parametrize("dimensions", [2, 3])
def test_activations_of_symmetric_kernels_commute_with_every_pose(dimensions) -> None:
    """Pooling of 2 by 2 (by 2) puts every value where it belongs."""
    for pose in POSES if dimensions == 2 else POSES[::5]:
        found = differences("basic-unet", dimensions, pose, symmetric=True)
        assert len(found) == 5 and max(found.values()) < 1e-3, pose


def test_with_other_kernels_the_values_are_those_of_no_image() -> None:
    for pose in (Augmentation((True, False, False), 0), Augmentation((False, False, False), 1)):
        assert min(differences("basic-unet", 2, pose, symmetric=False).values()) > 0.1


def test_convolutions_with_strides_put_a_flipped_level_beside_its_mask() -> None:
    """Whatever the kernels are: by stride - 1 voxels; a level with stride 1 is where it should be."""
    pose = Augmentation((True, False, False), 0)
    found = differences("residual-unet", 2, pose, symmetric=True)
    assert found["x0"] < 1e-3
    assert min(found["x1"], found["x2"]) > 0.1


def test_a_pose_is_that_of_the_seed_and_turns_nothing_that_would_change_its_shape() -> None:
    """SP-11.7-1: as a mask is posed, without brightness."""
    empty: Any = SimpleNamespace(contents=SimpleNamespace(releases=()))
    cut = backbone("basic-unet", 2).cut
    levels = tuple(Level(f"x{n}", one.channels, tuple(one.stride)) for n, one in enumerate(cut.levels))
    square = SimpleNamespace(cut=levels, fusion=None, activations=None, precision="f32")
    flat = SimpleNamespace(
        cut=(levels[0], replace(levels[1], stride=(2, 1))), fusion=None, activations=None, precision="f32"
    )
    seeds = range(12)
    poses = [Features(square, empty, empty, 1).pose(seed, 2) for seed in seeds]  # type: ignore[arg-type]
    assert poses == [derive(seed, 2, None) for seed in seeds]
    assert len({pose.turns for pose in poses}) == 4
    level = Features(flat, empty, empty, 1)  # type: ignore[arg-type]
    assert [level.pose(seed, 2) for seed in seeds] == [replace(pose, turns=0) for pose in poses]
    assert level.pose(None, 2) == Augmentation((False, False, False), 0)
