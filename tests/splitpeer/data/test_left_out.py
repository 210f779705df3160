"""Unusable files among good ones: none is skipped silently, and none stops the others from being read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitpeer.data.files import LeftOut, below, summary
from splitpeer.data.layouts import detect_layout, find, find_images, find_labels, subject
from splitpeer.errors import DataError


def put(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def left(root: Path, layout: str, modality: str | None = "t1") -> dict[str, str]:
    return {str(one.path.relative_to(root)): one.reason for one in find(root, layout, modality).left_out}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("b.hdr", "Analyze or NIfTI pair"),
        ("b.IMG", "Analyze or NIfTI pair"),
        ("b.img.gz", "Analyze or NIfTI pair"),
        ("b.nrrd", "not NIfTI"),
        ("b.mha", "not NIfTI"),
        ("b.mgz", "mri_convert"),
        ("b.dcm", "dcm2niix"),
        ("DICOMDIR", "dcm2niix"),
        ("IM000001", "does not end in .nii"),
        ("b.nii.gz.part", "unfinished copy"),
        ("b.nii.bz2", "unpack it"),
        ("b.nii.old", "does not end in .nii"),
        ("b.NII.gz ", "does not end in .nii"),
    ],
)
def test_a_file_of_another_format_is_listed(tmp_path: Path, name: str, what: str) -> None:
    put(tmp_path, "a.nii.gz", name)
    found = find(tmp_path, "folder", "t1")
    assert [case.patient for case in found.cases] == ["a"]
    assert [one.path.name for one in found.left_out] == [name]
    assert what in found.left_out[0].reason
    assert left(put(tmp_path / "tree", "P/P_t1.nii.gz", f"P/{name}"), "brats").keys() == {f"P/{name}"}


def test_links_pipes_and_folders_are_listed(tmp_path: Path) -> None:
    put(tmp_path, "a.nii.gz", "more/b.nii.gz")
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    (tmp_path / "good.nii.gz").symlink_to(tmp_path / "a.nii.gz")
    os.mkfifo(tmp_path / "pipe.nii.gz")
    assert [case.patient for case in find_images(tmp_path, "folder", "t1")] == ["a", "good"]
    assert left(tmp_path, "folder") == {
        "gone.nii.gz": "a link to a file that does not exist",
        "more": "a folder: only files of one folder are taken in this layout",
        "pipe.nii.gz": "not a regular file",
    }


@pytest.mark.parametrize(
    "name", [".DS_Store", "._a.nii.gz", "README", "a.json", "participants.tsv", "a.bval"]
)
def test_what_belongs_beside_images_is_not_listed(tmp_path: Path, name: str) -> None:
    assert left(put(tmp_path, "a.nii.gz", name), "folder") == {}


def test_a_summary_counts_and_shows_examples_in_printable_characters(tmp_path: Path) -> None:
    names = [f"{n}.nrrd" for n in range(5)]
    lines = summary([LeftOut(tmp_path / name, "not NIfTI") for name in names], tmp_path)
    assert lines == ["5 not taken: 0.nrrd, 1.nrrd, 2.nrrd and 2 more: not NIfTI"]
    (line,) = summary([LeftOut(tmp_path / "a\x1b[2J\n.nrrd", "not NIfTI")], tmp_path)
    assert line.isprintable()


def test_where_nothing_is_taken_the_error_says_what_lies_there(tmp_path: Path) -> None:
    put(tmp_path, "a.nrrd", "b.nrrd")
    for look in (lambda: find(tmp_path, "folder", "t1"), lambda: detect_layout(tmp_path)):
        with pytest.raises(DataError, match=r"2 not taken: a\.nrrd, b\.nrrd: not NIfTI"):
            look()


# --- trees ---------------------------------------------------------------------------------------------------


def test_one_foreign_file_in_a_brats_tree_does_not_end_the_reading(tmp_path: Path) -> None:
    put(
        tmp_path,
        "A/A_t1.nii.gz",
        "A/A_seg.nii.gz",
        "B/B_t1.nii.gz",
        "B/B_pred.nii.gz",
        "scout.nii",
        "C/C_t2.nii",
    )
    found = find(tmp_path, "brats", "t1")
    assert [case.patient for case in found.cases] == ["A", "B"]
    assert found.lacking == ("C",)
    foreign = "its name ends in neither a modality nor 'seg'"
    assert left(tmp_path, "brats") == {"B/B_pred.nii.gz": foreign, "scout.nii": foreign}
    assert find(tmp_path, "brats", None).lacking == ("B", "C")


def test_linked_folders_are_entered_once(tmp_path: Path) -> None:
    put(tmp_path / "store", "A/A_t1.nii.gz")
    root = tmp_path / "tree"
    root.mkdir()
    (root / "A").symlink_to(tmp_path / "store" / "A")
    (tmp_path / "store" / "A" / "loop").symlink_to(root)
    assert [case.patient for case in find_images(root, "brats", "t1")] == ["A"]


def test_a_folder_that_cannot_be_listed_is_listed(tmp_path: Path, monkeypatch) -> None:
    put(tmp_path, "A/A_t1.nii.gz", "B/B_t1.nii.gz")
    listed = Path.iterdir

    def denied(path: Path):
        if path.name == "B":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    volumes, left_out = below(tmp_path)
    assert [path.name for path in volumes] == ["A_t1.nii.gz"]
    assert left_out == [LeftOut(tmp_path / "B", "cannot be listed (Permission denied)")]


def test_a_folder_per_patient(tmp_path: Path) -> None:
    put(
        tmp_path,
        "P1/t1.nii.gz", "P1/T2-FLAIR.nii", "P1/seg.nii.gz",
        "P2/P2_T1w.nii.gz", "P2/mask.nii.gz",
        "P3/scan.nii.gz",
        "P4/one.nii.gz", "P4/two.nii.gz",
        "P5/t1.nii.gz", "P5/again_t1.nii.gz",
        "P6/flair.nii.gz",
        "P7/deep/t1.nii.gz",
        "loose.nii.gz",
    )  # fmt: skip
    assert detect_layout(put(tmp_path / "P1x", "a/t1.nii.gz", "b/t1.nii.gz")) == "patient-folders"
    found = find(tmp_path, "patient-folders", "t1")
    assert [(case.patient, case.path.name) for case in found.cases] == [
        ("P1", "t1.nii.gz"), ("P2", "P2_T1w.nii.gz"), ("P3", "scan.nii.gz"),
    ]  # fmt: skip
    assert found.lacking == ("P6",)
    not_named = "one of several files of a patient, and its name is neither a modality nor 'seg'"
    several = "one of several t1 images of a patient: choose one in a list (layout 'csv')"
    deeper = "deeper than the folder of a patient"
    assert left(tmp_path, "patient-folders") == {
        "P1x/a/t1.nii.gz": deeper, "P1x/b/t1.nii.gz": deeper, "P7/deep/t1.nii.gz": deeper,
        "P4/one.nii.gz": not_named, "P4/two.nii.gz": not_named,
        "P5/again_t1.nii.gz": several, "P5/t1.nii.gz": several,
        "loose.nii.gz": "not in the folder of a patient",
    }  # fmt: skip
    assert [case.patient for case in find_labels(tmp_path, "patient-folders")] == ["P1", "P2", "P3"]


def test_a_bids_tree_with_diffusion_beside_anatomy(tmp_path: Path) -> None:
    put(
        tmp_path,
        "dataset_description.json", "participants.tsv",
        "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T1w.json",
        "sub-01/anat/sub-01_ce-gadolinium_T1w.nii.gz", "sub-01/anat/sub-01_acq-3d_FLAIR.nii.gz",
        "sub-01/dwi/sub-01_dwi.nii.gz", "sub-01/dwi/sub-01_dwi.bval",
        "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz", "sub-02/ses-2/anat/sub-02_ses-2_run-1_T1w.nii.gz",
        "sub-03/anat/sub-03_run-1_T1w.nii.gz", "sub-03/anat/sub-03_run-2_T1w.nii.gz",
        "sub-04/anat/sub-05_T1w.nii.gz", "sub-04/anat/sub-04_ce-gd_T2w.nii.gz",
    )  # fmt: skip
    assert detect_layout(tmp_path) == "bids"
    assert [case.patient for case in find_images(tmp_path, "bids", "t1")] == [
        "sub-01", "sub-02_ses-1", "sub-02_ses-2",
    ]  # fmt: skip
    (contrast,) = find_images(tmp_path, "bids", "t1gd")
    assert contrast.path.name == "sub-01_ce-gadolinium_T1w.nii.gz"
    (flair,) = find_images(tmp_path, "bids", "flair")
    assert flair.path.name == "sub-01_acq-3d_FLAIR.nii.gz"
    assert {subject("sub-02_ses-1"), subject("sub-02_ses-2")} == {"sub-02"}
    several = "one of several t1 images of a patient: choose one in a list (layout 'csv')"
    assert left(tmp_path, "bids") == {
        "sub-01/dwi/sub-01_dwi.nii.gz": "not in the anat folder of a subject",
        "sub-03/anat/sub-03_run-1_T1w.nii.gz": several,
        "sub-03/anat/sub-03_run-2_T1w.nii.gz": several,
        "sub-04/anat/sub-05_T1w.nii.gz": "not named as BIDS asks for this folder",
        "sub-04/anat/sub-04_ce-gd_T2w.nii.gz": "after a contrast agent, but not T1w",
    }


def test_msd_lists_files_that_its_description_does_not(msd: Path) -> None:
    put(msd / "imagesTr", "BRATS_003.nii.gz", "extra.mha")
    assert left(msd, "msd") == {
        "imagesTr/BRATS_003.nii.gz": "not listed under training in dataset.json",
        "imagesTr/extra.mha": "not NIfTI: convert it to .nii.gz",
    }
