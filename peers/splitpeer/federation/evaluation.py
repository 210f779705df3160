"""Evaluation over the wire: windows over whole volumes, put together again, scored per volume."""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from splitpeer.data.geometry import Geometry, Triple
from splitpeer.data.sampling import batch_digest
from splitpeer.data.task import Task
from splitpeer.data.volumes import Volumes
from splitpeer.storage import durable
from splitpeer.training.metrics import Surfaces, VolumeDice
from splitpeer.training.windows import WindowMerger, window_origins
from splitproto.messages import Forward, Sample


@dataclass(frozen=True)
class Plan:
    """All batches of one evaluation, in order, and the patient of each."""

    forwards: Sequence[Forward]
    keys: Sequence[bytes]

    @classmethod
    def of(
        cls, keys: Sequence[bytes], labels: Volumes, window: Triple, overlap: float, batch: int, step: int
    ) -> Plan:
        """Windows over every volume, at most `batch` a message; the weights are those of `step`."""
        forwards: list[Forward] = []
        owners: list[bytes] = []
        for key in keys:
            origins = window_origins(labels.geometry(key).shape, window, overlap)
            for first in range(0, len(origins), batch):
                samples = tuple(Sample(key, origin) for origin in origins[first : first + batch])
                digest = batch_digest(step, samples, None)
                forwards.append(Forward("evaluate", step, len(forwards), samples, digest))
                owners.append(key)
        return cls(forwards, owners)


class Scoring:
    """Takes the predictions of a plan's batches in order; scores a volume when its last one is in.

    Args:
        save_to: folder for masks; None: they are only scored.
        made_from: by patient, the seats that its prediction is made from, noted in its mask.
        measure: take distances and volumes too, which is slow.

    Raises:
        ValueError: `labels` are no masks.
    """

    def __init__(
        self,
        plan: Plan,
        labels: Volumes,
        window: Triple,
        save_to: Path | None,
        *,
        made_from: Mapping[bytes, Sequence[str]] | None = None,
        measure: bool = False,
    ) -> None:
        if labels.labels is None:
            raise ValueError("predictions are scored with masks")
        self._task = labels.labels
        self._made_from = made_from or {}
        self._plan, self._labels, self._window, self._save_to = plan, labels, window, save_to
        self.dice = VolumeDice(self._task.region_names)
        self.surfaces = Surfaces(self._task.region_names) if measure else None
        self._merger: WindowMerger | None = None

    def add(self, index: int, probabilities: np.ndarray) -> None:
        """`probabilities`: float32 [B, channels, *spatial] of batch `index`."""
        key = self._plan.keys[index]
        shape = self._labels.geometry(key).shape
        if self._merger is None:
            self._merger = WindowMerger(shape, self._window, probabilities.shape[1])
        volumes = probabilities[..., None] if self._window[2] == 1 else probabilities
        for sample, volume in zip(self._plan.forwards[index].samples, volumes, strict=True):
            self._merger.add(sample.origin, volume)
        if index + 1 == len(self._plan.keys) or self._plan.keys[index + 1] != key:
            mask = self._task.decide(self._merger.result())
            self._merger = None
            truth, grid = self._labels.window(key, (0, 0, 0), shape), self._labels.geometry(key)
            self.dice.add(mask, truth)
            if self.surfaces is not None:
                self.surfaces.add(mask, truth, grid.spacing)
            if self._save_to is not None:
                path = self._save_to / f"{self._labels.case(key).patient}.nii.gz"
                save_mask(path, mask, grid, self._task, made_from=self._made_from.get(key, ()))


def save_mask(
    path: Path,
    regions: np.ndarray,
    grid: Geometry,
    task: Task,
    *,
    made_from: Sequence[str] = (),
) -> None:
    """Write a prediction [regions, x, y, z] as a NIfTI label map with the task's own values.

    It has the grid that it was made on: the reference file's own, in RAS order, with its own affine, oblique or not;
    where the job names a spacing, the resampled grid. Either way it lies on the image in any viewer.
    The header's description names the seats that it was `made_from`.

    Raises:
        ConfigError, DiskTrouble: it cannot be written; there is no half mask.
    """
    voxels = task.labels(regions)
    try:
        durable.make_folder(path.parent)
        image = nib.Nifti1Image(voxels, grid.affine)
        image.set_qform(grid.affine, code="aligned")  # programs differ in which of the two they read
        image.header.set_xyzt_units("mm")
        # NIfTI-1 gives 80 octets; more names than fit are cut off.
        image.header["descrip"] = f"splitproto {' '.join(made_from)}".strip()[:79]
        # Without the time of day in it the same mask is the same file.
        durable.replace(path, gzip.compress(image.to_bytes(), mtime=0), mode=0o666)
    except OSError as error:
        # The file's name is a patient's.
        raise durable.refusal(error, f"{path.parent}: a prediction", "[output] folder") from None
