"""What the tests of attacks on images share: small heads, a small encoder, and views made by the site's own code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from splitpeer.attacks.base import Shot, Target, View
from splitpeer.data.augment import augment
from splitpeer.defences.image.stack import make_image_stack
from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import make_stack
from splitpeer.models import Encoder, build_encoder, unet_backbone
from splitproto.records import Sample, Seat

FEATURES = (8, 4, 8, 8, 8, 4)
MODALITIES = ("flair", "t1")


def heads(count: int, seed: int, window: tuple[int, ...] = (32, 32)) -> np.ndarray:
    """float32 [count, 1, *window]: smooth textures in an ellipse, mean 0 and standard deviation 1 there, else 0."""
    source = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in window], indexing="ij"))
    images = np.zeros((count, 1, *window), np.float32)
    for image in images[:, 0]:
        axes = source.uniform(0.6, 0.85, len(window)).reshape(-1, *[1] * len(window))
        inside = np.square(grid / axes).sum(0) < 1
        texture = gaussian_filter(source.standard_normal(window), 1.5)
        image[inside] = (texture[inside] - texture[inside].mean()) / texture[inside].std()
    return images


def encoder(seed: int = 1, dimensions: int = 2, levels: Sequence[int] = (0, 1, 2, 3, 4)) -> Encoder:
    return build_encoder(unet_backbone(dimensions, FEATURES, levels), seed=seed).eval()


def look(
    images: np.ndarray,
    network: Encoder,
    *,
    defences: Sequence[str] = (),
    views: int = 1,
    step: int = 5,
    seeds: Sequence[int | None] = (None,),
    mode: str = "infer",
) -> View:
    """What a coordinator sees of `images`: `views` releases of each under every augmentation seed."""
    samples = tuple(Sample(bytes([n]) * 16, (0, 0, 0)) for n in range(len(images)))
    names = [f"x{level}" for level in network.levels]
    channels = {name: network.backbone.cut.channels[name] for name in names}
    activations = [written for written in defences if not written.startswith("image/")]
    stack = make_stack(activations, key=b"s" * 32, channels=channels, dimensions=network.dimensions)
    noise = make_image_stack(
        [w.removeprefix("image/") for w in defences if w.startswith("image/")], b"s" * 32
    )
    shots: list[list[Shot]] = [[] for _ in images]
    for seed in seeds:
        sent = []
        for index, image in enumerate(images):
            if noise:
                voxels = image.reshape(*image.shape, *[1] * (4 - image.ndim))
                image = noise.window(voxels, samples[index].key, (0, 0, 0), voxels.shape[1:]).reshape(
                    image.shape
                )
            sent.append(image if seed is None else augment(image, seed, index, "t1"))
        for number in range(views):
            with torch.no_grad():
                clean = network(torch.from_numpy(np.stack(sent)))
                left = stack(clean, Release(bytes(16), mode, step, number, samples))
            for index in range(len(images)):
                levels = {name: tensor[index].numpy().copy() for name, tensor in left.items()}
                shots[index].append(Shot(mode, step, index, seed, levels))
    return View(
        role="coordinator", site="north", seat=Seat("t1", ("t1",)), seats=tuple(Seat(m, (m,)) for m in MODALITIES),
        backbone=network.backbone,
        window=tuple(images.shape[2:]), defences=tuple(defences),
        targets=tuple(Target(sample, tuple(of)) for sample, of in zip(samples, shots, strict=True)),
    )  # fmt: skip


def likeness(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean correlation inside the head: 1 is the image itself, up to sign, gain and offset."""
    inside = [(a[t != 0], t[t != 0]) for a, t in zip(found[:, 0], truth[:, 0], strict=True)]
    return float(np.mean([abs(np.corrcoef(a, t)[0, 1]) for a, t in inside]))
