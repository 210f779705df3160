"""Masks that follow no convention, or not the one named: counted, and warned about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from splitpeer.data.check import check
from splitpeer.data.labels import regions
from splitpeer.data.layouts import Case
from splitpeer.data.mask_values import MaskCensus
from splitpeer.data.phantom.cohort import write_phantom
from splitpeer.data.volumes import Volumes
from splitpeer.errors import DataError

NAMES = {"msd": (1, 2, 3), "brats": (2, 1, 4), "brats2023": (2, 1, 3), "nnunet": (1, 2, 3)}
"""Values of edema, necrotic core, enhancing tumour."""


def tumour(convention: str, grow: int = 0) -> np.ndarray:
    """Edema around a rim of enhancing tumour around a necrotic core."""
    edema, necrosis, enhancing = NAMES[convention]
    grid = np.stack(np.meshgrid(*(np.arange(24),) * 3, indexing="ij")) - 12
    away = np.linalg.norm(grid, axis=0)
    return np.select([away < 3 + grow, away < 5 + grow, away < 8], [necrosis, enhancing, edema], 0).astype(
        np.uint8
    )


def folder(root: Path, files, *masks: np.ndarray) -> Path:
    for number, mask in enumerate(masks):
        files.save(root / f"P{number:03d}.nii.gz", mask, spacing=(5, 5, 5))
    return root


def said(report) -> str:
    return "\n".join(report.warnings)


# --- rounding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [2.9999998, 1.00001, 3.0009, -0.0005])
def test_values_that_are_nearly_whole_are_rounded_with_a_warning(
    tmp_path: Path, files, value: float, caplog
) -> None:
    mask = tumour("msd").astype(np.float32)
    right = regions(mask, "msd")
    mask[mask == round(value)] = value
    assert np.array_equal(regions(mask, "msd"), right)
    folder(tmp_path, files, mask)
    report = check(tmp_path, convention="msd")
    assert report.ok
    assert "1 masks hold values up to" in said(report)
    assert "P000.nii.gz" in said(report)
    # As in training.
    volumes = Volumes([Case("a", tmp_path / "P000.nii.gz")], salt=files.SALT, labels="msd")
    (key,) = volumes.keys()
    assert np.array_equal(volumes.window(key, (0, 0, 0), (24, 24, 24)), right)
    assert [r.getMessage() for r in caplog.records] == ["labels.rounded"]


@pytest.mark.parametrize(
    ("value", "shown"), [(2.998, "2.998"), (1.0015, "1.0015"), (0.5, "0.5"), (3.0000123e5, "300001.22")]
)
def test_other_values_are_refused_with_their_digits(value: float, shown: str) -> None:
    mask = tumour("msd").astype(np.float32)
    mask[12, 12, 12] = value
    with pytest.raises(DataError, match=rf"label value\(s\) {shown} are not in convention 'msd'"):
        regions(mask, "msd")


def test_whole_masks_bring_no_warning(tmp_path: Path, files) -> None:
    report = check(folder(tmp_path, files, tumour("msd"), tumour("msd").astype(np.float32)), convention="msd")
    assert report.ok
    assert not report.warnings


# --- counts ------------------------------------------------------------------------------------------------------


def test_voxels_are_counted_value_by_value(tmp_path: Path, files) -> None:
    one, other = tumour("msd"), tumour("msd")
    other[other == 3] = 0
    report = check(folder(tmp_path, files, one, other), convention="msd")
    edema, core, rim = (int((one == value).sum()) for value in (1, 2, 3))
    assert report.mask_voxels[1:] == [
        f"value 1 (edema): {2 * edema} voxels in 2 of 2 masks",
        f"value 2 (necrotic core): {2 * core} voxels in 2 of 2 masks",
        f"value 3 (enhancing): {rim} voxels in 1 of 2 masks",
    ]
    assert any(line.startswith("mask voxels   value 3 (enhancing)") for line in report.lines())


@pytest.mark.parametrize("convention", ["msd", "brats", "brats2023"])
@pytest.mark.parametrize("value", [1, 2, 255])
def test_binary_masks_are_warned_about(tmp_path: Path, files, convention: str, value: int) -> None:
    mask = (tumour("msd") > 0).astype(np.uint8) * value
    report = check(folder(tmp_path, files, mask, mask), convention=convention)
    count = 2 * int((mask > 0).sum())
    assert f"all masks hold only 0 and {value} ({count} voxels in 2 of 2 masks): a binary mask" in said(
        report
    )
    assert report.ok is (value in (1, 2))


def test_a_tissue_that_no_mask_holds_is_warned_about(tmp_path: Path, files) -> None:
    mask = tumour("brats")
    mask[mask == 4] = 0
    report = check(folder(tmp_path, files, mask), convention="brats")
    assert report.ok
    assert "no mask holds 4 (enhancing), but 1: " in said(report)


# --- the two that share their values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("real", "named", "hint"),
    [
        ("brats2023", "msd", "is the convention 'brats2023'?"),
        ("brats2023", "nnunet", "is the convention 'brats2023'?"),
        ("msd", "brats2023", "is the convention 'msd'?"),
    ],
)
def test_swapped_values_are_found_without_any_image(tmp_path: Path, files, real, named, hint) -> None:
    masks = [tumour(real), tumour(real, 1), tumour(real, 2)]
    report = check(folder(tmp_path, files, *masks), convention=named)
    assert report.ok
    (line,) = report.warnings
    assert "in 3 of 3 masks" in line
    assert line.endswith(hint)
    assert f"1: {sum(int((mask == 1).sum()) for mask in masks)} voxels" in line


def test_brats_2023_under_brats_is_refused(tmp_path: Path, files) -> None:
    report = check(folder(tmp_path, files, tumour("brats2023")), convention="brats")
    assert "label value(s) 3 are not in convention 'brats'" in report.problems[0]
    assert "no mask holds 4 (enhancing), but 1: " in said(report)


@pytest.mark.parametrize("convention", list(NAMES))
def test_right_conventions_bring_no_warning(tmp_path: Path, files, convention: str) -> None:
    report = check(folder(tmp_path, files, *(tumour(convention, n) for n in range(3))), convention=convention)
    assert report.ok
    assert not report.warnings


def test_the_phantom_is_right_under_its_own_convention_and_wrong_under_the_other(tmp_path: Path) -> None:
    write_phantom(tmp_path, 6, seed=1, shape=(48, 48, 24), workers=1)
    assert not any("borders" in line for line in check(tmp_path / "labels", convention="msd").warnings)
    assert any("borders" in line for line in check(tmp_path / "labels", convention="brats2023").warnings)


def test_an_image_taken_for_a_mask_is_not_listed_value_by_value(tmp_path: Path, files) -> None:
    census = MaskCensus("msd")
    census.add(tmp_path / "a.nii.gz", np.arange(1000.0).reshape(10, 10, 10))
    assert census.lines() == []
    assert census.warnings() == []
