"""Noise on the image itself, before augmentation and encoder: kept, by the voxel's place in the patient.

It is a function of key, patient and axial slice. So every epoch, every augmentation, every overlapping window
and every job on the same voxel grid shows the same noise, and there is nothing to average: whatever is
computed from the noisy image, and however often, says no more than the noisy image does.

Limits, plainly. A job that resamples to another voxel size has another grid and so another noise: allow few.
Zero voxels are the background, and by default stay zero: the outline of the head is sent as before, not less
and not more. With `background=true` noise covers them too, within the volume.
"""

from __future__ import annotations

import numpy as np

from splitpeer.defences import kinds
from splitpeer.defences.specs import Spec


class VoxelNoise:
    """Add kept Gaussian noise to each voxel, `scale` times the image's own standard deviation."""

    kind = kinds.VOXEL_NOISE

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._scale = np.float32(spec.values["scale"])
        self.background = bool(spec.values["background"])
        """Whether voxels that are zero get noise too."""

    def plane(self, source: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        """What is added to one whole axial slice: float32 of `shape`."""
        return self._scale * source.standard_normal(shape, dtype=np.float32)
