"""The phantoms of the examples: real headers, values in their units, and a task that no hospital can do alone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest

from splitpeer.data.check import check
from splitpeer.data.layouts import find_images

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("prostate", "petct", "gaps")
MODALITIES = {"prostate": ("t2", "adc"), "petct": ("ct", "pet"), "gaps": ("t1", "flair")}
TARGET = {"prostate": 2, "petct": 1, "gaps": 1}
"""The mask value that is hard to find."""
BINS = 48


def phantom(name: str) -> ModuleType:
    """`phantom.py` of an example."""
    spec = importlib.util.spec_from_file_location(f"{name}_phantom", EXAMPLES / name / "phantom.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=NAMES)
def cohort(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, ModuleType, Path]:
    """Name, module and folder of six patients of each example."""
    folder = tmp_path_factory.mktemp(request.param)
    module = phantom(request.param)
    module.write(folder, 6, seed=3)
    return request.param, module, folder


def test_headers_are_those_of_a_scanner(cohort: tuple[str, ModuleType, Path]) -> None:
    _, module, folder = cohort
    grids = []
    for path in sorted(folder.rglob("*.nii.gz")):
        image = nib.load(path)
        header = image.header
        assert image.shape == module.SHAPE and header.get_xyzt_units()[0] == "mm"
        assert np.allclose(header.get_zooms(), module.SPACING)
        assert int(header["sform_code"]) == int(header["qform_code"]) == 1
        assert np.allclose(image.get_sform(), image.get_qform(), atol=1e-3)
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        grids.append(image.affine[:3, :3] / module.SPACING)
        assert bytes(header["descrip"]).strip(b"\0")
    assert len(grids) >= 15
    oblique = [np.rad2deg(np.arccos(np.abs(grid).max(axis=0).min().clip(0, 1))) for grid in grids]
    assert max(oblique) > 1, "some patients lie askew"


def test_all_images_of_a_patient_have_one_grid(cohort: tuple[str, ModuleType, Path]) -> None:
    _, _, folder = cohort
    for path in sorted((folder / "labels").iterdir()):
        grids = [nib.load(one).affine for one in folder.rglob(path.name)]
        assert len(grids) >= 2 and all(np.array_equal(grid, grids[0]) for grid in grids)


def test_values_are_in_their_units(cohort: tuple[str, ModuleType, Path]) -> None:
    name, module, _ = cohort
    one, mask = module.patient(3, 0), module.patient(3, 0)["labels"] == TARGET[name]
    if name == "prostate":
        assert one["adc"].dtype == one["t2"].dtype == np.int16
        assert 650 < one["adc"][mask].mean() < 850, "a lesion's ADC in 1e-6 mm2/s"
    elif name == "petct":
        assert one["ct"].min() >= -1024 and one["ct"][:, :, 0].min() < -900
        assert 20 < one["ct"][mask].mean() < 80 and one["pet"].dtype == np.float32
        assert 3 < one["pet"][mask].mean() < 10 and one["pet"].max() < 20
    else:
        assert one["t1"].dtype == np.int16 and (one["t1"] == 0).mean() > 0.2, "0 outside the brain"
        assert ((one["t1"] > 0) == (one["flair"] > 0)).all()


def test_ct_is_stored_unsigned_with_its_rescale_intercept(tmp_path: Path) -> None:
    module = phantom("petct")
    module.write(tmp_path, 1)
    image = nib.load(next((tmp_path / "ct").iterdir()))
    assert image.get_data_dtype() == np.uint16
    assert (image.dataobj.slope, image.dataobj.inter) == (1.0, -1024.0)
    assert np.array_equal(np.asarray(image.dataobj), module.patient(0, 0)["ct"])


def test_every_mask_holds_what_is_looked_for(cohort: tuple[str, ModuleType, Path]) -> None:
    name, module, _ = cohort
    for number in range(12):
        mask = module.patient(0, number)["labels"]
        assert mask.dtype == np.uint8 and (mask == TARGET[name]).sum() > 30


def test_the_same_seed_gives_the_same_patients(cohort: tuple[str, ModuleType, Path]) -> None:
    _, module, _ = cohort
    one, again, other = module.patient(1, 2), module.patient(1, 2), module.patient(2, 2)
    assert all(np.array_equal(one[kind], again[kind]) for kind in one)
    assert not np.array_equal(one["labels"], other["labels"])


def test_the_daemon_reads_them(cohort: tuple[str, ModuleType, Path]) -> None:
    name, _, folder = cohort
    places = (
        {"north": "t1", "east": "t1", "south": "flair"}
        if name == "gaps"
        else {m: m for m in MODALITIES[name]}
    )
    for place, modality in places.items():
        report = check(folder / place, "folder", [modality])
        assert report.ok, report.problems
        assert report.counts[modality] == len(list((folder / place).iterdir()))


def test_patients_have_gaps(tmp_path: Path) -> None:
    cohort = phantom("gaps").write(tmp_path, 24)
    have = {site: {case.patient for case in find_images(tmp_path / site, "folder", "t1")} for site in
            ("north", "east", "south", "labels")}  # fmt: skip
    assert have["labels"] == set(cohort) and len(cohort) == 24
    assert not have["north"] & have["east"] and min(len(have["north"]), len(have["east"])) >= 8
    t1 = have["north"] | have["east"]
    assert len(t1 - have["south"]) >= 3 and len(have["south"] - t1) >= 2, "some lack FLAIR, some T1"
    assert all({site for site in ("north", "east", "south") if one in have[site]} == set(sites) for one, sites in
               cohort.items())  # fmt: skip
    assert all(cohort.values())


def standardised(voxels: np.ndarray) -> np.ndarray:
    """Each volume on its own, as sites do: mean 0, deviation 1 over what is not zero; in bins."""
    values = voxels[voxels != 0]
    levels = (voxels - values.mean()) / values.std()
    return np.clip((levels + 3) / 6 * BINS, 0, BINS - 1).astype(int)


def best_dice(module: ModuleType, kinds: tuple[str, ...], target: int) -> float:
    """What one can know from a voxel's values: frequencies of 8 patients, thresholded, on 8 others."""
    counts = np.zeros((2, *(BINS,) * len(kinds)))
    tests = []
    for number in range(16):
        one = module.patient(0, number)
        places, mask = tuple(standardised(one[kind]) for kind in kinds), one["labels"] == target
        if number < 8:
            for value in (0, 1):
                np.add.at(counts[value], tuple(place[mask == value] for place in places), 1)
        else:
            tests.append((places, mask))
    chance = counts[1] / np.maximum(counts.sum(axis=0), 1)
    scores = []
    for threshold in np.linspace(0.05, 0.95, 19):
        hits = [(chance[places] > threshold, mask) for places, mask in tests]
        scores.append(np.mean([2 * (hit & mask).sum() / (hit.sum() + mask.sum()) for hit, mask in hits]))
    return float(max(scores))


@pytest.mark.parametrize("name", NAMES)
def test_two_modalities_tell_what_neither_can_alone(name: str) -> None:
    module = phantom(name)
    alone = [best_dice(module, (kind,), TARGET[name]) for kind in MODALITIES[name]]
    together = best_dice(module, MODALITIES[name], TARGET[name])
    assert together > 0.6 and together > max(alone) + 0.2, (alone, together)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_as_a_script(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name / "phantom.py", tmp_path, "--patients", "2", "--seed", "5"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("2 patients in ")
    assert len(list((tmp_path / "labels").glob("*.nii.gz"))) == 2
