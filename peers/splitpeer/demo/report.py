"""What the demo leaves for people: a table, pictures, and `summary.json` for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
from rich.table import Table

from splitpeer.data.files import Case
from splitpeer.data.labels import regions
from splitpeer.data.nifti import read_voxels
from splitpeer.data.task import GLIOMA_REGIONS
from splitpeer.errors import JobFailed
from splitpeer.report.charts import dice_bars, prediction_sheet
from splitpeer.storage import durable
from splitpeer.training.scores import Scores, shown

REGIONS = (*GLIOMA_REGIONS, "mean")
CONTRASTS = {"FLAIR": "flair", "T1": "t1", "T1Gd": "t1ce", "T2": "t2"}
SHOWN = 4


def dice_table(rows: Mapping[str, Scores]) -> Table:
    """Dice of each network, best mean in bold."""
    table = Table(title="Dice per volume, patients held out")
    table.add_column("network")
    for region in REGIONS:
        table.add_column(region, justify="right")
    best = max((mean for values in rows.values() if (mean := values["mean"]) is not None), default=None)
    for name, values in rows.items():
        style = "bold" if best is not None and values["mean"] == best else None
        table.add_row(name, *(shown(values[region]) for region in REGIONS), style=style)
    return table


def distance_table(rows: Mapping[str, Scores]) -> Table:
    """95 % Hausdorff distance of each network, least mean in bold."""
    table = Table(title="95 % Hausdorff distance per volume in mm, patients held out")
    table.add_column("network")
    for region in REGIONS:
        table.add_column(region, justify="right")
    best = min((mean for values in rows.values() if (mean := values["mean"]) is not None), default=None)
    for name, values in rows.items():
        style = "bold" if best is not None and values["mean"] == best else None
        cells = ("-" if (mm := values[region]) is None else f"{mm:.1f}" for region in REGIONS)
        table.add_row(name, *cells, style=style)
    return table


def volume_line(volumes: Mapping[str, Mapping[str, float]]) -> str:
    """Mean volumes in one line."""
    return ", ".join(
        f"{region} {of['predicted']:.1f} ml of {of['true']:.1f}" for region, of in volumes.items()
    )


def draw(folder: Path, data: Path, results: Path, rows: Mapping[str, Scores]) -> list[Path]:
    """The pictures; returns their paths."""
    curve, sheet, bars = folder / "training.png", folder / "predictions.png", folder / "dice.png"
    copyfile(results / "training.png", curve)
    prediction_sheet(_slices(data, results / "predictions"), sheet)
    dice_bars(rows, bars)
    return [curve, sheet, bars]


def read_result(folder: Path) -> dict[str, Any]:
    """`result.json` of a finished job. Raises JobFailed if the job did not finish."""
    try:
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        raise JobFailed(f"{folder}: no result was written; the log of the coordinator says why") from None
    if not result["complete"]:
        raise JobFailed(f"the job stopped at step {result['step']} of {result['steps']}; it did not finish")
    return result


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """`summary.json`, whole or not at all."""
    durable.replace(path, (json.dumps(summary, indent=2) + "\n").encode(), mode=0o666, sync=False)


def _slices(data: Path, predictions: Path) -> Sequence[Mapping[str, Any]]:
    """For the first few patients held out, the slice with most tumour: four modalities, truth, prediction."""
    rows = []
    for path in sorted(predictions.glob("*.nii.gz"))[:SHOWN]:
        truth = regions(_load(data / "labels" / path.name), "msd").astype(bool)
        predicted = regions(_load(path), "msd").astype(bool)
        z = int(truth[0].sum(axis=(0, 1)).argmax())
        rows.append(
            {
                "title": f"{path.name.partition('.')[0]}, slice {z}",
                "contrasts": {name: _load(data / m / path.name)[:, :, z] for name, m in CONTRASTS.items()},
                "truth": truth[:, :, :, z],
                "prediction": predicted[:, :, :, z],
            }
        )
    return rows


def _load(path: Path) -> np.ndarray:
    """In RAS order, like a prediction, whatever the file's own."""
    return read_voxels(Case(path.name, path))[0]
