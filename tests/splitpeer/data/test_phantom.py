"""The phantom: the same bits every time, plausible anatomy, and two layouts that agree."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from splitpeer.data.labels import regions
from splitpeer.data.layouts import find_images, find_labels
from splitpeer.data.modalities import MODALITIES
from splitpeer.data.nifti import read_voxels
from splitpeer.data.phantom.anatomy import Grid, TissueMaps, load_tissue_maps
from splitpeer.data.phantom.cohort import Phantom, patient_name, render_patient, write_phantom
from splitpeer.data.phantom.render import DEFAULT_SHAPE, DEFAULT_SPACING_MM, Subject, render_subject
from splitpeer.errors import ConfigError, DataError

pytest.importorskip("nilearn", reason="the phantom's anatomy is in the extra `demo`")

SMALL = {"shape": (48, 48, 12), "spacing_mm": (4.2, 4.2, 12.0)}


@pytest.fixture(scope="module")
def maps() -> TissueMaps:
    return load_tissue_maps()


@pytest.fixture(scope="module")
def cohort(maps: TissueMaps) -> list[Phantom]:
    return [render_patient(3, index, maps=maps) for index in range(12)]


@pytest.fixture(scope="module")
def subject(maps: TissueMaps) -> Subject:
    return render_subject(maps, Grid(DEFAULT_SHAPE, DEFAULT_SPACING_MM), 3, 0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "data"
    write_phantom(folder, 3, seed=5, workers=1, **SMALL)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def volume_ml(labels: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    return np.array([(labels >= least).sum() for least in (1, 2, 3)]) * np.prod(spacing) / 1000


class TestRendering:
    def test_the_same_arguments_give_the_same_bits(self, maps: TissueMaps, cohort: list[Phantom]) -> None:
        again = render_patient(3, 4, maps=maps)
        assert np.array_equal(again.labels, cohort[4].labels)
        for modality in MODALITIES:
            assert np.array_equal(again.images[modality], cohort[4].images[modality])

    def test_another_seed_or_index_is_another_patient(self, maps: TissueMaps, cohort: list[Phantom]) -> None:
        for other in (render_patient(4, 0, maps=maps), cohort[1]):
            assert not np.array_equal(other.labels, cohort[0].labels)
            assert not np.array_equal(other.images["t1"], cohort[0].images["t1"])

    def test_images_are_whole_numbers_that_int16_holds_on_a_black_background(
        self, cohort: list[Phantom]
    ) -> None:
        for patient in cohort:
            for image in patient.images.values():
                assert image.dtype == np.float32
                assert image.shape == patient.labels.shape == DEFAULT_SHAPE
                assert np.array_equal(image, np.rint(image))
                assert image.min() == 0
                assert 300 < image.max() < 10_000
                assert not image[:2].any()
                assert 0.15 < (image > 0).mean() < 0.45

    def test_labels_follow_the_msd_convention_and_nest(self, cohort: list[Phantom]) -> None:
        for patient in cohort:
            assert patient.labels.dtype == np.uint8
            assert set(np.unique(patient.labels)) == {0, 1, 2, 3}
            whole, core, enhancing = regions(patient.labels, "msd").astype(bool)
            assert (core <= whole).all()
            assert (enhancing <= core).all()

    @pytest.mark.parametrize("index", [0, 11])  # 11 lies at the surface: without the mask it would stick out
    def test_every_tumour_lies_inside_the_brain(self, index: int, maps: TissueMaps) -> None:
        drawn = render_subject(maps, Grid(DEFAULT_SHAPE, DEFAULT_SPACING_MM), 3, index)
        assert (drawn.label > 0).sum() > 100
        assert drawn.head.brain[drawn.label > 0].all()

    def test_tumours_are_of_plausible_and_varied_size(self, cohort: list[Phantom]) -> None:
        sizes = np.array([volume_ml(patient.labels, DEFAULT_SPACING_MM) for patient in cohort])
        assert (sizes[:, 0] > 5).all()
        assert (sizes[:, 0] < 300).all()
        assert (sizes[:, 2] > 0.3).all()
        assert sizes[:, 0].max() > 2 * sizes[:, 0].min()

    def test_tissues_are_ordered_as_on_a_scanner(self, cohort: list[Phantom], subject: Subject) -> None:
        def means(modality: str) -> tuple[float, float, float]:
            image, healthy = cohort[0].images[modality], cohort[0].labels == 0
            csf, grey, white = (
                float(np.median(image[healthy & (part > 0.9)]))
                for part in (subject.head.csf, subject.head.grey, subject.head.white)
            )
            return csf, grey, white

        for modality in ("t1", "t1ce"):
            csf, grey, white = means(modality)
            assert csf < 0.7 * grey
            assert grey < 0.9 * white
        csf, grey, white = means("t2")
        assert csf > 1.2 * grey
        assert grey > 1.1 * white
        csf, grey, white = means("flair")
        assert csf < 0.6 * white
        assert white < grey

    def test_each_part_of_the_tumour_shows_on_its_contrast(self, cohort: list[Phantom]) -> None:
        def ratio(patient: Phantom, modality: str, one: int, other: int) -> float:
            image = patient.images[modality]
            return float(image[patient.labels == one].mean() / image[patient.labels == other].mean())

        # The check of the label convention: what enhances is brighter after contrast than the rest of the tumour.
        assert all(ratio(patient, "t1ce", 3, 2) > 1.15 for patient in cohort)
        assert all(ratio(patient, "t1ce", 3, 1) > 1.3 for patient in cohort)
        # Oedema is brighter than brain on FLAIR and T2, though in some patients hardly so on one of them.
        for modality in ("flair", "t2"):
            brain = [p.images[modality][(p.labels == 0) & (p.images["t1"] > 0)] for p in cohort]
            gain = [
                p.images[modality][p.labels == 1].mean() / np.median(b)
                for p, b in zip(cohort, brain, strict=True)
            ]
            assert np.median(gain) > 1.2
            assert min(gain) < 1.25 < max(gain)

    @pytest.mark.parametrize(
        ("modality", "brighter_than"), [("flair", 0.75), ("t2", 0.7), ("t1ce", 0.92), ("t1", 0.92)]
    )
    def test_brain_outside_the_tumour_lights_up_as_the_tumour_does(
        self, modality: str, brighter_than: float, subject: Subject
    ) -> None:
        """Without look-alikes one contrast alone would do, and training together would show nothing."""
        elsewhere = subject.head.brain & (subject.label == 0) & (subject.head.csf < 0.2)
        bright = subject.signal[MODALITIES.index(modality)] > brighter_than
        assert (bright & elsewhere).sum() > (10 if modality == "t1" else 200)

    def test_one_patient_is_the_same_person_at_every_resolution(self, maps: TissueMaps) -> None:
        coarse = render_patient(3, 2, (64, 64, 32), (3.2, 3.2, 4.5), maps=maps)
        fine = render_patient(3, 2, (100, 100, 48), (2.0, 2.0, 3.0), maps=maps)
        np.testing.assert_allclose(
            volume_ml(coarse.labels, (3.2, 3.2, 4.5)), volume_ml(fine.labels, (2.0, 2.0, 3.0)), rtol=0.2
        )
        middles = [
            nib.affines.apply_affine(p.affine, np.argwhere(p.labels > 1)).mean(axis=0) for p in (coarse, fine)
        ]
        np.testing.assert_allclose(*middles, atol=2.0)

    def test_the_maps_come_without_a_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("went to the network")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        assert load_tissue_maps().grey.shape == (197, 233, 189)

    def test_without_nilearn_one_line_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "nilearn", None)
        with pytest.raises(ConfigError, match=r"in the clone, pip install .*\[demo\]"):
            load_tissue_maps()


class TestWriting:
    def test_both_layouts_hold_the_same_patients(self, written: Path) -> None:
        masks = find_labels(written / "msd", "msd"), find_labels(written / "labels", "folder")
        assert [case.patient for case in masks[0]] == ["BRATS_001", "BRATS_002", "BRATS_003"]
        assert [case.patient for case in masks[1]] == [patient_name(index, 3) for index in range(3)]
        for mine, theirs in zip(*masks, strict=True):
            assert np.array_equal(read_voxels(mine)[0], read_voxels(theirs)[0])
        for modality in MODALITIES:
            sites = find_images(written / modality, "folder", modality)
            pooled = find_images(written / "msd", "msd", modality)
            assert [case.patient for case in sites] == [case.patient for case in masks[1]]
            for mine, theirs in zip(sites, pooled, strict=True):
                (voxels, header), (other, other_header) = read_voxels(mine), read_voxels(theirs)
                assert np.array_equal(voxels, other)
                assert np.array_equal(header.affine, other_header.affine)

    def test_files_hold_what_was_rendered(self, written: Path, maps: TissueMaps) -> None:
        patient = render_patient(5, 1, maps=maps, **SMALL)
        for modality in MODALITIES:
            stored = nib.load(written / modality / "phantom-002.nii.gz")
            assert np.array_equal(np.asarray(stored.dataobj), patient.images[modality])
        assert np.array_equal(
            np.asarray(nib.load(written / "labels/phantom-002.nii.gz").dataobj), patient.labels
        )

    def test_headers_say_ras_millimetres_and_agree(self, written: Path) -> None:
        for path in (
            "flair/phantom-001.nii.gz",
            "labels/phantom-001.nii.gz",
            "msd/imagesTr/BRATS_001.nii.gz",
        ):
            image = nib.load(written / path)
            assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
            assert image.header["sform_code"] > 0
            assert image.header["qform_code"] > 0
            np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
            assert image.header.get_xyzt_units()[0] == "mm"
            np.testing.assert_allclose(image.header.get_zooms()[:3], SMALL["spacing_mm"], rtol=1e-6)

    def test_dataset_json_is_task01s(self, written: Path) -> None:
        content = json.loads((written / "msd" / "dataset.json").read_text())
        assert content["modality"] == {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
        assert content["labels"]["1"] == "edema"
        assert content["labels"]["3"] == "enhancing tumour"
        assert content["tensorImageSize"] == "4D"
        assert nib.load(written / "msd/imagesTr/BRATS_001.nii.gz").shape == (*SMALL["shape"], 4)

    def test_two_workers_write_the_bytes_that_one_writes(
        self, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        main = sys.modules["__main__"]
        if not Path(getattr(main, "__file__", None) or "").is_file():
            # A spawned worker runs the main program's file again: of a program from stdin there is none.
            monkeypatch.setattr(main, "__file__", None, raising=False)
        seen: list[tuple[int, int]] = []
        write_phantom(
            tmp_path / "two",
            3,
            seed=5,
            workers=2,
            progress=lambda done, all_: seen.append((done, all_)),
            **SMALL,
        )
        assert digests(tmp_path / "two") == digests(written)
        assert seen == [(1, 3), (2, 3), (3, 3)]

    def test_a_repeat_does_nothing(self, written: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in written.rglob("*.gz")}
        summary = write_phantom(written, 3, seed=5, **SMALL)
        assert summary["written"] == 0
        assert summary["patients"] == 3
        assert {path: path.stat().st_mtime_ns for path in written.rglob("*.gz")} == before

    def test_an_interrupted_run_is_finished_to_the_same_bytes(self, tmp_path: Path) -> None:
        folder = tmp_path / "cohort"

        def stop(done: int, _: int) -> None:
            if done == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_phantom(folder, 2, seed=6, workers=1, progress=stop, **SMALL)
        (folder / "t1" / "phantom-002.nii.part").write_bytes(b"half a file")
        assert write_phantom(folder, 2, seed=6, workers=1, **SMALL)["written"] == 1
        complete = digests(folder)
        assert not [name for name in complete if name.endswith(".part")]
        (folder / "t2" / "phantom-002.nii.gz").unlink()
        assert write_phantom(folder, 2, seed=6, workers=1, **SMALL)["written"] == 1
        assert digests(folder) == complete

    @pytest.mark.parametrize("occupy", ["file_inside", "is_a_file", "other_seed", "broken_marker"])
    def test_a_foreign_folder_is_refused_and_left_alone(self, occupy: str, tmp_path: Path) -> None:
        folder = tmp_path / "mine"
        spoil: dict[str, Callable[[], object]] = {
            "file_inside": lambda: (folder.mkdir(), (folder / "thesis.txt").write_text("precious")),
            "is_a_file": lambda: folder.write_text("precious"),
            "other_seed": lambda: write_phantom(folder, 1, seed=7, workers=1, **SMALL),
            "broken_marker": lambda: (folder.mkdir(), (folder / "phantom.json").write_text("{")),
        }
        spoil[occupy]()
        before = digests(tmp_path)
        with pytest.raises(DataError, match="mine") as refusal:
            write_phantom(folder, 1, seed=8, workers=1, **SMALL)
        assert "\n" not in str(refusal.value)
        assert digests(tmp_path) == before

    @pytest.mark.parametrize(
        ("wrong", "named"),
        [
            ({"patients": 0}, "patients"),
            ({"seed": -1}, "seed"),
            ({"shape": (96, 96)}, "shape"),
            ({"shape": (96, 96, 4)}, "shape"),
            ({"spacing_mm": (2.0, 2.0, 0.0)}, "spacing_mm"),
            ({"spacing_mm": (2.0, 2.0, float("nan"))}, "spacing_mm"),
            ({"workers": 0}, "workers"),
        ],
    )
    def test_impossible_arguments_are_named(
        self, wrong: dict[str, object], named: str, tmp_path: Path
    ) -> None:
        arguments: dict[str, object] = {"patients": 1, **SMALL, **wrong}
        with pytest.raises(ConfigError, match=named):
            write_phantom(tmp_path / "x", **arguments)
        assert not (tmp_path / "x").exists()
