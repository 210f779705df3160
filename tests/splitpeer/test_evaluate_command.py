"""`splitpeer evaluate`: figures are those of the masks that people drew, whatever the order of the files' axes."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from splitpeer.cli import main
from splitpeer.daemon.spool import Spool, Waiting, folder_of
from splitpeer.daemon.spooled import Status
from splitpeer.data.files import Case
from splitpeer.data.geometry import Geometry
from splitpeer.data.nifti import read_header
from splitpeer.data.task import glioma
from splitpeer.results.evaluate import EvaluationTable, Truth
from splitpeer.settings import templates
from tests.splitpeer.daemon.spooling import TASK
from tests.splitpeer.daemon.stand_in import answers_on, daemon, masks_of

LABELS = ("--labels", "labels", "--convention", "task")
TASK_OF_TEMPLATE = 'preset = "glioma"'
OWN_TASK = 'values = { edema = 1, core = 2 }\nregions = { whole = ["edema", "core"], core = ["core"] }'
SHAPE = (12, 10, 6)
AFFINES = {
    "P001": np.array([[-10.0, 0, 0, 40], [0, -12, 0, 50], [0, 0, 30, -20], [0, 0, 0, 1]]),
    "P002": np.array([[0, 0, 20.0, -9], [15, 0, 0, -8], [0, -10, 0, 30], [0, 0, 0, 1]]),
    "=P03": np.array([[10.0, 0, 0, 0], [0, 10, 0, 0], [0, 0, 25, 0], [0, 0, 0, 1]]),
}


@pytest.fixture
def site(peer_toml: Path) -> Path:
    """A hospital with images and masks: P001's mask is the answer, P002's lacks a part, =P03's lacks the core."""
    folder = peer_toml.parent
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for patient, affine in AFFINES.items():
        voxels = np.random.default_rng(3).integers(1, 900, SHAPE).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, affine), folder / "images" / f"{patient}.nii.gz")
    for patient, grid in grids(folder).items():
        masks = masks_of(grid)
        if patient == "P002":
            masks[:, :3] = 0
        if patient == "=P03":
            masks[1] = 0
        labels = TASK.labels(masks.astype(bool))
        # RAS, whatever the order of the image's axes is.
        nib.save(nib.Nifti1Image(labels, grid.affine), folder / "labels" / f"{patient}.nii.gz")
    return folder


def grids(site: Path) -> dict[str, Geometry]:
    return {
        patient: read_header(Case(patient, site / "images" / f"{patient}.nii.gz")).geometry
        for patient in AFFINES
    }


@pytest.fixture
def evaluate(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, str]]:
    """`splitpeer evaluate ARGUMENTS`; returns what it printed."""

    monkeypatch.chdir(site)

    def call(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as left:
            main(
                [
                    "evaluate",
                    *(str(one) for one in (*LABELS, *arguments)),
                    "--config",
                    str(site / "peer.toml"),
                ]
            )
        out, err = capsys.readouterr()
        assert left.value.code == code, err
        return out, err

    return call


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


def test_all_patients_with_masks(site: Path, evaluate: Callable[..., tuple[str, str]]) -> None:
    with daemon(site / "state", answers_on(grids(site))):
        out, _ = evaluate("--out", site / "study")
    found = json.loads((site / "study" / "evaluation.json").read_text())
    rows = {row["patient"]: row for row in found["patients"]}
    assert list(rows) == ["=P03", "P002", "P001"], "the worst first"
    masks = masks_of(grids(site)["P002"]).astype(bool)
    less = masks.copy()
    less[:, :3] = False
    for place, region in enumerate(("whole", "core")):
        of = rows["P002"]["regions"][region]
        assert of["dice"] == pytest.approx(dice(masks[place], less[place]))
        # Voxels of 15 x 10 x 20 mm.
        assert of["predicted_ml"] == pytest.approx(3.0 * masks[place].sum())
        assert of["true_ml"] == pytest.approx(3.0 * less[place].sum())
        assert rows["P001"]["regions"][region]["dice"] == 1 and rows["P001"]["regions"][region]["hd95"] == 0
    assert rows["=P03"]["regions"]["core"]["dice"] == 0
    assert found["summary"]["core"]["dice_worst"] == 0
    assert found["summary"]["mean"]["dice"] == pytest.approx(
        np.mean([row["mean_dice"] for row in rows.values()])
    )
    assert found["runs"] == [{"id": "ab" * 8, "name": "glioma", "step": 40, "model_sha256": "cd" * 32}]
    lines = list(csv.DictReader((site / "study" / "evaluation.csv").read_text().splitlines()))
    assert [line["patient"] for line in lines] == ["'=P03", "P002", "P001"]
    assert float(lines[1]["dice_whole"]) == pytest.approx(rows["P002"]["regions"]["whole"]["dice"], rel=1e-5)
    assert lines[0]["missing"] == "flair"
    page = (site / "study" / "evaluation.html").read_text()
    # The own image lies beneath, and both contours are there.
    assert page.count("<figure>") == 9 and page.count("data:image/png") == 9
    assert "without flair" in page and "<script" not in page
    assert "whole" in out and "worst: =P03" in out
    assert sorted(os.listdir(site / "study")) == ["evaluation.csv", "evaluation.html", "evaluation.json"]
    assert os.listdir(folder_of(site / "state")) == []


def test_segmentations_that_are_there(site: Path, evaluate: Callable[..., tuple[str, str]]) -> None:
    text = templates.job_toml("lesions", {"north": ["t1"], "ukm": ["flair"]})
    assert text.count(TASK_OF_TEMPLATE) == 1
    (site / "job.toml").write_text(text.replace(TASK_OF_TEMPLATE, OWN_TASK))
    (site / "made").mkdir()
    for patient in ("P001", "P002"):
        grid = grids(site)[patient]
        labels = TASK.labels(masks_of(grid).astype(bool))[::-1]
        affine = grid.affine @ np.array(
            [[-1, 0, 0, grid.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
        )
        nib.save(nib.Nifti1Image(labels, affine), site / "made" / f"{patient}.nii.gz")
    out, err = evaluate(
        "--out", site / "study", "--masks", site / "made", "--job", site / "job.toml", "--json", code=4
    )
    found = json.loads(out)
    assert {row["patient"]: round(row["regions"]["whole"]["dice"], 3) for row in found["patients"]} == {
        "P001": 1.0, "P002": round(dice(*_pair(site)), 3)
    }  # fmt: skip
    assert "no segmentation of =P03" in found["failed"]["=P03"]
    assert err.splitlines()[-1] == "splitpeer: 1 of 3 patients have no figures, see evaluation.json"
    evaluate("P001", "--out", site / "study", "--masks", site / "made", "--job", site / "job.toml")


def _pair(site: Path) -> tuple[np.ndarray, np.ndarray]:
    whole = masks_of(grids(site)["P002"]).astype(bool)[0]
    less = whole.copy()
    less[:3] = False
    return whole, less


def test_nobody_can_be_evaluated(site: Path, evaluate: Callable[..., tuple[str, str]]) -> None:
    def refused(spool: Spool, one: Waiting) -> None:
        spool.note(one.id, Status.failed("refused", "north does not allow it"))

    with daemon(site / "state", refused):
        _, err = evaluate("--out", site / "study", code=1)
        assert err.splitlines()[-1] == "splitpeer: 3 of 3 patients could not be evaluated"
        _, err = evaluate("P001", "--out", site / "study", code=1)
        assert err == "splitpeer: north does not allow it\n"
    assert os.listdir(site / "study") == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["P009"], "P009: no mask of this patient"),
        (["--labels", "nowhere"], "nowhere"),
        (["--masks", "labels"], "add --convention"),
        (["--masks", "nowhere", "--convention", "msd"], "nowhere"),
        (["--worst", "99"], "--worst"),
    ],
)
def test_mistakes(
    site: Path,
    evaluate: Callable[..., tuple[str, str]],
    arguments: list[str],
    said: str,
) -> None:
    _, err = evaluate(*arguments, "--out", "study", code=4)
    assert said in err and len(err.splitlines()) == 1


def test_a_convention_is_not_guessed(site: Path, evaluate: Callable[..., tuple[str, str]]) -> None:
    with daemon(site / "state", answers_on(grids(site))):
        _, err = evaluate("P001", "--out", site / "study", "--convention", "msd", code=4)
    assert "convention msd is of glioma masks, and the run segments whole, core" in err


def test_a_region_that_no_mask_contains_is_not_counted() -> None:
    task = glioma("msd")
    masks = np.zeros((3, 4, 4, 4), bool)
    masks[:2, :2] = True
    table = EvaluationTable(task.region_names)
    grid = Geometry.of((4, 4, 4), np.diag([10.0, 10, 10, 1]))
    row = table.add("a", masks, Truth(masks, grid))
    assert table.held == {"WT", "TC"} and table.mean_dice(row) == 1
    assert table.summary().keys() == {"WT", "TC", "mean"}
