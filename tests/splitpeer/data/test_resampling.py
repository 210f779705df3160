"""One patient, two spacings, one grid (SP-11.12-7), and normalisation by hand (SP-11.12-8)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from splitpeer.data.geometry import Geometry, differences
from splitpeer.data.layouts import Case
from splitpeer.data.nifti import Rules
from splitpeer.data.normalisation import DEFAULT
from splitpeer.data.resampling import resample, resampled_grid
from splitpeer.data.volumes import Volumes
from splitpeer.errors import DataError


def grid(shape: tuple[int, ...], spacing: tuple[float, ...]) -> Geometry:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-10, 20, 5)
    return Geometry.of(shape, affine)


def by_hand(line: np.ndarray, old: float, new: float, length: int) -> list[float]:
    out = []
    for k in range(length):
        p = min(k * new / old, len(line) - 1)
        below = math.floor(p)
        above = min(below + 1, len(line) - 1)
        out.append(line[below] + (line[above] - line[below]) * (p - below))
    return out


@pytest.mark.parametrize(("old", "new"), [(2.0, 1.0), (1.0, 2.0), (0.9, 1.3), (6.0, 3.0), (1.0, 0.7)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_axis_is_interpolated_as_the_text_says(old: float, new: float, axis: int) -> None:
    """SP-11.12-7."""
    line = np.random.default_rng(0).random(9).astype(np.float32)
    shape, spacing, wanted = [1, 1, 1], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]
    shape[axis], spacing[axis], wanted[axis] = 9, old, new
    before = grid(tuple(shape), tuple(spacing))
    after = resampled_grid(before, tuple(wanted))
    length = round((9 - 1) * old / new) + 1
    assert after.shape[axis] == length
    out = resample(line.reshape(shape), before, after, nearest=False)
    np.testing.assert_allclose(out.ravel(), by_hand(line, old, new, length), atol=1e-4)


def test_the_grid_keeps_its_place_and_says_what_it_was() -> None:
    """SP-11.12-6."""
    before = grid((12, 10, 8), (2.0, 2.0, 4.0))
    after = resampled_grid(before, (1.0, 1.0, 1.0))
    assert (
        after.shape == (23, 19, 29) and after.spacing == (1.0, 1.0, 1.0) and after.stored == (2.0, 2.0, 4.0)
    )
    assert (after.origin, after.directions) == (before.origin, before.directions)
    assert before.stored == before.spacing


def test_what_float32_leaves_uncertain_decides_no_tie() -> None:
    """2.1 mm is not 2.1 in a header; half-way positions of masks go to the lower voxel whatever it is."""
    labels = np.arange(8, dtype=np.float32).reshape(8, 1, 1)
    results = []
    for size in (2.0, float(np.float32(2.0) + np.float32(1e-7)), 2.0 - 1e-7):
        before = grid((8, 1, 1), (size, 1.0, 1.0))
        after = resampled_grid(before, (1.0, 1.0, 1.0))
        results.append(resample(labels, before, after, nearest=True).ravel().tolist())
    assert results == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]] * 3


@pytest.mark.parametrize("slices", [40, 39, 41, 2])
def test_thick_slices_at_one_site_and_a_job_that_names_a_spacing(tmp_path: Path, files, slices: int) -> None:
    """3x3x6 at one site, 3x3x3 at the other, job spacing 3: refused by one slice before."""
    fine = files.head((20, 20, slices), seed=1) if slices > 4 else files.head((20, 20, slices), seed=1) + 1
    a = Volumes(
        [Case("p", files.save(tmp_path / "a" / "p.nii", fine, spacing=(3, 3, 3)))],
        salt=files.SALT, spacing=(3.0, 3.0, 3.0),
    )  # fmt: skip
    b = Volumes(
        [Case("p", files.save(tmp_path / "b" / "p.nii", fine[:, :, ::2], spacing=(3, 3, 6)))],
        salt=files.SALT, spacing=(3.0, 3.0, 3.0),
    )  # fmt: skip
    (key,) = a.keys()
    assert differences(a.geometry(key), b.geometry(key)) == []
    ends = a.window(key, (0, 0, slices - 1), (20, 20, 1)), b.window(key, (0, 0, slices - 1), (20, 20, 1))
    assert ends[0].shape == ends[1].shape
    # Where both have a slice, the resampled voxels lie on it: slice 2 of one is slice 1 of the other.
    if slices > 4:
        one, other = (v.window(key, (0, 0, 2), (20, 20, 1)) for v in (a, b))
        both = (one != 0) & (other != 0)
        assert np.corrcoef(one[both], other[both])[0, 1] > 0.9999
    # Without a spacing in the job they stay apart.
    plain = Volumes([b.case(key)], salt=files.SALT)
    assert differences(a.geometry(key), plain.geometry(key))


def test_a_spacing_that_would_take_too_much_is_refused_by_header_and_loader(tmp_path: Path, files) -> None:
    case = Case("p", files.save(tmp_path / "p.nii", files.head((12, 10, 8)), spacing=(3, 3, 3)))
    volumes = Volumes([case], salt=files.SALT, spacing=(0.1, 0.1, 0.1), rules=Rules(max_voxels=100_000))
    (key,) = volumes.keys()
    for call in (volumes.geometry, lambda k: volumes.window(k, (0, 0, 0), (4, 4, 4))):
        with pytest.raises(DataError, match=r"p\.nii: 331x271x211 voxels when resampled .* more than 100000"):
            call(key)


def test_normalisation_is_over_the_non_zero_voxels_in_float64() -> None:
    """SP-11.12-8: the population's deviation; a float32 sum of large values would be off in the third digit."""
    voxels = np.zeros((64, 64, 64), np.float32)
    voxels[1:, 1:] = np.random.default_rng(0).normal(30_000, 1, (63, 63, 64))
    out = DEFAULT.apply(voxels)
    inside = voxels[voxels != 0].astype(np.float64)
    wanted = (inside - inside.mean()) / inside.std(ddof=0)
    np.testing.assert_allclose(out[voxels != 0], wanted, atol=1e-6)
    assert out.dtype == np.float32 and not out[voxels == 0].any()
    constant = DEFAULT.apply(np.full((4, 4, 4), 7, np.float32))
    assert not constant.any()
    with pytest.raises(DataError, match="every voxel is zero"):
        DEFAULT.apply(np.zeros((4, 4, 4), np.float32))
