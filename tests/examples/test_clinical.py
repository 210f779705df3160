"""examples/clinical as its README says: DICOM of two hospitals becomes DICOM SEG on a scan's own slices."""

from __future__ import annotations

import json
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest

from tests.examples.scripts import EXAMPLES, commands, refuses_to_overwrite, script

PATIENT = "phantom-003"


@pytest.mark.timeout(400)
def test_from_the_scanner_to_the_mask(tmp_path: Path) -> None:
    done = script("clinical", tmp_path / "run", PATIENTS="3", NEW="1", STEPS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    scan = nib.Nifti1Image.from_filename(run / "pacs/labels" / f"{PATIENT}.nii.gz")
    mask = nib.Nifti1Image.from_filename(run / "masks" / f"{PATIENT}.nii.gz")
    assert mask.shape == scan.shape and np.allclose(mask.affine, scan.affine, atol=1e-3)
    made = json.loads((run / "masks" / f"{PATIENT}.json").read_text())
    assert sorted(made["modalities"]["used"]) == ["flair", "t1ce"]

    source = next(
        one
        for path in (run / "pacs/t1ce/dicom" / PATIENT).rglob("*.dcm")
        if "LOCALIZER" not in (one := pydicom.dcmread(path, stop_before_pixels=True)).ImageType
    )
    seg = highdicom.seg.segread(run / "seg" / f"{PATIENT}.dcm")
    # After two steps regions need not lie in each other: any of them.
    pixels = seg.get_volume(combine_segments=False).array
    assert int((pixels > 0).any(axis=-1).sum()) == int((np.asarray(mask.dataobj) > 0).sum())
    assert (seg.PatientID, seg.StudyInstanceUID) == (source.PatientID, source.StudyInstanceUID)
    assert seg.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert seg.SegmentSequence[0].SegmentLabel == "whole tumour (WT)"
    assert (run / "pages" / f"{PATIENT}.html").stat().st_size > 10_000

    # The mask of that patient was nowhere but with the people who drew it.
    assert not list((run / "hub").rglob(f"{PATIENT}*"))
    found = json.loads((run / "study/evaluation.json").read_text())
    assert set(found["summary"]) >= {"WT", "TC", "ET", "mean"}


def test_it_does_not_write_over_a_run(tmp_path: Path) -> None:
    assert refuses_to_overwrite("clinical", tmp_path)


def test_the_readme_and_the_script_give_the_same_commands() -> None:
    told, run = (
        commands((EXAMPLES / "clinical" / file).read_text(), "data prepare", "pki", "init")
        for file in ("README.md", "run.sh")
    )
    assert len(told) == 9
    assert told == run
