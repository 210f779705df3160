"""A mask, or probabilities, from the atlas back onto the patient's own grid. Needs neither SimpleITK nor pydicom."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from splitpeer.data.regrid import onto
from splitpeer.prepare.record import PreparedRecord


def to_original(
    volume: NDArray[np.generic], affine: NDArray[np.float64], record: PreparedRecord, *, order: Literal[0, 1]
) -> NDArray[np.generic]:
    """What a volume on the atlas shows at the voxels of the scan that its image was made of.

    The transform is inverted exactly and applied together with both grids, so there is one interpolation, and none
    where grids coincide. A mask made from probabilities is smoother if these come back and are compared with .5 here.

    Args:
        volume: [x, y, z], on any grid in the atlas's space: the atlas's own, a coarser one, a window of it.
        affine: 4x4, voxel of `volume` to the atlas's RAS millimetres.
        record: of the image.
        order: 1 linear, for probabilities; 0 nearest, for masks.

    Returns:
        [column, row, slice] of the original grid, in the dtype of `volume`; 0 where `volume` shows nothing. Slice k in
        DICOM's order of rows and columns is `[:, :, k].T`, of the file `record.files[k]`.
    """
    here = np.linalg.solve(record.transform, affine).astype(np.float64, copy=False)
    return onto(volume, here, record.shape, record.affine, order=order)
