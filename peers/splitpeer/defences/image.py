"""Noise on the image itself, before augmentation and encoder: kept, by the voxel's place in the patient.

It is a function of key, patient and axial slice. So every epoch, every augmentation, every overlapping window
and every job on the same voxel grid shows the same noise, and there is nothing to average: whatever is
computed from the noisy image, and however often, says no more than the noisy image does.

Limits, plainly. A job that resamples to another voxel size is another grid, hence another noise: allow few.
Zero voxels are the background, and by default stay zero: the outline of the head is sent as before, not less
and not more. With `background=true` noise covers them too, within the volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from splitpeer.defences.base import IMAGE, Defence, Parameter, Place, generator, parse_all

Triple = tuple[int, int, int]


class ImageDefence(Defence):
    """A defence of the image. Subclasses override `plane`."""

    places: ClassVar[frozenset[Place]] = frozenset({"image"})

    def plane(self, source: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        """What is added to one whole axial slice: float32 of `shape`."""
        raise NotImplementedError


class VoxelNoise(ImageDefence):
    """Add kept Gaussian noise to each voxel, `scale` times the image's own standard deviation."""

    name = "voxel-noise"
    title = "Kept noise on the image"
    promise = "No guarantee, but nothing to average on one voxel grid: many views show one noisy image."
    source = "permanent randomised response: Erlingsson et al. 2014, arXiv 1407.6981"
    options: ClassVar = {
        "scale": Parameter(1.0, 0.0, 1000.0, "standard deviations of the normalised image"),
        "background": Parameter(False, meaning="also where the image is zero, which hides the outline"),
    }

    def plane(self, source: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return np.float32(self.values["scale"]) * source.standard_normal(shape, dtype=np.float32)


class ImageStack:
    """Several defences of the image in order, with the key of whoever applies them.

    Args:
        defences: in the order in which they act.
        key: 32 octets.
    """

    def __init__(self, defences: Sequence[ImageDefence], key: bytes) -> None:
        self._defences, self._key = tuple(defences), key

    def __bool__(self) -> bool:
        return bool(self._defences)

    @property
    def specs(self) -> tuple[str, ...]:
        """Each as it is written, with "image/" before it."""
        return tuple(IMAGE + defence.spec for defence in self._defences)

    def window(self, voxels: np.ndarray, patient: bytes, origin: Triple, shape: Triple) -> np.ndarray:
        """The window `voxels` (float32 [1, x, y, z]) of a patient's volume of `shape`, defended: a new array.

        `origin` is the window's first voxel in the volume; what lies outside the volume stays as it is.
        """
        defended = voxels.copy()
        starts = [max(0, -first) for first in origin]
        ends = [min(n, size - first) for n, first, size in zip(voxels.shape[1:], origin, shape, strict=True)]
        if any(start >= end for start, end in zip(starts, ends, strict=True)):
            return defended
        x, y = slice(starts[0], ends[0]), slice(starts[1], ends[1])
        from_x = slice(origin[0] + starts[0], origin[0] + ends[0])
        from_y = slice(origin[1] + starts[1], origin[1] + ends[1])
        for z in range(starts[2], ends[2]):
            inside = defended[0, x, y, z]
            for number, defence in enumerate(self._defences):
                source = generator(
                    self._key,
                    b"image",
                    b"%d" % number,
                    defence.spec.encode(),
                    patient,
                    b"%d" % (origin[2] + z),
                )
                # The whole slice, so that every window finds its own part of it.
                noise = defence.plane(source, shape[:2])[from_x, from_y]
                everywhere = bool(defence.values.get("background"))
                inside[...] = np.where(everywhere | (voxels[0, x, y, z] != 0), inside + noise, inside)
        return defended


def make_image_stack(written: Sequence[str] | str, key: bytes) -> ImageStack:
    """Defences of the image from their text: a list, or one string joined by `+`. May be empty.

    Raises:
        ConfigError: see `parse`.
    """
    return ImageStack([d for d in parse_all(written, "image") if isinstance(d, ImageDefence)], key)
