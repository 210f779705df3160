"""SP-11.12-10: each normalisation on numbers known beforehand, and what cannot be normalised."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from splitpeer.data.layouts import Case
from splitpeer.data.normalisation import DEFAULT, KINDS, Normaliser
from splitpeer.data.quality import image_warnings
from splitpeer.data.volumes import Volumes
from splitpeer.errors import DataError, PatientUnusable

VALUES = np.array([0, 0, 1, 3, 5, 7], np.float32).reshape(1, 2, 3)
DEVIATION = np.sqrt(5)  # of 1, 3, 5, 7 about 4


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("zscore-nonzero", [0, 0, -3 / DEVIATION, -1 / DEVIATION, 1 / DEVIATION, 3 / DEVIATION]),
        ("zscore", (np.array([0, 0, 1, 3, 5, 7]) - 8 / 3) / np.sqrt(84 / 6 - 64 / 9)),
        ("percentile:0,100", [0, 0, 1 / 7, 3 / 7, 5 / 7, 1]),
        ("percentile:20,80", [0, 0, 0.2, 0.6, 1, 1]),  # 0 and 5
        ("window:1,5", [0, 0, 0, 0.5, 1, 1]),
        ("window:-2,8", [0.2, 0.2, 0.3, 0.5, 0.7, 0.9]),
        ("none", [0, 0, 1, 3, 5, 7]),
    ],
)
def test_known_numbers(rule: str, expected: list[float]) -> None:
    before = VALUES.copy()
    out = Normaliser.parse(rule).apply(VALUES)
    assert out.dtype == np.float32 and out.shape == VALUES.shape
    np.testing.assert_allclose(out.ravel(), expected, atol=1e-6)
    assert np.array_equal(VALUES, before) and out is not VALUES


def test_percentile_alone_means_the_half_percent_at_both_ends() -> None:
    assert Normaliser.parse("percentile") == Normaliser.parse("percentile:0.5,99.5")


@pytest.mark.parametrize("rule", ["zscore-nonzero", "zscore", "percentile", "window:-100,300", "none"])
def test_a_volume_of_zeros_is_refused_and_a_constant_one_is_finite(rule: str) -> None:
    with pytest.raises(DataError, match="every voxel is zero") as caught:
        Normaliser.parse(rule).apply(np.zeros((4, 4, 4), np.float32))
    assert caught.value.cause == "empty"
    assert np.isfinite(Normaliser.parse(rule).apply(np.full((4, 4, 4), 7, np.float32))).all()


@pytest.mark.parametrize("strange", [np.nan, np.inf])
@pytest.mark.parametrize("rule", ["zscore-nonzero", "zscore", "percentile", "window:-100,300", "none"])
def test_a_volume_with_nan_is_refused_whatever_the_rule(tmp_path: Path, rule: str, strange: float) -> None:
    voxels = np.ones((4, 4, 4), np.float32)
    voxels[1, 1, 1] = strange
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "p.nii.gz")
    volumes = Volumes(
        [Case("p", tmp_path / "p.nii.gz")], salt=bytes(32), normalisation=Normaliser.parse(rule)
    )
    (key,) = volumes.keys()
    with pytest.raises(PatientUnusable) as caught:
        volumes.window(key, (0, 0, 0), (4, 4, 4))
    assert caught.value.cause == "not-finite"


def test_volumes_are_normalised_as_they_were_asked_to(tmp_path: Path) -> None:
    voxels = np.arange(-32, 32, dtype=np.float32).reshape(4, 4, 4)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "p.nii.gz")
    rule = Normaliser.parse("window:-16,16")
    volumes = Volumes([Case("p", tmp_path / "p.nii.gz")], salt=bytes(32), normalisation=rule)
    (key,) = volumes.keys()
    out = volumes.window(key, (0, 0, 0), (4, 4, 4))[0]
    np.testing.assert_allclose(out, np.clip((voxels + 16) / 32, 0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("", "is not a normalisation rule"),
        ("ZSCORE", "is not a normalisation rule"),
        ("zscore:1,2", "takes no numbers"),
        ("window", "needs two intensities"),
        ("window:1", "is not a normalisation rule"),
        ("window:1,1", "must be below"),
        ("window:5,-5", "must be below"),
        ("window:nan,1", "is not a normalisation rule"),
        ("window:-1e400,1", "must be below"),
        ("percentile:-1,50", "between 0 and 100"),
        ("percentile:1,101", "between 0 and 100"),
        ("window:1,2,3", "is not a normalisation rule"),
        ("window:" + "0" * 60 + ",1", "is not a normalisation rule"),
    ],
)
def test_what_is_no_rule(written: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        Normaliser.parse(written)
    assert "\n" not in str(caught.value)


def test_rules_are_written_as_they_are_read() -> None:
    for written in ("zscore-nonzero", "zscore", "percentile:0.5,99.5", "window:-100.0,300.0", "none"):
        assert str(Normaliser.parse(written)) == written
        assert Normaliser.parse(str(Normaliser.parse(written))) == Normaliser.parse(written)
    assert {
        Normaliser.parse(r).kind for r in ("zscore-nonzero", "zscore", "percentile", "window:0,1", "none")
    } == set(KINDS)
    assert Normaliser.parse("zscore-nonzero") == DEFAULT


def test_air_is_no_strange_background_of_a_ct() -> None:
    """-1000 around a patient ruins a z-score over what is not zero, and nothing else."""
    voxels = np.full((20, 20, 20), -1000, np.float32)
    voxels[5:15, 5:15, 5:15] = np.random.default_rng(1).normal(40, 20, (10, 10, 10))
    assert any("background" in text for text in image_warnings(voxels))
    for rule in ("window:-100,300", "percentile", "none"):
        assert image_warnings(voxels, Normaliser.parse(rule)) == []
