"""A few steps as a picture: one row per party, one line in it per thread, a bar per part, coloured by what it is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from splitpeer.errors import ConfigError
from splitpeer.storage import durable
from splitpeer.timeline.recorded import PartySteps, Span, chosen, kind_of, threads_of

COLOURS: Mapping[str, str] = {
    "load": "#56B4E9",
    "compute": "#009E73",
    "encode": "#F0E442",
    "wire": "#E69F00",
    "wait": "#D9D9D9",
    "save": "#CC79A7",
    "other": "#0072B2",
}
"""By kind of a part; Okabe and Ito's (jfly.uni-koeln.de/color), but for waiting, which is no colour."""
FEW = 3
"""Steps that are drawn where nobody says which."""
FORMATS = (".png", ".svg")
DPI = 130
WIDTH, LINE, MARGIN = 12.0, 0.24, 1.3
"""Inches: of the picture, of a thread's line, above and below all of them."""
LETTER = 0.056
"""Inches of a letter in a bar."""


def check_format(path: Path) -> None:
    """Raises ConfigError: not a picture that can be written."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: a picture is a .png or a .svg: name the file so")


def typical(recorded: Sequence[PartySteps], count: int = FEW) -> tuple[int, int]:
    """First and last number of so many steps in a row, which took the first party the median time of all such rows."""
    steps = recorded[0].steps
    starts = range(max(1, len(steps) - count + 1))
    lasted = [steps[min(i + count, len(steps)) - 1].ended - steps[i].began for i in starts]
    middle = statistics.median_low(lasted)
    run = steps[lasted.index(middle) :][:count]
    return min(step.number for step in run), max(step.number for step in run)


def draw(recorded: Sequence[PartySteps], first: int, last: int, path: Path) -> None:
    """Write as PNG or SVG what all did while the first party made its steps from `first` to `last`.

    Raises:
        ConfigError: it has none of them, or the file cannot be written.
    """
    check_format(path)
    steps = chosen(recorded[:1], first, last)[0]
    began, ended = steps.began, steps.ended
    lines = [
        (one.party, thread, [s for s in spans if s.ended > began and s.began < ended])
        for one in recorded
        for thread, lanes in threads_of(one.steps).items()
        for spans in lanes
    ]
    lines = [line for line in lines if line[2]]
    figure = Figure(figsize=(WIDTH, MARGIN + LINE * len(lines)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, (_, _, spans) in enumerate(lines):
        _line(axes, y, spans, began, ended)
    for step in steps.steps:
        x = 1e3 * (step.began - began)
        axes.axvline(x, color="#000000", linewidth=0.7, linestyle=":")
        axes.text(x, -0.75, f" step {step.number}", fontsize=8, va="bottom")
    _parties(axes, lines)
    shown = {kind_of(span.part) for _, _, spans in lines for span in spans}
    figure.legend(
        handles=[Patch(color=colour, label=kind) for kind, colour in COLOURS.items() if kind in shown],
        loc="outside lower center", ncols=len(COLOURS), frameon=False, fontsize=8,
    )  # fmt: skip
    axes.set(xlim=(0, 1e3 * (ended - began)), ylim=(len(lines) - 0.5, -0.8))
    axes.set_xlabel("ms", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format=path.suffix.lower().removeprefix("."))
    except OSError as error:
        raise durable.refusal(error, f"{path}:", "--picture") from None


def _line(axes: Any, y: int, spans: Sequence[Span], began: float, ended: float) -> None:
    """A thread's parts; a name where there is room for it."""
    inches = (WIDTH - 2.0) / (ended - began)
    for span in spans:
        start, end = max(span.began, began), min(span.ended, ended)
        axes.barh(
            y, 1e3 * (end - start), 0.86, 1e3 * (start - began), color=COLOURS[kind_of(span.part)],
            edgecolor="white", linewidth=0.4,
        )  # fmt: skip
        if (end - start) * inches > LETTER * (len(span.part) + 1):
            axes.text(1e3 * ((start + end) / 2 - began), y, span.part, fontsize=6.5, ha="center", va="center")


def _parties(axes: Any, lines: Sequence[tuple[str, str, Sequence[Span]]]) -> None:
    """Names at the left; a rule between two parties."""
    axes.set_yticks(range(len(lines)))
    labels = []
    for number, (party, thread, _) in enumerate(lines):
        new = number == 0 or lines[number - 1][0] != party
        labels.append(f"{party}   {thread}" if new else thread)
        if new and number:
            axes.axhline(number - 0.5, color="#888888", linewidth=0.6)
    axes.set_yticklabels(labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
