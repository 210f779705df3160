"""What a coordinator cannot make of figures: a mean of one person, counts that begin again, tables without end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from splitpeer.data.layouts import find_labels
from splitpeer.data.sampling import batch_digest
from splitpeer.data.task import glioma
from splitpeer.data.volumes import Volumes
from splitpeer.settings.bounds import Bounds
from splitpeer.site import scoring
from splitpeer.site.budgets import MOST_SEATS, Budgets, BudgetSpent
from splitpeer.site.labelling import Labelling, LossTold
from splitpeer.site.scoring import ScoreRow, ScoreTable
from splitproto.errors import PolicyRefused, SchemaMismatch, StepMismatch
from splitproto.messages import Conclude, Prediction
from splitproto.records import Sample

SHAPE = (20, 18, 4)
TASK = glioma("msd")


def row(patient: str, without: str = "") -> ScoreRow:
    return ScoreRow(patient, ["t1"], without, [0.5] * 3, [True] * 3, [1.0] * 3, [2.0] * 3, [3.0] * 3)


def told(table: ScoreTable, least: int = 2) -> dict[str, float]:
    return table.figures(("dice", "hd95", "volume"), 0.01, least)


@pytest.mark.parametrize(
    ("patients", "persons"),
    [
        (["a", "b"], 2),
        (["BraTS-GLI-00005-000", "BraTS-GLI-00005-001"], 1),
        (["BraTS-GLI-00005-000", "BraTS-GLI-00006-000"], 2),
    ],
)
def test_figures_are_of_persons(tmp_path: Path, patients: list[str], persons: int) -> None:
    """SP-11.20-10: scans of one are one."""
    table = ScoreTable(tmp_path / "scores.json", TASK)
    for number, (patient, without) in enumerate((p, w) for w in ("", "t1") for p in patients):
        table.put(number, row(patient, without))
    assert bool(told(table)) == (persons == 2)
    assert any(name.endswith("_without_t1") for name in told(table, persons))
    assert told(table, persons + 1) == {}


def test_a_table_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would not be read again is not written."""
    path = tmp_path / "scores.json"
    table = ScoreTable(path, TASK)
    table.put(0, row("a"))
    monkeypatch.setattr(scoring, "MAX_BYTES", path.stat().st_size + 100)
    with pytest.raises(PolicyRefused, match="the scores of one evaluation take more than"):
        table.put(1, row("b"))
    assert len(table) == len(ScoreTable(path, TASK)) == 1
    table.put(0, row("b"))
    # No memory for a number that anybody can write.
    assert table.holds(1) and not table.holds(2) and not table.holds(1 << 53)


def test_names_of_seats_begin_no_count_of_their_own(tmp_path: Path) -> None:
    """SP-11.20-10: each allows as many again of any patient, and there are so many; a restart changes nothing."""
    bounds = Bounds(max_window_evaluations=2)
    counts = Budgets(tmp_path, bounds)
    for without in ("", "t1", "", "t1"):
        counts.predicted(b"a", without)
    counts.flush()
    again = Budgets(tmp_path, bounds)
    for spent in (counts, again):
        with pytest.raises(BudgetSpent, match="a patient was scored more than 4 times in one run"):
            spent.predicted(b"a", "")
    for number in range(MOST_SEATS - 1):
        again.predicted(number.to_bytes(2), f"x{number}")
    with pytest.raises(BudgetSpent, match="predictions without more than 64 different seats"):
        again.predicted(b"b", "one more")
    with pytest.raises(BudgetSpent, match="predictions without more than 64 different seats"):
        Budgets(tmp_path, bounds).predicted(b"b", "one more")
    again.predicted(b"b", "t1")


Predict = Callable[..., Prediction]


@pytest.fixture
def labels(tmp_path: Path) -> tuple[Labelling, Predict]:
    """A site with masks of a and b after step 0, and predictions of its patients."""
    folder = tmp_path / "labels"
    folder.mkdir()
    mask = np.zeros(SHAPE, np.uint8)
    mask[4:9, 4:9] = 1
    for patient in "ab":
        nib.save(nib.Nifti1Image(mask, np.eye(4)), folder / f"{patient}.nii.gz")
    masks = Volumes(find_labels(folder, "folder"), salt=bytes(32), labels=TASK)
    job: Any = SimpleNamespace(window=(16, 16, 1), steps=4, batch=2, augment=False)
    budgets = Budgets(None, Bounds())
    site = Labelling(bytes(16), job, masks, TASK, tmp_path / "run", LossTold(("dice",)), None, budgets)
    keys = {case.patient: key for key, case in masks.cases.items()}
    (tmp_path / "run").mkdir()

    def prediction(number: int, patient: str, **changed: Any) -> Prediction:
        sample = Sample(keys[patient], (0, 0, 0))
        digest = batch_digest(0, (sample,), None)
        zeros = np.zeros((len(TASK.regions), *SHAPE), "u1")
        return replace(Prediction(0, number, sample, digest, ("t1",), None, {"mask": zeros}), **changed)

    return site, prediction


def test_a_patient_is_scored_once_in_an_evaluation(labels: tuple[Labelling, Predict]) -> None:
    """SP-11.20-9, SP-11.20-10: two of one would be that one's Dice."""
    site, prediction = labels
    site.score(prediction(0, "a"), 0)
    for number in (1, 7):
        with pytest.raises(SchemaMismatch, match="a patient is scored once in an evaluation"):
            site.score(prediction(number, "a"), 0)
    with pytest.raises(SchemaMismatch, match="a seat that has no name"):
        site.score(prediction(1, "a", without=""), 0)
    # Once without each seat, and again under the same number, as after a lost link.
    for _ in range(2):
        site.score(prediction(1, "a", without="t1"), 0)
    with pytest.raises(SchemaMismatch, match="once without each seat"):
        site.score(prediction(2, "a", without="t1"), 0)
    assert site.conclude(Conclude(0, 2), 0)[0].values == {}
    site.score(prediction(2, "b"), 0)
    assert site.conclude(Conclude(0, 3), 0)[0].values.keys() >= {"dice_WT", "dice_mean"}
    # Of a part there are no figures, and number 0 begins again.
    with pytest.raises(StepMismatch, match="3 of 2 predictions"):
        site.conclude(Conclude(0, 2), 0)
    site.score(prediction(0, "b"), 0)
    site.score(prediction(1, "a"), 0)
    assert site.conclude(Conclude(0, 2), 0)[0].values


def test_who_has_withdrawn_is_in_no_table_and_has_no_prediction(labels: tuple[Labelling, Predict]) -> None:
    """SP-11.20-12: figures stay, so that what was told can be told again; so does who is whom."""
    site, prediction = labels
    for number, patient in enumerate("ab"):
        site.score(prediction(number, patient), 0)
    told = site.conclude(Conclude(0, 2), 0)[0]
    run, key = site._folder, {case.patient: key for key, case in site._masks.cases.items()}
    for folder in (run, run.parent / "earlier"):
        (folder / "predictions").mkdir(parents=True)
        for name in ("a", "b", " "):
            (folder / "predictions" / f"{name}.nii.gz").touch()

    def left(folder: Path) -> list[str]:
        return sorted(path.name for path in (folder / "predictions").iterdir())

    (run.parent / "labels" / "a.nii.gz").unlink()
    assert site.forget({key["a"], bytes(16)}, everywhere=False) == {key["a"]}
    assert left(run) == [" .nii.gz", "b.nii.gz"] and len(left(run.parent / "earlier")) == 3
    rows = json.loads((run / "scores-00000000.json").read_text())["rows"]
    assert [row["patient"] for row in rows.values()] == ["(withdrawn) 1", "b"]
    assert site.conclude(Conclude(0, 2), 0)[0] == told
    assert site.forget({key["a"]}, everywhere=True) == {key["a"]}
    assert left(run.parent / "earlier") == [" .nii.gz", "b.nii.gz"]
    assert site.forget({key["a"]}, everywhere=True) == frozenset()
    # Two persons stay two, and what they are called does not depend on when they left.
    assert site.forget({key["b"]}, everywhere=True) == {key["b"]}
    assert site.conclude(Conclude(0, 2), 0)[0] == told
