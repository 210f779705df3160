"""Pictures: how training went, what was predicted, which network did best.

Colours are Okabe and Ito's (jfly.uni-koeln.de/color), distinguishable for colour-blind readers, and never the
only sign: lines have markers, bars have numbers, truth and prediction have panels of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from splitpeer.data.task import GLIOMA_REGIONS, glioma

REGION_NAMES = {region.name: str(region) for region in glioma("msd").regions}
COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#F0E442")
"""Colours of regions in a task's order, repeated if there are more."""
MARKERS = ("o", "s", "^", "v", "P", "X", "*")
MEAN, LOSS = "#000000", "#666666"
DPI = 130


def training_curve(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss and validation Dice over steps, as a PNG.

    Args:
        metrics: one mapping a record: "step", and any of "loss" and "dice" (of each region, and "mean"; None: not
            scored), the latter with "made_from", the seats.
        path: the file to write.
    """
    figure = _figure(8.5, 6.5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
    losses = [(record["step"], record["loss"]) for record in metrics if record.get("loss") is not None]
    if losses:
        steps, values = np.asarray(losses, dtype=float).T
        smooth = _smooth(values)
        top.plot(steps, values, color=LOSS, alpha=0.35, linewidth=0.8, label="each step")
        if len(smooth) > 1 and len(values) > 20:
            top.plot(steps, smooth, color=MEAN, linewidth=1.8, label="running mean")
        top.legend(frameon=False)
    top.set_ylabel("training loss")
    scored = [record for record in metrics if record.get("dice")]
    regions = _regions(record["dice"] for record in scored)
    for region in (*regions, "mean"):
        points = [
            (record["step"], value) for record in scored if (value := record["dice"].get(region)) is not None
        ]
        if points:
            steps, values = np.asarray(points, dtype=float).T
            bottom.plot(
                steps,
                values,
                color=_colour(region, regions),
                marker="D" if region == "mean" else MARKERS[regions.index(region) % len(MARKERS)],
                markersize=5,
                linewidth=2.4 if region == "mean" else 1.4,
                label=f"{REGION_NAMES.get(region, region)}  {values[-1]:.3f}",
            )
    bottom.set(ylim=(0, 1), xlabel="step", ylabel="validation Dice")
    if scored:
        # Below the axes: with one evaluation the points lie at the right edge, where a legend would hide them.
        made_from = ", ".join(scored[-1].get("made_from", ()))
        figure.legend(
            *bottom.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False,
            title="; ".join(filter(None, (f"made from {made_from}" if made_from else "", _counted(scored)))) or None,
        )  # fmt: skip
    else:
        bottom.text(0.5, 0.5, "not validated yet", transform=bottom.transAxes, ha="center", color=LOSS)
    for axes in (top, bottom):
        _plain(axes)
    _save(figure, path)


def _counted(scored: Sequence[Mapping[str, Any]]) -> str:
    """How many patients the points represent, if that is not the same for all."""
    counts = [record["volumes"] for record in scored if "volumes" in record]
    return (
        f"{counts[-1]} patients at the end, {counts[0]} before" if counts and counts[0] != counts[-1] else ""
    )


def draw_curve(folder: Path) -> Path:
    """`training.png` from the `metrics.jsonl` of a job's folder; returns its path."""
    records: list[dict[str, Any]] = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record.get("rollback"):
            # Work went back: what was made of later steps is void.
            records = [earlier for earlier in records if earlier["step"] <= record["step"]]
        elif "loss" in record or "dice" in record:
            records.append(record)
    training_curve(records, folder / "training.png")
    return folder / "training.png"


def prediction_sheet(
    rows: Sequence[Mapping[str, Any]], path: Path, regions: Sequence[str] = GLIOMA_REGIONS
) -> None:
    """A few slices: every modality, the truth and the prediction drawn over the last modality, as a PNG.

    Args:
        rows: "contrasts" {name: [H, W]}, "truth" and "prediction" bool [regions, H, W], "title".
        path: the file to write.
        regions: their names, in order.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no slices to draw")
    names = list(rows[0]["contrasts"])
    columns = [*names, "truth", "prediction"]
    width, height = np.shape(rows[0]["truth"])[1:]
    figure = _figure(2.1 * len(columns) * min(width / height, 1.5) + 0.4, 2.3 * len(rows) + 0.8)
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes_row, row in zip(grid, rows, strict=True):
        for axes, name in zip(axes_row, columns, strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if name in names:
                _show(axes, row["contrasts"][name])
            else:
                _show(axes, row["contrasts"][names[-1]], dim=True)
                _overlay(axes, np.asarray(row[name], dtype=bool), regions)
        axes_row[0].set_ylabel(row.get("title", ""), fontsize=9)
        dice = _dice(np.asarray(row["prediction"], dtype=bool), np.asarray(row["truth"], dtype=bool), regions)
        axes_row[-1].set_xlabel("  ".join(f"{region} {value}" for region, value in dice.items()), fontsize=8)
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(name, fontsize=11)
    figure.legend(
        handles=[
            Patch(facecolor=_colour(region, regions), label=REGION_NAMES.get(region, region))
            for region in regions
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    _save(figure, path)


def dice_bars(table: Mapping[str, Mapping[str, float | None]], path: Path) -> None:
    """Dice per network and region, as a PNG.

    Args:
        table: {network: {each region and, if wanted, "mean": Dice, None: not scored}}; drawn in the table's order.
        path: the file to write.

    Raises:
        ValueError: the table is empty.
    """
    if not table:
        raise ValueError("no networks to compare")
    named = _regions(table.values())
    regions = [*named, "mean"] if any("mean" in scores for scores in table.values()) else named
    figure = _figure(8.5, 1.2 + 0.24 * len(table) * (len(regions) + 1))
    axes = figure.subplots()
    height = 1 / (len(regions) + 1)
    for order, region in enumerate(regions):
        for place, scores in enumerate(table.values()):
            value = scores.get(region)
            y = place + (order - (len(regions) - 1) / 2) * height
            label = REGION_NAMES.get(region, region) if place == 0 else None
            bar = value or 0.0
            axes.barh(y, bar, height * 0.9, color=_colour(region, named), label=label)
            axes.text(bar + 0.01, y, "-" if value is None else f"{value:.3f}", va="center", fontsize=8)
    axes.set(xlim=(0, 1), xlabel="Dice", yticks=range(len(table)), yticklabels=list(table))
    axes.invert_yaxis()
    _plain(axes)
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=len(regions), frameon=False)
    _save(figure, path)


def _regions(scores: Iterable[Mapping[str, float | None]]) -> list[str]:
    """The regions that are scored anywhere, in the order of their task."""
    return [
        region for region in dict.fromkeys(name for of_one in scores for name in of_one) if region != "mean"
    ]


def _colour(region: str, regions: Sequence[str]) -> str:
    return MEAN if region == "mean" else COLOURS[regions.index(region) % len(COLOURS)]


def _figure(width: float, height: float) -> Figure:
    """A figure that no window system and no global state of pyplot knows of."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a twentieth of the run, shorter at both ends."""
    half = max(len(values) // 40, 1)
    return np.asarray([values[max(i - half, 0) : i + half + 1].mean() for i in range(len(values))])


def _show(axes: Any, image: np.ndarray, dim: bool = False) -> None:
    """First array axis to the right, second upwards: NIfTI's RAS seen from below, patient's left at the right."""
    low, high = np.percentile(image, [1, 99.5])
    high = high if high > low else low + 1
    span = high - low
    axes.imshow(image.T, cmap="gray", origin="lower", vmin=low, vmax=high + (0.4 * span if dim else 0))


def _overlay(axes: Any, masks: np.ndarray, regions: Sequence[str]) -> None:
    """Regions, the last named on top: filled lightly, outlined fully."""
    coloured = np.zeros((*masks.shape[1:], 4))
    for region, mask in zip(regions, masks, strict=True):
        coloured[mask] = (*to_rgb(_colour(region, regions)), 0.6)
    axes.imshow(coloured.transpose(1, 0, 2), origin="lower", interpolation="nearest")
    for region, mask in zip(regions, masks, strict=True):
        if mask.any() and not mask.all():
            axes.contour(
                mask.T.astype(float), levels=[0.5], colors=[_colour(region, regions)], linewidths=1.1
            )


def _dice(prediction: np.ndarray, truth: np.ndarray, regions: Sequence[str]) -> dict[str, str]:
    """Dice of one slice, for the caption; a dash where neither has the region."""
    both = (prediction & truth).sum(axis=(1, 2))
    total = prediction.sum(axis=(1, 2)) + truth.sum(axis=(1, 2))
    return {
        region: f"{2 * b / t:.2f}" if t else "-" for region, b, t in zip(regions, both, total, strict=True)
    }
