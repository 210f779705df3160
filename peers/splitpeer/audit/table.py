"""The sweep as a Markdown table, put between two marks of a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from splitpeer.audit.breadth import breadth_table
from splitpeer.audit.frontier import FrontierPoint, pareto
from splitpeer.errors import ConfigError
from splitpeer.storage import durable

BEGIN, END = "<!-- sweep: begin -->", "<!-- sweep: end -->"


def markdown(points: Sequence[Mapping[str, Any]]) -> str:
    """One row for each configuration, seeds averaged: Dice, naive and adaptive attacks, the tumour, the labels."""
    names = list(dict.fromkeys(point["name"] for point in points))
    ranked = [p for p in points if p.get("ranked", True)]
    views = sorted({f["views"] for p in ranked for f in p["figures"] if f["goal"] == "image"})
    one, many = views[:1], views[1:]
    heads = ["configuration", "Dice", "naive", *(f"{v} view{'s' if v > 1 else ''}" for v in one),
             *(["many views"] if many else []), "worst", "by",
             "patient by patient", "worst tenth", "re-identified", "tumour Dice",
             "mask AUC first / last / all steps", "more than the own image: AUC / Dice"]  # fmt: skip
    averaged = [_average([p for p in points if p["name"] == name]) for name in names]
    front = {point.name for point in pareto([row["point"] for row in averaged])}
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in sorted(averaged, key=lambda row: not row["point"].ranked):
        point = row["point"]
        name = point.name if point.ranked else f"{point.name} (+)"
        cells = [f"**{name}**" if point.name in front else name, _two(point.dice, 3), _two(row["naive"])]
        cells += [_two(row["views"].get(v)) for v in one]
        if many:
            cells.append(_two(max((x for v in many if (x := row["views"].get(v)) is not None), default=None)))
        cells += [
            _within(point.leakage, point.low, point.high),
            point.by,
            _two(point.each_worst),
            _two(point.worst_tenth),
            row["picked"],
            _two(point.tumour),
            " / ".join(_two(a, 3) for a in row["aucs"]),
            " / ".join(_signed(a) for a in (point.advantage_auc, point.advantage_dice)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _legend(points, averaged), *breadth_table(points), *efforts(points)]) + "\n"


def efforts(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """How hard each attack was tried over all configurations, beside the published effort: a second table."""
    spent: dict[str, list[Mapping[str, Any]]] = {}
    for figure in (f for p in points for f in p["figures"] if f.get("spent") and f["adaptive"]):
        spent.setdefault(figure["attack"], []).append(figure["spent"])
    if not spent:
        return []
    rows = []
    for attack, given in spent.items():
        least, most = (find(given, key=lambda one: one["times"])["effort"] for find in (min, max))
        counts = {why: sum(one["stopped"] == why for one in given) for why in ("converged", "limit", "fixed")}
        told = ", ".join(f"{count} {_STOPPED[why]}" for why, count in counts.items() if count)
        ours = least if least == most else f"{least} to {most}"
        rows.append(f"| {attack} | {ours} | {told} | {given[0]['published'] or '-'} |")
    return ["", "| attack | effort, ours | of all its runs | published |", "|---|---|---|---|", *rows]


_STOPPED = {
    "converged": "where more gained less than .01",
    "limit": "at the limit, where more may gain",
    "fixed": "at a fixed effort",
}


def _legend(points: Sequence[Mapping[str, Any]], averaged: Sequence[Mapping[str, Any]]) -> str:
    """How to read the table, with the floors."""
    floor = mean(row["point"].floor for row in averaged) if averaged else 0.0
    patients = sorted({row["point"].patients for row in averaged} - {0})
    said = [
        f"Floor of SSIM (average image of other patients): {floor:.2f}.",
        f"Of mask AUC: {_floors_of('auc', points)}." if _floors_of("auc", points) else "",
        f"Over the whole window: {_floors_of('auc_window', points)}." if _floors_of("auc_window", points) else "",
        "Worst: the attack with the highest mean, with the 95 % interval over patients of one seed. "
        "Patient by patient: each by the attack that works best on this patient, and of those the worst tenth.",
        "Re-identified: patients told apart by the best attack, with the exact 95 % interval.",
        f"Patients under attack: {', '.join(map(str, patients))}." if patients else "",
        _MANY if any(len(row["views"]) > 1 for row in averaged) else "",
        "Bold: on the Pareto front of Dice and worst SSIM. (+): attacked differently from the rest, so not compared.",
    ]  # fmt: skip
    return " ".join(filter(None, said))


def _floors_of(figure: str, points: Sequence[Mapping[str, Any]]) -> str:
    """Each floor of a figure of label attacks, averaged over all that have it."""
    found: dict[str, list[float]] = {}
    for score in (f["scores"].get(figure) for p in points for f in p["figures"] if f["goal"] == "mask"):
        for name, value in ((score or {}).get("floors") or {}).items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return ", ".join(f"{name} {mean(values):.3f}" for name, values in found.items())


def write_into(document: Path, table: str, picture: Path | None = None) -> None:
    """Replace the text between the marks, and put the picture next to the document.

    Raises:
        ConfigError: the file is missing, or has no marks.
    """
    try:
        text = document.read_text()
    except OSError as error:
        raise ConfigError(f"{document}: cannot be read ({error.strerror})") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{document}: has no lines {BEGIN} and {END} for the table to stand between")
    text = f"{before}{BEGIN}\n\n{table}\n{END}{after}"
    durable.replace(document, text.encode(), mode=0o666, sync=False)
    if picture is not None:
        durable.replace(document.parent / picture.name, picture.read_bytes(), mode=0o666, sync=False)


def _average(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seeds of one configuration."""

    def over(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return mean(known) if known else None

    def best(point: Mapping[str, Any], *, adaptive: bool, views: int | None = None) -> float | None:
        found = [
            f["scores"]["ssim"]["mean"]
            for f in point["figures"]
            if f["goal"] == "image" and f["adaptive"] is adaptive and views in (None, f["views"])
            and f["scores"].get("ssim", {}).get("mean") is not None
        ]  # fmt: skip
        return max(found, default=None)

    numbers = sorted({f["views"] for p in points for f in p["figures"] if f["goal"] == "image"})
    undefended = all(p["defences"] == "none" for p in points)
    first = points[0]
    worst = max(points, key=lambda p: p["leakage"])
    summary = FrontierPoint(
        name=first["name"], dice=mean(p["dice"] for p in points), leakage=mean(p["leakage"] for p in points),
        by=worst["by"], views=worst["views"], floor=mean(p["floor"] for p in points),
        tumour=over([p["tumour"] for p in points]), mask_auc=over([p["mask_auc"] for p in points]),
        ranked=first.get("ranked", True), low=worst.get("low"), high=worst.get("high"),
        patients=worst.get("patients", 0),
        **{name: over([p.get(name) for p in points])
           for name in ("each_worst", "worst_tenth", "advantage_auc", "advantage_dice")},
    )  # fmt: skip
    either = {v: [max(filter(None, (best(p, adaptive=True, views=v), best(p, adaptive=False, views=v))), default=None)
                  for p in points] for v in numbers}  # fmt: skip
    # The stronger form of each, as for images.
    aucs = [
        over([max((f["scores"]["auc"]["mean"] for f in p["figures"]
                   if f["goal"] == "mask" and f["step"] == step and f["scores"].get("auc")), default=None)
              for p in points])
        # Numbers of steps ascending, then all of them together.
        for step in sorted({f["step"] for p in points for f in p["figures"] if f["goal"] == "mask"},
                           key=lambda step: (isinstance(step, str), step))
    ]  # fmt: skip
    naive = over([best(p, adaptive=False) for p in points])
    return {
        "point": summary,
        "naive": over([best(p, adaptive=True) for p in points]) if undefended and naive is None else naive,
        "views": {v: over(values) for v, values in either.items()},
        "aucs": aucs,
        "picked": _picked([f["scores"]["reidentification"] for p in points for f in p["figures"]
                           if f["scores"].get("reidentification")]),
    }  # fmt: skip


def _picked(scores: Sequence[Mapping[str, Any]]) -> str:
    """The most patients that an attack told apart: how many of how many, and the exact interval."""
    known = [score for score in scores if score.get("mean") is not None]
    if not known:
        return "-"
    most = max(known, key=lambda score: score["mean"])
    hits = f"{most['mean'] * most['patients']:.1f}".removesuffix(".0")
    return f"{hits} of {most['patients']} ({_two(most['low'])}-{_two(most['high'])})"


def _within(value: float, low: float | None, high: float | None) -> str:
    return _two(value) if low is None or high is None else f"{_two(value)} ({_two(low)}-{_two(high)})"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


_MANY = "Many views: many releases of a sample; of a site that answers the same every time, releases in other poses."


def _two(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
