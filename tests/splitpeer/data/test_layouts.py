from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from splitpeer.data import trees
from splitpeer.data.layouts import (
    canonical_modality,
    detect_layout,
    find_images,
    find_labels,
    found_modalities,
    subject,
)
from splitpeer.errors import DataError


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("T1Gd", "t1ce"),
        ("t1c", "t1ce"),
        ("T1w", "t1"),
        ("t1n", "t1"),
        ("T2F", "flair"),
        (" FLAIR ", "flair"),
        ("t2w", "t2"),
    ],
)
def test_every_spelling_has_one_name(spelling: str, name: str) -> None:
    assert canonical_modality(spelling) == name


def test_an_unknown_modality_is_refused() -> None:
    with pytest.raises(DataError, match="unknown modality 'adc': name one of flair, t1, t1ce, t2"):
        canonical_modality("adc")


def test_msd_takes_the_channel_from_its_description_and_skips_junk(msd: Path) -> None:
    cases = find_images(msd, "msd", "T1Gd")
    assert [(c.patient, c.channel) for c in cases] == [("BRATS_001", 2), ("BRATS_002", 2)]
    assert [c.path.parent.name for c in find_labels(msd, "msd")] == ["labelsTr"] * 2
    assert [c.patient for c in find_labels(msd, "msd")] == ["BRATS_001", "BRATS_002"]
    assert found_modalities(msd, "msd") == ("flair", "t1", "t1ce", "t2")
    assert detect_layout(msd) == "msd"


def test_msd_channels_follow_the_description_and_not_their_usual_order(msd: Path) -> None:
    description = json.loads((msd / "dataset.json").read_text())
    description["modality"] = {"0": "T2w", "1": "t1gd"}
    (msd / "dataset.json").write_text(json.dumps(description))
    assert find_images(msd, "msd", "t1ce")[0].channel == 1
    with pytest.raises(DataError, match=r"dataset\.json: 0 channels are 'flair'"):
        find_images(msd, "msd", "flair")


def test_msd_troubles_are_one_clear_line(msd: Path) -> None:
    (msd / "imagesTr" / "BRATS_002.nii.gz").unlink()
    with pytest.raises(DataError, match=r"BRATS_002\.nii\.gz: listed in dataset\.json but not in"):
        find_images(msd, "msd", "t1")
    (msd / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        find_images(msd, "msd", "t1")
    (msd / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"dataset\.json: missing: layout 'msd' needs it"):
        find_labels(msd, "msd")


def test_msd_does_not_leave_its_folder(msd: Path, files) -> None:
    files.save(msd.parent / "other.nii.gz", files.head())
    description = json.loads((msd / "dataset.json").read_text())
    description["training"] = [{"image": "../other.nii.gz", "label": "../other.nii.gz"}]
    (msd / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match="but not in"):
        find_images(msd, "msd", "t1")


def test_brats_2018_grades_and_2019_names(tmp_path: Path, brats) -> None:
    brats(tmp_path, "Brats18_CBICA_AOD_1", below="HGG")
    brats(tmp_path, "Brats18_2013_0_1", below="LGG")
    assert [c.patient for c in find_images(tmp_path, "brats", "t1gd")] == [
        "Brats18_2013_0_1",
        "Brats18_CBICA_AOD_1",
    ]
    assert all(c.path.name.endswith("_t1ce.nii.gz") for c in find_images(tmp_path, "brats", "t1ce"))
    assert len(find_labels(tmp_path, "brats")) == 2
    assert detect_layout(tmp_path) == "brats"


def test_brats_2020_uncompressed_with_the_odd_mask_of_case_355(tmp_path: Path, brats) -> None:
    brats(tmp_path, "BraTS20_Training_354", suffix=".nii")
    brats(tmp_path, "BraTS20_Training_355", suffix=".nii")
    folder = tmp_path / "BraTS20_Training_355"
    (folder / "BraTS20_Training_355_seg.nii").rename(folder / "W39_1998.09.19_Segm.nii")
    (tmp_path / "survival_info.csv").write_text("no image")
    assert [c.patient for c in find_labels(tmp_path, "brats")] == [
        "BraTS20_Training_354",
        "BraTS20_Training_355",
    ]


def test_brats_2023_hyphens_and_time_points(tmp_path: Path, brats) -> None:
    for visit in ("000", "001"):
        brats(tmp_path, f"BraTS-GLI-00005-{visit}", ("t1n", "t1c", "t2w", "t2f", "seg"), separator="-")
    found = find_images(tmp_path, "brats", "flair")
    assert [c.patient for c in found] == ["BraTS-GLI-00005-000", "BraTS-GLI-00005-001"]
    assert found_modalities(tmp_path, "brats") == ("flair", "t1", "t1ce", "t2")
    assert {subject(c.patient) for c in found} == {"BraTS-GLI-00005"}
    assert subject("BRATS_001") == "BRATS_001"


def test_brats_rejects_patients_twice(tmp_path: Path, brats) -> None:
    brats(tmp_path, "A", below="HGG")
    brats(tmp_path, "A", below="LGG")
    with pytest.raises(DataError, match="are the same patient: keep one of the two files"):
        find_images(tmp_path, "brats", "t1")


def test_folder_names_patients_by_file_and_skips_junk(tmp_path: Path, files) -> None:
    for name in ("b.nii", "a.v1.nii.gz", "._a.nii.gz"):
        files.save(tmp_path / name, files.head())
    (tmp_path / "notes.txt").write_text("no image")
    assert [c.patient for c in find_images(tmp_path, "folder", "t1")] == ["a.v1", "b"]
    assert find_images(tmp_path, "folder", "t1") == find_labels(tmp_path, "folder")
    assert detect_layout(tmp_path) == "folder"


def test_one_patient_in_two_files_is_refused(tmp_path: Path, files) -> None:
    files.save(tmp_path / "a.nii", files.head())
    files.save(tmp_path / "a.nii.gz", files.head())
    with pytest.raises(DataError, match=r"a\.nii and .*a\.nii\.gz are the same patient"):
        find_images(tmp_path, "folder", "t1")


def test_missing_and_empty_folders_and_wrong_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder: check the path"):
        find_images(tmp_path / "nowhere", "folder", "t1")
    with pytest.raises(DataError, match=r"no NIfTI file \(\.nii or \.nii\.gz\) found"):
        find_images(tmp_path, "folder", "t1")
    with pytest.raises(DataError, match="no seg file"):
        find_labels(tmp_path, "brats")
    with pytest.raises(DataError, match="unknown layout 'dicom': name one of folder, patient-folders, bids"):
        find_labels(tmp_path, "dicom")
    with pytest.raises(DataError, match=r"no \.nii or \.nii\.gz file here or below"):
        detect_layout(tmp_path)


def test_an_ambiguous_folder_is_not_guessed(tmp_path: Path, brats) -> None:
    brats(tmp_path, "A")
    for path in (tmp_path / "A").iterdir():
        shutil.move(path, tmp_path)
    (tmp_path / "A").rmdir()
    with pytest.raises(DataError, match=r"'brats' .* or 'folder'"):
        detect_layout(tmp_path)


def test_every_alias_is_listed_once() -> None:
    spelled = [alias for aliases in trees.ALIASES.values() for alias in aliases]
    assert len(spelled) == len(set(spelled))
    assert tuple(trees.ALIASES) == trees.MODALITIES
