"""Limits on files, applied before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_VOXELS = 2**27
"""Voxels of one volume, 512 MiB as float32. More is a broken or hostile header."""


@dataclass(frozen=True)
class Rules:
    """The settings of `[data]` that concern reading."""

    max_voxels: int = MAX_VOXELS
    """Most voxels of one volume, as stored and as resampled."""
    unknown_orientation: Literal["warn", "refuse"] = "warn"
    """How a file is treated whose header does not say which side is which."""
