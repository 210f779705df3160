"""Layout "msd": any task of the Decathlon; `dataset.json` says what is in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from splitpeer.data import msd as layout
from splitpeer.data.check import check
from splitpeer.data.layouts import detect_layout, find, find_images, find_labels, listing, look
from splitpeer.data.nifti import read_voxels
from splitpeer.data.volumes import Volumes
from splitpeer.errors import DataError


@pytest.fixture
def task(tmp_path: Path, files):
    """Writes a task: task(modality table, patients) -> its folder; channel c of patient n holds 100 * n + c."""

    def make(modality: dict[str, str], patients: int = 2, labels: dict[str, str] | None = None) -> Path:
        root = tmp_path / "Task"
        training = []
        for number in range(patients):
            name = f"prostate_{number:02d}.nii.gz"
            channels = [np.full((6, 5, 4), 100 * number + c, np.float32) for c in range(len(modality))]
            voxels = np.stack(channels, -1) if len(channels) > 1 else channels[0]
            files.save(root / "imagesTr" / name, voxels)
            files.save(root / "labelsTr" / name, files.mask((6, 5, 4), values=(1, 2)))
            training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
        write(
            root,
            modality=modality,
            labels=labels or {"0": "background", "1": "PZ", "2": "TZ"},
            training=training,
        )
        return root

    return make


def write(root: Path, **entries: object) -> None:
    path = root / "dataset.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | entries))


def test_a_prostate_task_has_two_modalities_in_one_file(task) -> None:
    root = task({"0": "T2", "1": "ADC"})
    assert detect_layout(root) == "msd"
    assert listing(root, "msd").modalities() == ("adc", "t2")
    cases = find_images(root, "msd", "ADC")
    assert [(case.patient, case.channel) for case in cases] == [("prostate_00", 1), ("prostate_01", 1)]
    assert [float(read_voxels(case)[0].max()) for case in cases] == [1.0, 101.0]
    assert [float(read_voxels(case)[0].max()) for case in find_images(root, "msd", "t2")] == [0.0, 100.0]
    assert [case.patient for case in find_labels(root, "msd")] == ["prostate_00", "prostate_01"]
    assert layout.label_names(root) == {0: "background", 1: "PZ", 2: "TZ"}


def test_a_task_of_one_modality_has_files_of_three_axes(task) -> None:
    root = task({"0": "CT"})
    cases = find_images(root, "msd", "ct")
    assert [case.channel for case in cases] == [None, None]
    assert Volumes(cases[1:], salt=bytes(32)).geometry(
        Volumes(cases[1:], salt=bytes(32)).keys()[0]
    ).shape == (6, 5, 4)


def test_data_check_reads_any_task_and_shows_what_its_labels_mean(task) -> None:
    root = task({"0": "CT", "1": "PET"}, labels={"0": "background", "1": "cancer"})
    report = check(root, modalities=["pet"])
    assert report.counts == {"pet": 2, "labels": 2} and report.layout == "msd"
    assert "label         1 cancer" in report.lines()
    assert check(root).counts == {"ct": 2, "pet": 2, "labels": 2}


def test_every_missing_file_is_counted_and_the_others_are_read(task) -> None:
    root = task({"0": "T2", "1": "ADC"}, patients=6)
    for number in range(4):
        (root / "imagesTr" / f"prostate_{number:02d}.nii.gz").unlink()
    (root / "labelsTr" / "prostate_05.nii.gz").unlink()
    report = check(root, convention="brats2023")
    assert report.counts == {"adc": 2, "t2": 2, "labels": 5}
    gone = [text for text in report.problems if "listed in dataset.json but not in" in text]
    assert len(gone) == 2
    assert "prostate_02.nii.gz and 1 more: listed" in gone[0] and "prostate_05.nii.gz: listed" in gone[1]
    with pytest.raises(DataError, match=r"and 1 more: listed in dataset\.json but not in"):
        find(root, "msd", "t2")
    with pytest.raises(DataError, match=r"labelsTr/prostate_05\.nii\.gz: listed"):
        find(root, "msd", None)


def test_a_site_without_masks_is_only_warned(task) -> None:
    root = task({"0": "T2", "1": "ADC"})
    for path in (root / "labelsTr").iterdir():
        path.unlink()
    assert [case.patient for case in find_images(root, "msd", "t2")] == ["prostate_00", "prostate_01"]
    report = check(root, modalities=["adc"])
    assert any("labelsTr/prostate_00.nii.gz" in text for text in report.warnings)
    assert not any("labelsTr" in text for text in report.problems)


@pytest.mark.parametrize(
    ("modality", "wanted", "what"),
    [
        (
            {"0": "T2", "1": "t2w"},
            "t2",
            "2 channels are 't2' (it lists T2, t2w): name a modality that is there once",
        ),
        (
            {"0": "T2", "1": "b 800"},
            "t2",
            "channel 1 is 'b 800', which is not a valid name of a modality: write it without",
        ),
        ({"0": "T2", "1": "label"}, "t2", "channel 1 is 'label', which is not a valid name of a modality"),
        ({"0": "T2", "1": "ADC"}, "dwi", "0 channels are 'dwi' (it lists T2, ADC): name a modality"),
    ],
)
def test_an_unclear_channel_is_a_problem_and_never_a_guess(task, modality, wanted: str, what: str) -> None:
    root = task(modality)
    with pytest.raises(DataError) as caught:
        find_images(root, "msd", wanted)
    assert what in str(caught.value)
    assert any(what in text for text in check(root, modalities=[wanted] if wanted else []).problems)


def test_a_problem_of_one_channel_leaves_the_others_usable(task) -> None:
    root = task({"0": "T2", "1": "T2w", "2": "ADC"})
    assert [case.channel for case in find_images(root, "msd", "adc")] == [2, 2]


@pytest.mark.parametrize(
    "image",
    ["../other.nii.gz", "/etc/other.nii.gz", "imagesTr/../../other.nii.gz"],
    ids=["up", "absolute", "hidden"],
)
def test_a_description_does_not_lead_out_of_its_folder(task, files, image: str) -> None:
    root = task({"0": "CT"})
    files.save(root.parent / "other.nii.gz", files.head())
    write(root, training=[{"image": image, "label": image}])
    assert look(root, "msd", "ct").cases == ()
    with pytest.raises(DataError, match=r"listed in dataset\.json but not in"):
        find(root, "msd", "ct")


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ({"image": "./imagesTr/prostate_00.nii.gz"}, '"training" entry 2 lacks "image" or "label"'),
        (["image"], '"training" entry 2 lacks'),
        ({"image": 3, "label": 4}, '"training" entry 2 lacks'),
        ({"image": "a\0.nii", "label": "b"}, '"training" entry 2 lacks'),
    ],
)
def test_a_broken_entry_is_named_by_its_number(task, entry: object, what: str) -> None:
    root = task({"0": "CT"})
    first = {"image": "./imagesTr/prostate_00.nii.gz", "label": "./labelsTr/prostate_00.nii.gz"}
    write(root, training=[first, entry])
    found = look(root, "msd", "ct")
    assert [case.patient for case in found.cases] == ["prostate_00"]
    assert what in found.problems[0]


def test_two_entries_of_one_patient_are_refused(task) -> None:
    root = task({"0": "CT"})
    entry = {"image": "./imagesTr/prostate_00.nii.gz", "label": "./labelsTr/prostate_00.nii.gz"}
    write(root, training=[entry, entry])
    assert "are the same patient" in look(root, "msd", "ct").problems[0]


def test_the_description_is_read_within_bounds(task, monkeypatch) -> None:
    root = task({"0": "CT"})
    (root / "dataset.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="not readable JSON"):
        find(root, "msd", "ct")
    monkeypatch.setattr(layout, "MAX_BYTES", 10)
    with pytest.raises(DataError, match=r"not readable JSON .*larger than"):
        find(root, "msd", "ct")
