"""The table of an evaluation at the site of the labels: a row for each prediction, and the figures that may be told."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from splitpeer.data.layouts import subject
from splitpeer.data.task import Task
from splitpeer.errors import DataError
from splitpeer.storage import durable, reading
from splitpeer.training.metrics import Surfaces, VolumeDice, means
from splitpeer.training.scores import Scores
from splitproto.errors import PolicyRefused

MAX_BYTES = 64 << 20
"""Of a table on disk."""
NOBODY = "(withdrawn) "
"""And a number: in place of the ids of patients who have withdrawn consent."""
MOST_FIGURES = 64
"""SP-8.4: entries of `scores`."""


@dataclass(frozen=True)
class ScoreRow:
    """One patient, as predicted from some seats. Lists are in the order of the regions."""

    patient: str
    """The hospital's own id: the table stays here."""
    seats: list[str]
    without: str
    """Seat that was left out on purpose; empty: none."""
    dice: list[float]
    held: list[bool]
    """Whether the mask has the region."""
    hd95_mm: list[float] | None
    predicted_ml: list[float] | None
    true_ml: list[float] | None


class ScoreTable:
    """The rows of one evaluation, as they are on disk after each.

    Args:
        path: of the file.
        task: what was predicted.

    Raises:
        DataError: an earlier process left what cannot be read.
    """

    def __init__(self, path: Path, task: Task) -> None:
        self._path, self._regions = path, task.region_names
        self._rows = self._read()

    def __len__(self) -> int:
        return len(self._rows)

    def takes(self, number: int, patient: str, without: str) -> bool:
        """Whether this may be row `number`: a patient scored twice would make a mean of one (SP-11.20-9)."""
        return number == 0 or all(
            at == number or (row.patient, row.without) != (patient, without) for at, row in self._rows.items()
        )

    def put(self, number: int, row: ScoreRow) -> None:
        """Row `number`; 0 begins the evaluation again.

        Raises:
            PolicyRefused: the table would be larger than `MAX_BYTES`.
            ConfigError, DiskTrouble: it cannot be written.
        """
        rows = {**({} if number == 0 else self._rows), number: row}
        self._write(rows)
        self._rows = rows

    def holds(self, count: int) -> bool:
        """Whether rows 0 to `count` - 1 are there, and no other."""
        return len(self._rows) == count and all(number < count for number in self._rows)

    def dice(self, without: str = "") -> Scores:
        """Means over patients; {}: there is none."""
        rows = self._of(without)
        if not rows:
            return {}
        held = np.any([row.held for row in rows], axis=0)
        return means(self._regions, [np.array(row.dice) for row in rows], held)

    def seats(self) -> list[str]:
        """Those that an evaluation was made without, one at a time."""
        return list(dict.fromkeys(row.without for row in self._rows.values() if row.without))

    def distances(self) -> Scores:
        """Means over patients, mm; {}: none was measured."""
        rows = [row for row in self._of("") if row.hd95_mm is not None]
        if not rows:
            return {}
        held = np.any([row.held for row in rows], axis=0)
        return means(self._regions, [np.array(row.hd95_mm) for row in rows], held)

    def volumes(self) -> dict[str, dict[str, float]]:
        """Means over patients, ml, by region: "predicted" and "true"; {}: none was measured."""
        rows = [
            [row.predicted_ml, row.true_ml]
            for row in self._of("")
            if row.predicted_ml is not None and row.true_ml is not None
        ]
        if not rows:
            return {}
        predicted, true = np.mean(rows, axis=0).tolist()
        return {
            region: {"predicted": predicted[number], "true": true[number]}
            for number, region in enumerate(self._regions)
        }

    def figures(self, told: Collection[str], step: float, least: int) -> dict[str, float]:
        """SP-11.20-9, SP-11.20-10: what the coordinator is told.

        Args:
            told: of dice, hd95 and volume.
            step: to which figures are rounded.
            least: with fewer persons there are none; two scans of one are one person.
        """
        if self._persons("") < least:
            return {}
        found: dict[str, float | None] = {}
        if "dice" in told:
            found |= {f"dice_{region}": score for region, score in self.dice().items()}
            for seat in self.seats():
                if self._persons(seat) >= least:
                    found |= {f"dice_{region}_without_{seat}": s for region, s in self.dice(seat).items()}
        if "hd95" in told:
            found |= {f"hd95_{region}": mm for region, mm in self.distances().items()}
        if "volume" in told:
            for region, ml in self.volumes().items():
                found |= {f"volume_{region}": ml["predicted"], f"true_volume_{region}": ml["true"]}
        known = [(name, rounded(value, step)) for name, value in found.items() if value is not None]
        return dict(known[:MOST_FIGURES])

    def _of(self, without: str) -> Sequence[ScoreRow]:
        return [self._rows[number] for number in sorted(self._rows) if self._rows[number].without == without]

    def _persons(self, without: str) -> int:
        return len({subject(row.patient) for row in self._of(without)})

    def _read(self) -> dict[int, ScoreRow]:
        if not self._path.exists():
            return {}
        return {int(number): ScoreRow(**row) for number, row in _document(self._path)["rows"].items()}

    def _write(self, rows: Mapping[int, ScoreRow]) -> None:
        said = {str(number): asdict(row) for number, row in sorted(rows.items())}
        _replace(self._path, {"version": 1, "regions": self._regions, "rows": said})


def forget(path: Path, is_gone: Callable[[str], bool]) -> set[str]:
    """Take the ids of patients out of a table on disk, of whatever task. Their figures stay: what was told of them are
    means, which may be asked for again, and persons stay apart.

    Returns:
        The ids.

    Raises:
        DataError: it cannot be read.
        ConfigError, DiskTrouble: it cannot be written.
    """
    said = _document(path)
    rows = [said["rows"][number] for number in sorted(said["rows"], key=int)]
    gone = {
        row["patient"] for row in rows if not row["patient"].startswith(NOBODY) and is_gone(row["patient"])
    }
    if gone:
        names: dict[str, str] = {}
        for row in rows:
            if row["patient"] in gone or row["patient"].startswith(NOBODY):
                row["patient"] = names.setdefault(subject(row["patient"]), f"{NOBODY}{len(names) + 1}")
        _replace(path, said)
    return gone


def measured(
    task: Task,
    patient: str,
    seats: Sequence[str],
    without: str,
    masks: tuple[np.ndarray, np.ndarray],
    spacing: Sequence[float] | None,
) -> ScoreRow:
    """The row of one prediction.

    Args:
        masks: predicted and true, [regions, x, y, z].
        spacing: mm; None: distances and volumes are not taken, which is slow.
    """
    predicted, true = masks
    dice = VolumeDice(task.region_names).add(predicted, true)
    surfaces, distances = Surfaces(task.region_names), None
    if spacing is not None:
        distances = surfaces.add(predicted, true, spacing)
    volumes = surfaces.volumes()
    return ScoreRow(
        patient,
        list(seats),
        without,
        list(dice.values()),
        [bool(one.any()) for one in true],
        None if distances is None else list(distances.values()),
        [ml["predicted"] for ml in volumes.values()] or None,
        [ml["true"] for ml in volumes.values()] or None,
    )


def rounded(value: float, step: float) -> float:
    """To the nearest multiple of `step`, without the error of binary fractions: 0.85, not 0.8500000000000001."""
    unit = Decimal(str(step))
    return float((Decimal(str(value)) / unit).to_integral_value() * unit)


def _document(path: Path) -> dict[str, Any]:
    """A table whose rows are whole. Raises DataError."""
    try:
        said = json.loads(reading.read(path, MAX_BYTES))
        for number, row in said["rows"].items():
            int(number), ScoreRow(**row)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DataError(f"{path}: cannot be read: remove it, and the evaluation is repeated") from None
    return dict(said)


def _replace(path: Path, said: Mapping[str, Any]) -> None:
    """Raises PolicyRefused: it would be larger than `MAX_BYTES`; ConfigError, DiskTrouble: it cannot be written."""
    written = (json.dumps(said, indent=1) + "\n").encode()
    if len(written) > MAX_BYTES:
        raise PolicyRefused(f"the scores of one evaluation take more than {MAX_BYTES >> 20} MiB")
    try:
        durable.replace(path, written)
    except OSError as error:
        raise durable.refusal(error, f"{path}: the scores", "[peer] state") from None
