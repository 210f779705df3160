"""Registration to MNI152: hospitals' scans of one head meet there, and figures tell when one does not."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from splitpeer.data.phantom.scanners import Scan, Scanner, scan
from splitpeer.errors import DataError
from splitpeer.prepare import register
from splitpeer.prepare.atlas import Atlas, load_atlas
from splitpeer.prepare.bounds import QualityBounds
from splitpeer.prepare.quality import figures, seen_on, suspicious
from splitpeer.prepare.register import Registrar, n4
from splitpeer.prepare.templates import MNI152

SEED = 2
SCANS = {
    "t1": Scanner((46, 64, 60), (3.6, 3.2, 3.0), "sagittal", turned=(12, 10, 12), shifted_mm=30),
    "t2": Scanner((56, 66, 36), (3.2, 3.2, 5.0)),
}


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    pytest.importorskip("nilearn")
    return load_atlas(MNI152)


@pytest.fixture(scope="module")
def scans() -> dict[str, Scan]:
    return {name: scan(SEED, 0, name, scanner) for name, scanner in SCANS.items()}


@pytest.fixture(scope="module")
def registrar(atlas: Atlas) -> Registrar:
    return Registrar(atlas)


@pytest.fixture(scope="module")
def found(registrar: Registrar, scans: dict[str, Scan]) -> dict[str, np.ndarray]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            register, "STARTS", register.STARTS[:1]
        )  # from where the others end, the way is the same
        return {
            name: registrar.register(one.voxels.astype(np.float32), one.affine, "affine")["affine"]
            for name, one in scans.items()
        }


def brain_points(atlas: Atlas) -> np.ndarray:
    index = np.argwhere(atlas.brain)[::997]
    return atlas.affine[:3, :3] @ index.T + atlas.affine[:3, 3:]


def test_scans_of_one_head_meet(atlas: Atlas, scans: dict[str, Scan], found: dict[str, np.ndarray]) -> None:
    """Each scan's way to the atlas begins with its own pose, which is known here: from the head, all ways must end at
    one place. Half a voxel in the plane, 1.6 mm, is what training cannot see."""
    points = brain_points(atlas)
    heads = {name: found[name] @ scans[name].pose for name in scans}
    for one, other in combinations(heads, 2):
        apart = (heads[one] - heads[other])[:3]
        mean = float(np.linalg.norm(apart[:, :3] @ points + apart[:, 3:], axis=0).mean())
        before = (scans[one].pose - scans[other].pose)[:3]
        assert np.linalg.norm(before[:, :3] @ points + before[:, 3:], axis=0).mean() > 10
        assert mean < 1.6, f"{one} and {other} lie {mean:.2f} mm apart"


def test_figures_tell_good_from_bad(
    atlas: Atlas, scans: dict[str, Scan], found: dict[str, np.ndarray]
) -> None:
    def judged(name: str, wrong: np.ndarray) -> tuple[str, ...]:
        transform = wrong @ found[name]
        seen = seen_on(atlas, scans[name].voxels.astype(np.float32), transform @ scans[name].affine)
        return suspicious(figures(seen, transform), QualityBounds())

    shifted, turned = np.eye(4), np.eye(4)
    shifted[:3, 3] = 0, 6, 0
    turned[1:3, 1:3] = [[0.990, -0.139], [0.139, 0.990]]  # 8 degrees
    for name in scans:
        assert judged(name, np.eye(4)) == ()
        # Only that it fits better elsewhere tells this.
        (line,) = judged(name, shifted)
        assert line.startswith("peak -")
    assert judged("t2", np.diag([1.0, 1, -1, 1])) != ()
    assert any(line.startswith("peak -") for line in judged("t2", turned))
    assert any("stretched" in line for line in judged("t1", np.diag([1.5, 1, 1, 1])))


def test_the_same_scan_gives_the_same_bits(
    registrar: Registrar, scans: dict[str, Scan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(register, "RIGID", register.RIGID[:1])
    monkeypatch.setattr(register, "STARTS", register.STARTS[:1])
    one = scans["t2"]
    ways = [registrar.register(one.voxels.astype(np.float32), one.affine, "rigid")["rigid"] for _ in range(2)]
    assert np.array_equal(*ways)
    rotation = ways[0][:3, :3]
    assert np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)


def test_a_head_that_is_turned_far_is_found(
    atlas: Atlas,
    registrar: Registrar,
    scans: dict[str, Scan],
    found: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As near as the first, rigid stage comes to the affine way: 8 mm voxels."""
    monkeypatch.setattr(register, "RIGID", register.RIGID[:1])
    one, turn = scans["t2"], np.eye(4)
    turn[:2, :2] = [[0.707, -0.707], [0.707, 0.707]]  # 45 degrees
    way = registrar.register(one.voxels.astype(np.float32), turn @ one.affine, "rigid")["rigid"]
    apart = (way @ turn - found["t2"])[:3]
    points = brain_points(atlas)
    assert np.linalg.norm(apart[:, :3] @ points + apart[:, 3:], axis=0).mean() < 8


def test_stretching_does_not_lead_a_head_astray(
    atlas: Atlas, registrar: Registrar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patient whom an affine registration puts 6 mm off, with a peak of 0, if it begins after the coarsest rigid
    stage."""
    monkeypatch.setattr(register, "STARTS", register.STARTS[:1])
    one = scan(0, 10, "t1ce", Scanner((50, 50, 40), (4.0, 4.0, 4.0)))
    ways = registrar.register(one.voxels.astype(np.float32), one.affine, "affine")
    peaks = {
        kind: figures(seen_on(atlas, one.voxels.astype(np.float32), way @ one.affine), way)["peak"]
        for kind, way in ways.items()
    }
    # .16 and .20: a figure of one scan scatters by a few hundredths.
    assert peaks["rigid"] > 0.1 and peaks["affine"] > peaks["rigid"] - 0.05


def test_what_is_no_head_is_an_error_of_one_line(registrar: Registrar) -> None:
    with pytest.raises(DataError, match="is this a head"):
        registrar.register(np.zeros((20, 20, 20), np.float32), np.diag([60.0, 60, 60, 1]), "rigid")


def test_n4_takes_a_smooth_gain_away() -> None:
    index = np.indices((32, 32, 32)) / 31
    head = ((index - 0.5) ** 2).sum(axis=0) < 0.16
    tissue = np.where(np.random.default_rng(0).random((32, 32, 32)) < 0.5, 100.0, 140.0)
    gain = np.exp(0.6 * (index[0] - 0.5))
    image = np.where(head, tissue * gain, 0).astype(np.float32)
    out = n4(image, np.diag([4.0, 4.0, 4.0, 1.0]))
    assert not out[~head].any()

    def slope(voxels: np.ndarray) -> float:
        return float(np.polyfit(index[0][head], np.log(voxels[head] / tissue[head]), 1)[0])

    assert slope(image) == pytest.approx(0.6, abs=0.01)
    assert abs(slope(out)) < 0.2


def test_an_atlas_of_ones_own(tmp_path: Path) -> None:
    import nibabel as nib

    path = tmp_path / "a.nii.gz"
    voxels = np.zeros((20, 20, 20), np.float32)
    voxels[5:15, 5:15, 5:15] = 7
    nib.save(nib.Nifti1Image(voxels, np.diag([4.0, 4.0, 4.0, 1.0])), path)
    atlas = load_atlas(path)
    assert atlas.brain.sum() == 1000 and atlas.name == "a.nii.gz"
    coarse = atlas.grid((8.0, 8.0, 8.0))
    assert coarse.shape == (11, 11, 11) and coarse.sha256 == atlas.sha256
    nib.save(nib.Nifti1Image(voxels + 1, np.eye(4)), path)
    with pytest.raises(DataError, match="no background"):
        load_atlas(path)
