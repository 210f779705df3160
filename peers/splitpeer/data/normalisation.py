"""Normalisation: what is done to the intensities of an image, one rule per modality (SP-11.12-8)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from splitpeer.errors import DataError

KINDS = ("zscore-nonzero", "zscore", "percentile", "window", "none")
PERCENTILES = (0.5, 99.5)
"""The numbers of `percentile` by default."""
LONGEST = 64
"""Most characters of a rule on the wire."""
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_RULE = re.compile(rf"(?P<kind>[a-z-]+)(?::(?P<low>{_NUMBER}),(?P<high>{_NUMBER}))?", re.ASCII)
_HELP = 'write "zscore-nonzero", "zscore", "percentile:0.5,99.5", "window:-100,300" or "none"'


@dataclass(frozen=True)
class Normaliser:
    """A rule: `kind`, with two numbers where it takes them.

    zscore-nonzero: mean 0 and deviation 1 over the voxels that are not zero, which stay zero.
    zscore: the same over all voxels.
    percentile: clipped to two percentiles of all voxels, which become 0 and 1.
    window: clipped to two intensities, which become 0 and 1: Hounsfield units of CT.
    none: as stored.
    """

    kind: str = "zscore-nonzero"
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Normaliser:
        """The rule as it is written. Raises ValueError, one line, for any other text."""
        match = _RULE.fullmatch(text) if len(text) <= LONGEST else None
        if match is None or match["kind"] not in KINDS:
            raise ValueError(f"{text[:LONGEST]!r} is not a normalisation rule: {_HELP}")
        kind = match["kind"]
        if kind not in ("percentile", "window"):
            if match["low"] is not None:
                raise ValueError(f"{text!r}: {kind} takes no numbers: {_HELP}")
            return cls(kind)
        if match["low"] is None:
            if kind == "window":
                raise ValueError(f"{text!r}: window needs two intensities: {_HELP}")
            return cls(kind, *PERCENTILES)
        low, high = float(match["low"]), float(match["high"])
        if not (low < high and math.isfinite(high - low)):
            raise ValueError(f"{text!r}: the first number must be below the second")
        if kind == "percentile" and not (low >= 0 and high <= 100):
            raise ValueError(f"{text!r}: percentiles lie between 0 and 100")
        return cls(kind, low, high)

    def __str__(self) -> str:
        return (
            f"{self.kind}:{self.low!r},{self.high!r}" if self.kind in ("percentile", "window") else self.kind
        )

    @property
    def zero_is_background(self) -> bool:
        """Whether voxels that are zero are taken to lie outside the patient."""
        return self.kind == "zscore-nonzero"

    def apply(self, voxels: np.ndarray) -> np.ndarray:
        """SP-11.12-8: float32 voxels of any shape, all finite, normalised; computed in float64. Never in place.

        Raises DataError, without a name, where every voxel is zero.
        """
        filled = voxels != 0
        if not filled.any():
            raise DataError("every voxel is zero: export it again", "empty")
        if self.kind == "none":
            return voxels.copy()
        if self.kind in ("zscore-nonzero", "zscore"):
            return _standardised(voxels, filled if self.zero_is_background else np.ones_like(filled))
        low, high = self.low, self.high
        if self.kind == "percentile":
            low, high = (float(value) for value in np.percentile(voxels.astype(np.float64), (low, high)))
        scaled = (np.clip(voxels.astype(np.float64), low, high) - low) / ((high - low) or 1.0)
        return scaled.astype(voxels.dtype)


def _standardised(voxels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 over the voxels that are `chosen`; the others 0."""
    values = voxels[chosen].astype(np.float64)
    values -= values.mean()
    values /= math.sqrt(np.square(values).mean()) or 1.0
    out = np.zeros_like(voxels)
    out[chosen] = values
    return out


DEFAULT = Normaliser()
"""The rule of a modality for which a job names none."""
OF_A_SUM = ("zscore", "zscore-nonzero")
"""Kinds under which no image becomes a constant (SP-11.18-1)."""
