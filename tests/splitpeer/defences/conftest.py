"""Tensors as an encoder makes them, and releases of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import Stack, make_stack
from splitpeer.models import build_encoder, unet_backbone
from splitproto.records import Sample

FEATURES = (4, 6, 8, 8, 10, 4)
WINDOW = {2: (48, 48), 3: (32, 32, 32)}
KEY = bytes(range(32))


class Bench:
    """A small encoder's outputs for a batch of balls, and what is needed to send them."""

    features = FEATURES
    key = KEY

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.window = WINDOW[dimensions]
        self.channels = {f"x{level}": FEATURES[level] for level in range(5)}
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in self.window), indexing="ij"))
        away = np.linalg.norm(grid, axis=0)
        source = np.random.default_rng(5)
        balls = [(away < size) * (1 + source.normal(0, 0.3, away.shape)) for size in (0.9, 0.7, 0.5)]
        self.image = torch.from_numpy(np.stack(balls)[:, None].astype(np.float32))
        self.encoder = build_encoder(unet_backbone(dimensions, FEATURES), seed=3)
        with torch.no_grad():
            self.tensors = self.encoder(self.image)

    def release(self, **changes: object) -> Release:
        samples = tuple(Sample(bytes([number]) * 16, (0, 4, number)) for number in range(3))
        return replace(Release(b"r" * 16, "train", 5, 0, samples), **changes)

    def stack(self, written: str, **changes: object) -> Stack:
        options = {"key": KEY, "channels": self.channels, "dimensions": self.dimensions, **changes}
        return make_stack(written, **options)

    def leaves(self) -> dict[str, Tensor]:
        return {name: tensor.clone().requires_grad_() for name, tensor in self.tensors.items()}

    def sent(self, written: str, release: Release | None = None, **changes: object) -> dict[str, Tensor]:
        with torch.no_grad():
            return self.stack(written, **changes)(self.tensors, release or self.release())


@pytest.fixture(scope="session")
def benches() -> dict[int, Bench]:
    torch.set_num_threads(1)
    return {dimensions: Bench(dimensions) for dimensions in (2, 3)}


@pytest.fixture
def flat(benches: dict[int, Bench]) -> Bench:
    return benches[2]


@pytest.fixture(params=[2, 3])
def bench(request: pytest.FixtureRequest, benches: dict[int, Bench]) -> Bench:
    return benches[request.param]


@pytest.fixture
def same() -> Callable[[dict[str, Tensor], dict[str, Tensor]], bool]:
    """Equal names, shapes and bits, the sign of zero included."""

    def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return list(a) == list(b) and all(
            a[name].numpy().tobytes() == b[name].numpy().tobytes() and a[name].shape == b[name].shape
            for name in a
        )

    return equal
