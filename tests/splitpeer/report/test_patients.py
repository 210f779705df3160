"""Patient by patient: the attack that works best on each, the interval over patients, and who is the worst."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitpeer.leakage.scores import summarise
from splitpeer.report.build import write_report
from splitpeer.report.findings import pair
from splitpeer.report.model import AuditRun, Entry, Source
from splitpeer.report.patients import by_patient
from splitpeer.report.store import Folder

PATIENTS = ("aa", "bb", "cc", "dd")


def entry(name: str, values: tuple[float, ...], **fields: Any) -> Entry:
    figure = "advantage_auc" if fields.get("goal") == "mask" else "ssim"
    scores = {figure: summarise(values, range(len(values)))}
    given = {"attack": name, "title": name, "goal": "image", "modality": "T1"} | fields
    return Entry(id=name, scores=scores, **given)


def rows(*entries: Entry, patients: tuple[str, ...] = PATIENTS) -> list[Any]:
    run = AuditRun(capture=Source(role="coordinator"), entries=entries, patients=patients)
    return by_patient(pair([Folder(path=Path("a"), run=run)]))


def test_each_patient_counts_with_the_attack_that_works_best_there() -> None:
    one, other = (0.2, 0.3, 0.9, 0.4), (0.5, 0.1, 0.3, 0.4)
    (row,) = rows(entry("one", one), entry("other", other))
    best = np.maximum(one, other)
    assert row.score.each == pytest.approx(best) and row.score.mean == pytest.approx(best.mean())
    # Student's t of four patients, as everywhere.
    assert (row.score.low, row.score.high) == (
        summarise(best, range(4)).low,
        min(summarise(best, range(4)).high, 1.0),
    )
    assert row.score.low is not None and row.score.low < row.score.mean
    assert (row.worst, row.most, row.by, row.attacks) == ("cc", 0.9, "One", 2)


def test_adversaries_who_read_different_things_are_told_apart() -> None:
    found = rows(
        entry("a", (0.2, 0.3, 0.4, 0.5)),
        entry("b", (0.9, 0.3, 0.4, 0.5), reads="with T2 in clear"),
        entry("c", (0.3, 0.3, 0.8, 0.5), defences=("secure sum of 4 hospitals",)),
    )
    assert [(row.adversary, row.worst, row.attacks) for row in found] == [
        ("no defence", "dd", 1),
        ("no defence, with T2 in clear", "aa", 1),
        ("secure sum of 4 hospitals", "cc", 1),
    ]


def test_who_it_is_is_not_guessed_and_naive_attacks_do_not_count() -> None:
    naive = entry("n", (0.9, 0.9, 0.9, 0.9), defences=("dropout:0.5",), adaptive=False)
    (row,) = rows(entry("a", (0.2, 0.3, 0.4)), naive)
    assert (row.worst, row.most) == ("", 0.4)


def test_the_page_has_a_row_for_both_sides(make_run: Callable[..., Path], tmp_path: Path) -> None:
    entries = (
        entry("whitebox", (0.2, 0.3, 0.9, 0.4)),
        entry("norms", (-0.1, 0.02, 0.05, 0.0), goal="mask", modality="T2"),
    )
    folder = make_run(tmp_path / "run", entries=entries, patients=PATIENTS)
    write_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("Patient by patient</h3>") == 2
    assert "<td>cc</td>" in page and page.count("0.90") >= 1
    low, high = (f"{value:+.2f}".replace("-", "−") for value in _between(entries[1]))
    assert f"{low} to {high}" in page, "the advantage over the own image has its interval in the table"


def _between(one: Entry) -> tuple[float, float]:
    score = one.scores["advantage_auc"]
    return score.low, score.high
