from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from splitpeer.data import modalities
from splitpeer.data.check import check
from splitpeer.data.layouts import (
    detect_layout,
    find,
    find_images,
    find_labels,
    listing,
    subject,
)
from splitpeer.data.modalities import canonical_modality
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


@pytest.mark.parametrize("name", ["ADC", "ct", " pet ", "dce-1", "b1000", "suv.max"])
def test_any_name_is_a_modality(name: str) -> None:
    assert canonical_modality(name) == name.strip().lower()


@pytest.mark.parametrize("name", ["", "a b", "t1/t2", "\u00e4", "-t1", "x" * 33, "t1\n2"])
def test_what_cannot_be_a_name_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="is not a valid name of a modality: write 1 to 32 letters"):
        canonical_modality(name)


@pytest.mark.parametrize("name", ["seg", "Mask", "labels"])
def test_masks_are_no_modality(name: str) -> None:
    with pytest.raises(DataError, match="is what masks are called: give the modality another name"):
        canonical_modality(name)


def test_msd_takes_the_channel_from_its_description_and_skips_junk(msd: Path) -> None:
    cases = find_images(msd, "msd", "T1Gd")
    assert [(c.patient, c.channel) for c in cases] == [("BRATS_001", 2), ("BRATS_002", 2)]
    assert [c.path.parent.name for c in find_labels(msd, "msd")] == ["labelsTr"] * 2
    assert [c.patient for c in find_labels(msd, "msd")] == ["BRATS_001", "BRATS_002"]
    assert listing(msd, "msd").modalities() == ("flair", "t1", "t1ce", "t2")
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
    assert listing(tmp_path, "brats").modalities() == ("flair", "t1", "t1ce", "t2")
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
    spelled = [alias for aliases in modalities.ALIASES.values() for alias in aliases]
    assert len(spelled) == len(set(spelled))
    assert tuple(modalities.ALIASES) == modalities.MODALITIES


# --- a folder per modality ---------------------------------------------------------------------------------------


def test_a_folder_per_modality(tmp_path: Path, files) -> None:
    for name in ("ADC/P1", "ADC/P2", "t2/P1", "labels/P1"):
        files.save(tmp_path / f"{name}.nii.gz", files.head() if "labels" not in name else files.mask())
    assert detect_layout(tmp_path) == "folder"
    assert listing(tmp_path, "folder").modalities() == ("adc", "t2")
    assert [case.patient for case in find_images(tmp_path, "folder", "adc")] == ["P1", "P2"]
    assert [case.path.parent.name for case in find_labels(tmp_path, "folder")] == ["labels"]
    assert find(tmp_path, "folder", "t2").lacking == ("P2",)
    with pytest.raises(DataError, match="no pet file"):
        find_images(tmp_path, "folder", "pet")
    assert check(tmp_path, convention="msd").counts == {"adc": 2, "t2": 1, "labels": 1}


def test_a_folder_of_any_name_is_found_when_it_is_looked_for(tmp_path: Path, files) -> None:
    files.save(tmp_path / "b1000" / "P1.nii.gz", files.head())
    assert [case.patient for case in find_images(tmp_path, "folder", "b1000")] == ["P1"]


def test_images_here_and_in_the_folder_of_the_modality_are_not_guessed(tmp_path: Path, files) -> None:
    for name in ("P1", "adc/P1", "old/P1"):
        files.save(tmp_path / f"{name}.nii.gz", files.head())
    with pytest.raises(DataError, match="images here and in adc/: name the folder that is meant"):
        find_images(tmp_path, "folder", "adc")
    assert any("images here and in adc/" in text for text in check(tmp_path, "folder", ["adc"]).problems)
    assert [case.patient for case in find_images(tmp_path, "folder", "t2")] == ["P1"]


def test_a_patient_folder_may_hold_any_modality(tmp_path: Path, files) -> None:
    for name in ("P1/adc", "P1/P1_b1000", "P1/seg", "P2/adc"):
        files.save(tmp_path / f"{name}.nii.gz", files.head())
    assert [case.path.name for case in find_images(tmp_path, "patient-folders", "b1000")] == [
        "P1_b1000.nii.gz"
    ]
    assert listing(tmp_path, "patient-folders").modalities() == ("adc",)


# --- BraTS of every year, BIDS with sessions and runs -------------------------------------------------------------


@pytest.mark.parametrize(
    ("patient", "kinds", "mark"),
    [
        ("Brats17_CBICA_AAB_1", ("flair", "t1", "t1ce", "t2"), "_"),
        ("Brats18_2013_0_1", ("flair", "t1", "t1ce", "t2"), "_"),
        ("BraTS19_TCIA01_131_1", ("flair", "t1", "t1ce", "t2"), "_"),
        ("BraTS20_Training_001", ("flair", "t1", "t1ce", "t2"), "_"),
        ("BraTS2021_00000", ("flair", "t1", "t1ce", "t2"), "_"),
        ("BraTS-GLI-00005-000", ("t2f", "t1n", "t1c", "t2w"), "-"),
        ("BraTS-MEN-00004-000", ("t2f", "t1n", "t1c", "t2w"), "-"),
        ("BraTS-PED-00002-000", ("t2f", "t1n", "t1c", "t2w"), "-"),
    ],
)
def test_brats_names_of_every_year(
    tmp_path: Path, brats, patient: str, kinds: tuple[str, ...], mark: str
) -> None:
    brats(tmp_path, patient, (*kinds, "seg"), separator=mark)
    assert detect_layout(tmp_path) == "brats"
    for modality, kind in zip(("flair", "t1", "t1ce", "t2"), kinds, strict=True):
        (case,) = find_images(tmp_path, "brats", modality)
        assert (case.patient, case.path.name) == (patient, f"{patient}{mark}{kind}.nii.gz")
    assert [case.patient for case in find_labels(tmp_path, "brats")] == [patient]
    assert check(tmp_path, convention="brats").ok


def test_all_patients_twice_are_told_not_only_the_first(tmp_path: Path, brats) -> None:
    for patient in ("A", "B", "C"):
        brats(tmp_path, patient, ("t1",), below="HGG")
        if patient != "C":
            brats(tmp_path, patient, ("t1",), below="LGG")
    report = check(tmp_path, modalities=["t1"])
    twice = [text for text in report.problems if "are the same patient" in text]
    assert len(twice) == 2 and "HGG/A/" in twice[0] and "LGG/B/" in twice[1]
    assert report.counts == {"t1": 1}
    with pytest.raises(DataError, match=r"are the same patient.*\(1 more: splitpeer data check lists them\)"):
        find_images(tmp_path, "brats", "t1")


def test_bids_with_sessions_runs_and_other_folders(tmp_path: Path, files) -> None:
    for name in (
        "sub-01/ses-1/anat/sub-01_ses-1_T1w", "sub-01/ses-2/anat/sub-01_ses-2_run-1_T1w",
        "sub-01/ses-2/anat/sub-01_ses-2_run-2_T1w", "sub-01/ses-1/pet/sub-01_ses-1_trc-FDG_pet",
        "sub-01/ses-1/dwi/sub-01_ses-1_ADC", "sub-01/ses-1/func/sub-01_ses-1_task-rest_bold",
        "sub-01/ses-1/anat/sub-01_ses-1_PDw", "sub-01/ses-1/anat/sub-01_ses-1_desc-brain_mask",
        "derivatives/x/sub-01/ses-1/anat/sub-01_ses-1_dseg",
    ):  # fmt: skip
        files.save(tmp_path / f"{name}.nii.gz", files.head())
    assert detect_layout(tmp_path) == "bids"
    assert listing(tmp_path, "bids").modalities() == ("adc", "pdw", "pet", "t1")
    assert [case.patient for case in find_images(tmp_path, "bids", "t1")] == ["sub-01_ses-1"]
    assert [case.path.parent.name for case in find_images(tmp_path, "bids", "pet")] == ["pet"]
    with pytest.raises(DataError, match="no seg file"):
        find_labels(tmp_path, "bids")
    (mask,) = find_labels(tmp_path / "derivatives" / "x", "bids")
    assert mask.patient == "sub-01_ses-1"
    warnings = "\n".join(check(tmp_path, modalities=["t1"]).warnings)
    for said in (
        "1 not taken: sub-01/ses-1/func/sub-01_ses-1_task-rest_bold.nii.gz: not in the anat folder",
        "sub-01_ses-2_run-2_T1w.nii.gz: one of several t1 images of a patient: choose one in a list",
        "sub-01_ses-1_desc-brain_mask.nii.gz: a mask of something else: BIDS calls a segmentation dseg",
        "1 not taken: derivatives/x/sub-01/ses-1/anat/sub-01_ses-1_dseg.nii.gz: not named as BIDS asks",
    ):
        assert said in warnings
    run = find_images(tmp_path, "sub-{patient}/ses-2/anat/*_run-1_T1w.nii.gz", "t1")
    assert [(case.patient, case.path.name) for case in run] == [("01", "sub-01_ses-2_run-1_T1w.nii.gz")]
