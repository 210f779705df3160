"""A mask that is written matches its image, however the image was stored."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from splitpeer.data.layouts import Case
from splitpeer.data.pseudonym import pseudonym
from splitpeer.data.volumes import Volumes
from splitpeer.federation.evaluation import save_mask

SALT = bytes(32)
SHAPE = (14, 12, 10)
CODES = [
    "".join(letters[side] for letters, side in zip(order, sides, strict=True))
    for order in itertools.permutations(("LR", "PA", "IS"))
    for sides in itertools.product((0, 1), repeat=3)
]
MARKED = [(2, 3, 4), (9, 5, 4), (11, 10, 8)]


def turned(about_x: float, about_z: float) -> np.ndarray:
    a, b = math.radians(about_x), math.radians(about_z)
    x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    z = np.array([[math.cos(b), -math.sin(b), 0], [math.sin(b), math.cos(b), 0], [0, 0, 1]])
    return x @ z


def write(path: Path, codes: str, rotation: np.ndarray, spacing=(3.0, 2.0, 4.0)) -> Path:
    """A reference file whose stored axes are `codes`, before it is tilted; three voxels have values of their own."""
    columns = []
    for letter in codes:
        axis = next(n for n, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        columns.append(rotation[:, axis] * spacing[axis] * (1 if letter in "RAS" else -1))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.array(columns).T, (-83.2, 41.7, -120.4)
    voxels = np.zeros(SHAPE, np.uint8)
    for value, place in enumerate(MARKED, 1):
        voxels[place] = value
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def places(path: Path) -> np.ndarray:
    """Where the values 1, 2 and 3 lie, in scanner coordinates, as any viewer finds it."""
    image = nib.load(path)
    voxels = np.asarray(image.dataobj)
    return np.array([(image.affine @ (*np.argwhere(voxels == value)[0], 1))[:3] for value in (1, 2, 3)])


def through(reference: Path, out: Path, spacing: tuple[float, float, float] | None = None) -> Volumes:
    """The reference's own regions, as the loader cuts them, written as a prediction."""
    volumes = Volumes([Case("p", reference)], salt=SALT, labels="msd", spacing=spacing)
    key = pseudonym(SALT, "p")
    grid = volumes.geometry(key)
    save_mask(out, volumes.window(key, (0, 0, 0), grid.shape).astype(bool), grid, volumes.labels)
    return volumes


@pytest.mark.parametrize("tilt", [(0, 0), (15, 10), (-30, 5), (40, -35), (3, 44)])
@pytest.mark.parametrize("codes", CODES)
def test_a_mask_lies_on_its_reference(tmp_path: Path, codes: str, tilt: tuple[float, float]) -> None:
    """Every orientation, upright and oblique: within 1e-3 mm (36 mm off at 15 and 10 degrees before)."""
    reference = write(tmp_path / "reference.nii.gz", codes, turned(*tilt))
    through(reference, tmp_path / "out" / "p.nii.gz")
    np.testing.assert_allclose(places(tmp_path / "out" / "p.nii.gz"), places(reference), atol=1e-3)
    written = nib.load(tmp_path / "out" / "p.nii.gz")
    canonical = nib.as_closest_canonical(nib.load(reference))
    np.testing.assert_allclose(written.affine, canonical.affine, atol=1e-4)
    assert written.shape == canonical.shape
    # Programs differ in which of the two they read.
    np.testing.assert_allclose(written.get_qform(), written.get_sform(), atol=1e-3)
    assert written.header["qform_code"] > 0 < written.header["sform_code"]


@pytest.mark.parametrize("tilt", [(0, 0), (15, 10)])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "IAL"])
def test_a_mask_of_a_resampled_volume_has_the_resampled_grid(tmp_path: Path, codes: str, tilt) -> None:
    reference = write(tmp_path / "reference.nii.gz", codes, turned(*tilt), spacing=(4.0, 4.0, 4.0))
    volumes = through(reference, tmp_path / "p.nii.gz", (1.0, 1.0, 1.0))
    written, stored = nib.load(tmp_path / "p.nii.gz"), nib.load(reference)
    np.testing.assert_allclose(written.header.get_zooms(), (1, 1, 1), atol=1e-4)
    assert written.shape == volumes.geometry(pseudonym(SALT, "p")).shape
    labels, before = np.asarray(written.dataobj), np.asarray(stored.dataobj)
    for value, centre in enumerate(places(reference), 1):
        # Nearest voxel: the block that takes the value includes the voxel's centre and is no wider than it.
        index = np.linalg.solve(written.affine, (*centre, 1))[:3]
        assert labels[tuple(np.rint(index).astype(int))] == value
        block = np.argwhere(labels == value) @ written.affine[:3, :3].T + written.affine[:3, 3]
        assert np.linalg.norm(block - centre, axis=1).max() <= 2 * math.sqrt(3) + 1e-3
    assert set(np.unique(labels)) == set(np.unique(before))


async def test_predictions_of_an_oblique_cohort_lie_on_their_label_files(scene, make, tmp_path: Path) -> None:
    """All contrasts and masks 15 degrees about x and 10 about z, stored as LPS at one site."""
    rotation = turned(15, 10)
    for patient in ("P1", "P2", "P3"):
        make.patient(tmp_path / "plain", patient, int(patient[1]), (33, 34, 35))
        for kind in ("labels", "t1", "t2"):
            image = nib.load(tmp_path / "plain" / kind / f"{patient}.nii.gz")
            voxels, affine = np.asarray(image.dataobj), np.eye(4)
            affine[:3, :3], affine[:3, 3] = rotation * (2.0, 2.0, 3.0), (-60, -70, -30)
            if kind == "t2":
                affine = affine @ np.diag([-1, -1, 1, 1]) @ translation(-32, -33, 0)
                voxels = voxels[::-1, ::-1]
            path = tmp_path / "data" / kind / f"{patient}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, affine), path)
    scene.cast("t1", "t2", training={"steps": 1}, data={"validation": 1, "window": [32, 32]})
    scene.coordinator(data={"labels": str(tmp_path / "data" / "labels")})
    for modality in ("t1", "t2"):
        scene.client(modality, data={"images": str(tmp_path / "data" / modality)})
    ran = await scene.together()
    assert ran.result is not None, ran.error
    (path,) = (scene.output / "predictions").glob("*.nii.gz")
    mask, reference = nib.load(path), nib.load(tmp_path / "data" / "labels" / path.name)
    corners = np.array([*itertools.product((0, 32), (0, 33), (0, 34))])
    for corner in corners:
        np.testing.assert_allclose(mask.affine @ (*corner, 1), reference.affine @ (*corner, 1), atol=1e-3)


def translation(*by: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = by
    return matrix
