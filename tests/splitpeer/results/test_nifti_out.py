"""NIfTI masks and the JSON beside them: the patient's own grid, the task's values, and where they come from."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from splitpeer.data.files import Case
from splitpeer.data.nifti import read_voxels
from splitpeer.data.task import glioma
from splitpeer.errors import ConfigError, DataError, DiskTrouble
from splitpeer.results.nifti_out import descrip, in_one_line, undecided, write_nifti
from splitpeer.results.segmentation import Origin, Segmentation


@pytest.fixture
def ours(patients: SimpleNamespace) -> Segmentation:
    shape, affine = patients.stored(
        patients.SHAPE, patients.affine("oblique"), (2, 0, 1), (True, False, True)
    )
    made: Segmentation = patients.segmentation(shape, affine)
    return made


@pytest.mark.parametrize("name", ["mask.nii.gz", "mask.nii"])
def test_a_map_of_the_tasks_values_on_the_patients_grid(
    ours: Segmentation, tmp_path: Path, name: str
) -> None:
    beside = write_nifti(ours, tmp_path / name)
    image = nib.load(tmp_path / name)
    assert image.shape == ours.shape and image.get_data_dtype() == np.uint8
    assert np.abs(image.affine - ours.affine).max() < 1e-5
    assert np.abs(image.get_qform() - ours.affine).max() < 1e-4
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
    assert (glioma("brats").masks(np.asarray(image.dataobj)) == ours.masks).all()
    # What this project reads is what it wrote.
    voxels, header = read_voxels(Case("P", tmp_path / name))
    assert header.warnings == () or all("mm" in text for text in header.warnings)
    assert voxels.max() == 4
    assert beside == tmp_path / "mask.json"
    assert (tmp_path / name).stat().st_mode & 0o777 == beside.stat().st_mode & 0o777 == 0o600


def test_where_it_comes_from(ours: Segmentation, tmp_path: Path, patients: SimpleNamespace) -> None:
    said = json.loads(write_nifti(ours, tmp_path / "mask.nii.gz").read_text())
    assert said["notice"].startswith("Not a medical device")
    assert said["run"] == {
        "id": "a1b2c3d4", "name": "glioma-demo", "step": 1200, "model_sha256": patients.MODEL,
    }  # fmt: skip
    assert said["modalities"] == {"used": ["t1", "t2", "flair"], "missing": ["t1ce"]}
    assert said["warnings"] == ["Made without t1ce: the network was trained with it."]
    assert said["created"] == "2026-03-04T05:06:07+00:00"
    whole = said["regions"][0]
    assert (whole["name"], whole["values"]) == ("WT", [1, 4, 2])
    assert whole["voxels"] == ours.masks[0].sum()
    assert whole["ml"] == pytest.approx(ours.masks[0].sum() * 1.0 * 1.3 * 2.5 / 1000, abs=1e-4)
    assert said["file"] == {"holds": "values", "voxels_decided_by_the_smallest_region": 0}


def test_the_header_says_it_in_79_characters_and_names_no_patient(ours: Segmentation, tmp_path: Path) -> None:
    write_nifti(ours, tmp_path / "mask.nii.gz")
    text = bytes(nib.load(tmp_path / "mask.nii.gz").header["descrip"]).rstrip(b"\0").decode()
    assert text == "splitproto 0.1.0 glioma-demo 9f9f9f9f9f9f without t1ce, not a medical device"
    long = replace(ours, origin=replace(ours.origin, name="ü" * 200, missing=("t1ce", "flair")))
    assert len(descrip(long)) == 79 and descrip(long).endswith("without t1ce,flair, not a medical device")


def test_the_same_mask_is_the_same_file(ours: Segmentation, tmp_path: Path) -> None:
    write_nifti(ours, tmp_path / "one.nii.gz")
    write_nifti(ours, tmp_path / "two.nii.gz")
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "two.nii.gz").read_bytes()


def test_probabilities_as_volumes_of_one_file(ours: Segmentation, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="probabilities were not kept"):
        write_nifti(ours, tmp_path / "p.nii.gz", "probabilities")
    kept = replace(ours, probabilities=ours.masks.astype(np.float32) * np.float32(0.7))
    write_nifti(kept, tmp_path / "p.nii.gz", "probabilities")
    chance = np.asarray(nib.load(tmp_path / "p.nii.gz").dataobj)
    assert chance.dtype == np.float32 and chance.max() == np.float32(0.7)
    assert chance.shape == (*ours.shape, 3) and (np.moveaxis(chance > 0, -1, 0) == ours.masks).all()


def test_regions_that_no_value_stands_for_are_counted(ours: Segmentation, tmp_path: Path) -> None:
    masks = ours.masks.copy()
    masks[0][masks[2]] = False  # enhancing tumour outside the whole tumour
    odd = replace(ours, masks=masks)
    lost = int(ours.masks[2].sum())
    assert undecided(odd) == lost > 0
    said = json.loads(write_nifti(odd, tmp_path / "mask.nii.gz").read_text())
    assert said["file"]["voxels_decided_by_the_smallest_region"] == lost


def test_a_sheared_grid_has_no_quaternion(ours: Segmentation, tmp_path: Path) -> None:
    affine = ours.affine.copy()
    affine[:3, 2] += 0.2 * affine[:3, 1]
    write_nifti(replace(ours, affine=affine), tmp_path / "mask.nii.gz")
    image = nib.load(tmp_path / "mask.nii.gz")
    assert int(image.header["qform_code"]) == 0 and np.abs(image.affine - affine).max() < 1e-5
    assert replace(ours, affine=affine).voxel_ml == pytest.approx(ours.voxel_ml)


def test_a_full_disk_leaves_no_mask_and_no_half(
    ours: Segmentation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(DiskTrouble, match=r"mask.nii.gz cannot be written \(No space left on device\)"):
        write_nifti(ours, tmp_path / "mask.nii.gz")
    assert list(tmp_path.iterdir()) == []


def test_another_name_is_refused(ours: Segmentation, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is called .nii.gz or .nii"):
        write_nifti(ours, tmp_path / "mask.dcm")


def test_arrays_that_are_no_segmentation(patients: SimpleNamespace) -> None:
    task, origin = glioma("brats"), patients.ORIGIN
    with pytest.raises(DataError, match="not one of 3 regions"):
        Segmentation("P", task, np.zeros((2, 3, 3, 3), bool), np.eye(4), origin)
    with pytest.raises(DataError, match="different shapes"):
        Segmentation("P", task, np.zeros((3, 3, 3, 3), bool), np.eye(4), origin, np.zeros((3, 3, 3, 2)))
    with pytest.raises(DataError, match="no grid"):
        Segmentation("P", task, np.zeros((3, 3, 3, 3), bool), np.diag([1.0, 0.0, 1.0, 1.0]), origin)


def test_words(ours: Segmentation) -> None:
    assert ours.grid == "11 x 18 x 15 voxels of 2.5 x 1 x 1.3 mm"
    assert in_one_line({"WT": 38.24, "TC": 0.0}) == "WT 38.2 ml, TC 0.0 ml"
    two = Origin("r", "n", "m", ("t1",), ("t2", "flair"), warnings=("Slow.",))
    assert two.cautions == ("Made without t2, flair: the network was trained with them.", "Slow.")
    assert two.created.tzinfo is not None
