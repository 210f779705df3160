"""Pictures are written, of the right size and not blank, also for the extreme cases of a run."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from splitpeer.report import charts
from splitpeer.report import charts as pictures
from splitpeer.report.charts import dice_bars, prediction_sheet, training_curve

COLOURS = {**dict(zip(("WT", "TC", "ET"), charts.COLOURS, strict=False)), "mean": charts.MEAN}


def colours_in(path: Path) -> set[str]:
    red, green, blue = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(np.uint32).T
    return {f"#{colour:06X}" for colour in np.unique(red << 16 | green << 8 | blue)}


def test_training_curve(tmp_path: Path) -> None:
    records = [{"step": step, "loss": 2 / (1 + step)} for step in range(40)]
    training_curve(records, tmp_path / "loss.png")
    assert COLOURS["WT"] not in colours_in(tmp_path / "loss.png")
    records.append({"step": 40, "dice": {"WT": 0.8, "TC": 0.6, "ET": None, "mean": 0.7}})
    training_curve(records, tmp_path / "new" / "both.png")
    drawn = colours_in(tmp_path / "new" / "both.png")
    assert {COLOURS["WT"], COLOURS["TC"], COLOURS["mean"]} <= drawn
    assert COLOURS["ET"] not in drawn, "nothing was scored"
    training_curve([], tmp_path / "empty.png")


def test_the_legend_says_how_many_patients_the_points_stand_for() -> None:
    some, all_of_them = {"volumes": 6}, {"volumes": 24}
    assert pictures._counted([some, some, all_of_them]) == "24 patients at the end, 6 before"
    assert pictures._counted([some, some]) == pictures._counted([{}]) == pictures._counted([]) == ""


def test_steps_that_a_rollback_made_void_are_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = {"step": 2, "volumes": 1, "dice": {"mean": 0.5}, "made_from": ["flair", "t2"]}
    lines: list[dict[str, object]] = [
        *({"step": step, "loss": 1.0} for step in (1, 2, 3)),
        {"step": 1, "rollback": True},
        *({"step": step, "loss": 2.0} for step in (2, 3)),
        {"step": 2, "rollback": True},
        dice,
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn: list[object] = []
    monkeypatch.setattr(pictures, "training_curve", lambda records, path: drawn.extend(records))
    pictures.draw_curve(tmp_path)
    assert drawn == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, dice]


def test_prediction_sheet(tmp_path: Path) -> None:
    truth = np.zeros((3, 32, 40), dtype=bool)
    truth[:, 10:20, 10:20] = True
    row = {
        "contrasts": {"T1": np.random.default_rng(0).random((32, 40)), "FLAIR": np.zeros((32, 40))},
        "truth": truth,
        "prediction": np.zeros_like(truth),
        "title": "case-0001, slice 3",
    }
    prediction_sheet([row, row], tmp_path / "two.png")
    prediction_sheet([row], tmp_path / "one.png")
    two, one = (matplotlib.image.imread(tmp_path / name) for name in ("two.png", "one.png"))
    assert two.shape[0] > one.shape[0]
    assert two.shape[1] == one.shape[1]
    with pytest.raises(ValueError, match="no slices"):
        prediction_sheet([], tmp_path / "none.png")


def test_dice_bars(tmp_path: Path) -> None:
    scores = {"WT": 0.82, "TC": 0.7, "ET": 0.8, "mean": 0.773}
    dice_bars(
        {"split": scores, "T1 alone": {**scores, "ET": None}, "T2 alone": dict.fromkeys(scores)},
        tmp_path / "bars.png",
    )
    assert {COLOURS[region] for region in scores} <= colours_in(tmp_path / "bars.png")
    with pytest.raises(ValueError, match="no networks"):
        dice_bars({}, tmp_path / "none.png")


def test_pictures_name_the_regions_of_any_task(tmp_path: Path) -> None:
    """The first region has the first colour; more regions than colours still have one each."""
    names = [f"part-{number}" for number in range(9)]
    dice = dict.fromkeys(names, 0.5) | {"mean": 0.5}
    training_curve([{"step": 1, "dice": dice}], tmp_path / "curve.png")
    assert {charts.COLOURS[0], charts.COLOURS[6], charts.MEAN} <= colours_in(tmp_path / "curve.png")
    dice_bars({"split": dice}, tmp_path / "bars.png")
    assert set(charts.COLOURS) <= colours_in(tmp_path / "bars.png")
    masks = np.zeros((2, 16, 16), bool)
    masks[0, 2:8, 2:8] = masks[1, 9:14, 9:14] = True
    row = {"contrasts": {"ct": np.ones((16, 16))}, "truth": masks, "prediction": masks, "title": "one"}
    prediction_sheet([row], tmp_path / "sheet.png", ("liver", "lesion"))
    assert set(charts.COLOURS[:2]) <= colours_in(tmp_path / "sheet.png")
