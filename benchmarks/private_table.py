"""The table of `private.py`: for a terminal, and as docs show it. Means with 95 % t intervals over patients."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pretraining import CONTRASTS, interval
from private_leak import GRADIENT, INSIDER, LABELS, OUTSIDER
from private_run import Row
from rich.table import Table

from splitpeer.leakage.measure import OTHER_MASKS, OWN_IMAGE

READ = ("tumour_presence", "tumour_volume", "tumour_side")
NONE = "-"
Results = Mapping[str, Any]


class Figure(NamedTuple):
    """A mean over patients; seeds have other patients, so all count."""

    values: Sequence[float]

    @property
    def mean(self) -> float:
        """Of all."""
        return statistics.fmean(self.values)

    def __str__(self) -> str:
        half = interval(self.values)
        return f"{_short(self.mean)}" + (f" ± {_short(half)}" if half is not None else "")


class Worst(NamedTuple):
    """What an adversary's best attacks reach: for each contrast the one that shows most."""

    contrast: str
    """That shows most of all."""
    figure: Figure
    """Of that contrast."""
    average: Figure
    """Of all contrasts, patient by patient."""
    attack: str
    """Of that contrast."""


def columns(results: Results, row: Row, rows: Sequence[Row], given: argparse.Namespace) -> dict[str, str]:
    """One line of the table, by column."""
    seeds = given.seeds
    done = [results[f"{row.name}/{seed}"] for seed in seeds]
    joint = [results[f"{rows[0].name}/{seed}"] for seed in seeds]
    paired = [
        [a - b for a, b in zip(one["patients"], other["patients"], strict=True)]
        for one, other in zip(done, joint, strict=True)
    ]
    minus = Figure([each for one in paired for each in one])
    inside, outside = (worst(results, row.name, names, seeds) for names in (INSIDER, OUTSIDER))
    found = outlines(results, row.name, seeds)
    return {
        "row": row.name,
        "Dice": _short(statistics.fmean(one["dice"]["mean"] for one in done)),
        "minus joint": str(minus) if row != rows[0] else NONE,
        "over seeds": str(Figure([statistics.fmean(one) for one in paired])) if row != rows[0] else NONE,
        "SSIM, all encoders": _worst(inside),
        "mean": str(inside.average) if inside else NONE,
        "SSIM, no encoder": _worst(outside),
        "less labels alone": above_labels(results, row.name, seeds),
        "tumour there / size / side": readouts(results, row.name, INSIDER, seeds),
        "outline from the gradient (own image, others' outlines)": outline(found) if found else NONE,
        "more than these": more_than_floors(found) if found else NONE,
        "kB a window": f"{done[0]['octets_per_window'] / 1000:.0f}",
        "s": f"{statistics.fmean(one['seconds'] for one in done):.0f}",
    }


def worst(results: Results, row: str, attacks: Sequence[str], seeds: Sequence[int]) -> Worst | None:
    """Of all that were made; None: none was."""
    found: dict[str, tuple[str, list[float]]] = {}
    for attack in attacks:
        made = [one for seed in seeds if (one := results.get(_key(row, seed, attack))) is not None]
        for contrast in CONTRASTS if made else ():
            values = [value for one in made for value in one["patients"][contrast]]
            if contrast not in found or statistics.fmean(values) > statistics.fmean(found[contrast][1]):
                found[contrast] = (attack, values)
    if not found:
        return None
    contrast = max(found, key=lambda one: statistics.fmean(found[one][1]))
    attack, values = found[contrast]
    every = zip(*(values for _, values in found.values()), strict=False)
    return Worst(contrast, Figure(values), Figure([statistics.fmean(each) for each in every]), attack)


def above_labels(results: Results, row: str, seeds: Sequence[int]) -> str:
    """What a coordinator without encoders sees beyond what the labels say: of its worst contrast, paired."""
    outside = worst(results, row, OUTSIDER, seeds)
    if outside is None:
        return NONE
    apart: list[float] = []
    for seed in seeds:
        ours, low = (results.get(_key(row, seed, attack)) for attack in (outside.attack, LABELS))
        if ours is not None and low is not None:
            pairs = zip(ours["patients"][outside.contrast], low["patients"][outside.contrast], strict=True)
            apart += [a - b for a, b in pairs]
    return str(Figure(apart)) if apart else NONE


class Outlines(NamedTuple):
    """What a label attack shows of the outline, at the site whose image it adds most to."""

    contrast: str
    attack: str
    auc: Figure
    floors: Mapping[str, float]
    """Means of what needs no gradient."""
    gained: Figure
    """AUC beyond the highest floor, window by window of a patient."""


def outlines(results: Results, row: str, seeds: Sequence[int]) -> Outlines | None:
    """The attack on labels that shows most beyond the floors, over all sites; None: none was made."""
    made = [one["masks"] for seed in seeds if (one := results.get(_key(row, seed, GRADIENT))) is not None]
    found = []
    for contrast, attacks in made[0].items() if made else ():
        for attack in attacks:
            scores = [one[contrast][attack] for one in made]
            floors = {
                name: statistics.fmean(score["auc"]["floors"][name] for score in scores)
                for name in (OWN_IMAGE, OTHER_MASKS)
            }
            auc = Figure([value for score in scores for value in score["auc"]["each"] if value is not None])
            higher = max(floors.values())
            gained = Figure([value - higher for value in auc.values])
            if floors[OWN_IMAGE] == higher:
                gained = Figure(
                    [v for score in scores for v in score["advantage_auc"]["each"] if v is not None]
                )
            found.append(Outlines(contrast, attack, auc, floors, gained))
    return max(found, key=lambda one: one.gained.mean, default=None)


def outline(found: Outlines) -> str:
    """AUC, at whose site and by what; in brackets the floors."""
    low = ", ".join(_short(value) for value in found.floors.values())
    return f"{found.auc} ({low}; {found.contrast}, {found.attack})"


def more_than_floors(found: Outlines) -> str:
    """What the gradient adds to the better of the floors."""
    return str(found.gained)


def readouts(results: Results, row: str, attacks: Sequence[str], seeds: Sequence[int]) -> str:
    """What is told of the tumour, at worst over attacks and contrasts; in brackets what needs no image."""
    cells = []
    for name in READ:
        scores = [
            one["tumour"][contrast][name]
            for seed in seeds
            for attack in attacks
            if (one := results.get(_key(row, seed, attack))) is not None
            for contrast in CONTRASTS
        ]
        known = [one for one in scores if one["mean"] is not None]
        if known:
            most = max(known, key=lambda one: one["mean"])
            low = max((value for value in most["floors"].values() if value is not None), default=None)
            cells.append(_short(most["mean"]) + (f" ({_short(low)})" if low is not None else ""))
    return " / ".join(cells) or NONE


def _key(row: str, seed: int, attack: str) -> str:
    return f"{LABELS}/{seed}" if attack == LABELS else f"{row}/{seed}/{attack}"


def _worst(found: Worst | None) -> str:
    return NONE if found is None else f"{found.figure} ({found.contrast}, {found.attack})"


def _short(value: float) -> str:
    """Three digits after the point, without a zero before it."""
    sign, digits = "-" if value < 0 else "", f"{abs(value):.3f}"
    return sign + digits.removeprefix("0")


def floors(results: Results, given: argparse.Namespace) -> str:
    """What needs nothing that was sent, in one line."""
    found = []
    for key, words in ((LABELS, "from the labels alone"), ("floor", "the strangers' mean image")):
        made = [one for seed in given.seeds if (one := results.get(f"{key}/{seed}")) is not None]
        if made:
            figures = {c: Figure([v for one in made for v in one["patients"][c]]) for c in CONTRASTS}
            found.append(f"{words} " + ", ".join(f"{c} {figure}" for c, figure in figures.items()))
    return "; ".join(found)


def shown(results: Results, rows: Sequence[Row], given: argparse.Namespace) -> Table:
    """For a terminal."""
    lines = [columns(results, row, rows, given) for row in rows]
    table = Table(title=f"seeds {given.seeds}", caption=floors(results, given) or None)
    for column in lines[0]:
        table.add_column(column, justify="left" if column == "row" else "right")
    for line in lines:
        table.add_row(*line.values())
    return table


def markdown(results: Results, rows: Sequence[Row], given: argparse.Namespace) -> str:
    """As docs/private.md and docs/privacy.md show it."""
    lines = [columns(results, row, rows, given) for row in rows]
    names = list(lines[0])
    head = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    body = [f"| {' | '.join(line.values())} |" for line in lines]
    low = floors(results, given)
    trained = given.patients - given.validation
    under = (
        f"Seeds {', '.join(map(str, given.seeds))}; {trained} patients to train on, {given.validation} held out; "
        f"{given.steps} steps, {given.pretraining_steps} of pretraining on {given.strangers} strangers; the adversary "
        f"has {given.shadow} others. ± is half a 95 % t interval over patients."
    )
    return "\n".join([*head, *body, "", under, *([f"SSIM without anything sent: {low}."] if low else []), ""])
