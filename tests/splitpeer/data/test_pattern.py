"""A pattern in the owner's words: which file is whose, and no guess where a name can be read in two ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitpeer.data.check import check
from splitpeer.data.layouts import find, find_images, find_labels, listing
from splitpeer.errors import DataError


def put(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def ids(root: Path, pattern: str, modality: str = "t1") -> list[str]:
    return [case.patient for case in find_images(root, pattern, modality)]


@pytest.mark.parametrize(
    ("pattern", "names", "patients"),
    [
        ("{patient}/T1*.nii.gz", ("P1/T1_axial.nii.gz", "P2/T1.nii.gz"), ["P1", "P2"]),
        ("{patient}/*/adc.nii", ("P1/2020/adc.nii", "P2/x/adc.nii"), ["P1", "P2"]),
        ("**/{patient}_T1.nii.gz", ("P1_T1.nii.gz", "a/b/P_2_T1.nii.gz"), ["P1", "P_2"]),
        ("{patient}/{patient}_T1.nii", ("P1/P1_T1.nii", "P2/P2_T1.nii"), ["P1", "P2"]),
        ("case?{patient}.nii.gz", ("case-7.nii.gz", "case_8.nii.gz"), ["7", "8"]),
        ("[{patient}]+(1).nii", ("[a.b]+(1).nii",), ["a.b"]),
    ],
)
def test_a_pattern_names_patients(tmp_path: Path, pattern: str, names: tuple[str, ...], patients) -> None:
    put(tmp_path, *names)
    assert ids(tmp_path, pattern) == patients
    assert find_labels(tmp_path, pattern) == find_images(tmp_path, pattern, "anything")
    assert find(tmp_path, pattern, "t1").left_out == ()


def test_what_does_not_match_is_listed_with_the_pattern(tmp_path: Path) -> None:
    put(tmp_path, "P1/T1.nii.gz", "P1/T2.nii.gz", "P1/t1.nii.gz", "P2/deep/T1.nii.gz", "P3/P4_T1.nii.gz")
    found = find(tmp_path, "{patient}/T1*.nii.gz", "t1")
    assert [case.patient for case in found.cases] == ["P1"]
    assert {one.path.relative_to(tmp_path).as_posix() for one in found.left_out} == {
        "P1/T2.nii.gz",
        "P1/t1.nii.gz",
        "P2/deep/T1.nii.gz",
        "P3/P4_T1.nii.gz",
    }
    assert {one.reason for one in found.left_out} == {"does not match '{patient}/T1*.nii.gz'"}
    with pytest.raises(DataError, match=r"5 not taken: .* does not match"):
        find(tmp_path, "{patient}/{patient}_T1.nii.gz", "t1")


def test_two_files_of_a_patient_are_left_out_with_a_fix(tmp_path: Path) -> None:
    put(tmp_path, "P1/T1.nii.gz", "P1/T1_again.nii.gz", "P2/T1.nii.gz")
    found = find(tmp_path, "{patient}/T1*.nii.gz", "t1")
    assert [case.patient for case in found.cases] == ["P2"]
    assert [one.reason for one in found.left_out] == [
        "one of several t1 images of a patient: choose one in a list (layout 'csv')"
    ] * 2


def test_a_name_that_can_be_read_in_two_ways_is_not_guessed(tmp_path: Path) -> None:
    put(tmp_path, "P1_ax_T1.nii.gz", "P2_T1.nii.gz", "P_3_ax_T1.nii.gz")
    found = find(tmp_path, "{patient}_*_T1.nii.gz", "t1")
    assert [case.patient for case in found.cases] == ["P1"]
    reasons = {one.path.name: one.reason for one in found.left_out}
    assert "does not match" in reasons["P2_T1.nii.gz"]
    assert "can be read in two ways here ('P', 'P_3'): choose one in a list" in reasons["P_3_ax_T1.nii.gz"]


def test_a_pattern_may_name_the_modality(tmp_path: Path) -> None:
    put(
        tmp_path,
        "P_1-ADC.nii.gz",
        "P_1-T1Gd.nii.gz",
        "P_1-seg.nii.gz",
        "P_2-ADC.nii.gz",
        f"P_2-{'x' * 40}.nii.gz",
    )
    pattern = "{patient}-{modality}.nii.gz"
    assert listing(tmp_path, pattern).modalities() == ("adc", "t1ce")
    assert ids(tmp_path, pattern, "adc") == ["P_1", "P_2"]
    assert find(tmp_path, pattern, "t1gd").lacking == ("P_2",)
    assert [case.path.name for case in find_labels(tmp_path, pattern)] == ["P_1-seg.nii.gz"]
    (long,) = find(tmp_path, pattern, "adc").left_out
    assert long.reason.endswith("is not a valid name of a modality")


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("*/T1.nii.gz", "does not say where the id is: write {patient} in its place"),
        ("{patient}/{contrast}.nii.gz", r"holds {contrast}: only {patient} and {modality} are known"),
        ("{patient}/{.nii.gz", "holds {.nii.gz: only"),
        ("{patient}{modality}.nii", "does not say where the id ends: write something between"),
        ("/data/{patient}.nii", "must be relative to the folder and stay below it"),
        ("../{patient}.nii", "must be relative to the folder and stay below it"),
        ("a\\{patient}.nii", "write folders with /, without .."),
        ("{patient}/T1.dcm", "names no NIfTI file: let it end in .nii.gz or .nii"),
    ],
)
def test_a_mistake_in_a_pattern_is_one_line(tmp_path: Path, pattern: str, what: str) -> None:
    with pytest.raises(DataError) as caught:
        find(tmp_path, pattern, "t1")
    assert what in str(caught.value) and repr(pattern) in str(caught.value)


def test_data_check_reads_a_pattern(tmp_path: Path, files) -> None:
    for patient in ("P1", "P2"):
        files.save(tmp_path / patient / "ADC_b1000.nii.gz", files.head())
        files.save(tmp_path / patient / "scout.nii.gz", files.head())
    files.truncate(tmp_path / "P2" / "ADC_b1000.nii.gz")
    report = check(tmp_path, "{patient}/ADC*.nii.gz", ["adc"])
    assert report.counts == {"adc": 2} and len(report.problems) == 1
    assert "P2/ADC_b1000.nii.gz: truncated" in report.problems[0]
    assert any(text.startswith("2 not taken: P1/scout.nii.gz, P2/scout.nii.gz") for text in report.warnings)
