"""Fields of a job's network, for tests that need no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from splitproto.records import Level, Setting


def unet(features: Sequence[int], dimensions: int = 2) -> dict[str, Any]:
    """What a `Job` says of a BasicUNet with these six widths."""
    return {
        "network": "basic-unet",
        "settings": (Setting("features", tuple(features)),),
        "cut": tuple(Level(f"x{n}", width, (2**n,) * dimensions) for n, width in enumerate(features[:5])),
    }
