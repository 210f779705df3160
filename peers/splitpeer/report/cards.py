"""One attack as the page shows it: band, pictures with their words, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitpeer.errors import DataError
from splitpeer.report import bands, pictures, words
from splitpeer.report.findings import ReportFinding
from splitpeer.report.model import UNDEFENDED
from splitpeer.report.text import lower_first, plural, upper_first
from splitpeer.report.verdict import under

SHOWN = 4
"""Samples in a picture, spread evenly over all, so that they are not hand-picked."""


@dataclass(frozen=True)
class Picture:
    """One row of the figure (on a narrow screen a column): the same samples in one form."""

    heading: str
    caption: str
    tiles: list[tuple[str, str]]
    """(data: address, alternative text) of each sample."""


class Card:
    """A finding with its pictures and words; `folder` is named where there are several.

    Raises:
        DataError: its arrays do not fit each other.
    """

    def __init__(self, finding: ReportFinding, number: int, folder: str = "") -> None:
        self.finding, self.anchor, self.folder = finding, f"attack-{number}", folder
        entry = finding.strongest
        self.title = f"{upper_first(entry.title)}, {under(entry.configuration)}"
        self.variants = [finding.entry, *([finding.naive] if finding.naive else [])]
        names = {name for variant in self.variants for name in variant.scores}
        order = [name for name in words.METRICS if name in names]
        order += sorted(names - set(order))
        self.main = [name for name in order if name in words.MAIN]
        self.more = [name for name in order if name not in words.MAIN]
        self.flags = []
        if bands.tumour_shows(entry.scores):
            self.flags.append("the target can be found")
        if bands.recognised(entry.scores):
            self.flags.append("the patient can be picked out")
        first = next(iter(entry.scores.values()), None)
        self.basis = ""
        if first is not None:
            self.basis = f"Mean over {plural(first.patients, 'patient')}, {plural(first.samples, 'sample')}"
            self.basis += (
                ". The interval is over patients." if first.low is not None else "; too few for an interval."
            )
        arrays = _Shown.of(finding)
        self.pictures: list[Picture] = []
        self.size = arrays.size if arrays else (0, 0)
        if arrays is not None:
            self.pictures = _images(finding, arrays) if entry.goal == "image" else _maps(finding, arrays)


@dataclass(frozen=True)
class _Shown:
    """The samples of a finding that are shown, cut from its arrays."""

    found: NDArray[Any]
    truth: NDArray[Any] | None
    floor: NDArray[Any] | None
    masks: NDArray[Any] | None
    """True whole tumour [n, *spatial]."""
    tumour: NDArray[Any] | None

    @property
    def size(self) -> tuple[int, int]:
        """Pixels of a tile: width, height."""
        return pictures.SCALE * self.found.shape[2], pictures.SCALE * self.found.shape[3]

    @classmethod
    def of(cls, finding: ReportFinding) -> _Shown | None:
        """None where no reconstruction was kept."""
        entry, arrays = finding.strongest, finding.arrays
        found = arrays.get(entry.id)
        if found is None or not len(found):
            return None
        if entry.goal == "mask":
            found = found[:, None]
        spatial = found.shape[2:]
        if len(spatial) not in (2, 3) or found.shape[1] != 1 or not all(spatial):
            raise DataError(f"{entry.id}: an array {arrays[entry.id].shape} is not a set of images")
        rows = np.asarray(entry.rows if entry.rows is not None else range(len(found)))
        if len(rows) != len(found):
            raise DataError(
                f"{entry.id}: {len(found)} reconstructions, but {len(rows)} rows of the truth are named"
            )
        chosen = np.unique(np.linspace(0, len(found) - 1, min(SHOWN, len(found))).round().astype(int))

        def take(name: str, rows: NDArray[Any]) -> NDArray[Any] | None:
            array = arrays.get(name)
            if array is None:
                return None
            if rows.max() >= len(array) or rows.min() < 0:
                raise DataError(f"{entry.id}: names row {rows.max()} of {name}, which has {len(array)}")
            if array.shape[-len(spatial) :] != spatial or array.ndim - len(spatial) not in (1, 2):
                raise DataError(f"{entry.id}: its images are {spatial}, {name} is {array.shape}")
            chosen: np.ndarray = array[rows]
            return chosen

        masks = take("masks", rows[chosen])
        return cls(
            found[chosen],
            take(f"truth_{entry.modality}", rows[chosen]),
            take(f"floor_{entry.modality}", rows[chosen]),
            masks if masks is None or masks.ndim == 1 + len(spatial) else masks[:, 0],
            take(f"tumour_{entry.id}", chosen),
        )


def _images(finding: ReportFinding, shown: _Shown) -> list[Picture]:
    entry, count = finding.strongest, len(shown.found)
    tiles = pictures.image_tiles(shown.truth, shown.found, shown.masks, shown.tumour, shown.floor)
    what = f"{plural(count, 'sample')} of {finding.where}"
    true = f" ({what})." + (" The true target is outlined in blue." if shown.masks is not None else "")
    found = ", in the same grey window." if shown.truth is not None else "."
    if shown.tumour is not None:
        found += " What a network takes for the target in it is outlined in orange."
    reached = "" if finding.leakage is None else f"; mean likeness {finding.leakage:.2f}"
    by = f"recovered by {lower_first(entry.title)}, {under(entry.configuration)}{reached}"
    return _rows(
        tiles,
        ("truth", "True image", true, f"true image of {finding.where}"),
        ("found", "Recovered", f" by the coordinator{found}", f"{by}"),
        (
            "floor",
            "Average image",
            ": what one shows without having seen anything.",
            "average of other patients",
        ),
    )


def _maps(finding: ReportFinding, shown: _Shown) -> list[Picture]:
    entry = finding.strongest
    tiles = pictures.mask_tiles(shown.truth, shown.found[:, 0], shown.masks)
    reached = "" if finding.leakage is None else f"; AUC {finding.leakage:.2f}"
    by = f"map recovered by {lower_first(entry.title)}, {under(entry.configuration)}{reached}"
    true = " of the target, in blue, which this hospital does not hold."
    return _rows(
        tiles,
        ("truth", "True outline", true, "true outline of the target"),
        (
            "found",
            "Recovered map",
            ": bright where the hospital takes tissue for the target, each map from its darkest to its brightest.",
            by,
        ),
    )


def _rows(tiles: dict[str, list[str]], *named: tuple[str, str, str, str]) -> list[Picture]:
    return [
        Picture(heading, caption, [(tile, f"Sample {i}: {alt}") for i, tile in enumerate(tiles[name], 1)])
        for name, heading, caption, alt in named
        if name in tiles
    ]


def groups(cards: Sequence[Card]) -> list[dict[str, Any]]:
    """Cards by what was attacked and configuration; undefended first, and the strongest attack first."""
    found: dict[tuple[str, str], list[Card]] = {}
    for card in cards:
        found.setdefault((card.finding.where, card.finding.entry.configuration), []).append(card)

    def most(card: Card) -> float:
        return -(card.finding.leakage or 0.0)

    order = sorted(
        found, key=lambda name: (name[0], name[1] != UNDEFENDED, min(map(most, found[name])), name[1])
    )
    return [
        {"heading": f"{where}, {under(name)}", "cards": sorted(found[where, name], key=most)}
        for where, name in order
    ]
