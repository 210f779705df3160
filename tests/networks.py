"""Small settings of every network, for tests that take all networks in turn."""

from __future__ import annotations

from splitpeer.models.registry import NETWORKS

SMALL: dict[str, dict[str, tuple[int, ...]]] = {
    "basic-unet": {"features": (4, 4, 6, 8, 8, 4)},
    "residual-unet": {"features": (4, 6, 8)},
    "swin-unetr": {
        "feature_size": (12,), "depths": (2, 1, 1, 1), "num_heads": (3, 2, 4, 2), "window_size": (4,)
    },
}  # fmt: skip

for _name in NETWORKS:
    assert _name in SMALL, f"{_name} has no small settings: add them to SMALL in tests/networks.py"
