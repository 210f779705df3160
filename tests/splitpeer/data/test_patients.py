"""Ids that look like one patient, and ids that other sites may write differently."""

from __future__ import annotations

import pytest

from splitpeer.data.layouts import find_images
from splitpeer.data.patients import duplicate_warnings, near_duplicates, patient_id, spelling_hints
from splitpeer.errors import DataError


@pytest.mark.parametrize(
    "group",
    [
        ("P001", "p001"),
        ("P003", "P003 (copy)"),
        ("P003", "P003 (1)"),
        ("P003", "P003 - Kopie"),
        ("p1", "p1_Eq_1", "p1a"),
        ("p1_Eq_1", "p1_Eq_2"),
        ("p1", "p1_Tilt_1"),
        ("P 7", "P-7", "P_7"),
        ("7", "007"),
        ("P7", "P7\u200b"),
        ("\u00c5sa", "a\u030asa"),
        ("fi1", "\ufb01" + "1"),
    ],
)
def test_near_duplicates_are_found(group: tuple[str, ...]) -> None:
    others = ["Q1", "Q2", "Q12", "X100", "X200"]
    assert near_duplicates([*others, *group]) == [tuple(sorted(group))]
    (line,) = duplicate_warnings([*group, *others])
    assert all(repr(one) in line for one in group)


@pytest.mark.parametrize(
    "ids",
    [
        ["BraTS-GLI-00005-000", "BraTS-GLI-00005-001"],
        ["Brats18_2013_1_12", "Brats18_2013_11_2"],
        ["sub-01_ses-1", "sub-01_ses-2"],
        ["A1", "B1"],
        ["100", "101a"],
        ["MUELLER", "MULLER"],
    ],
)
def test_different_patients_are_not_taken_for_one(ids: list[str]) -> None:
    assert near_duplicates(ids) == []


def test_one_spelling_of_an_id(tmp_path) -> None:
    """SP-11.5-2."""
    assert patient_id(" Jose\u0301\t") == "Jos\u00e9"
    (tmp_path / "Jos\u00e9.nii.gz").write_bytes(b"")
    assert find_images(tmp_path, "folder", "t1")[0].patient == "Jos\u00e9"
    (tmp_path / "Jose\u0301.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"are the same patient: .* differ only in Unicode form or in spaces"):
        find_images(tmp_path, "folder", "t1")


def test_a_space_at_the_end_is_no_other_patient(tmp_path) -> None:
    """SP-11.5-2."""
    for name in ("P1.nii.gz", "P1 .nii.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"are the same patient: .* spaces at the ends"):
        find_images(tmp_path, "folder", "t1")


@pytest.mark.parametrize(
    ("ids", "what"),
    [
        (["1", "2", "10"], "without zeros in front (1, 2): other sites may write 001"),
        (["P1", "P100"], "without zeros in front (P1): other sites may write P001"),
        (["P001_T1", "P002_T1", "P003"], "2 of 3 ids end in the name of a modality (P001_T1, P002_T1)"),
        (["a-flair"], "1 of 1 ids end in the name of a modality"),
        (["P1_0000", "P2_0000"], "all ids end in '_0000'"),
        (["P1_brain", "P2_brain"], "all ids end in '_brain'"),
        (["sub-01", "sub-02"], "all ids begin with 'sub-'"),
    ],
)
def test_ids_that_others_may_write_differently(ids: list[str], what: str) -> None:
    assert any(what in hint for hint in spelling_hints(ids)), spelling_hints(ids)


@pytest.mark.parametrize(
    "ids",
    [
        ["BRATS_001", "BRATS_002"],
        ["001", "010", "100"],
        ["MUELLER_Erika"],
        ["BraTS-GLI-00005-000", "BraTS-GLI-00006-000"],
        [],
    ],
)
def test_ids_that_are_usual_bring_no_hint(ids: list[str]) -> None:
    assert spelling_hints(ids) == []
