"""Float32 tensors to and from what travels, at the job's precision."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch


def to_wire(arrays: Mapping[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """SP-11.8-3: float32 arrays as they travel: unchanged, or bfloat16 as its 16 bits (round to nearest even)."""
    if precision != "bf16":
        return dict(arrays)
    return {
        name: torch.tensor(array).to(torch.bfloat16).view(torch.uint16).numpy()
        for name, array in arrays.items()
    }


def from_wire(arrays: Mapping[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """The inverse: float32 arrays."""
    if precision != "bf16":
        return dict(arrays)
    return {
        name: torch.from_numpy(bits).view(torch.bfloat16).float().numpy() for name, bits in arrays.items()
    }
