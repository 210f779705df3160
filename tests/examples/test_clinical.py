"""examples/clinical as its README says: DICOM of two hospitals becomes DICOM SEG on a scan's own slices."""

from __future__ import annotations

import json
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest

from splitpeer.data.files import Case
from splitpeer.data.nifti import read_voxels
from splitpeer.data.task import glioma
from splitpeer.prepare.back import to_original
from splitpeer.prepare.record import read
from tests.examples.scripts import EXAMPLES, commands, refuses_to_overwrite, script

NEW = "phantom-003"
PATIENTS = ("phantom-001", "phantom-002", NEW)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script leaves: the smallest cohort, of whom one patient is trained on, one held out and one new."""
    folder = tmp_path_factory.mktemp("clinical") / "run"
    done = script("clinical", folder, PATIENTS="3", NEW="1", STEPS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.timeout(1200)  # the first one waits for the run
def test_masks_on_the_atlas_return_to_where_they_were_drawn(run: Path) -> None:
    """On the scan's own slices: one voxel off in any direction, at most .90 of them would agree."""
    for patient in PATIENTS:
        image = nib.Nifti1Image.from_filename(run / "pacs/labels" / f"{patient}.nii.gz")
        drawn = np.asarray(image.dataobj)
        moved, header = read_voxels(Case(patient, run / "north/images/labels" / f"{patient}.nii.gz"))
        record = read(run / "north/images/prepared" / f"{patient}.json")
        assert np.allclose(record.affine, image.affine, atol=1e-3)
        back = to_original(moved.astype(np.uint8), header.affine, record, order=0)
        assert record.kept == "affine" and (back == drawn)[drawn > 0].mean() > 0.95  # measured: .98 to .997


@pytest.mark.timeout(1200)
def test_nifti_and_dicom_seg_hold_the_same_voxels_of_the_scan(run: Path) -> None:
    scan = nib.Nifti1Image.from_filename(run / "pacs/labels" / f"{NEW}.nii.gz")
    mask = nib.Nifti1Image.from_filename(run / "masks" / f"{NEW}.nii.gz")
    values = np.asarray(mask.dataobj)
    assert mask.shape == scan.shape and np.allclose(mask.affine, scan.affine, atol=1e-3)
    assert values.any()  # after two steps: anything, anywhere
    made = json.loads((run / "masks" / f"{NEW}.json").read_text())
    assert sorted(made["modalities"]["used"]) == ["flair", "t1ce"]

    seg = highdicom.seg.segread(run / "seg" / f"{NEW}.dcm")
    volume = seg.get_volume(combine_segments=False)
    index = np.indices(volume.spatial_shape).reshape(3, -1)
    ours = np.diag([-1.0, -1.0, 1.0, 1.0]) @ mask.affine
    place = np.linalg.solve(ours, volume.affine @ np.vstack([index, np.ones(index.shape[1])]))[:3]
    assert np.abs(place - place.round()).max() < 1e-3
    regions = np.zeros((volume.array.shape[-1], *mask.shape), bool)
    regions[:, *place.round().astype(int)] = volume.array.reshape(-1, len(regions)).T
    assert np.array_equal(glioma("msd").labels(regions), values)


@pytest.mark.timeout(1200)
def test_the_dicom_seg_belongs_to_the_scan(run: Path) -> None:
    source = next(
        one
        for path in (run / "pacs/t1ce/dicom" / NEW).rglob("*.dcm")
        if "LOCALIZER" not in (one := pydicom.dcmread(path, stop_before_pixels=True)).ImageType
    )
    seg = highdicom.seg.segread(run / "seg" / f"{NEW}.dcm")
    assert (seg.PatientID, seg.StudyInstanceUID) == (source.PatientID, source.StudyInstanceUID)
    assert seg.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert {
        one.ReferencedSOPInstanceUID for one in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    } == {source.SOPInstanceUID}
    assert seg.SegmentSequence[0].SegmentLabel == "whole tumour (WT)"


@pytest.mark.timeout(1200)
def test_the_new_patient_was_new_and_is_scored(run: Path) -> None:
    # The mask of that patient was nowhere but with the people who drew it.
    assert not list((run / "hub").rglob(f"{NEW}*"))
    found = json.loads((run / "study/evaluation.json").read_text())
    assert set(found["summary"]) >= {"WT", "TC", "ET", "mean"}
    assert (run / "pages" / f"{NEW}.html").stat().st_size > 10_000


def test_it_does_not_write_over_a_run(tmp_path: Path) -> None:
    assert refuses_to_overwrite("clinical", tmp_path)


@pytest.mark.parametrize(("patients", "new"), [("2", "1"), ("5", "4"), ("16", "12"), ("6", "0")])
def test_too_few_patients_are_refused_before_anything_is_made(
    tmp_path: Path, patients: str, new: str
) -> None:
    done = script("clinical", tmp_path / "run", PATIENTS=patients, NEW=new)
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1 and f"run.sh: {patients} patients are too few" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_readme_and_the_script_give_the_same_commands() -> None:
    told, run = (
        commands((EXAMPLES / "clinical" / file).read_text(), "data prepare", "pki", "init")
        for file in ("README.md", "run.sh")
    )
    assert len(told) == 9
    assert told == run
