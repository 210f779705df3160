"""The page of an evaluation: the table, and the worst patients with the contours of network and people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from splitpeer.report.build import PAGE as REPORT
from splitpeer.results.evaluate import EvaluationTable, PatientRow
from splitpeer.results.page import PAGE, environment, style_hash
from splitpeer.results.palette import dash_of, hex_of
from splitpeer.results.pictures import Sheet, SlicePicture
from splitpeer.results.segmentation import NOT_A_DEVICE
from splitpeer.storage import durable

MOST_ROWS = 500
"""Patients in the page's table, worst first; the CSV has all."""
WHO = ("the network", "people")


@dataclass(frozen=True)
class ShownImage:
    """One of the worst patients, in arrays."""

    row: PatientRow
    masks: np.ndarray
    """bool [regions, x, y, z] on the grid of the truth, RAS."""
    truth: np.ndarray
    affine: np.ndarray
    """float64 4x4, of that grid."""


@dataclass(frozen=True)
class JudgedCase:
    """One of the worst patients, as the page shows it."""

    patient: str
    region: str
    dice: float
    hd95: float
    pictures: list[SlicePicture]
    missing: tuple[str, ...]


class Worst:
    """Keeps the arrays of the few worst patients while others are added.

    Args:
        table: the figures.
        most: patients kept.
    """

    def __init__(self, table: EvaluationTable, most: int) -> None:
        self._table, self._most = table, most
        self._kept: list[tuple[PatientRow, np.ndarray, np.ndarray, np.ndarray, tuple[int, ...]]] = []

    def add(self, row: PatientRow, masks: np.ndarray, truth: np.ndarray, affine: np.ndarray) -> None:
        """One patient, as given to `EvaluationTable.add`."""
        if not self._most:
            return
        self._kept.append((row, np.packbits(masks), np.packbits(truth), affine, masks.shape))
        # Which regions count is only known at the end, so a few more stay.
        self._kept.sort(key=lambda kept: self._table.mean_dice(kept[0]))
        del self._kept[2 * self._most :]

    def shown(self) -> list[ShownImage]:
        """The worst, in order."""
        order = {row.patient: place for place, row in enumerate(self._table.worst())}
        kept = sorted(self._kept, key=lambda one: order[one[0].patient])[: self._most]
        return [
            ShownImage(row, _unpacked(masks, shape), _unpacked(truth, shape), affine)
            for row, masks, truth, affine, shape in kept
        ]


def write_evaluation_page(
    table: EvaluationTable,
    worst: Sequence[ShownImage],
    path: Path,
    *,
    image: Callable[[str], np.ndarray | None] = lambda patient: None,
) -> None:
    """Write the page.

    Args:
        table: all figures.
        worst: patients with pictures.
        path: the file; an older one is replaced.
        image: of a patient, [x, y, z] on the grid of its truth, RAS; None: contours on black.

    Raises:
        ConfigError, DiskTrouble: it cannot be written; there is no half page.
    """
    style = (REPORT / "page.css").read_text(encoding="utf-8") + (PAGE / "page.css").read_text(
        encoding="utf-8"
    )
    origins = {(row.origin.name, row.origin.run, row.origin.step, row.origin.model)
               for row in table.rows if row.origin is not None}  # fmt: skip
    rows = table.worst()
    page = environment().get_template("evaluation.html.jinja").render(
        notice=NOT_A_DEVICE,
        style=Markup(style),  # noqa: S704 - our own files
        style_hash=style_hash(style),
        origins=sorted(origins, key=str),
        regions=[name for name in table.regions if name in table.held],
        absent=[name for name in table.regions if name not in table.held],
        summary=table.summary(),
        rows=[(row, table.mean_dice(row)) for row in rows[:MOST_ROWS]],
        more=max(len(rows) - MOST_ROWS, 0),
        incomplete=sum(bool(row.origin and row.origin.missing) for row in rows),
        failed=sorted(table.failed.items()),
        who=[(name, {"colour": hex_of(place), "dash": dash_of(place)}) for place, name in enumerate(WHO)],
        worst=[_case(table, one, image(one.row.patient)) for one in worst],
        image_name="",
    )  # fmt: skip
    try:
        durable.replace(path, page.encode())
    except OSError as error:
        raise durable.refusal(error, str(path), "--out") from None


def _case(table: EvaluationTable, one: ShownImage, image: np.ndarray | None) -> JudgedCase:
    """The region that is worst, where people saw most of it; where they saw nothing, where the network did."""
    held = [name for name in table.regions if name in table.held] or list(table.regions)
    region = min(held, key=lambda name: one.row.regions[name].dice)
    place = table.regions.index(region)
    masks = np.stack([one.masks[place], one.truth[place]])
    sheet = Sheet(masks, one.affine, image)
    figures = one.row.regions[region]
    return JudgedCase(
        one.row.patient,
        region,
        figures.dice,
        figures.hd95,
        sheet.pictures(sheet.largest(1 if masks[1].any() else 0)),
        one.row.origin.missing if one.row.origin else (),
    )


def _unpacked(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool)
