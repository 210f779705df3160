"""DICOM SEG: every voxel where the patient has it, read back by pydicom and by highdicom; what a PACS shows of it."""

from __future__ import annotations

import errno
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest

from splitpeer.data.task import Region, Task
from splitpeer.dicom.headers import read_folder
from splitpeer.dicom.stacks import grid_of, stacks_of
from splitpeer.errors import ConfigError, DataError, DiskTrouble
from splitpeer.results.codes import Concept, RegionCode, code_of
from splitpeer.results.dicom_seg import write_dicom_seg
from splitpeer.results.dicom_source import read_series
from splitpeer.results.segmentation import Segmentation

VIEWS = ("axial", "sagittal", "coronal", "oblique", "tilted")
ORDERS = ((0, 1, 2), (2, 0, 1), (1, 0, 2))


def by_formula(patients: SimpleNamespace, seg: pydicom.Dataset) -> int:
    """Compares each frame of a segmentation with the formula, pixel by pixel, from what the file says of its place
    (PS3.3, C.7.6.2.1.1). Returns how many pixels are set.
    """
    shared = seg.SharedFunctionalGroupsSequence[0]
    along = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    rows, columns = (float(mm) for mm in shared.PixelMeasuresSequence[0].PixelSpacing)
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    for group, frame in zip(seg.PerFrameFunctionalGroupsSequence, frames, strict=True):
        place = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        row, column = np.mgrid[: seg.Rows, : seg.Columns]
        points = place + column[..., None] * columns * along[0] + row[..., None] * rows * along[1]
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        assert (patients.inside(points @ patients.LPS.T)[number - 1] == frame.astype(bool)).all()
    return int(frames.sum())


def laid_back(ours: Segmentation, path: Path) -> np.ndarray:
    """A segmentation as highdicom reads it, as a volume, on the grid of the NIfTI file."""
    volume = highdicom.seg.segread(path).get_volume(combine_segments=False, rescale_fractional=False)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ours.affine
    again = np.zeros_like(ours.masks)
    index = np.stack(np.meshgrid(*map(np.arange, volume.spatial_shape), indexing="ij"), -1).reshape(-1, 3)
    mapped = np.linalg.solve(lps, volume.affine) @ np.c_[index, np.ones(len(index))].T
    assert np.abs(mapped - mapped.round()).max() < 1e-3
    there = mapped[:3].round().astype(int)
    for region in range(3):
        again[region][tuple(there)] = volume.array[..., region].reshape(-1)
    return again


@pytest.mark.parametrize("files", ["forward", "backward", "mixed", "multiframe", "multiframe backward"])
@pytest.mark.parametrize("view", VIEWS)
def test_every_voxel_is_where_the_patient_has_it(
    patients: SimpleNamespace, tmp_path: Path, view: str, files: str
) -> None:
    kind, _, order = files.partition(" ")
    scan = (
        patients.multiframe(tmp_path / "s", view, order or "forward")
        if kind == "multiframe"
        else patients.scan(tmp_path / "s", view, files)
    )
    place = VIEWS.index(view) + len(files)
    shape, affine = patients.stored(
        scan.shape, scan.affine, ORDERS[place % 3], patients.turns[place % len(patients.turns)]
    )
    ours = patients.segmentation(shape, affine)
    out = tmp_path / "mask.dcm"
    write_dicom_seg(ours, read_series([scan.folder]), out)
    seg = pydicom.dcmread(out)
    # Read by pydicom, against the formula.
    assert by_formula(patients, seg) == ours.masks.sum() > 500
    if view != "tilted":  # highdicom makes no volume of a stack that is not at right angles
        assert (laid_back(ours, out) == ours.masks).all()
    # Every frame names the image it lies on.
    named = {
        str(image.ReferencedSOPInstanceUID)
        for group in seg.PerFrameFunctionalGroupsSequence
        for derived in group.DerivationImageSequence
        for image in derived.SourceImageSequence
    }
    assert named <= {str(pydicom.dcmread(path).SOPInstanceUID) for path in scan.paths}
    (referenced,) = seg.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == "1.2.826.0.1.3680043.8.498.2"


def written(patients: SimpleNamespace, folder: Path, **more: Any) -> tuple[Segmentation, pydicom.Dataset]:
    scan = patients.scan(folder / "s")
    ours = patients.segmentation(scan.shape, scan.affine, **more)
    write_dicom_seg(ours, read_series(scan.paths), folder / "mask.dcm")
    return ours, pydicom.dcmread(folder / "mask.dcm")


def test_a_pacs_sees_what_it_is_and_what_it_was_made_without(
    patients: SimpleNamespace, tmp_path: Path
) -> None:
    _, seg = written(patients, tmp_path)
    assert (seg.Modality, seg.SegmentationType, seg.SegmentsOverlap) == ("SEG", "BINARY", "YES")
    assert (seg.PatientID, seg.StudyInstanceUID) == ("P-0001", "1.2.826.0.1.3680043.8.498.1")
    assert (seg.PatientName, seg.AccessionNumber, seg.SeriesNumber) == ("Phantom^One", "A1", 9004)
    assert seg.SeriesInstanceUID != "1.2.826.0.1.3680043.8.498.2"
    assert seg.FrameOfReferenceUID == "1.2.826.0.1.3680043.8.498.3"
    assert seg.SeriesDescription == "glioma-demo segmentation, not a medical device"
    assert seg.ContentDescription == "WITHOUT t1ce; not a medical device; from t1, t2, flair"
    assert "Made without t1ce" in seg.ImageComments and patients.MODEL in seg.ImageComments
    of = [(one.SegmentLabel, one.SegmentedPropertyTypeCodeSequence[0]) for one in seg.SegmentSequence]
    types = [(label, code.CodeValue, code.CodingSchemeDesignator) for label, code in of]
    assert types == [
        ("whole tumour (WT)", "301766008", "SCT"),
        ("tumour core (TC)", "108369006", "SCT"),
        ("enhancing tumour (ET)", "C113842", "NCIt"),
    ]
    for segment in seg.SegmentSequence:
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("splitproto", "0.1.0")
        assert algorithm.AlgorithmFamilyCodeSequence[0].CodeMeaning == "Artificial Intelligence"
        assert patients.MODEL in algorithm.AlgorithmParameters
        assert segment.TrackingID and segment.TrackingUID
    assert len({segment.TrackingUID for segment in seg.SegmentSequence}) == 3
    assert (tmp_path / "mask.dcm").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("shape", ["mask", "empty"])
@pytest.mark.parametrize("other", ["sagittal", "axial"])
def test_one_stack_of_an_enhanced_image_that_holds_two(
    patients: SimpleNamespace, tmp_path: Path, other: str, shape: str
) -> None:
    """Another orientation, or another echo at the same places: `data prepare` takes one, and so does the mask."""
    scan = patients.two_stacks(tmp_path / "s", "axial", other)
    with pytest.raises(
        DataError, match=r"several stacks \(11 and 11 slices\): name the files of one, or prepare"
    ):
        read_series([scan.folder])
    stacks = stacks_of(read_folder(scan.folder).headers)
    (stack,) = (one for one in stacks if one.slices[0][1].apart[2] == "80.0")
    frames = tuple(frame.index for _, frame in grid_of(stack).slices)
    assert sorted(frames) == list(range(1, 22, 2))
    masks = np.zeros((3, *scan.shape), bool) if shape == "empty" else None
    ours = patients.segmentation(scan.shape, scan.affine, masks=masks)
    out = tmp_path / "mask.dcm"
    write_dicom_seg(ours, read_series(scan.paths, frames), out)
    seg = pydicom.dcmread(out)
    if shape == "mask":
        assert by_formula(patients, seg) == ours.masks.sum() > 500
        assert (laid_back(ours, out) == ours.masks).all()
    else:
        assert not seg.pixel_array.any() and len(seg.PerFrameFunctionalGroupsSequence) >= scan.shape[2]
    # Each frame names the frame it lies on: of the right stack, at its own place.
    source = pydicom.dcmread(scan.paths[0])
    for group in seg.PerFrameFunctionalGroupsSequence:
        (image,) = group.DerivationImageSequence[0].SourceImageSequence
        frame = source.PerFrameFunctionalGroupsSequence[int(image.ReferencedFrameNumber) - 1]
        assert frame.MREchoSequence[0].EffectiveEchoTime == 80
        places = (one.PlanePositionSequence[0].ImagePositionPatient for one in (group, frame))
        assert np.allclose(*(np.array(place, float) for place in places), atol=1e-6)
    with pytest.raises(DataError, match="has changed since the image was prepared from it"):
        read_series(scan.paths, (*frames[:-1], 99))


def test_what_can_be_prepared_can_be_segmented(patients: SimpleNamespace, tmp_path: Path) -> None:
    """Slices 5 mm apart, of .5 mm pixels, one .3 mm off its place and all turned by rounding."""
    place, scan = 4, patients.scan(tmp_path / "s", steps=(0.5, 0.5, 5.0))
    one = pydicom.dcmread(scan.paths[place])
    one.ImagePositionPatient[2] += 0.3
    one.ImageOrientationPatient[1] = "0.00004"
    patients.store(one, scan.paths[place])
    (stack,) = stacks_of(read_folder(scan.folder).headers)
    grid = grid_of(stack)
    series = read_series([scan.folder])
    assert series.shape == grid.shape and np.array_equal(series.affine, grid.affine)
    out = tmp_path / "mask.dcm"
    write_dicom_seg(patients.segmentation(series.shape, series.affine), series, out)
    images = [str(one.SOPInstanceUID) for one in series.datasets]
    again = highdicom.seg.segread(out).get_pixels_by_source_instance(images)
    masks = patients.segmentation(series.shape, series.affine).masks
    assert np.array_equal(again.transpose(3, 2, 1, 0), masks) and masks.any()
    frames = pydicom.dcmread(out).PerFrameFunctionalGroupsSequence
    heights = {float(frame.PlanePositionSequence[0].ImagePositionPatient[2]) for frame in frames}
    assert heights <= {float(pydicom.dcmread(path).ImagePositionPatient[2]) for path in scan.paths}


def test_an_empty_mask_is_a_valid_answer(patients: SimpleNamespace, tmp_path: Path) -> None:
    empty = np.zeros((3, *patients.SHAPE), bool)
    _, seg = written(patients, tmp_path, masks=empty)
    assert len(seg.SegmentSequence) == 3 and not seg.pixel_array.any()


def test_an_empty_region_is_described(patients: SimpleNamespace, tmp_path: Path) -> None:
    masks = patients.inside(patients.grid_points(patients.SHAPE, patients.affine("axial")))
    masks[2] = False
    _, seg = written(patients, tmp_path, masks=masks)
    assert len(seg.SegmentSequence) == 3
    assert {
        g.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        for g in seg.PerFrameFunctionalGroupsSequence
    } == {1, 2}


def test_codes_are_the_hospitals_own_or_say_no_more_than_the_name(
    patients: SimpleNamespace, tmp_path: Path
) -> None:
    task = Task({1: "liver", 2: "lesion"}, (Region("organ", (1, 2)), Region("lesion", (2,))))
    assert str(code_of(task, task.regions[0]).type) == "SCT:85756007:Tissue"
    assert str(code_of(task, task.regions[1]).type) == "SCT:52988006:Lesion"
    own = {
        "organ": RegionCode(
            Concept.parse("SCT:10200004:Liver"), Concept.parse("SCT:123037004:Anatomical Structure")
        )
    }
    scan = patients.scan(tmp_path / "s")
    masks = patients.inside(patients.grid_points(scan.shape, scan.affine))[:2]
    ours = patients.segmentation(scan.shape, scan.affine, task=task, masks=masks)
    write_dicom_seg(ours, read_series(scan.paths), tmp_path / "mask.dcm", codes=own)
    first = pydicom.dcmread(tmp_path / "mask.dcm").SegmentSequence[0]
    assert first.SegmentLabel == "organ"
    assert first.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Liver"
    assert first.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Anatomical Structure"


@pytest.mark.parametrize(
    ("name", "meaning"),
    [("edema", "Edema"), ("oedema", "Edema"), ("necrotic-core", "Necrosis"), ("enhancing", "Enhancing Lesion"),
     ("non-enhancing", "Lesion"), ("tumour", "Neoplasm"), ("prostate", "Tissue")],
)  # fmt: skip
def test_a_name_that_says_what_it_is(name: str, meaning: str) -> None:
    task = Task({1: name}, (Region(name, (1,)),))
    assert code_of(task, task.regions[0]).type.meaning == meaning


@pytest.mark.parametrize("written", ["Neoplasm", "SCT:108369006", "SCT:1:", "S T:1:x", "SCT:1:" + "x" * 65])
def test_what_is_no_code_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="write scheme:value:meaning"):
        Concept.parse(written)


# --- series that do not belong to the mask --------------------------------------------------------------


def test_a_mask_on_another_grid_is_refused(patients: SimpleNamespace, tmp_path: Path) -> None:
    scan = patients.scan(tmp_path / "s")
    series = read_series(scan.paths)
    moved = scan.affine.copy()
    moved[0, 3] += 0.5
    with pytest.raises(
        DataError, match=r"not on the grid of the mask \(18 x 15 x 11 .*up to 0.5 mm apart: name the series"
    ):
        write_dicom_seg(patients.segmentation(scan.shape, moved), series, tmp_path / "mask.dcm")
    near = scan.affine.copy()
    near[0, 3] += 0.2  # a quarter of the shortest edge, 1 mm, is what float32 headers may be off
    write_dicom_seg(patients.segmentation(scan.shape, near), series, tmp_path / "near.dcm")
    smaller = (17, 15, 11)
    with pytest.raises(DataError, match=r"not on the grid of the mask \(17 x 15 x 11"):
        write_dicom_seg(patients.segmentation(smaller, scan.affine), series, tmp_path / "mask.dcm")
    turned = patients.affine("oblique")
    with pytest.raises(DataError, match="not on the grid"):
        write_dicom_seg(patients.segmentation(scan.shape, turned), series, tmp_path / "mask.dcm")
    assert not (tmp_path / "mask.dcm").exists()


def test_a_missing_slice_and_a_doubled_one(patients: SimpleNamespace, tmp_path: Path) -> None:
    scan = patients.scan(tmp_path / "s")
    (tmp_path / "s" / "copy.dcm").write_bytes(scan.paths[3].read_bytes())
    assert read_series([scan.folder]).shape == scan.shape  # a copy is the same image
    again = pydicom.dcmread(scan.paths[3])
    again.SOPInstanceUID = "1.2.3.4"
    patients.store(again, tmp_path / "s" / "copy.dcm")
    with pytest.raises(DataError, match="1 places with several images"):
        read_series([scan.folder])
    (tmp_path / "s" / "copy.dcm").unlink()
    scan.paths[4].unlink()
    with pytest.raises(
        DataError, match="1 of its slices missing after slice 4 of 10: export the whole series"
    ):
        read_series([scan.folder])


def test_two_series_and_none(patients: SimpleNamespace, tmp_path: Path) -> None:
    one = patients.scan(tmp_path / "all" / "one")
    patients.scan(tmp_path / "all" / "two", SeriesInstanceUID="1.2.3", SeriesDescription="localizer")
    with pytest.raises(
        DataError, match=r"2 series \(T1 axial, localizer\): name the files or the folder of one"
    ):
        read_series([tmp_path / "all"])
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").write_text("not DICOM")
    with pytest.raises(DataError, match="no DICOM image: name the folder"):
        read_series([tmp_path / "none"])
    with pytest.raises(DataError, match=r"notes.txt: not DICOM: name the files"):
        read_series([tmp_path / "none" / "notes.txt"])
    (tmp_path / "all" / "one" / "notes.txt").write_text("passed over in a folder")
    cut = one.paths[0].read_bytes()[:400]
    (tmp_path / "cut.dcm").write_bytes(cut)
    with pytest.raises(DataError, match=r"cut.dcm: "):
        read_series([tmp_path / "cut.dcm"])
    assert read_series([one.folder]).shape == one.shape


def test_another_patients_image_among_them(patients: SimpleNamespace, tmp_path: Path) -> None:
    scan = patients.scan(tmp_path / "s")
    other = pydicom.dcmread(scan.paths[2])
    other.PatientID = "P-0002"
    patients.store(other, scan.paths[2])
    with pytest.raises(
        DataError, match="images of 2 patients in one series: name the files of one"
    ) as refused:
        read_series(scan.paths)
    assert "P-000" not in str(refused.value).replace(str(tmp_path), "")
    other.PatientID, other.FrameOfReferenceUID = "P-0001", "1.2.3"
    patients.store(other, scan.paths[2])
    with pytest.raises(DataError, match="images of 2 frames of reference in one series"):
        read_series(scan.paths)


@pytest.mark.parametrize("lost", ["ImagePositionPatient", "PixelSpacing", "FrameOfReferenceUID"])
def test_an_image_that_does_not_say_where_it_lies(
    patients: SimpleNamespace, tmp_path: Path, lost: str
) -> None:
    scan = patients.scan(tmp_path / "s")
    broken = pydicom.dcmread(scan.paths[2])
    delattr(broken, lost)
    patients.store(broken, scan.paths[2])
    with pytest.raises(DataError, match="export the series again, as it left the scanner"):
        read_series(scan.paths)


def test_an_anonymised_series_will_do(patients: SimpleNamespace, tmp_path: Path) -> None:
    scan = patients.scan(tmp_path / "s")
    for path in scan.paths:
        one = pydicom.dcmread(path)
        for name in (
            "PatientName",
            "PatientBirthDate",
            "PatientSex",
            "AccessionNumber",
            "StudyID",
            "StudyTime",
        ):
            delattr(one, name)
        patients.store(one, path)
    write_dicom_seg(
        patients.segmentation(scan.shape, scan.affine), read_series(scan.paths), tmp_path / "m.dcm"
    )
    seg = pydicom.dcmread(tmp_path / "m.dcm")
    assert by_formula(patients, seg) > 500 and not seg.PatientName


@pytest.mark.parametrize(
    ("charset", "name"),
    [(["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"), ("ISO_IR 100", "Müller^Jürgen"), ("", "Smith^A")],
)
def test_names_in_any_script(patients: SimpleNamespace, tmp_path: Path, charset: Any, name: str) -> None:
    scan = patients.scan(tmp_path / "s", SpecificCharacterSet=charset, PatientName=name)
    ours = patients.segmentation(scan.shape, scan.affine, origin=replace(patients.ORIGIN, name="Großhirn δ"))
    write_dicom_seg(ours, read_series(scan.paths), tmp_path / "mask.dcm")
    seg = pydicom.dcmread(tmp_path / "mask.dcm")
    assert (seg.PatientName, seg.SpecificCharacterSet) == (name, "ISO_IR 192")
    assert seg.SeriesDescription.startswith("Großhirn δ segmentation")


def test_without_highdicom_one_line_says_how_to_install_it(
    patients: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = patients.scan(tmp_path / "s")
    series = read_series(scan.paths)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(
        ConfigError, match=r"DICOM SEG needs highdicom: in the clone, pip install '\.\[dicom\]'"
    ):
        write_dicom_seg(patients.segmentation(scan.shape, scan.affine), series, tmp_path / "mask.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.delitem(sys.modules, "splitpeer.dicom.headers")
    monkeypatch.delitem(sys.modules, "splitpeer.dicom.stacks")
    with pytest.raises(ConfigError, match=r"DICOM needs pydicom: in the clone, pip install '\.\[dicom\]'"):
        read_series(scan.paths)


def test_a_full_disk_leaves_the_older_file(
    patients: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = patients.scan(tmp_path / "s")
    (tmp_path / "mask.dcm").write_bytes(b"older")

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(
        DiskTrouble, match=r"mask.dcm cannot be written \(No space left on device\): make room"
    ):
        write_dicom_seg(
            patients.segmentation(scan.shape, scan.affine), read_series(scan.paths), tmp_path / "mask.dcm"
        )
    assert (tmp_path / "mask.dcm").read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.dcm", "s"]
