"""All defences by name."""

from __future__ import annotations

from splitpeer.defences.base import Defence
from splitpeer.defences.dp import DPGaussian
from splitpeer.defences.gradients import Iso, Marvell, MaxNorm
from splitpeer.defences.image import VoxelNoise
from splitpeer.defences.learned import Adversary, NoPeek, Shredder
from splitpeer.defences.masks import Dropout, TopK, Withhold
from splitpeer.defences.noise import Gaussian, Laplace, Percentile
from splitpeer.defences.shape import Bottleneck, Clip, Projection, Quantise

_ALL: tuple[type[Defence], ...] = (
    Dropout,
    TopK,
    Withhold,
    Gaussian,
    Laplace,
    Percentile,
    DPGaussian,
    Clip,
    Quantise,
    Projection,
    Bottleneck,
    NoPeek,
    Shredder,
    Adversary,
    VoxelNoise,
    MaxNorm,
    Iso,
    Marvell,
)
CATALOGUE: dict[str, type[Defence]] = {kind.name: kind for kind in _ALL}
