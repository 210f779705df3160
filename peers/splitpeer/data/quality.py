"""What the voxels of one image say about it: contrast, outliers, background. Warnings with figures, never refusals."""

from __future__ import annotations

import numpy as np

from splitpeer.data.normalisation import DEFAULT, Normaliser

LEAST_FILLED = 1e-3
"""Share of voxels that are not zero; a head fills more of its volume."""
MOST_FILLED = 0.95
"""The same; a volume with more has noise, or a constant, where there should be nothing."""
OUTLIER_FACTOR = 20.0
"""A voxel this many times farther from the median than 99 % of the voxels determines the contrast alone."""

_ZERO_IS_BACKGROUND = (
    "normalisation takes every non-zero voxel for the head, background included: "
    "export it with background 0, for instance skull-stripped"
)


def image_warnings(voxels: np.ndarray, normalisation: Normaliser = DEFAULT) -> list[str]:
    """What is odd about an image float32 [x, y, z] of which some voxel is not zero, that will be normalised so."""
    filled = voxels[voxels != 0]
    if not normalisation.zero_is_background:
        # Only a z-score is ruined by what lies far off, and 0 is an intensity like any other.
        return _contrast(voxels, filled) if normalisation.kind == "zscore" else _flat(filled)
    return [*_contrast(voxels, filled), *_background(voxels, filled)]


def _contrast(voxels: np.ndarray, filled: np.ndarray) -> list[str]:
    if filled.size < LEAST_FILLED * voxels.size or filled.size == 1:
        return [f"only {filled.size} of {voxels.size} voxels are not zero: hardly an image"]
    if flat := _flat(filled):
        return flat
    values = filled.astype(np.float64)
    median = float(np.median(values))
    away = np.abs(values - median)
    usual = float(np.quantile(away, 0.99))
    if usual and away.max() > OUTLIER_FACTOR * usual:
        count = int((away > OUTLIER_FACTOR * usual).sum())
        worst = float(values[away.argmax()])
        return [
            f"{count} outlier(s) up to {worst:g}, where 99 % of the voxels are within {usual:.4g} of {median:.4g}: "
            "normalisation squeezes the contrast of all others"
        ]
    return []


def _flat(filled: np.ndarray) -> list[str]:
    low, high = float(filled.min()), float(filled.max())
    return [f"no contrast: all {filled.size} voxels that are not zero are {low:g}"] if low == high else []


def _background(voxels: np.ndarray, filled: np.ndarray) -> list[str]:
    shell = _shell(voxels)
    values, counts = np.unique(shell, return_counts=True)
    usual = float(values[counts.argmax()])
    if usual != 0 and 2 * counts.max() > shell.size and filled.min() != filled.max():
        return [f"the background is {usual:g}, not 0: {_ZERO_IS_BACKGROUND}"]
    if filled.size > MOST_FILLED * voxels.size:
        share = 100 * filled.size / voxels.size
        return [f"the background is not 0 ({share:.0f} % of the voxels are not zero): {_ZERO_IS_BACKGROUND}"]
    return []


def _shell(voxels: np.ndarray) -> np.ndarray:
    """The voxels of the six faces."""
    faces = [voxels.take((0, -1), axis).ravel() for axis in range(3) if voxels.shape[axis] > 1]
    return np.concatenate(faces) if faces else voxels.ravel()
