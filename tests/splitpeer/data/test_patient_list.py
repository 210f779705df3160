"""Layout "csv": a list that says which file is whose."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitpeer.data import patient_list
from splitpeer.data.layouts import detect_layout, find_images, find_labels
from splitpeer.errors import DataError


@pytest.fixture
def listed(tmp_path: Path):
    """Writes a list beside three files: listed(content) -> its path."""
    for name in ("1.nii.gz", "scans/P002_T1.nii", "x.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def write(content: str | bytes) -> Path:
        path = tmp_path / "patients.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.mark.parametrize(
    "content",
    [
        "patient,path\n001,1.nii.gz\nP002,scans/P002_T1.nii\n",
        "\ufeffpatient,path\r\n001,1.nii.gz\r\nP002,scans/P002_T1.nii\r\n",
        "Patient;Path\n001;1.nii.gz\n\nP002;scans/P002_T1.nii",
        'path,born,patient\n"1.nii.gz",1950,"001"\n./scans/P002_T1.nii,,P002\n',
        "\n patient , path \n 001 , 1.nii.gz \n,\nP002,scans/../scans/P002_T1.nii\n",
    ],
    ids=["plain", "Excel on Windows", "German Excel", "more columns", "spaces and empty lines"],
)
def test_a_list_names_patients(listed, content: str) -> None:
    path = listed(content)
    found = find_images(path, "csv", "t1")
    assert [(case.patient, case.path.name) for case in found] == [
        ("001", "1.nii.gz"),
        ("P002", "P002_T1.nii"),
    ]
    assert find_labels(path, "csv") == found
    assert detect_layout(path) == "csv"


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ("name,path\na,1.nii.gz", "line 1: needs one column patient: begin it with patient,path"),
        ("patient,path,path\na,1.nii.gz", "line 1: needs one column path"),
        ("patient,path\na,1.nii.gz\na,x.nii.gz", "line 3: patient 'a' is in line 2 already"),
        ("patient,path\na,1.nii.gz\n\n a ,x.nii.gz", "line 4: patient 'a' is in line 2 already"),
        ("patient,path\nJos\u00e9,1.nii.gz\nJose\u0301,x.nii.gz", "line 3: patient 'Jos\u00e9' is in line 2"),
        ("patient,path\na,1.nii.gz\nb,./1.nii.gz", r"line 3: 1\.nii\.gz is the file of line 2 already"),
        ("patient,path\na,y.nii.gz", r"line 2: y\.nii\.gz: no such file: paths are relative"),
        ("patient,path\na,scans\\P002_T1.nii", r"no such file: .*; write / instead of \\"),
        ("patient,path\na,scans", "line 2: scans: name a .nii or .nii.gz file"),
        ("patient,path\na,", "line 2: the path is empty"),
        ("patient,path\n ,1.nii.gz", "line 2: the patient is empty"),
        ("patient,path\na", "line 2: 1 columns"),
        ('patient,path\na,"1.nii.gz', "not CSV"),
        ("patient,path\na,1\0.nii.gz", "line 2: "),
        (b"patient,path\na,1.nii.gz\nM\xfcller,x.nii.gz", "line 3: not UTF-8: save the file as CSV UTF-8"),
        ("patient,path\n", "no NIfTI file"),
        ("", "no NIfTI file"),
        ("patient,path\na," + "x" * 5000 + ".nii", "line 2: "),
    ],
)
def test_a_mistake_is_named_by_its_line(listed, lines: str | bytes, what: str) -> None:
    path = listed(lines)
    with pytest.raises(DataError, match=what) as caught:
        find_images(path, "csv", "t1")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_list_that_is_none_is_refused_before_it_is_read(listed, monkeypatch) -> None:
    path = listed("patient,path\n001,1.nii.gz\n")
    monkeypatch.setattr(patient_list, "MAX_LIST_BYTES", 10)
    with pytest.raises(DataError, match="this is not a list of patients"):
        find_images(path, "csv", "t1")
    with pytest.raises(DataError, match="needs a file with the columns patient,path"):
        find_images(path.parent, "csv", "t1")
