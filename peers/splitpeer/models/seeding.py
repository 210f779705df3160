"""Initial weights. A site's encoder is secret: its weights are enough to invert its activations at the first
step. torch's CPU generator is a Mersenne Twister that keeps the low 32 bits of its seed, few enough to try
them all. So parameters are drawn here from numpy's PCG64, which uses every bit of its seed; torch's global
generator is neither read nor changed.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

PRIVATE_ENTROPY_BITS = 128  # PCG64's whole state

Network = TypeVar("Network", bound=nn.Module)
_PRODUCTS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_NORMALISATIONS = (nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm)
_OVER_THE_BATCH = nn.modules.batchnorm._BatchNorm
_BIAS_TABLE = "relative_position_bias_table"
"""Bias tables of attention within windows (Liu et al., arXiv 2103.14030): normal, with this deviation, cut off at
+-2."""
_BIAS_DEVIATION = 0.02


def site_seed(job_seed: int, name: str) -> int:
    """A 63-bit seed for one party of a job: for demonstrations and tests, where runs must repeat.

    SHA-256 of the job's seed and the party's name, so that no two parties start from the same weights.
    Not a secret: the job's seed determines the weights.
    """
    digest = hashlib.sha256(f"splitpeer site seed\0{job_seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded(build: Callable[[], Network], seed: int | None) -> Network:
    """Call `build()` and draw the network's parameters again from `seed`; from the system's entropy if None.

    The distribution is torch's own default: weights and biases of convolutions and linear layers uniform in
    +-1/sqrt(fan-in) (He et al., arXiv 1502.01852, with a = sqrt 5), normalisation at one and zero; bias tables of
    attention as MONAI draws them. Equal seeds give equal bits in every process, whatever else was drawn before.

    Raises:
        TypeError: a module whose distribution is unknown, or that normalises over the batch.
    """
    with torch.random.fork_rng(devices=[]):
        network = build()
    source = np.random.Generator(
        np.random.PCG64(secrets.randbits(PRIVATE_ENTROPY_BITS) if seed is None else seed)
    )
    for module in network.modules():
        if isinstance(module, _OVER_THE_BATCH):
            # Its statistics mix patients: they would leave with a sample of another, and be averaged with weights.
            kind = type(module).__name__
            raise TypeError(f"{kind} makes a sample depend on the other patients of its batch; use GroupNorm")
        if isinstance(module, _PRODUCTS):
            fan_in = module.weight[0].numel()  # as torch counts it, for transposed convolutions too
            bound = 1 / math.sqrt(fan_in)
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    _fill(parameter, source.uniform(-bound, bound, size=tuple(parameter.shape)))
            continue
        own = dict(module.named_parameters(recurse=False))
        if _BIAS_TABLE in own:
            table = own.pop(_BIAS_TABLE)
            _fill(table, source.normal(0, _BIAS_DEVIATION, size=tuple(table.shape)).clip(-2, 2))
        if own and not isinstance(module, _NORMALISATIONS):
            raise TypeError(f"{type(module).__name__} has parameters whose initial distribution is unknown")
    return network


def _fill(parameter: Tensor, values: np.ndarray) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(values))
