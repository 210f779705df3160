"""Layout "csv": a list that says which file is whose."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitpeer.data import patient_list
from splitpeer.data.check import check
from splitpeer.data.layouts import detect_layout, find, find_images, find_labels, listing, look
from splitpeer.errors import DataError


@pytest.fixture
def listed(tmp_path: Path):
    """Writes a list next to three files: listed(content) -> its path."""
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


# --- several kinds in one list, comments, bounds -----------------------------------------------------------------


def test_a_list_may_say_what_each_file_shows(listed) -> None:
    path = listed(
        "# exported on Monday\npatient,modality,path\nP1,ADC,1.nii.gz\n\n  # P1 was scanned twice\n"
        'P1,seg,x.nii.gz\n"P,2",t2w,"scans/P002_T1.nii"\n'
    )
    assert listing(path, "csv").modalities() == ("adc", "t2")
    assert [(case.patient, case.path.name) for case in find_images(path, "csv", "adc")] == [
        ("P1", "1.nii.gz")
    ]
    assert [case.patient for case in find_images(path, "csv", "T2")] == ["P,2"]
    assert [case.path.name for case in find_labels(path, "csv")] == ["x.nii.gz"]
    assert find(path, "csv", "adc").lacking == ("P,2",)


def test_a_list_picks_a_channel_of_a_file(listed) -> None:
    path = listed("patient,modality,path,channel\nP1,t2,1.nii.gz,0\nP1,adc,1.nii.gz,1\nP1,seg,x.nii.gz,\n")
    assert [case.channel for case in find_images(path, "csv", "adc")] == [1]
    assert [case.channel for case in find_labels(path, "csv")] == [None]


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ("patient,modality,path\nP1,a b,1.nii.gz", "line 2: 'a b' is not a valid name of a modality"),
        ("patient,modality,path\nP1,,1.nii.gz", "line 2: the modality is empty: fill it in"),
        (
            "patient,modality,path\nP1,t1,1.nii.gz\nP1,T1w,x.nii.gz",
            "line 3: patient 'P1' is in line 2 already",
        ),
        ("patient,modality,path\nP1,t1,1.nii.gz\nP1,t2,1.nii.gz", "line 3: 1.nii.gz is the file of line 2"),
        ("patient,path,modality,modality\n", "line 1: the column modality is there twice"),
        (
            "patient,path,channel\nP1,1.nii.gz,two",
            "line 2: channel 'two' is not a whole number: count from 0",
        ),
        ("patient,path,channel\nP1,1.nii.gz,-1", "line 2: channel '-1' is not a whole number"),
        ("patient,path,channel\nP1,1.nii.gz,99999", "line 2: channel '99999' is not a whole number"),
        ("patient,path,channel\nP1,1.nii.gz,1\nP2,./1.nii.gz,1", "line 3: 1.nii.gz is the file of line 2"),
    ],
)
def test_a_mistake_in_a_list_of_several_kinds(listed, lines: str, what: str) -> None:
    with pytest.raises(DataError) as caught:
        find_images(listed(lines), "csv", "t1")
    assert what in str(caught.value)


@pytest.mark.parametrize("written", ["../out.nii.gz", "scans/../../out.nii.gz", "{root}/out.nii.gz"])
def test_a_list_may_name_files_anywhere(listed, tmp_path: Path, written: str) -> None:
    """Its owner wrote it; images often lie on another disk."""
    (tmp_path.parent / "out.nii.gz").write_bytes(b"")
    path = listed(f"patient,path\nP1,{written.format(root=tmp_path.parent)}\nP2,1.nii.gz\n")
    found = look(path, "csv", "t1")
    assert [case.patient for case in found.cases] == ["P1", "P2"] and not found.problems


def test_a_path_from_the_root_may_lead_into_the_folder(listed, tmp_path: Path) -> None:
    assert [
        case.patient for case in find_images(listed(f"patient,path\nP1,{tmp_path}/1.nii.gz\n"), "csv", "t1")
    ] == ["P1"]


def test_a_pipe_is_no_list(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "patients.csv")
    with pytest.raises(DataError, match="needs a file with the columns"):
        find_images(tmp_path / "patients.csv", "csv", "t1")


def test_data_check_tells_every_mistake_of_a_list_and_reads_the_rest(tmp_path: Path, files) -> None:
    files.save(tmp_path / "a.nii.gz", files.head())
    path = tmp_path / "patients.csv"
    path.write_text(
        "patient,path\nA,a.nii.gz\nB,gone.nii.gz\nA,a.nii.gz\n,a.nii.gz\nC,../c.nii.gz\nD\n", encoding="utf-8"
    )
    report = check(path, modalities=["adc"])
    assert report.counts == {"adc": 1}
    assert [text.split(":")[0].rpartition(" ")[2] for text in report.problems] == ["3", "4", "5", "6", "7"]
    with pytest.raises(
        DataError, match=r"line 3: gone\.nii\.gz: no such file.*\(4 more: splitpeer data check"
    ):
        find_images(path, "csv", "adc")
