"""`splitpeer segment` of an image that `data prepare` made: the mask comes back to the scan, as DICOM SEG too."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from splitpeer.cli import main
from splitpeer.daemon.spool import Spool, Waiting
from splitpeer.data.files import Case
from splitpeer.data.geometry import Geometry
from splitpeer.data.nifti import read_header
from splitpeer.data.resampling import resampled_grid
from splitpeer.prepare.record import AtlasGrid, PreparedRecord, read, record_of, write
from tests.splitpeer.daemon.spooling import TASK
from tests.splitpeer.daemon.stand_in import answers_on, daemon, masks_of

highdicom = pytest.importorskip("highdicom")
from pydicom import Dataset  # noqa: E402

from splitpeer.data.phantom.series import write_series  # noqa: E402  (needs pydicom)

SHAPE = (12, 10, 6)
SCAN = np.array([[9.8, -2.0, 0, 11], [2.0, 9.8, 0, 2], [0, 0, 25, 3], [0, 0, 0, 1]])
ANGLE = np.deg2rad(7.0)
TO_ATLAS = np.array(
    [
        [np.cos(ANGLE), 0, np.sin(ANGLE), 4.0],
        [0, 1, 0, -8.0],
        [-np.sin(ANGLE), 0, np.cos(ANGLE), 2.5],
        [0, 0, 0, 1],
    ]
)
"""From the scan to the atlas: a turn and a shift. With `TO_ATLAS @ SCAN` as the atlas's grid, voxels fall on voxels."""


@pytest.fixture
def site(peer_toml: Path) -> Path:
    """A hospital with a scan P001 as DICOM, and the image that was prepared of it."""
    folder = peer_toml.parent
    (folder / "images").mkdir()
    voxels = np.random.default_rng(7).integers(1, 900, SHAPE).astype(np.int16)
    image = folder / "images" / "P001.nii.gz"
    nib.save(nib.Nifti1Image(voxels, TO_ATLAS @ SCAN), image)
    files = write_series(folder / "dicom" / "one", voxels, SCAN, patient_id="4711", description="FLAIR")
    first = highdicom.imread(files[0])
    record = PreparedRecord(
        patient="P001", modality="flair", study=first.StudyInstanceUID, series=first.SeriesInstanceUID,
        frame_of_reference=first.FrameOfReferenceUID,
        files=tuple(str(file.relative_to(folder / "dicom")) for file in files), frames=None, shape=SHAPE,
        affine=SCAN, atlas=AtlasGrid("small", "0" * 64, SHAPE, TO_ATLAS @ SCAN), transform=TO_ATLAS,
        method="rigid", kept="rigid", quality={"nmi": 1.2}, reasons=("little overlap",), accepted=True, warnings=(),
        software={}, inputs="0" * 64, image=hashlib.sha256(image.read_bytes()).hexdigest(), mask="",
    )  # fmt: skip
    record_of(image).parent.mkdir()
    write(record_of(image), record)
    # Another series, which it was not made of.
    write_series(folder / "dicom" / "two", voxels, SCAN, patient_id="4711", description="T1", number=2)
    return folder


@pytest.fixture
def segment(site: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """`splitpeer segment ARGUMENTS`; returns what it printed."""
    stored = read_header(Case("P001", site / "images" / "P001.nii.gz")).geometry

    def call(*arguments: str | Path, code: int = 0, on: Geometry = stored) -> tuple[str, str]:
        with daemon(site / "state", answers_on({"P001": on})), pytest.raises(SystemExit) as left:
            main(["segment", "P001", *map(str, arguments), "--config", str(site / "peer.toml")])
        out, err = capsys.readouterr()
        assert left.value.code == code, err
        return out, err

    return call


def expected(site: Path) -> np.ndarray:
    """The answer's regions, bool [regions, column, row, slice]."""
    header = read_header(Case("P001", site / "images" / "P001.nii.gz"))
    assert header.orientation == "RAS"
    return masks_of(header.geometry).astype(bool)


def test_the_mask_is_on_the_grid_of_the_scan(site: Path, segment: Callable[..., tuple[str, str]]) -> None:
    out, err = segment(
        "--out", site / "m.nii.gz", "--dicom-seg", site / "m.dcm", "--dicom", site / "dicom", "--report",
        site / "m.html", "--probabilities",
    )  # fmt: skip
    assert "m.dcm" in out and "warning: P001: taken in spite of: little overlap" in err
    image = nib.Nifti1Image.from_filename(site / "m.nii.gz")
    assert np.allclose(image.affine, SCAN, atol=1e-4)
    assert np.array_equal(np.asarray(image.dataobj), TASK.labels(expected(site)))
    seg = highdicom.seg.segread(site / "m.dcm")
    assert seg.number_of_segments == 2
    assert {item.SeriesInstanceUID for item in seg.ReferencedSeriesSequence} == {
        highdicom.imread(next((site / "dicom" / "one").iterdir())).SeriesInstanceUID
    }
    volume = seg.get_volume(combine_segments=False)
    # LPS millimetres of DICOM against RAS; where each voxel of the scan is in the volume.
    back = np.linalg.solve(volume.affine, np.diag([-1.0, -1, 1, 1]) @ SCAN)
    for place, mask in enumerate(expected(site)):
        columns, rows, slices = np.rint(back @ np.vstack([np.argwhere(mask).T, np.ones(mask.sum())]))[
            :3
        ].astype(int)
        assert (volume.array[columns, rows, slices, place] == 1).all()
        assert volume.array[..., place].sum() == mask.sum()
    page = (site / "m.html").read_text()
    assert "little overlap" in page and "The grey image is not the scan itself." in page


@pytest.mark.parametrize(
    ("folder", "prepared", "said"),
    [
        ("nowhere", True, "not there"),
        ("dicom", False, "2 series"),
        ("dicom/one", False, "is not on the grid"),
    ],
)
def test_a_wrong_folder_is_found_before_anybody_is_asked(
    site: Path, capsys: pytest.CaptureFixture[str], folder: str, prepared: bool, said: str
) -> None:
    image, asked = site / "images" / "P001.nii.gz", list[str]()
    answer = answers_on({"P001": read_header(Case("P001", image)).geometry})

    def noting(spool: Spool, one: Waiting) -> None:
        asked.append(one.id)
        answer(spool, one)

    if not prepared:
        record_of(image).unlink()
    arguments = (
        "--out",
        site / "m.nii.gz",
        "--dicom-seg",
        site / "m.dcm",
        "--dicom",
        site / folder,
        "--force",
    )
    with daemon(site / "state", noting), pytest.raises(SystemExit) as left:
        main(["segment", "P001", *map(str, arguments), "--config", str(site / "peer.toml")])
    _, err = capsys.readouterr()
    assert left.value.code == 4 and said in err and len(err.splitlines()) == 1
    assert asked == [] and not (site / "m.nii.gz").exists()


def test_a_stack_of_an_enhanced_image(site: Path, segment: Callable[..., tuple[str, str]]) -> None:
    """The record says which of the frames the image was made of."""
    image = site / "images" / "P001.nii.gz"
    voxels = np.random.default_rng(7).integers(1, 900, SHAPE).astype(np.int16)
    (file,) = write_series(
        site / "dicom" / "three",
        voxels,
        SCAN,
        patient_id="4711",
        description="FLAIR",
        number=3,
        enhanced=True,
    )
    data = highdicom.imread(file)
    groups, planes = list(data.PerFrameFunctionalGroupsSequence), data.pixel_array
    data.PerFrameFunctionalGroupsSequence = [*groups, *copy.deepcopy(groups)]
    for group in groups:  # a localizer in front
        group.PlaneOrientationSequence = [Dataset()]
        group.PlaneOrientationSequence[0].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    data.NumberOfFrames, data.PixelData = 2 * SHAPE[2], planes.tobytes() * 2
    data.save_as(file)
    written = read(record_of(image))
    frames = tuple(range(SHAPE[2], 2 * SHAPE[2]))
    write(
        record_of(image),
        replace(written, series=data.SeriesInstanceUID, files=("three/03-multiframe.dcm",), frames=frames),
    )
    segment("--out", site / "m.nii.gz", "--dicom-seg", site / "m.dcm", "--dicom", site / "dicom")
    seg = highdicom.seg.segread(site / "m.dcm")
    wanted = np.zeros((2 * SHAPE[2], SHAPE[1], SHAPE[0], 2), np.uint8)
    wanted[SHAPE[2] :] = expected(site).transpose(3, 2, 1, 0)
    again = seg.get_pixels_by_source_frame(
        data.SOPInstanceUID, list(range(1, 2 * SHAPE[2] + 1)), ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )  # fmt: skip
    assert np.array_equal(again, wanted) and wanted.any()


def test_an_image_that_is_not_its_records(site: Path, segment: Callable[..., tuple[str, str]]) -> None:
    image = site / "images" / "P001.nii.gz"
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.int16), TO_ATLAS @ SCAN), image)
    _, err = segment("--out", site / "m.nii.gz", code=4)
    assert "is not the image that" in err and "prepare it again" in err
    assert not (site / "m.nii.gz").exists()


def test_an_answer_on_a_grid_of_the_jobs_spacing(site: Path, segment: Callable[..., tuple[str, str]]) -> None:
    """Half the image's: every voxel of the scan falls on one of the answer, so nothing is interpolated."""
    grid = read_header(Case("P001", site / "images" / "P001.nii.gz")).geometry
    x, y, z = grid.spacing
    finer = resampled_grid(grid, (x / 2, y / 2, z / 2))
    segment("--out", site / "m.nii.gz", on=finer)
    image = nib.Nifti1Image.from_filename(site / "m.nii.gz")
    regions = masks_of(finer)[:, ::2, ::2, ::2].astype(bool)
    assert np.allclose(image.affine, SCAN, atol=1e-4) and image.shape == SHAPE
    assert np.array_equal(np.asarray(image.dataobj), TASK.labels(regions)) and regions.any()


def test_files_that_are_gone(site: Path, segment: Callable[..., tuple[str, str]]) -> None:
    _, err = segment(
        "--out", site / "m.nii.gz", "--dicom-seg", site / "m.dcm", "--dicom", site / "images", code=4
    )
    assert "name the folder that splitpeer data prepare read" in err.splitlines()[-1]
    assert not (site / "m.nii.gz").exists() and not (site / "m.dcm").exists()


def test_another_export_in_the_folder_of_the_first(
    site: Path, segment: Callable[..., tuple[str, str]]
) -> None:
    voxels = np.ones(SHAPE, np.int16)
    # The same names of files, the same grid, another person.
    write_series(site / "dicom" / "one", voxels, SCAN, patient_id="4712", description="FLAIR")
    _, err = segment(
        "--out",
        site / "m.nii.gz",
        "--dicom-seg",
        site / "m.dcm",
        "--dicom",
        site / "dicom",
        "--force",
        code=4,
    )
    assert "another series than the one that P001.nii.gz was made of" in err.splitlines()[-1]
    assert not (site / "m.nii.gz").exists() and not (site / "m.dcm").exists()


def test_a_series_that_the_record_does_not_name(site: Path, segment: Callable[..., tuple[str, str]]) -> None:
    record_of(site / "images" / "P001.nii.gz").unlink()
    arguments = ("--out", site / "m.nii.gz", "--dicom-seg", site / "m.dcm", "--dicom")
    _, err = segment(*arguments, site / "dicom", code=4)
    assert "2 series" in err.splitlines()[-1]
    # Nothing says that 4711 is P001.
    _, err = segment(*arguments, site / "dicom" / "one", code=4)
    last = err.splitlines()[-1]
    assert "its PatientID is not P001" in last and "--force" in last and "4711" not in last
    # Without a record the mask is where the image is, and that is not where the scan is.
    _, err = segment(*arguments, site / "dicom" / "one", "--force", code=4)
    assert "grid" in err.splitlines()[-1]
    assert not (site / "m.nii.gz").exists()
