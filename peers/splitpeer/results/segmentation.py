"""One patient's segmentation on the patient's own grid, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

import splitproto
from splitpeer.data.geometry import Triple, edges
from splitpeer.data.task import Task
from splitpeer.errors import DataError

SOFTWARE = f"splitproto {splitproto.__version__}"
NOT_A_DEVICE = "Not a medical device: for research only, never a basis for diagnosis or treatment."
SHORT_NOT_A_DEVICE = "not a medical device"
"""For places that hold few characters."""


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True)
class Origin:
    """What a segmentation was made by, and from."""

    run: str
    """Id of the run whose network it was."""
    name: str
    """What the run's job is called."""
    model: str
    """Of the decoder's tensors, hex: SHA-256, equal exactly if they are. It is not that of a file."""
    used: tuple[str, ...]
    """Modalities whose images the network saw, in the order of the seats."""
    missing: tuple[str, ...] = ()
    """Modalities the network was trained with, but did not see of this patient."""
    step: int | None = None
    """Training step of the checkpoint."""
    warnings: tuple[str, ...] = ()
    """Anything else a reader of the mask must know, a sentence each."""
    created: datetime = field(default_factory=_now)
    """UTC."""
    software: str = SOFTWARE

    @property
    def cautions(self) -> tuple[str, ...]:
        """Everything to be said beside the mask, the missing modalities first."""
        without = f"Made without {', '.join(self.missing)}: the network was trained with it."
        if len(self.missing) > 1:
            without = f"Made without {', '.join(self.missing)}: the network was trained with them."
        return ((without,) if self.missing else ()) + self.warnings


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The regions of one patient.

    Args:
        patient: the id at this hospital.
        task: what the regions mean.
        masks: bool [regions, i, j, k], axes as the patient's own image is stored, regions in the task's order.
        affine: float64 4x4, from (i, j, k) to RAS millimetres.
        origin: what it was made by.
        probabilities: float32 [regions, i, j, k] of 0 to 1 behind the masks, without the background; None: not kept.

    Raises:
        DataError: the arrays do not fit the task or each other.
    """

    patient: str
    task: Task
    masks: np.ndarray
    affine: np.ndarray
    origin: Origin
    probabilities: np.ndarray | None = None

    def __post_init__(self) -> None:
        wanted = len(self.task.regions)
        if self.masks.dtype != bool or self.masks.ndim != 4 or len(self.masks) != wanted:
            raise DataError(
                f"a mask of {self.masks.dtype} {list(self.masks.shape)} is not one of {wanted} regions: "
                "ask for the segmentation again"
            )
        if self.probabilities is not None and self.probabilities.shape != self.masks.shape:
            raise DataError("probabilities and masks have different shapes: ask for the segmentation again")
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all() or self.voxel_ml == 0:
            raise DataError("the grid of the mask is no grid: check the header of the patient's image")

    @property
    def shape(self) -> Triple:
        """Voxels along i, j and k."""
        i, j, k = self.masks.shape[1:]
        return i, j, k

    @property
    def voxel_ml(self) -> float:
        """Millilitres of one voxel; right for sheared grids too."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def voxels(self) -> dict[str, int]:
        """Region to the number of its voxels."""
        return {name: int(mask.sum()) for name, mask in zip(self.task.region_names, self.masks, strict=True)}

    @property
    def volumes(self) -> Mapping[str, float]:
        """Region to millilitres."""
        return {name: count * self.voxel_ml for name, count in self.voxels.items()}

    @property
    def grid(self) -> str:
        """The grid in words: "240 x 240 x 155 voxels of 1 x 1 x 1 mm"."""
        return grid_in_words(self.shape, self.affine)


def grid_in_words(shape: Triple, affine: np.ndarray) -> str:
    """Shape and voxel size of a grid, for people."""
    sizes = " x ".join(f"{mm:.4g}" for mm in edges(affine))
    return f"{' x '.join(map(str, shape))} voxels of {sizes} mm"
