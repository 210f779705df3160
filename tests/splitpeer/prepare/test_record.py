"""The record says where an image came from, strictly; and a mask comes back by it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from splitpeer.data.regrid import onto
from splitpeer.errors import DataError
from splitpeer.prepare.back import to_original
from splitpeer.prepare.record import AtlasGrid, PreparedRecord, read, record_of, write

ATLAS = np.diag([2.0, 2.0, 2.0, 1.0])
ATLAS[:3, 3] = -40.0, -50.0, -30.0


def turned(degrees: float = 25.0, shift: tuple[float, float, float] = (12.0, -7.0, 5.0)) -> np.ndarray:
    """Rigid: about the first axis, then a shift."""
    angle, out = np.deg2rad(degrees), np.eye(4)
    out[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    out[:3, 3] = shift
    return out


def made(**changes: object) -> PreparedRecord:
    affine = np.diag([-1.0, 1.5, 4.0, 1.0])
    affine[:3, 3] = 20.0, -30.0, -20.0
    record = PreparedRecord(
        patient="phantom-001",
        modality="t1",
        study="1.2",
        series="1.2.3",
        frame_of_reference="",
        files=tuple(f"a/{k}.dcm" for k in range(12)),
        frames=None,
        shape=(40, 30, 12),
        affine=affine,
        atlas=AtlasGrid("mni152", "ab", (40, 50, 30), ATLAS),
        transform=turned(),
        method="affine",
        kept="rigid",
        quality={"nmi": 1.1},
        reasons=(),
        accepted=False,
        warnings=("w",),
        software={"numpy": "2"},
        inputs="cd",
        image="ef",
        mask="",
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    for record in (made(), made(files=("m.dcm",), frames=tuple(range(11, -1, -1)))):
        path = record_of(tmp_path / "phantom-001.nii.gz")
        path.parent.mkdir(exist_ok=True)
        write(path, record)
        assert path == tmp_path / "prepared" / "phantom-001.json"
        assert read(path).to_json() == record.to_json()
        assert path.stat().st_mode & 0o777 == 0o600


def test_an_older_record_kept_what_was_asked_for(tmp_path: Path) -> None:
    raw = made().to_json()
    del raw["kept"]
    (tmp_path / "p.json").write_text(json.dumps(raw))
    assert read(tmp_path / "p.json").kept == "affine"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda raw: raw.pop("transform"), "transform is missing"),
        (lambda raw: raw.update(kept="best"), "kept has a wrong value"),
        (lambda raw: raw.update(extra=1), "extra is unknown"),
        (lambda raw: raw.update(version=1), "version 1"),
        (lambda raw: raw.update(format="x"), "not a record"),
        (lambda raw: raw.update(shape=[40, 30]), "shape has a wrong value"),
        (lambda raw: raw.update(shape=[40, True, 12]), "shape has a wrong value"),
        (lambda raw: raw["affine"].pop(), "affine has a wrong value"),
        (lambda raw: raw["transform"][0].__setitem__(0, "1"), "transform has a wrong value"),
        (lambda raw: raw["transform"].__setitem__(slice(0, 3), [[0, 0, 0, 1]] * 3), "transform has a wrong value"),
        (lambda raw: raw["files"].pop(), "files do not match"),
        (lambda raw: raw.update(frames=[0]), "frames do not match"),
        (lambda raw: raw.update(method="spline"), "method has a wrong value"),
        (lambda raw: raw.update(accepted="no"), "accepted has a wrong value"),
        (lambda raw: raw["atlas"].update(name=3), "atlas has a wrong value"),
    ],
)  # fmt: skip
def test_a_wrong_record_is_one_line(tmp_path: Path, change, word: str) -> None:  # type: ignore[no-untyped-def]
    raw = json.loads(json.dumps(made().to_json()))
    change(raw)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=word):
        read(path)


def test_no_record_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="splitpeer data prepare"):
        read(tmp_path / "none.json")


def ball(shape: tuple[int, ...], affine: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """Voxels within a ball: the distance is computed per voxel, nothing is resampled."""
    index = np.indices(shape).reshape(3, -1)
    away = affine[:3, :3] @ index + affine[:3, 3:] - centre[:3, None]
    return (np.sqrt((away**2).sum(axis=0)) < radius).reshape(shape)


def test_a_ball_comes_back_where_it_was() -> None:
    """Rigid: a ball is a ball in both spaces. On voxels whose centres are farther from its surface than half the
    diagonal of an atlas voxel, the nearest voxel is on the same side: there every voxel must agree."""
    record = made()
    here = record.affine @ (20, 15, 6, 1)
    there = record.transform @ here
    drawn = ball(record.atlas.shape, ATLAS, there, 17.0).astype(np.uint8)
    back = to_original(drawn, ATLAS, record, order=0)
    half = np.sqrt(3) * 2.0 / 2
    inside = ball(record.shape, record.affine, here, 17.0 - half)
    outside = ~ball(record.shape, record.affine, here, 17.0 + half)
    assert back.dtype == np.uint8 and back.shape == record.shape
    assert inside.sum() > 500 and outside.sum() > 500
    assert back[inside].all() and not back[outside].any()


def test_where_grids_coincide_nothing_is_interpolated() -> None:
    """A quarter turn and whole voxels: values return to the bit, from the whole atlas and from a window of it."""
    rng = np.random.default_rng(2)
    image = rng.normal(size=(40, 30, 12)).astype(np.float32)
    record = made(transform=turned(90.0, (3.0, 4.5, -6.0)))
    placed = record.transform @ record.affine
    for order in (0, 1):
        assert np.array_equal(to_original(image, placed, record, order=order), image)
    window = placed.copy()
    window[:3, 3] = (placed @ (4, 5, 2, 1))[:3]
    back = to_original(image[4:30, 5:20, 2:9], window, record, order=1)
    assert np.array_equal(back[4:30, 5:20, 2:9], image[4:30, 5:20, 2:9])
    assert not back[:4].any() and not back[:, 20:].any()


def test_linear_in_space_is_exact_for_any_affine() -> None:
    """Trilinear interpolation reproduces what is linear in millimetres, whatever turns, stretches and shears."""
    transform = turned() @ np.array([[1.1, 0.05, 0, 0], [0, 0.9, 0.02, 0], [0, 0, 1.05, 0], [0, 0, 0, 1.0]])
    record = made(transform=transform)
    index = np.indices((80, 80, 80)).reshape(3, -1)
    wide = np.diag([2.0, 2.0, 2.0, 1.0])
    wide[:3, 3] = -80.0
    weights = np.array([0.3, -0.2, 0.5])
    field = (weights @ (wide[:3, :3] @ index + wide[:3, 3:])).reshape(80, 80, 80)
    back = to_original(field, wide, record, order=1)
    voxels = np.indices(record.shape).reshape(3, -1)
    placed = transform @ record.affine
    expected = (weights @ (placed[:3, :3] @ voxels + placed[:3, 3:])).reshape(record.shape)
    assert np.allclose(back, expected, atol=1e-9)


def test_there_and_back_on_fine_grids(tmp_path: Path) -> None:
    """Half a voxel of the coarser grid is the most that nearest neighbour moves a surface, each way."""
    record = made(
        affine=np.diag([1.0, 1.0, 1.0, 1.0]), shape=(40, 40, 40), files=("m",), frames=tuple(range(40))
    )
    fine = np.eye(4)
    fine[:3, 3] = (record.transform @ (20, 20, 20, 1))[:3] - 40
    drawn = ball(record.shape, record.affine, np.array([20.0, 20.0, 20.0]), 12.0).astype(np.uint8)
    on_atlas = onto(drawn, record.transform @ record.affine, (81, 81, 81), fine, order=0)
    back = to_original(on_atlas, fine, record, order=0)
    dice = 2 * (drawn & back).sum() / (drawn.sum() + back.sum())
    assert dice > 0.95  # a shell of half a voxel is 3/12/2 of the volume of a ball with radius 12


def test_the_way_back_needs_no_library_of_scans() -> None:
    code = (
        "import sys; sys.modules['SimpleITK'] = sys.modules['pydicom'] = None; "
        "import splitpeer.prepare.back, splitpeer.prepare.record"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
