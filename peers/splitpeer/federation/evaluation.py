"""Evaluation over the wire: windows over whole volumes, put together again, scored per volume."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from splitpeer.data.geometry import Geometry, Triple
from splitpeer.data.nifti_write import DESCRIP, nifti, packed
from splitpeer.data.sampling import Grids
from splitpeer.data.task import Task
from splitpeer.data.volumes import Volumes
from splitpeer.errors import DataError
from splitpeer.federation.inference import Volume, questions, windows_of
from splitpeer.storage import durable
from splitpeer.training.metrics import Surfaces, VolumeDice
from splitproto.messages import Forward

SUFFIX = ".nii.gz"
"""Of a prediction's file, after the patient's id."""


@dataclass(frozen=True)
class Plan:
    """All batches of one evaluation, in order, and the patient of each."""

    forwards: Sequence[Forward]
    keys: Sequence[bytes]

    @classmethod
    def of(
        cls, keys: Sequence[bytes], labels: Grids, window: Triple, overlap: float, batch: int, step: int
    ) -> Plan:
        """Windows over every volume, at most `batch` a message; the weights are those of `step`."""
        shapes = {key: labels.geometry(key).shape for key in keys}
        windows = [some for key in keys for some in windows_of(key, shapes[key], window, overlap, batch)]
        forwards = questions("evaluate", step, windows, partial(next, count()))
        return cls(forwards, [some[0].key for some in windows])

    def end(self, index: int) -> int:
        """One past the last batch of the patient of batch `index`."""
        key = self.keys[index]
        while index < len(self.keys) and self.keys[index] == key:
            index += 1
        return index


class Assembly:
    """Takes the predictions of a plan's batches in order; a volume is whole when its last one is in.

    Args:
        labels: the grids of the volumes.
        task: what is predicted.
    """

    def __init__(self, plan: Plan, labels: Grids, window: Triple, task: Task) -> None:
        self._plan, self._labels, self._window, self._task = plan, labels, window, task
        self._volume: Volume | None = None

    def add(self, index: int, probabilities: np.ndarray) -> np.ndarray | None:
        """The prediction, bool [regions, x, y, z], of the patient whose last batch this is; else None.

        Args:
            probabilities: float32 [B, channels, *spatial] of batch `index`.
        """
        key = self._plan.keys[index]
        volume = self._volume = self._volume or Volume(self._labels.geometry(key).shape, self._window)
        volume.add(self._plan.forwards[index].samples, probabilities)
        if index + 1 < len(self._plan.keys) and self._plan.keys[index + 1] == key:
            return None
        self._volume = None
        return self._task.decide(volume.probabilities())


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
        self._plan, self._labels, self._save_to = plan, labels, save_to
        self._assembly = Assembly(plan, labels, window, self._task)
        self.dice = VolumeDice(self._task.region_names)
        self.surfaces = Surfaces(self._task.region_names) if measure else None

    def add(self, index: int, probabilities: np.ndarray) -> None:
        """`probabilities`: float32 [B, channels, *spatial] of batch `index`."""
        key = self._plan.keys[index]
        if (mask := self._assembly.add(index, probabilities)) is None:
            return
        grid = self._labels.geometry(key)
        truth = self._labels.window(key, (0, 0, 0), grid.shape)
        self.dice.add(mask, truth)
        if self.surfaces is not None:
            self.surfaces.add(mask, truth, grid.spacing)
        if self._save_to is not None:
            path = self._save_to / f"{self._labels.case(key).patient}{SUFFIX}"
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
        # More names than fit are cut off.
        said = f"splitproto {' '.join(made_from)}".strip()[:DESCRIP]
        data = packed(nifti(voxels, grid.affine, "aligned", descrip=said))
        durable.replace(path, data, mode=0o666)
    except OSError as error:
        # The file's name is a patient's.
        raise durable.refusal(error, f"{path.parent}: a prediction", "[output] folder") from None


def remove_masks(folder: Path, keys: Collection[bytes], masks: Volumes) -> frozenset[bytes]:
    """Remove what `save_mask` wrote of patients, named by their ids; their own masks may be gone by now.

    Args:
        keys: of the patients.
        masks: under whose salt the keys are.

    Returns:
        Of whom there was one.

    Raises:
        ConfigError, DiskTrouble: one cannot be removed.
    """
    found = {}
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(DataError):  # a name that is no patient's
            found[masks.key_of(path.name.removesuffix(SUFFIX))] = path
    gone = found.keys() & set(keys)
    try:
        for key in gone:
            found[key].unlink(missing_ok=True)
        if gone:
            durable.sync_folder(folder)
    except OSError as error:
        raise durable.refusal(error, f"{folder}: a prediction", "[output] folder") from None
    return frozenset(gone)
