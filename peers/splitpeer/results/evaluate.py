"""Segmentations against masks that people drew: figures of every patient, what they say together, the worst cases.

Everything is computed on the grid of the people's mask. Dice, the 95 % Hausdorff distance and volumes are those of
`training.metrics`, with its conventions for empty masks.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from splitpeer.data.files import Case
from splitpeer.data.geometry import Geometry, differences
from splitpeer.data.labels import regions as regions_in
from splitpeer.data.nifti import read_voxels
from splitpeer.data.rules import Rules
from splitpeer.data.task import Task
from splitpeer.errors import DataError
from splitpeer.results.segmentation import NOT_A_DEVICE, SOFTWARE, Origin

FORMAT = 1


@dataclass(frozen=True)
class Figures:
    """One region of one patient."""

    dice: float
    hd95: float
    """Millimetres."""
    predicted_ml: float
    true_ml: float


@dataclass(frozen=True)
class PatientRow:
    """One patient."""

    patient: str
    regions: Mapping[str, Figures]
    origin: Origin | None
    """What the segmentation was made from; None: not known."""


@dataclass(frozen=True)
class Truth:
    """The mask that people drew of a patient: bool [regions, x, y, z], RAS."""

    masks: np.ndarray
    grid: Geometry


def truth_of(case: Case, task: Task, rules: Rules) -> Truth:
    """Read a mask. Raises DataError: it cannot be read, or holds a value that the task does not name."""
    voxels, header = read_voxels(case, rules)
    try:
        return Truth(regions_in(voxels, task).astype(bool), header.geometry)
    except DataError as error:
        raise DataError(f"{case.path}: {error}", "mask-values") from None


def check_grid(case: Case, truth: Truth, grid: Geometry, masks: np.ndarray) -> None:
    """Whether a segmentation is on the grid of a mask. Raises DataError: it is not."""
    different = differences(grid, truth.grid)
    if different or masks.shape != truth.masks.shape:
        what = "; ".join(different) or f"shape {list(masks.shape)} against {list(truth.masks.shape)}"
        raise DataError(f"{case.path}: the segmentation is on another grid than this mask: {what}")


class EvaluationTable:
    """The figures of all patients.

    Args:
        regions: names, in the order of the channels.
    """

    def __init__(self, regions: Sequence[str]) -> None:
        self.regions = tuple(regions)
        self.rows: list[PatientRow] = []
        self.failed: dict[str, str] = {}
        """Patients without figures, and why."""
        self.held: set[str] = set()
        """Regions that some mask contains; the others are not counted."""

    def add(self, patient: str, masks: np.ndarray, truth: Truth, origin: Origin | None = None) -> PatientRow:
        """Compare one patient; `masks` like `Truth.masks`, on the same grid."""
        # torch; most commands never measure.
        from splitpeer.training.metrics import Surfaces, VolumeDice

        dice, surfaces = VolumeDice(self.regions), Surfaces(self.regions)
        scores = dice.add(masks, truth.masks)
        distances = surfaces.add(masks, truth.masks, truth.grid.spacing)
        volumes = surfaces.volumes()
        self.held |= {name for name, mask in zip(self.regions, truth.masks, strict=True) if mask.any()}
        figures = {
            name: Figures(scores[name], distances[name], volumes[name]["predicted"], volumes[name]["true"])
            for name in self.regions
        }
        row = PatientRow(patient, figures, origin)
        self.rows.append(row)
        return row

    def mean_dice(self, row: PatientRow) -> float:
        """Of one patient, over the regions that some mask contains."""
        held = [row.regions[name].dice for name in self.regions if name in self.held]
        return statistics.fmean(held) if held else 1.0

    def worst(self) -> list[PatientRow]:
        """The rows, those with the least mean Dice first."""
        return sorted(self.rows, key=lambda row: (self.mean_dice(row), row.patient))

    def summary(self) -> dict[str, dict[str, float]]:
        """By region that some mask contains: mean, median and worst of Dice and HD95, mean volumes; "mean" of Dice."""
        found: dict[str, dict[str, float]] = {}
        if not self.rows:
            return found
        for name in self.regions:
            if name not in self.held:
                continue
            of = [row.regions[name] for row in self.rows]
            dice, hd95 = [one.dice for one in of], [one.hd95 for one in of]
            found[name] = {
                "dice": statistics.fmean(dice),
                "dice_median": statistics.median(dice),
                "dice_worst": min(dice),
                "hd95": statistics.fmean(hd95),
                "hd95_median": statistics.median(hd95),
                "hd95_worst": max(hd95),
                "predicted_ml": statistics.fmean(one.predicted_ml for one in of),
                "true_ml": statistics.fmean(one.true_ml for one in of),
            }
        if found:
            found["mean"] = {"dice": statistics.fmean(one["dice"] for one in found.values())}
        return found

    def csv(self) -> str:
        """A line per patient, worst first; figures in full."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        named = ("dice", "hd95_mm", "predicted_ml", "true_ml")
        writer.writerow(
            ["patient", "used", "missing", *(f"{what}_{name}" for name in self.regions for what in named)]
        )
        for row in self.worst():
            of = [row.regions[name] for name in self.regions]
            figures = [value for one in of for value in (one.dice, one.hd95, one.predicted_ml, one.true_ml)]
            origin = row.origin
            made = [" ".join(origin.used), " ".join(origin.missing)] if origin else ["", ""]
            writer.writerow([_cell(row.patient), *made, *(f"{value:.6g}" for value in figures)])
        return out.getvalue()

    def document(self) -> dict[str, Any]:
        """The same and the summary, as JSON has it."""
        runs = {_run(row.origin): row.origin for row in self.rows if row.origin is not None}
        return {
            "format": FORMAT,
            "notice": NOT_A_DEVICE,
            "software": SOFTWARE,
            "runs": [
                {"id": one.run, "name": one.name, "step": one.step, "model_sha256": one.model}
                for one in runs.values()
            ],
            "regions": list(self.regions),
            "summary": self.summary(),
            "patients": [self._shown(row) for row in self.worst()],
            "failed": dict(sorted(self.failed.items())),
        }

    def _shown(self, row: PatientRow) -> dict[str, Any]:
        origin = row.origin
        return {
            "patient": row.patient,
            "modalities": {"used": list(origin.used), "missing": list(origin.missing)} if origin else None,
            "mean_dice": self.mean_dice(row),
            "regions": {name: dict(vars(one)) for name, one in row.regions.items()},
        }


def _run(origin: Origin) -> tuple[str, int | None, str]:
    return origin.run, origin.step, origin.model


def _cell(text: str) -> str:
    """An id that a spreadsheet takes for a formula gets a quote in front."""
    return f"'{text}" if text[:1] in "=+-@" else text
