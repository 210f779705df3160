"""The floors: what an adversary who has seen nothing of a patient can reach with the mean image, or another
patient's image. A reconstruction reveals something about a patient only as far as it beats these. "SSIM 0.4"
alone says nothing: the mean of other patients may reach it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitpeer.leakage.metrics import Image, brain_mask, similarities

MEAN_IMAGE = "mean image of other patients"
OTHER_PATIENT = "image of another patient"


@dataclass(frozen=True)
class Others:
    """Images of patients other than those under attack, in the same normalised intensities; or their masks."""

    images: NDArray[Any]
    """[M, 1, *spatial]."""
    patients: Sequence[Any]
    """[M]; who each image is of."""
    z: Sequence[float] | None = None
    """[M]; where each slice lies, in the unit of the targets' own; None: unknown, or volumes."""

    def __post_init__(self) -> None:
        if len(self.images) != len(self.patients) or (self.z is not None and len(self.z) != len(self.images)):
            raise ValueError(f"{len(self.images)} images, but not as many patients or places")

    def choose(self, patient: Any, z: float | None) -> NDArray[np.intp]:
        """Rows of other patients than `patient`: of each the slice nearest to `z`, or all where z is unknown."""
        rows = np.flatnonzero(np.asarray([other != patient for other in self.patients], dtype=bool))
        if z is None or self.z is None:
            return rows
        nearest: dict[Any, int] = {}
        for row in map(int, rows):
            best = nearest.get(self.patients[row])
            if best is None or abs(self.z[row] - z) < abs(self.z[best] - z):
                nearest[self.patients[row]] = int(row)
        return np.asarray(sorted(nearest.values()), dtype=np.intp)


def mean_images(
    others: Others, patients: Sequence[Any], z: Sequence[float] | None = None
) -> NDArray[np.float32] | None:
    """For each target the mean of the other patients' images at its level, float32 [N, 1, *spatial].

    None if there is no other patient for some target.
    """
    chosen = [others.choose(patient, None if z is None else z[i]) for i, patient in enumerate(patients)]
    if not all(len(rows) for rows in chosen):
        return None
    return np.stack(
        [others.images[rows].mean(axis=0, dtype=np.float64).astype(np.float32) for rows in chosen]
    )


def other_images(
    others: Others, patients: Sequence[Any], z: Sequence[float] | None = None, seed: int = 0
) -> NDArray[np.float32] | None:
    """For each target one other patient's image at its level, float32 [N, 1, *spatial]; None as in `mean_images`."""
    random = np.random.default_rng(seed)
    chosen = [others.choose(patient, None if z is None else z[i]) for i, patient in enumerate(patients)]
    if not all(len(rows) for rows in chosen):
        return None
    return np.stack([np.asarray(others.images[random.choice(rows)], dtype=np.float32) for rows in chosen])


def compare(truth: Image, images: Image) -> dict[str, NDArray[np.float64]]:
    """`similarities` of [N, 1, *spatial] with [N, 1, *spatial], pair by pair: {metric: float64 [N]}.

    NaN where the true image is empty (a window outside the body).
    """
    if truth.shape != images.shape:
        raise ValueError(f"the truth is {truth.shape}, the reconstructions {images.shape}")
    found = [
        similarities(one, other) if one.any() else None
        for one, other in zip(truth[:, 0], images[:, 0], strict=True)
    ]
    names = next((list(values) for values in found if values is not None), [])
    return {
        name: np.asarray([np.nan if values is None else values[name] for values in found]) for name in names
    }


@dataclass(frozen=True)
class Floors:
    """The floors of one set of truths, made once and used for every attack on it."""

    others: Others
    images: dict[str, NDArray[np.float32]]
    """Name of the floor to what that adversary would show, [N, 1, *spatial]: also worth a picture."""
    values: dict[str, dict[str, NDArray[np.float64]]]
    """Name of the floor to {metric: [N]}."""

    @classmethod
    def make(
        cls,
        truth: Image,
        patients: Sequence[Any],
        others: Others | None = None,
        z: Sequence[float] | None = None,
        seed: int = 0,
    ) -> Floors:
        """Floors from images of other patients; by default from the other patients among the truths themselves.

        Raises:
            ValueError: shapes or counts differ.
        """
        pool = others if others is not None else Others(truth, patients, z)
        made = {
            MEAN_IMAGE: mean_images(pool, patients, z),
            OTHER_PATIENT: other_images(pool, patients, z, seed),
        }
        images = {name: found for name, found in made.items() if found is not None}
        return cls(pool, images, {name: compare(truth, found) for name, found in images.items()})


class Gallery:
    """Images to recognise a patient in: the squared correlation of one image with each, inside each one's body."""

    def __init__(self, images: Image) -> None:
        """`images`: [G, 1, *spatial]."""
        flat = [image[0] for image in images]
        self._masks = np.stack([brain_mask(image).ravel() for image in flat]).astype(np.float32)
        rows = np.stack([np.ravel(image) for image in flat]).astype(np.float32) * self._masks
        self._count = np.maximum(self._masks.sum(1), 1)
        self._rows = rows - self._masks * (rows.sum(1) / self._count)[:, None]
        self._power = (self._rows.astype(np.float64) ** 2).sum(1)

    def match(self, image: Image) -> NDArray[np.float64]:
        """[G]: share of each gallery image's variance that `image` explains; 0 for constant ones."""
        query = np.nan_to_num(np.ravel(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        query = query - query.mean()
        size = np.abs(query).max()
        if size == 0:
            return np.zeros(len(self._rows))
        unit = (query / size).astype(np.float32)
        mean = (self._masks @ unit) / self._count
        power = self._masks @ (unit * unit) - self._count * mean**2
        shared = self._rows @ unit
        good = (power > 1e-6 * self._count) & (self._power > 0)
        return np.where(good, shared**2 / np.where(good, power * self._power, 1.0), 0.0)
