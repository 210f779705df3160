"""The class of every kind of defence of activations and gradients, by name; those of images are in `image`."""

from __future__ import annotations

from splitpeer.defences.activation.dp import DPGaussian
from splitpeer.defences.activation.learned import Adversary, NoPeek, Shredder
from splitpeer.defences.activation.masks import Dropout, TopK, Withhold
from splitpeer.defences.activation.noise import Gaussian, Laplace, Percentile
from splitpeer.defences.activation.shape import Bottleneck, Clip, Projection, Quantise
from splitpeer.defences.base import Defence
from splitpeer.defences.gradient.voxels import Iso, Marvell, MaxNorm

_ALL: tuple[type[Defence], ...] = (
    Dropout, TopK, Withhold,
    Gaussian, Laplace, Percentile, DPGaussian,
    Clip, Quantise, Projection, Bottleneck,
    NoPeek, Shredder, Adversary,
    MaxNorm, Iso, Marvell,
)  # fmt: skip
CATALOGUE: dict[str, type[Defence]] = {made.kind.name: made for made in _ALL}
