"""The phantom as DICOM: readers find the voxels where the patient lies, whatever the grid and the export."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from splitpeer.cli import main
from splitpeer.data.phantom import scanners
from splitpeer.data.phantom.scanners import SCANNERS, Scanner, hospital_id, scan, write_dicom_phantom
from splitpeer.data.phantom.series import Oddities, tilted, uid_of, write_series
from splitpeer.data.regrid import onto, softened

pytest.importorskip("nilearn", reason="the phantom's anatomy is in the extra `demo`")

SMALL = {
    "t1": Scanner((20, 24, 18), (8.0, 8.0, 9.0), "sagittal"),
    "t1ce": Scanner((24, 28, 14), (7.0, 7.0, 12.0), enhanced=True),
    "t2": Scanner((24, 28, 14), (7.0, 7.0, 12.0), oddities=Oddities(reverse=True), own_ids=True),
    "flair": Scanner((24, 14, 20), (8.0, 14.0, 8.0), "coronal", follows=False),
}


def block() -> tuple[np.ndarray, np.ndarray]:
    voxels = np.random.default_rng(1).integers(0, 900, (7, 6, 5)).astype(np.int16)
    affine = np.diag([-1.5, -2.0, 4.0, 1.0])
    affine[:3, 3] = 30.0, 20.0, -10.0
    return voxels, affine


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tilt", [0.0, 12.0])
def test_a_voxel_is_where_its_header_says(tmp_path: Path, *, reverse: bool, tilt: float) -> None:
    voxels, affine = block()
    affine = tilted(affine, tilt)
    odd = Oddities(slope=0.5, intercept=-20.0, reverse=reverse)
    paths = write_series(tmp_path, voxels, affine, patient_id="A", description="x", oddities=odd)
    i, j, k = 4, 1, 3
    data = pydicom.dcmread(paths[k])
    # PS3.3 C.7.6.2.1.1: the first vector points along a row, whose index is the column.
    down, across = (float(step) for step in data.PixelSpacing)
    row, column = np.reshape([float(one) for one in data.ImageOrientationPatient], (2, 3))
    lps = np.array([float(x) for x in data.ImagePositionPatient]) + i * across * row + j * down * column
    assert np.allclose(lps * (-1, -1, 1), (affine @ (i, j, k, 1))[:3], atol=1e-6)
    stored = data.pixel_array[j, i]
    assert float(stored) * float(data.RescaleSlope) + float(data.RescaleIntercept) == voxels[i, j, k]


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "rle"])
@pytest.mark.parametrize("enhanced", [False, True])
def test_every_export_holds_the_voxels(tmp_path: Path, syntax: str, *, enhanced: bool) -> None:
    voxels, affine = block()
    paths = write_series(
        tmp_path,
        voxels,
        affine,
        patient_id="A",
        description="x",
        enhanced=enhanced,
        oddities=Oddities(syntax=syntax),
    )
    read = np.stack([pydicom.dcmread(path).pixel_array for path in paths], -1) if not enhanced else None
    if read is None:
        read = pydicom.dcmread(paths[0]).pixel_array.transpose(1, 2, 0)
    assert np.array_equal(read.transpose(1, 0, 2), voxels)


def test_hospitals_scan_one_person(tmp_path: Path) -> None:
    """Seen through its pose, what one hospital calls tumour is where the other one's is."""
    heads = []
    for modality, scanner in SMALL.items():
        taken = scan(3, 2, modality, scanner)
        grid = np.diag([6.0, 6.0, 6.0, 1.0])
        grid[:3, 3] = -84.0, -102.0, -78.0
        head = np.linalg.inv(taken.pose) @ taken.affine
        half = np.median(taken.voxels[taken.voxels > 0]) / 2
        there = (taken.voxels > half).astype(np.float32)
        heads.append(onto(there, head, (28, 32, 30), grid, order=1) > 0.5)
    for other in heads[1:]:
        shared = 2 * (heads[0] & other).sum() / (heads[0].sum() + other.sum())
        assert shared > 0.92  # measured: .94 to .95; with a pose ignored .75 or less


def test_a_cohort_on_disk(tmp_path: Path) -> None:
    summary = write_dicom_phantom(tmp_path, 1, seed=3, scanners=SMALL)
    files = list(tmp_path.rglob("*.dcm"))
    assert summary["files"] == len(files)
    ids = {path: pydicom.dcmread(path, specific_tags=["PatientID"]).PatientID for path in files}
    assert {ids[path] for path in files if "t2" in path.parts} == {hospital_id("t2", "phantom-001")}
    assert (tmp_path / "t2" / "ids.csv").read_text() == "hospital,study\nT2700137,phantom-001\n"
    mask = nib.load(tmp_path / "labels" / "phantom-001.nii.gz")
    taken = scan(3, 0, "t1ce", SMALL["t1ce"])
    assert np.array_equal(np.asarray(mask.dataobj), taken.label)
    assert np.allclose(mask.affine, taken.affine, atol=1e-4)
    assert np.allclose(summary["poses"]["t1ce/phantom-001"], taken.pose)


def test_the_command_makes_what_two_hospitals_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scanners, "SCANNERS", SMALL)

    def call(*more: str) -> int:
        with pytest.raises(SystemExit) as left:
            main(["data", "phantom", str(tmp_path / "pacs"), "--patients", "1", *more])
        return int(left.value.code or 0)

    assert call("--dicom", "--modality", "t2", "--modality", "flair") == 0
    assert "flair/, t2/ (DICOM), labels/ (on the grid of t2)" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "pacs").iterdir()} == {"flair", "t2", "labels"}
    mask = nib.load(tmp_path / "pacs/labels/phantom-001.nii.gz")
    assert np.array_equal(np.asarray(mask.dataobj), scan(0, 0, "t2", SMALL["t2"]).label)
    assert call("--modality", "t2") == 4 and "only with --dicom" in capsys.readouterr().err


def test_uids_are_of_the_words_alone() -> None:
    assert uid_of("a", 1) == uid_of("a", 1) != uid_of("a", 2)
    assert pydicom.uid.UID(uid_of("a", 1)).is_valid
    assert {scanner.plane for scanner in SCANNERS.values()} == {"axial", "sagittal", "coronal"}


def test_a_grid_seen_on_itself_is_itself_and_back() -> None:
    voxels, affine = block()
    assert np.array_equal(onto(voxels, affine, voxels.shape, affine, order=1), voxels)
    turned = affine.copy()
    turned[:, 0], turned[:3, 3] = -affine[:, 0], affine[:3, 3] + 6 * affine[:3, 0]
    assert np.array_equal(onto(voxels, affine, voxels.shape, turned, order=1), voxels[::-1])


def test_a_coarser_grid_sees_the_average() -> None:
    """A checkerboard of 1 mm is grey at 4 mm, and would be noise without the Gaussian before."""
    board = np.indices((32, 32, 32)).sum(axis=0).astype(np.float32) % 2
    coarse = np.diag([4.0, 4.0, 4.0, 1.0])
    coarse[:3, 3] = 4.0
    seen = onto(softened(board, np.eye(4), coarse), np.eye(4), (6, 6, 6), coarse, order=1)
    assert np.abs(seen - 0.5).max() < 0.01
    assert softened(board, np.eye(4), np.eye(4)) is board
