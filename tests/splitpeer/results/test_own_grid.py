"""Back from the job's grid: a mask in RAS order, or resampled, lies on the patient's own file again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from splitpeer.data.files import Case
from splitpeer.data.nifti import read_header, read_voxels
from splitpeer.data.resampling import resample
from splitpeer.data.task import Region, Task, glioma
from splitpeer.data.volumes import grid_of
from splitpeer.errors import DataError
from splitpeer.results.own_grid import chances, decided, on_file

CLASSES = Task({1: "one", 2: "two"}, (Region("one", (1,)), Region("two", (2,))), exclusive=True)


def a_file(patients: SimpleNamespace, folder: Path, number: int) -> tuple[Case, np.ndarray, np.ndarray]:
    """A patient's image stored with axes in some order and some reversed; its truth and affine as stored."""
    order = ((0, 1, 2), (2, 0, 1), (1, 0, 2), (2, 1, 0))[number % 4]
    shape, affine = patients.stored(
        (26, 28, 30), patients.affine("oblique", (26, 28, 30)), order, patients.turns[number]
    )
    points = patients.grid_points(shape, affine)
    path = folder / "P-0001.nii.gz"
    nib.save(nib.Nifti1Image(patients.image_at(points).astype(np.float32), affine), path)
    return Case("P-0001", path), patients.inside(points), nib.load(path).affine


@pytest.mark.parametrize("number", range(8))
def test_what_reading_turned_is_turned_back(patients: SimpleNamespace, tmp_path: Path, number: int) -> None:
    case, truth, affine = a_file(patients, tmp_path, number)
    image, header = read_voxels(case)
    ras = np.stack([header.turn.voxels(mask) for mask in truth])
    assert ras.shape[1:] == image.shape
    values, back = on_file(chances(glioma("brats"), ras), header.geometry, header)
    ours = decided("P-0001", glioma("brats"), values, back, patients.ORIGIN)
    assert (ours.masks == truth).all()
    assert np.abs(ours.affine - affine).max() < 1e-4  # mm; the header is float32
    assert ours.probabilities is None


def test_what_was_resampled_is_decided_on_the_files_grid(patients: SimpleNamespace, tmp_path: Path) -> None:
    case, truth, _ = a_file(patients, tmp_path, 5)
    header = read_header(case)
    grid = grid_of(case, header, (1.5, 1.5, 1.5))
    assert grid.shape != header.shape
    ras = np.stack([header.turn.voxels(mask) for mask in truth]).astype(np.float32)
    coarse = np.stack([resample(mask, header.geometry, grid, nearest=False) for mask in ras])
    values, affine = on_file(coarse, grid, header)
    ours = decided("P-0001", glioma("brats"), values, affine, patients.ORIGIN, keep=True)
    overlap = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in zip(ours.masks, truth, strict=True)]
    # Twice interpolated over 1.5 mm: a border of a fraction of a voxel, on a body of 4 to 19 mm.
    assert min(overlap[:2]) > 0.95 and overlap[2] > 0.85
    assert ours.probabilities is not None and ours.probabilities.shape == ours.masks.shape


def test_classes_that_exclude_each_other(patients: SimpleNamespace) -> None:
    masks = np.zeros((2, 3, 3, 3), bool)
    masks[0, 0], masks[1, 2] = True, True
    values = chances(CLASSES, masks)
    assert values.shape == (3, 3, 3, 3) and (values.sum(0) == 1).all()
    ours = decided("P-0001", CLASSES, values, np.eye(4), patients.ORIGIN, keep=True)
    assert (ours.masks == masks).all()
    assert ours.probabilities is not None and (ours.probabilities == masks).all()


def test_an_answer_to_something_else(patients: SimpleNamespace, tmp_path: Path) -> None:
    case, _, _ = a_file(patients, tmp_path, 0)
    header = read_header(case)
    with pytest.raises(DataError, match=r"the answer has \[4, 4, 4\] voxels, not \[26, 28, 30\]"):
        on_file(np.zeros((3, 4, 4, 4), np.float32), header.geometry, header)
    with pytest.raises(DataError, match="2 channels, the task 3"):
        decided("P", glioma("brats"), np.zeros((2, 4, 4, 4), np.float32), np.eye(4), patients.ORIGIN)
