"""References that the figures are compared with."""

from __future__ import annotations

import numpy as np

from splitpeer.leakage.metrics import Image, Mask, align


def explained(truth: Image, image: Image, mask: Mask) -> float:
    """Share of the truth's variance inside `mask` that `image` explains after alignment (squared correlation)."""
    wanted = np.asarray(truth, dtype=np.float64)[mask]
    spread = float(np.var(wanted))
    if spread == 0:
        return 0.0
    return 1.0 - float(np.mean((wanted - align(image, truth, mask)[mask]) ** 2)) / spread
