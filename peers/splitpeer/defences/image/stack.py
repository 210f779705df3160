"""Several defences of an image in order, on any window of a volume: numpy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from splitpeer.defences.image.noise import VoxelNoise
from splitpeer.defences.kinds import parse_all
from splitpeer.defences.randomness import generator
from splitpeer.defences.specs import Written, placed

Triple = tuple[int, int, int]


class ImageStack:
    """Several defences of the image in order, with the key of the peer that applies them.

    Args:
        defences: in the order in which they act.
        key: 32 octets.
    """

    def __init__(self, defences: Sequence[VoxelNoise], key: bytes) -> None:
        self._defences, self._key = tuple(defences), key

    def __bool__(self) -> bool:
        return bool(self._defences)

    @property
    def specs(self) -> tuple[str, ...]:
        """Each as it is written, with "image/" before it."""
        return placed("image", (defence.spec for defence in self._defences))

    def window(self, voxels: np.ndarray, patient: bytes, origin: Triple, shape: Triple) -> np.ndarray:
        """The window `voxels` (float32 [1, x, y, z]) of a patient's volume of `shape`, defended: a new array.

        `origin` is the window's first voxel in the volume; voxels outside the volume stay as they are.
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
                    str(defence.spec).encode(),
                    patient,
                    b"%d" % (origin[2] + z),
                )
                # The whole slice, so that every window finds its own part of it.
                noise = defence.plane(source, shape[:2])[from_x, from_y]
                inside[...] = np.where(defence.background | (voxels[0, x, y, z] != 0), inside + noise, inside)
        return defended


def make_image_stack(written: Written, key: bytes) -> ImageStack:
    """Defences of the image from text: a list, or one string joined by `+`. May be empty.

    Raises:
        ConfigError: see `parse`.
    """
    return ImageStack([spec.kind.load()(spec) for spec in parse_all(written, "image")], key)
