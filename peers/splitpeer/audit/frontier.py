"""Dice against leakage: the configurations for which no other is better at both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from splitpeer.storage import durable

LEAST_DICE = 0.3
"""A network below this segments nothing; it is named at the picture's edge."""


@dataclass(frozen=True)
class FrontierPoint:
    """One configuration, judged by the worst that was found against it."""

    name: str
    dice: float
    """Mean over regions and patients held out."""
    leakage: float
    """Highest mean SSIM inside the body, aligned, over all attacks and numbers of views."""
    by: str
    """The attack that reached it."""
    views: int
    floor: float
    """What knowing only the average image gives."""
    tumour: float | None = None
    """Dice of the tumour found in the worst reconstruction."""
    mask_auc: float | None = None
    """Worst leak-AUC of the mask from gradients, inside the body."""
    low: float | None = None
    """95 % interval of `leakage`."""
    high: float | None = None
    patients: int = 0
    """Under attack."""
    each_worst: float | None = None
    """Mean over patients of the highest SSIM that any attack reached for each."""
    worst_tenth: float | None = None
    """The same, over the tenth of the patients who leak most."""
    advantage_auc: float | None = None
    """Largest gain of a label attack over what the own image shows, inside the body."""
    advantage_dice: float | None = None
    ranked: bool = True
    """False: it met other attacks than the rest, so that its leakage is no match for theirs."""


def pareto(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The points that no other dominates: more Dice at no more leakage, or less leakage at no less Dice.

    Only those that met the same attacks are compared: a weaker adversary finds less leakage in the same traffic.
    """
    points = [point for point in points if point.ranked]
    return [
        p
        for p in points
        if not any(
            (q.dice >= p.dice and q.leakage <= p.leakage) and (q.dice > p.dice or q.leakage < p.leakage)
            for q in points
        )
    ]


def save(points: Sequence[FrontierPoint], folder: Path) -> None:
    """`frontier.json` and `frontier.png`."""
    front = {point.name for point in pareto(points)}
    rows = [asdict(point) | {"front": point.name in front} for point in points]
    text = json.dumps({"points": rows}, indent=2) + "\n"
    durable.replace(folder / "frontier.json", text.encode(), mode=0o666, sync=False)
    draw(points, folder / "frontier.png")


def draw(points: Sequence[FrontierPoint], path: Path) -> None:
    """Leakage to the right, Dice upwards; the front is a line, its points are named."""
    points = [point for point in points if point.ranked]
    figure = Figure(figsize=(9.5, 6.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    front = sorted(pareto(points), key=lambda p: p.leakage)
    names = {p.name for p in front}
    inner = [p for p in points if p.name not in names]
    axes.scatter([p.leakage for p in inner], [p.dice for p in inner], s=34, color="#999999", marker="o",
                 label="another is better at both")  # fmt: skip
    axes.plot([p.leakage for p in front], [p.dice for p in front], color="#0072B2", marker="D", markersize=7,
              linewidth=1.4, label="Pareto front")  # fmt: skip
    if points:
        floor = sum(p.floor for p in points) / len(points)
        axes.axvline(floor, color="#D55E00", linestyle="--", linewidth=1.2,
                     label=f"floor: an average image, {floor:.2f}")  # fmt: skip
    # One that segments nothing would squeeze all others into a corner.
    useful = [p.dice for p in points if p.dice >= LEAST_DICE] or [0.0, 1.0]
    low, high = min(useful) - 0.03, max(useful) + 0.05
    axes.set_ylim(low, high)
    placed: list[tuple[float, float]] = []
    gap = 0.022 * (high - low)
    for point in sorted(points, key=lambda p: (p.dice, p.leakage)):
        text, y = point.name, point.dice
        if point.dice < LEAST_DICE:
            text, y = f"{point.name}: Dice {point.dice:.2f}, below", low + gap
        # Labels one above the other where points are close.
        while any(abs(y - py) < gap and abs(point.leakage - px) < 0.3 for px, py in placed):
            y += gap
        placed.append((point.leakage, y))
        axes.annotate(text, (point.leakage, max(point.dice, low)), xytext=(point.leakage + 0.008, y), fontsize=7,
                      color="#0072B2" if point.name in names else "#555555", va="center")  # fmt: skip
    axes.set(xlabel="leakage: best reconstruction by any attack (SSIM inside the body, 1 = the image itself)",
             ylabel="Dice, mean over regions (patients held out)")  # fmt: skip
    axes.set_xlim(right=1.28)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.12, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
