from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from splitpeer.data.check import check
from splitpeer.data.layouts import find_all
from splitpeer.errors import DataError


def rim(shape=(12, 10, 8), bright: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A T1ce volume and its mask: value `bright` marks the voxels that took up contrast agent."""
    marks = np.zeros(shape, np.uint8)
    marks[3:9, 3:7, 3:5] = 1
    marks[4:8, 4:6, 3:5] = 2
    marks[3, 3:7, 3:5] = 3 if bright == 3 else 1
    image = np.where(marks == bright, 200, 80).astype(np.float32)
    return image, marks


def test_a_sound_msd_tree(msd: Path) -> None:
    seen = []
    report = check(msd, convention="msd", progress=lambda n, of, path: seen.append((n, of, path.name)))
    assert report.ok and report.layout == "msd" and not report.problems
    assert report.counts == {"flair": 2, "t1": 2, "t1ce": 2, "t2": 2, "labels": 2}
    assert dict(report.shapes) == {"12x10x8": 10} and dict(report.orientations) == {"RAS": 10}
    assert dict(report.spacings) == {"1x1x1": 10} and dict(report.label_values) == {"0, 1, 2, 3": 2}
    assert [n for n, _, _ in seen] == list(range(1, 11)) and {of for _, of, _ in seen} == {10}
    assert json.loads(report.as_json())["ok"] is True
    assert report.lines()[-1].split() == ["result", "usable"]
    assert any(line.split() == ["t1ce", "2", "patients"] for line in report.lines())


def test_every_problem_is_named_by_file(tmp_path: Path, files, brats) -> None:
    for patient in ("A", "B", "C", "D"):
        brats(tmp_path, patient)
    files.truncate(tmp_path / "A" / "A_t1.nii.gz")
    files.flip_a_voxel_bit(tmp_path / "B" / "B_flair.nii.gz")
    files.save(tmp_path / "B" / "B_seg.nii.gz", files.mask(values=(1, 3)))
    files.save(tmp_path / "C" / "C_t2.nii.gz", files.head((12, 10, 9)))
    files.save(tmp_path / "C" / "C_t1.nii.gz", np.zeros((12, 10, 8), np.float32))
    (tmp_path / "D" / "D_t2.nii.gz").unlink()
    report = check(tmp_path, convention="brats")
    text = "\n".join(report.problems)
    assert not report.ok and len(report.problems) == 5, text
    assert "A_t1.nii.gz: truncated or corrupt" in text
    assert "B_flair.nii.gz: truncated or corrupt (CRC check failed" in text
    assert "B_seg.nii.gz: label value(s) 3 are not in convention 'brats'" in text
    assert "C_t2.nii.gz: differs from" in text and "shape 12x10x8 against 12x10x9" in text
    assert "C_t1.nii.gz: every voxel is zero" in text
    assert "D: no t2" in report.warnings
    assert report.lines()[-1].endswith("5 problem(s)")
    assert json.loads(report.as_json())["problems"] == report.problems


def test_masks_without_a_named_convention_are_pointed_out(msd: Path) -> None:
    report = check(msd)
    assert report.ok and any("no label convention named" in text for text in report.warnings)


def test_a_site_that_holds_several_modalities(tmp_path: Path, files) -> None:
    for modality, name in (("t2", "a"), ("adc", "a"), ("adc", "b"), ("pd", "c")):
        files.save(tmp_path / modality / f"{name}.nii.gz", files.head((7, 9, 11)))
    report = check(tmp_path, "folder", ["t2", "adc"])
    assert report.ok and report.counts == {"t2": 1, "adc": 2}
    assert "b: no t2" in report.warnings
    files.save(tmp_path / "alone" / "a.nii.gz", files.head())
    (problem,) = check(tmp_path / "alone", "folder", ["t2", "adc"]).problems
    assert "its name does not say whether it is t2 or adc" in problem


def test_a_site_with_one_modality_and_no_masks(tmp_path: Path, files) -> None:
    for name in "ab":
        files.save(tmp_path / f"{name}.nii.gz", files.head((7, 9, 11)), axes="LPS", spacing=(1, 1, 3))
    report = check(tmp_path, modalities=["T1Gd"])
    assert report.ok and report.layout == "folder" and report.counts == {"t1ce": 2}
    assert dict(report.shapes) == {"7x9x11": 2} and dict(report.orientations) == {"LPS": 2}
    assert dict(report.spacings) == {"1x1x3": 2}
    assert check(tmp_path).counts == {"images": 2}


def test_a_folder_of_masks(tmp_path: Path, files) -> None:
    files.save(tmp_path / "a.nii.gz", files.mask(values=(1, 2, 4)))
    files.save(tmp_path / "b.nii.gz", files.mask(values=()))
    report = check(tmp_path, convention="brats")
    assert (
        report.ok
        and report.counts == {"labels": 2}
        and any("b.nii.gz: an empty mask" in w for w in report.warnings)
    )
    assert len(check(tmp_path, convention="msd").problems) == 1


@pytest.mark.parametrize(("convention", "warned"), [("msd", False), ("brats2023", False)])
def test_bright_enhancing_tumour_raises_no_warning(tmp_path: Path, files, convention, warned) -> None:
    for name in ("A", "B"):
        image, marks = rim()
        files.save(tmp_path / name / f"{name}_t1ce.nii.gz", image)
        files.save(tmp_path / name / f"{name}_seg.nii.gz", marks)
    report = check(tmp_path, convention=convention)
    assert report.ok and any("darker" in text for text in report.warnings) is warned


def test_dark_enhancing_tumour_is_warned_about(tmp_path: Path, files) -> None:
    """Masks with the meaning of labels 2 and 3 exchanged."""
    for name in ("A", "B"):
        image, marks = rim()
        marks = np.array([0, 1, 3, 2], np.uint8)[marks]
        files.save(tmp_path / name / f"{name}_t1ce.nii.gz", image)
        files.save(tmp_path / name / f"{name}_seg.nii.gz", marks)
    report = check(tmp_path, convention="msd")
    assert report.ok and any("darker" in text and "2 of 2 patients" in text for text in report.warnings)


def test_one_modality_of_a_tree(tmp_path: Path, brats) -> None:
    brats(tmp_path, "A", kinds=("t1", "t2"))
    report = check(tmp_path, modalities=["t2"])
    assert report.counts == {"t2": 1} and report.ok
    assert "no seg file" in check(tmp_path, convention="brats").problems[0]
    assert "no flair file" in check(tmp_path, modalities=["flair"]).problems[0]


def test_nothing_to_report_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no \.nii"):
        check(tmp_path)
    with pytest.raises(DataError, match="unknown label convention"):
        check(tmp_path, layout="folder", convention="auto")


def test_the_report_lists_what_was_not_taken_and_ids_that_look_wrong(tmp_path: Path, files) -> None:
    for name in ("P001_T1", "p001_T1", "P002_T1"):
        files.save(tmp_path / f"{name}.nii.gz", files.head())
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "nowhere")
    for name in ("a.hdr", "a.img", "b.nrrd", "c.mgz"):
        (tmp_path / name).write_bytes(b"")
    report = check(tmp_path, "folder", ["t1"])
    assert report.ok and report.counts == {"t1": 3}
    for said in (
        "1 not taken: gone.nii.gz: a link to a file that does not exist",
        "2 not taken: a.hdr, a.img: an Analyze or NIfTI pair",
        "1 not taken: b.nrrd: not NIfTI",
        "1 not taken: c.mgz: FreeSurfer's format",
        "'P001_T1' and 'p001_T1' are taken for 2 patients, and look like one",
        "3 of 3 ids end in the name of a modality",
    ):
        assert any(text.startswith(said) for text in report.warnings), (said, report.warnings)
    assert any(line.startswith("warning       2 not taken: a.hdr, a.img") for line in report.lines())


def test_names_in_two_unicode_forms_do_not_pass(tmp_path: Path, files) -> None:
    for name in ("Jos\u00e9", "Jose\u0301"):
        files.save(tmp_path / f"{name}.nii.gz", files.head())
    report = check(tmp_path, modalities=["t1"])
    assert not report.ok
    assert "are the same patient" in report.problems[0]


def test_a_foreign_file_in_a_tree_is_a_warning(tmp_path: Path, files, brats) -> None:
    brats(tmp_path, "A")
    files.save(tmp_path / "A" / "A_pred.nii.gz", files.head())
    report = check(tmp_path, convention="brats")
    assert report.ok and report.counts == {"flair": 1, "t1": 1, "t1ce": 1, "t2": 1, "labels": 1}
    assert any("1 not taken: A/A_pred.nii.gz: its name ends in neither" in text for text in report.warnings)


def test_a_list_is_checked_like_a_folder(tmp_path: Path, files) -> None:
    files.save(tmp_path / "scan.nii.gz", files.head())
    (tmp_path / "patients.csv").write_text("patient,path\nP001,scan.nii.gz\n")
    report = check(tmp_path / "patients.csv", modalities=["t1"])
    assert report.ok and report.layout == "csv" and report.counts == {"t1": 1}


@pytest.mark.parametrize("kind", ["nothing of use", "masks only beside images elsewhere"])
def test_a_folder_without_a_single_image_is_not_usable(tmp_path: Path, files, kind: str) -> None:
    """The wrong folder was called usable, with a warning at most."""
    if kind == "nothing of use":
        (tmp_path / "P001").mkdir()
        (tmp_path / "P001" / "P001_t1.nrrd").write_bytes(b"x")
    else:
        (tmp_path / "sub-1" / "dwi").mkdir(parents=True)
        files.save(tmp_path / "sub-1" / "dwi" / "sub-1_dwi.nii.gz", files.head())
    report = check(tmp_path, layout="patient-folders" if kind == "nothing of use" else "bids")
    assert not report.ok and sum(report.counts.values()) == 0


def test_a_folder_that_another_modality_used_was_taken(tmp_path: Path, files) -> None:
    for kind in ("mr", "ct", "odd"):
        for patient in ("p1", "p2"):
            files.save(tmp_path / kind / f"{patient}.nii.gz", files.head())
    report = check(tmp_path, "folder", ["mr", "ct"])
    assert report.ok and report.counts == {"mr": 2, "ct": 2}
    told = [text for text in report.warnings if "not taken" in text]
    assert told and all("1 not taken: odd: a folder: only files of one" in text for text in told)
    assert {
        one.path.name for kind in find_all(tmp_path, "folder", ["mr", "ct"]).values() for one in kind.left_out
    } == {"odd"}


def test_a_guess_that_found_nothing_names_itself_and_what_to_try(tmp_path: Path, files) -> None:
    for kind in ("mr", "ct"):
        for patient in ("p1", "p2"):
            files.save(tmp_path / kind / f"{patient}.nii.gz", files.head())
    (said,) = check(tmp_path).problems
    assert "as layout 'patient-folders', which was guessed" in said
    assert said.endswith("if its folders are modalities, try --layout folder --modality ct --modality mr")
    assert check(tmp_path, "folder", ["ct", "mr"]).ok, "what it advises works"
