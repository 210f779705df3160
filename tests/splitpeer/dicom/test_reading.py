"""A folder of DICOM becomes volumes: where the voxels lie, what a series is, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from splitpeer.data.phantom.series import Oddities, Protocol, tilted, write_series
from splitpeer.dicom import headers
from splitpeer.dicom.choice import Choice, by_patient, choose
from splitpeer.dicom.headers import read_folder
from splitpeer.dicom.rules import RULES, SeriesRule
from splitpeer.dicom.voxels import read_voxels
from splitpeer.errors import DataError

SLICES = 16


def head(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    voxels = np.random.default_rng(seed).integers(0, 900, (9, 7, SLICES)).astype(np.int16)
    angle = np.deg2rad(20)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.25, -1.5, 4.0])
    affine[:3, 3] = 31.5, 22.0, -17.0
    return voxels, affine


def write(folder: Path, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    voxels, affine = head()
    options = {"patient_id": "A", "description": "t1_mprage", "modality": "t1", **options}
    write_series(folder, voxels, options.pop("affine", affine), **options)
    return voxels, affine


def chosen(folder: Path, modality: str = "t1", rule: SeriesRule | None = None, most: int = 10**6) -> Choice:
    files, lines = by_patient(read_folder(folder).headers)
    assert lines == []
    (patient,) = files.values()
    return choose(patient, modality, rule or RULES[modality], most)


def said(choice: Choice) -> str:
    """All reasons, for a look at one of them."""
    return " | ".join((choice.why, *(one.text for one in choice.left_out)))


@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize(
    "oddities",
    [
        Oddities(),
        Oddities(reverse=True, slope=0.5, intercept=-7.0),
        Oddities(syntax="rle"),
        Oddities(syntax="implicit", copied=(2, 5)),
    ],
    ids=["plain", "reversed and scaled", "rle", "copies"],
)
def test_voxels_and_affine_come_back(tmp_path: Path, oddities: Oddities, *, enhanced: bool) -> None:
    voxels, affine = write(tmp_path, enhanced=enhanced, oddities=oddities)
    choice = chosen(tmp_path)
    assert choice.taken is not None, choice.why
    grid = choice.taken.grid
    assert np.array_equal(read_voxels(tmp_path, grid), voxels)
    # Positions have 16 characters (DS): 1e-9 of a millimetre, times the slices.
    assert np.allclose(grid.affine, affine, atol=1e-7)
    assert bool(grid.warnings) is bool(oddities.copied and not enhanced)


def test_a_left_handed_or_tilted_stack_keeps_its_places(tmp_path: Path) -> None:
    """The order of slices is ours; each voxel stays where its header has it."""
    voxels, affine = head()
    for name, given in (("left", affine @ np.diag([1, 1, -1, 1])), ("tilted", tilted(affine, 15.0))):
        write(tmp_path / name, affine=given)
        choice = chosen(tmp_path / name)
        assert choice.taken is not None
        grid = choice.taken.grid
        read = read_voxels(tmp_path / name, grid)
        flip = name == "left"
        assert np.array_equal(read[:, :, ::-1] if flip else read, voxels)
        k = SLICES - 1 - 3 if flip else 3
        assert np.allclose(grid.affine @ (1, 2, k, 1), given @ (1, 2, 3, 1), atol=1e-6)
        assert ("15.0 degrees" in " ".join(grid.warnings)) is (name == "tilted")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"oddities": Oddities(missing=(5, 6))}, "2 of its slices missing after slice 5 of 14"),
        ({"oddities": Oddities(truncated=(4,))}, "1 of its files end early"),
        ({"oddities": Oddities(syntax="jpeg-lossless")}, "packed as JPEG Lossless"),
        ({"oddities": Oddities(tags={"ImagePositionPatient": None})}, "without position"),
        ({"oddities": Oddities(tags={"PixelSpacing": None})}, "no pixel spacing"),
        ({"oddities": Oddities(tags={"PhotometricInterpretation": "MONOCHROME1"})}, "inverted"),
        ({"oddities": Oddities(tags={"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]})}, "not at right angles"),
        ({"kind": ("ORIGINAL", "PRIMARY", "LOCALIZER")}, "a localizer"),
        ({"kind": ("ORIGINAL", "PRIMARY", "P", "ND")}, "P image"),
        ({"kind": ("DERIVED", "SECONDARY", "MIP")}, "MIP image"),
        ({"description": "SWI_t1"}, "'SWI' in its description"),
        ({"description": "t1 post KM"}, "after a contrast agent"),
        ({"modality": "t1ce", "description": "t1 nativ"}, "not what its description says: the header names"),
        ({"modality": "t2"}, "not what its description says: t1 by name, t2 by its parameters (TE 96, TR 5200"),
        ({"modality": "t2", "description": "T2 TSE"}, "shows t2"),
        ({"protocol": Protocol(50.0, 25.0), "description": "axial"}, "neither its description nor its parameters"),
        ({"modality": "ct"}, "modality CT, not MR"),
    ],
)  # fmt: skip
def test_what_is_not_taken_has_its_reason(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    write(tmp_path, **options)
    choice = chosen(tmp_path)
    assert choice.taken is None
    assert reason in said(choice)
    assert "\n" not in choice.why


def test_few_slices_and_too_many_voxels(tmp_path: Path) -> None:
    write(tmp_path)
    assert "fewer than 99 slices" in said(chosen(tmp_path, rule=SeriesRule("t1", min_slices=99)))
    assert "1008 voxels, more than 1007" in said(chosen(tmp_path, most=9 * 7 * SLICES - 1))


def test_two_series_that_fit_need_a_rule(tmp_path: Path) -> None:
    write(tmp_path, number=2)
    write(tmp_path, number=5, date="20260301", description="t1_mprage repeat")
    both = chosen(tmp_path)
    assert both.taken is None and "2 series show t1" in both.why and "[prepare.series.t1]" in both.why
    newest = chosen(tmp_path, rule=SeriesRule("t1", "without", prefer="newest"))
    assert newest.taken is not None and newest.taken.header.number == 5
    named = chosen(tmp_path, rule=SeriesRule(description="repeat$"))
    assert named.taken is not None and named.taken.header.number == 5
    but = chosen(tmp_path, rule=SeriesRule("t1", but="repeat"))
    assert but.taken is not None and but.taken.header.number == 2


def test_several_images_at_one_place_are_no_volume(tmp_path: Path) -> None:
    write(tmp_path, number=3)
    write(tmp_path, number=3, series=chosen(tmp_path).taken.header.series, description="again")  # type: ignore[union-attr]
    for path in tmp_path.glob("*.dcm"):
        data = pydicom.dcmread(path)
        data.SOPInstanceUID = f"1.2.3.{abs(hash(path.name)) % 10**9}"
        data.save_as(tmp_path / f"x{path.name}")
    assert "16 places with several images" in chosen(tmp_path).why


def test_a_series_in_several_multiframe_files_is_named(tmp_path: Path) -> None:
    voxels, affine = head()
    for part in (0, 1):
        placed = affine.copy()
        placed[:3, 3] += part * SLICES * affine[:3, 2]
        options = {
            "patient_id": "A",
            "description": "t1",
            "series": "1.2.3",
            "number": part,
            "enhanced": True,
        }
        (path,) = write_series(tmp_path, voxels, placed, **options)  # type: ignore[arg-type]
        data = pydicom.dcmread(path)
        data.SOPInstanceUID = f"1.2.3.4.{part}"
        data.save_as(path)
    assert "spread over 2 multi-frame files" in chosen(tmp_path).why


def test_echoes_of_one_series_are_told_apart(tmp_path: Path) -> None:
    late = {"EchoTime": 100.0, "RepetitionTime": 4000.0, "InversionTime": None}
    write(tmp_path / "1", series="1.2.3", oddities=Oddities(tags={"EchoTime": 3.0}))
    write(tmp_path / "2", series="1.2.3", oddities=Oddities(tags=late))
    choice = chosen(tmp_path)
    assert choice.taken is not None
    assert {header.echo_ms for header, _ in choice.taken.grid.slices} == {3.0}


def test_a_study_of_two_patients_is_used_by_neither(tmp_path: Path) -> None:
    write(tmp_path / "a", oddities=Oddities(other_patient=(3,)))
    write(tmp_path / "b", patient_id="B")
    files, lines = by_patient(read_folder(tmp_path).headers)
    assert list(files) == ["B"]
    assert len(lines) == 1 and "2 patient ids ('A', 'A-other')" in lines[0]


def test_other_files_are_counted_and_names_never_read(tmp_path: Path) -> None:
    write(tmp_path / "x", oddities=Oddities(tags={"PatientName": "Secret^Person"}))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "x" / "cut.dcm").write_bytes((tmp_path / "x" / "01-0001.dcm").read_bytes()[:700])
    found = read_folder(tmp_path)
    assert len(found.headers) == SLICES
    assert found.passed == {"not DICOM": 1, "a header that ends early: copy or export it again": 1}
    assert "Secret" not in repr(found)


def test_patients_by_folder_or_another_attribute(tmp_path: Path) -> None:
    write(tmp_path / "P7", oddities=Oddities(tags={"OtherPatientIDs": "X9"}))
    assert {one.patient for one in read_folder(tmp_path, "folder").headers} == {"P7"}
    assert {one.patient for one in read_folder(tmp_path, "OtherPatientIDs").headers} == {"X9"}
    with pytest.raises(DataError, match="no attribute of DICOM"):
        read_folder(tmp_path, "PatientNumber")


def test_limits_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(DataError, match="no DICOM image"):
        read_folder(tmp_path)
    write(tmp_path)
    monkeypatch.setattr(headers, "MAX_FILES", 3)
    with pytest.raises(DataError, match="more than 3 files"):
        read_folder(tmp_path)


def test_a_file_that_changes_after_the_look_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    choice = chosen(tmp_path)
    assert choice.taken is not None
    path = tmp_path / "01-0004.dcm"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"01-0004\.dcm"):
        read_voxels(tmp_path, choice.taken.grid)
    path.unlink()
    with pytest.raises(DataError, match=r"01-0004\.dcm: cannot be read"):
        read_voxels(tmp_path, choice.taken.grid)
