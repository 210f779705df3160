"""The atlas: an image of an average head, which part of it is brain, and the space in which all sites' images lie."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from splitpeer.data.files import Case
from splitpeer.data.geometry import Geometry, Millimetres, Triple
from splitpeer.data.nifti import Rules, read_voxels
from splitpeer.data.resampling import resampled_grid
from splitpeer.errors import DataError, needs
from splitpeer.prepare.record import AtlasGrid
from splitpeer.prepare.templates import MNI152


@dataclass(frozen=True, eq=False)
class Atlas:
    """`voxels`: float32 [x, y, z] in RAS order; `brain`: bool, the same shape; `affine`: voxel to mm, 4x4."""

    name: str
    voxels: NDArray[np.float32]
    brain: NDArray[np.bool_]
    affine: NDArray[np.float64]
    sha256: str

    def grid(self, spacing: Millimetres | None = None) -> AtlasGrid:
        """The grid that images are written on: the atlas's own, or one of that spacing over the same field."""
        shape = self.voxels.shape
        own = Geometry.of((shape[0], shape[1], shape[2]), self.affine)
        wanted = own if spacing is None else resampled_grid(own, spacing)
        return AtlasGrid(self.name, self.sha256, wanted.shape, wanted.affine)

    def __len__(self) -> int:
        return self.voxels.size


def load_atlas(name: str | Path) -> Atlas:
    """`MNI152`, or a NIfTI file, of which every voxel that is not 0 counts as brain.

    Raises:
        DataError: the file cannot be used.
        ConfigError: nilearn is missing.
    """
    if name == MNI152:
        voxels, brain, affine = _mni152()
    else:
        found, header = read_voxels(Case("atlas", Path(name)), Rules())
        voxels, affine = found, header.affine
        brain = ndimage.binary_fill_holes(voxels > 0)
        if not 0 < int(brain.sum()) < brain.size:
            raise DataError(f"{name}: no background: an atlas must be 0 outside the head")
    digest = hashlib.sha256(affine.tobytes() + voxels.tobytes() + np.array(voxels.shape).tobytes())
    return Atlas(Path(name).name, voxels, brain, affine, digest.hexdigest())


def _mni152() -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float64]]:
    try:
        from nilearn import datasets
    except ImportError:
        raise needs("the atlas mni152", "nilearn", "register") from None
    image = datasets.load_mni152_template(resolution=1)
    mask = datasets.load_mni152_brain_mask(resolution=1)
    voxels = np.ascontiguousarray(np.asarray(image.dataobj, np.float32))
    return voxels, np.asarray(mask.dataobj) > 0, np.asarray(image.affine, np.float64)


def corners(shape: Triple, affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The eight corner voxels' centres in mm, [3, 8]."""
    index = np.array(np.meshgrid(*((0, n - 1) for n in shape), indexing="ij"), np.float64).reshape(3, -1)
    out: NDArray[np.float64] = affine[:3, :3] @ index + affine[:3, 3:]
    return out
