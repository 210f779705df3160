"""Check, start-up and loader are one code path: the same file, the same verdict; and what only deserves a warning."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.log import LogSink
from splitpeer.data.check import check
from splitpeer.data.layouts import Case
from splitpeer.data.quality import image_warnings
from splitpeer.data.rules import Rules
from splitpeer.data.volumes import Volumes
from splitpeer.errors import DataError
from splitpeer.federation.files import MOST_LINES, look, tell

LOG = h.Reporter(LogSink(logging.getLogger("splitpeer.test")))

SHAPE = (60, 50, 20)
SPACING = np.diag([3.0, 3.0, 6.0, 1.0])


def head(seed: int = 0) -> np.ndarray:
    voxels = np.zeros(SHAPE, np.float32)
    voxels[8:-8, 8:-8, 2:-2] = np.random.default_rng(seed).normal(100, 20, voxels[8:-8, 8:-8, 2:-2].shape)
    return voxels


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = SPACING, **codes: int) -> Path:
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, codes.get("sform", 2))
    image.set_qform(None if codes.get("sform", 2) else affine, codes.get("qform", 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def sheared() -> np.ndarray:
    affine = SPACING.copy()
    affine[0, 2] = 0.1
    return affine


def with_nan() -> np.ndarray:
    voxels = head()
    voxels[20, 20, 10] = np.nan
    return voxels


BAD = {
    "zero": lambda path: save(path, np.zeros(SHAPE, np.float32)),
    "nan": lambda path: save(path, with_nan()),
    "sheared": lambda path: save(path, head(), sheared()),
    "huge": lambda path: save(path, head(), np.diag([2000.0, 2000, 2000, 1])),
    "tiny": lambda path: save(path, head(), np.diag([0.003, 0.003, 0.003, 1])),
    "flat": lambda path: save(path, head()[..., 9]),
    "series": lambda path: save(path, np.stack([head()] * 2, -1)),
    "short": lambda path: cut(save(path, head())),
    "text": lambda path: path.write_text("404"),
    "empty": lambda path: path.write_bytes(b""),
}
GOOD = {
    "plain": lambda path: save(path, head()),
    "one more axis": lambda path: save(path, head()[..., None]),
    "unknown orientation": lambda path: save(path, head(), sform=0),
    "constant": lambda path: save(path, 5 * (head() != 0).astype(np.float32)),
    "one voxel": lambda path: save(path, np.where(head() == head().max(), 1, 0).astype(np.float32)),
    "scanner noise": lambda path: save(path, np.abs(head()) + 1),
}
HEADER_SHOWS = {"sheared", "huge", "tiny", "flat", "series", "text", "empty"}


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def lines(root: Path) -> tuple[list[str], list[str]]:
    report = check(root, "folder", ["t1"])
    return report.problems, report.warnings


@pytest.mark.parametrize("name", [*BAD, *GOOD])
def test_check_start_and_loader_agree(tmp_path: Path, files, name: str) -> None:
    path = tmp_path / "p.nii.gz"
    (BAD | GOOD)[name](path)
    save(tmp_path / "q.nii.gz", head(1))
    cases = [Case("p", path), Case("q", tmp_path / "q.nii.gz")]
    volumes = Volumes(cases, salt=files.SALT)
    (key,) = (key for key in volumes.keys() if volumes.case(key).patient == "p")  # noqa: SIM118
    problems, warnings = lines(tmp_path)
    seen = {}
    for verify in (False, True):
        volumes = Volumes(cases, salt=files.SALT)
        look(volumes, bad := {}, LOG, voxels=verify)
        seen[verify] = set(bad) == {key}, volumes.warnings
    if name in GOOD:
        assert volumes.window(key, (0, 0, 0), SHAPE).shape == (1, *SHAPE)
        assert (problems, seen[False][0], seen[True][0]) == ([], False, False)
        assert sorted(line for of_one in seen[True][1].values() for line in of_one) == sorted(warnings)
        return
    with pytest.raises(DataError) as loaded:
        volumes.window(key, (0, 0, 0), (1, 1, 1))
    assert problems == [str(loaded.value)]
    assert (seen[False][0], seen[True][0]) == (name in HEADER_SHOWS, True)


def test_a_volume_of_zeros_is_refused_by_the_loader_too(tmp_path: Path, files) -> None:
    """It was trained on before; and so was one channel of a file whose others are sound."""
    volumes = np.stack([head(), np.zeros(SHAPE, np.float32)], -1)
    path = save(tmp_path / "p.nii.gz", volumes)
    sound, zero = (Volumes([Case("p", path, channel)], salt=files.SALT) for channel in (0, 1))
    (key,) = sound.keys()
    assert sound.window(key, (0, 0, 0), SHAPE).any()
    with pytest.raises(DataError, match=r"p\.nii\.gz: every voxel is zero: export it again") as caught:
        zero.window(key, (0, 0, 0), (1, 1, 1))
    assert caught.value.cause == "empty"
    masks = Volumes([Case("p", path, 1)], salt=files.SALT, labels="msd")
    assert not masks.window(key, (0, 0, 0), SHAPE).any()  # no tumour is no fault


def test_files_of_one_grid_in_any_stored_order_pass_the_check(tmp_path: Path, files) -> None:
    """LAS, LPS and PSR of one patient were refused: "co-register and resample"."""
    for kind, axes in (("flair", "LAS"), ("t1", "LPS"), ("t2", "PSR"), ("seg", "RAS")):
        voxels = files.mask((50, 40, 30), (1, 2, 4)) if kind == "seg" else files.head((50, 40, 30))
        files.save(tmp_path / "P" / f"P_{kind}.nii.gz", voxels, axes=axes, origin=(-24.02, 20, 5))
    files.save(tmp_path / "P" / "P_t1ce.nii.gz", files.head((50, 40, 30)), origin=(-24.0, 20, 5))
    report = check(tmp_path, "brats", convention="brats")
    assert report.ok, report.problems
    assert set(report.orientations) == {"LAS", "LPS", "PSR", "RAS"}


def test_a_turned_contrast_is_a_problem_of_the_check(tmp_path: Path, files) -> None:
    c, s = np.cos(np.radians(10)), np.sin(np.radians(10))
    turned = SPACING.copy()
    turned[:2, :2] = [[3 * c, -3 * s], [3 * s, 3 * c]]
    save(tmp_path / "P" / "P_t1.nii.gz", head())
    save(tmp_path / "P" / "P_t2.nii.gz", head(), turned)
    (problem,) = check(tmp_path, "brats").problems
    assert "P_t2.nii.gz: differs from" in problem and "direction: turned by 10 degrees" in problem


# --- voxels that want a second look --------------------------------------------------------------------------


def changed(place=(30, 25, 10), value: float = 30_000.0) -> np.ndarray:
    voxels = head()
    voxels[place] = value
    return voxels


@pytest.mark.parametrize(
    ("voxels", "said"),
    [
        (5 * (head() != 0).astype(np.float32), ["no contrast: all 23936 voxels that are not zero are 5"]),
        (np.full(SHAPE, -3, np.float32), ["no contrast: all 60000 voxels that are not zero are -3", "not 0"]),
        (
            head() * (np.arange(60000).reshape(SHAPE) % 3000 == 1509),
            ["only 14 of 60000 voxels are not zero: hardly"],
        ),
        (
            np.where(np.arange(60000).reshape(SHAPE) == 7, 1.0, 0),
            ["only 1 of 60000 voxels are not zero: hardly"],
        ),
        (
            changed(),
            [
                "1 outlier(s) up to 30000, where 99 % of the voxels are within ",
                " of 99.88: normalisation squeezes",
            ],
        ),
        (changed(value=-9000.0), ["1 outlier(s) up to -9000"]),
        (
            np.where(head() == 0, -1024, head() - 100),
            ["the background is -1024, not 0: normalisation takes every"],
        ),
        (np.where(head() == 0, 7, head()), ["the background is 7, not 0"]),
        (
            head() + np.abs(np.random.default_rng(1).normal(5, 1, SHAPE)),
            ["the background is not 0 (100 % of the voxels are not zero)", "export it with background 0"],
        ),
    ],
)
def test_odd_voxels_are_told_with_figures(voxels: np.ndarray, said: list[str]) -> None:
    text = "\n".join(image_warnings(voxels.astype(np.float32)))
    for words in said:
        assert words in text, text


def test_an_ordinary_head_raises_no_warning() -> None:
    assert image_warnings(head()) == []
    skewed = np.where(head() == 0, 0, np.random.default_rng(0).lognormal(4, 0.6, SHAPE))
    assert image_warnings(skewed.astype(np.float32)) == []


# --- the log of a peer -----------------------------------------------------------------------------------------


def test_findings_go_to_the_log_once_and_not_without_end(tmp_path: Path, files, caplog) -> None:
    for number in range(MOST_LINES + 5):
        save(tmp_path / f"{number}.nii.gz", head(), sform=0)
    save(tmp_path / "bad.nii.gz", head(), sheared())
    cases = [Case(path.name, path) for path in sorted(tmp_path.iterdir())]
    volumes = Volumes(cases, salt=files.SALT)
    with caplog.at_level(logging.WARNING):
        look(volumes, {}, LOG)
        look(volumes, {}, LOG)
        tell(volumes, LOG)
    told = [(r.getMessage(), r.fields["cause"]) for r in caplog.records if r.getMessage() == "data.warning"]
    assert len(told) == MOST_LINES + 1
    assert all(".nii.gz: orientation unknown" in line for _, line in told[:-1])
    assert told[-1][1] == "5 more: splitpeer data check shows all"
    bad = [r.fields["cause"] for r in caplog.records if r.getMessage() == "patient.unusable"]
    assert len(bad) == 2 and all("bad.nii.gz: its axes are not at right angles" in line for line in bad)


def test_an_unknown_orientation_may_be_refused(tmp_path: Path, files) -> None:
    case = Case("p", save(tmp_path / "p.nii.gz", head(), sform=0))
    volumes = Volumes([case], salt=files.SALT, rules=Rules(unknown_orientation="refuse"))
    with pytest.raises(
        DataError, match=r"none of 1 patients' files can be used; the last: .*orientation unknown"
    ):
        look(volumes, {}, LOG)
