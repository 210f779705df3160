"""A folder of patients is prepared: again only what changed, the rest named in one line; nothing tells who they are."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from splitpeer.cli.outcome import run
from splitpeer.data.layouts import detect_layout, find, find_images, find_labels
from splitpeer.data.nifti import read_voxels
from splitpeer.data.phantom.series import Oddities, write_series
from splitpeer.errors import DataError
from splitpeer.prepare import one, register
from splitpeer.prepare.back import to_original
from splitpeer.prepare.record import read

SHAPE = (30, 36, 28)
AFFINE = np.diag([-5.0, -5.0, 5.0, 1.0])
"""As radiologists look at axial slices; in RAS order the first two axes are reversed."""
AFFINE[:3, 3] = 70.0, 90.0, -60.0


def head(seed: int = 0) -> np.ndarray:
    """An egg with something in it, which all patients share; and noise, which they do not."""
    index = [(axis - (n - 1) / 2) / (0.36 * n) for axis, n in zip(np.indices(SHAPE), SHAPE, strict=True)]
    inside = sum(axis**2 for axis in index) < 1
    texture = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=SHAPE), 1.5)
    image = 400 + 900 * texture + 5 * np.random.default_rng(seed).normal(size=SHAPE)
    return np.where(inside, np.clip(image, 50, 2000), 0).round().astype(np.int16)


@pytest.fixture
def atlas(tmp_path: Path) -> Path:
    path = tmp_path / "egg.nii.gz"
    nib.save(nib.Nifti1Image(head(9), AFFINE), path)
    return path


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "dicom"
    for name in ("P1", "P2"):
        patient(folder, name)
    return folder


def patient(folder: Path, name: str, seed: int = 1, oddities: Oddities | None = None, **more: object) -> None:
    options = {"description": "t1_mprage", "oddities": oddities} | more
    write_series(folder / name, head(seed), AFFINE, patient_id=name, **options)  # type: ignore[arg-type]


@pytest.fixture
def command(
    tmp_path: Path,
    atlas: Path,
    scans: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[int, str, str]]:
    """`splitpeer data prepare` into `images`; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    usual = ("--from", str(scans), "--modality", "t1", "--out", "images", "--atlas", str(atlas))

    def call(*more: str, registration: str = "none") -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            run(["data", "prepare", *usual, "--registration", registration, *more])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(left.value.code or 0), said.out, said.err

    return call


Command = Callable[..., tuple[int, str, str]]


def test_images_records_and_the_page(tmp_path: Path, command: Command) -> None:
    code, out, _ = command()
    assert code == 0 and out.startswith("2 prepared; look at the images: images/prepare.html")
    cases = find_images(tmp_path / "images", "folder", "t1")
    assert [case.patient for case in cases] == ["P1", "P2"]
    voxels, header = read_voxels(cases[0])
    record = read(tmp_path / "images" / "prepared" / "P1.json")
    # Registered as it lies: the voxels are those of the scan, in RAS order, and 0 stays 0.
    assert np.array_equal(voxels, head(1)[::-1, ::-1].astype(np.float32)) and header.shape == SHAPE
    assert record.files[0] == "P1/01-0001.dcm" and record.shape == SHAPE and record.method == "none"
    assert np.array_equal(to_original(voxels, header.affine, record, order=1), head(1))
    page = (tmp_path / "images" / "prepare.html").read_text()
    # The pictures are in the page: one file can be carried to a browser.
    assert page.count('src="data:image/png;base64,') == 2 and "Not a medical device" in page
    assert (tmp_path / "images" / "prepared" / "P1.png").read_bytes().startswith(b"\x89PNG")
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "images").rglob("*")} == {0}


def test_a_second_run_does_only_what_changed(tmp_path: Path, scans: Path, command: Command) -> None:
    command()
    image = tmp_path / "images" / "P1.nii.gz"
    before, stamp = image.read_bytes(), image.stat().st_mtime_ns
    patient(scans, "P3")
    (tmp_path / "images" / "P2.nii.gz").unlink()
    code, out, _ = command()
    assert code == 0 and out.startswith("1 unchanged, 2 prepared")
    assert image.stat().st_mtime_ns == stamp
    patient(scans, "P1", seed=4)
    command()
    assert image.read_bytes() != before
    shutil.rmtree(scans / "P1")
    patient(scans, "P1")
    command()
    assert image.read_bytes() == before  # the same voxels give the same bytes
    assert "3 prepared" in command("--spacing", "10", "10", "10")[1]


def test_bad_patients_are_named_and_the_others_go_on(tmp_path: Path, scans: Path, command: Command) -> None:
    patient(scans, "P3", oddities=Oddities(missing=(9,)))
    patient(scans, "P4", oddities=Oddities(truncated=(9,)))
    patient(scans, "P5", number=1)
    patient(scans, "P5", number=2)
    patient(scans, "P6", oddities=Oddities(other_patient=(1,)))
    write_series(scans / "odd", head(1), AFFINE, patient_id="a/b", description="t1")
    code, out, _ = command()
    lines = out.splitlines()
    assert code == 4 and "2 prepared" in lines[-1] and "4 failed" in lines[-1]
    assert any(line.startswith("P3: failed: series 1") and "missing after slice 9" in line for line in lines)
    assert any(line.startswith("P4: failed") and "end early" in line for line in lines)
    assert any(line.startswith("P5: failed: 2 series show t1") for line in lines)
    assert any(line.startswith("a study of 2 patient ids") for line in lines)
    assert any("no name for a file" in line for line in lines)
    assert sorted(path.name for path in (tmp_path / "images").glob("*.nii.gz")) == ["P1.nii.gz", "P2.nii.gz"]


def test_what_is_suspicious_is_held_back_until_accepted(
    tmp_path: Path, scans: Path, command: Command
) -> None:
    moved = AFFINE.copy()
    moved[:3, 3] += 40
    write_series(scans / "P1", head(1), moved, patient_id="P1", description="t1_mprage")
    code, out, _ = command()
    assert code == 4 and "P1: held back: nmi 1.0" in out
    images = tmp_path / "images"
    assert not (images / "P1.nii.gz").exists() and not (images / "prepared" / "P1.json").exists()
    held = read(images / "prepared" / "held-back" / "P1.json")
    assert held.held_back and held.quality["nmi"] < 1.05
    assert "held back" in (images / "prepare.html").read_text()
    assert command()[0] == 4
    code, out, _ = command("--accept", "P1")
    assert code == 0 and "1 accepted" in out
    assert read(images / "prepared" / "P1.json").accepted and (images / "P1.nii.gz").exists()
    assert not (images / "prepared" / "held-back" / "P1.json").exists()
    assert command()[:2] == (0, out.replace("1 accepted, 1 unchanged", "2 unchanged"))
    # What is held back now does not leave the image of an earlier run behind.
    assert (images / "P2.nii.gz").exists()
    shutil.rmtree(scans / "P2")
    write_series(scans / "P2", head(1), moved, patient_id="P2", description="t1_mprage")
    code, out, _ = command()
    (line,) = (line for line in out.splitlines() if line.startswith("P2: held back"))
    assert line.endswith("; its image of an earlier run was removed")
    assert not (images / "P2.nii.gz").exists() and not (images / "prepared" / "P2.json").exists()
    assert "earlier run" not in command()[1]
    code, _, err = command("--accept", "P9")
    assert code == 4 and "--accept P9: no such patient" in err


@pytest.mark.parametrize(("step_mm", "said"), [(60.0, "went astray (peak "), (1e4, "found no place")])
def test_an_affine_registration_gone_wrong_gives_way_to_the_rigid_one(
    tmp_path: Path, scans: Path, command: Command, monkeypatch: pytest.MonkeyPatch, step_mm: float, said: str
) -> None:
    shutil.rmtree(scans / "P2")
    monkeypatch.setattr(register, "AFFINE", (register.RegistrationStage(4, 4.0, 1.0, step_mm, 2),))
    code, out, _ = command("--json", registration="affine")
    (told,) = json.loads(out)["outcomes"]
    record = read(tmp_path / "images" / "prepared" / "P1.json")
    assert code == 0 and (record.method, record.kept, told["kept"]) == ("affine", "rigid", "rigid")
    rotation = record.transform[:3, :3]
    assert np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-9) and record.quality["peak"] > 0.1
    (line,) = record.warnings
    assert line.startswith(f"registered rigidly: the affine registration {said}")
    assert f"P1: {line}" in command(registration="affine")[1].splitlines()
    assert "<td>rigid</td>" in (tmp_path / "images" / "prepare.html").read_text()


def test_an_affine_registration_is_kept_unless_its_peak_is_suspicious(
    tmp_path: Path, scans: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also below the rigid one's: the other hospitals' images of this patient are stretched, too."""
    shutil.rmtree(scans / "P2")
    monkeypatch.setattr(register, "AFFINE", (register.RegistrationStage(4, 4.0, 1.0, 60.0, 2),))
    command("--set", "prepare.least_peak=-1", "--accept", "P1", registration="affine")
    record = read(tmp_path / "images" / "prepared" / "P1.json")
    assert record.kept == "affine" and record.quality["peak"] < 0.1 and record.warnings == ()


def test_an_older_image_goes_when_its_patient_fails(tmp_path: Path, scans: Path, command: Command) -> None:
    images = tmp_path / "images"
    masks = tmp_path / "masks"
    masks.mkdir()
    nib.save(nib.Nifti1Image((head(1) > 500).astype(np.uint8), AFFINE), masks / "P1.nii.gz")
    assert command("--masks", str(masks))[0] == 0
    patient(scans, "P1", number=7, description="t1_mprage_nav")
    code, out, _ = command("--masks", str(masks))
    (line,) = (line for line in out.splitlines() if line.startswith("P1: failed: 2 series"))
    assert code == 4 and line.endswith("; its image of an earlier run was removed")
    assert not list(images.rglob("P1.*"))
    assert (images / "P2.nii.gz").exists()
    assert (images / "prepare.html").read_text().count("data:image/png") == 1
    assert "earlier run" not in command("--masks", str(masks))[1]


def test_an_image_is_there_until_its_successor_is_whole(
    tmp_path: Path, scans: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command()
    images = tmp_path / "images"
    before = (images / "P1.nii.gz").read_bytes(), (images / "prepared" / "P1.json").read_bytes()
    patient(scans, "P1", seed=4)
    seen = []
    real = one.write_image

    def watched(path: Path, *rest: object) -> None:
        seen.append((path.read_bytes(), (images / "prepared" / f"{path.name[:2]}.json").read_bytes()))
        real(path, *rest)  # type: ignore[arg-type]
        seen.append((path.read_bytes(), (images / "prepared" / f"{path.name[:2]}.json").read_bytes()))

    monkeypatch.setattr(one, "write_image", watched)
    assert command()[1].startswith("1 prepared, 1 unchanged")
    # The image, then the record.
    assert seen[0] == before and seen[1][0] != before[0] and seen[1][1] == before[1]
    assert (images / "prepared" / "P1.json").read_bytes() != before[1]


def test_mni152_asks_for_brains_without_skull(tmp_path: Path, command: Command) -> None:
    (tmp_path / "empty").mkdir()
    tool = f"prepare.skull_strip={sys.executable} {{in}} {{out}}"
    warning = "warning: [prepare] skull_strip is not set"
    usual = ("--from", str(tmp_path / "empty"), "--atlas", "mni152")
    err = command(*usual, registration="affine")[2]
    assert sum(line.startswith(warning) for line in err.splitlines()) == 1
    assert warning not in command(*usual, "--set", tool, registration="affine")[2]
    assert warning not in command(*usual)[2]
    assert warning not in command("--from", str(tmp_path / "empty"), registration="affine")[2]


def test_ids_of_the_hospital_become_those_of_the_study(tmp_path: Path, scans: Path, command: Command) -> None:
    ids = tmp_path / "ids.csv"
    with ids.open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([("hospital", "study"), ("P1", "S-01")])
    code, out, _ = command("--ids", str(ids))
    assert code == 4 and "P2: failed: its id is not in the list of ids" in out
    image = tmp_path / "images" / "S-01.nii.gz"
    assert [path.name for path in image.parent.glob("*.nii.gz")] == [image.name]
    header = nib.load(image).header
    assert {
        bytes(header[name].tobytes()).strip(b"\0")
        for name in ("descrip", "aux_file", "db_name", "intent_name")
    } == {b""}
    assert b"P1" not in (tmp_path / "images" / "prepare.json").read_bytes().replace(b"P1/", b"")
    ids.write_text("hospital,study\nP1,S\nP2,S\n")
    code, _, err = command("--ids", str(ids))
    assert code == 4 and "line 3: an id that another line has already" in err
    ids.write_text("a,b\n")
    assert "needs the columns hospital and study" in command("--ids", str(ids))[2]


def write_ids(path: Path, **study: str) -> Path:
    path.write_text("hospital,study\n" + "".join(f"{hospital},{name}\n" for hospital, name in study.items()))
    return path


@pytest.mark.parametrize("exported", [True, False])
def test_nothing_stays_of_a_patient_who_was_taken_out_of_the_list(
    tmp_path: Path, scans: Path, command: Command, exported: bool
) -> None:
    """Whether or not the files are still in the export."""
    images, masks, ids = tmp_path / "images", tmp_path / "masks", tmp_path / "ids.csv"
    masks.mkdir()
    for name in ("S-01", "S-02"):
        nib.save(nib.Nifti1Image((head(1) > 500).astype(np.uint8), AFFINE), masks / f"{name}.nii.gz")
    given = ("--ids", str(write_ids(ids, P1="S-01", P2="S-02")), "--masks", str(masks))
    assert command(*given)[0] == 0
    (images / "own.nii.gz").write_bytes(b"of somebody else")
    (images / "S-02.nii.part").write_bytes(b"of a crash")
    write_ids(ids, P1="S-01")
    (masks / "S-02.nii.gz").unlink()
    if not exported:
        shutil.rmtree(scans / "P2")
    before = sorted(scans.rglob("*"))
    code, out, _ = command(*given)
    lines = out.splitlines()
    assert "S-02: removed: its id is no longer in the list of ids" in lines and "1 removed" in lines[-1]
    assert (code, any(line.startswith("P2: failed: its id is not in the list") for line in lines)) == (
        (4, True) if exported else (0, False)
    )
    assert not [path for path in images.rglob("*") if "S-02" in path.name]
    assert len([path for path in images.rglob("*") if "S-01" in path.name]) == 4
    assert (images / "own.nii.gz").exists() and sorted(scans.rglob("*")) == before
    assert "removed" not in command(*given)[1]
    assert "S-02" not in (images / "prepare.json").read_text() + (images / "prepare.html").read_text()


def test_what_is_held_back_goes_with_its_patient(tmp_path: Path, scans: Path, command: Command) -> None:
    moved = AFFINE.copy()
    moved[:3, 3] += 40
    write_series(scans / "P1", head(1), moved, patient_id="P1", description="t1_mprage")
    ids = write_ids(tmp_path / "ids.csv", P1="S-01", P2="S-02")
    assert "S-01: held back" in command("--ids", str(ids))[1]
    write_ids(ids, P2="S-02")
    assert "S-01: removed" in command("--ids", str(ids))[1]
    assert not [path for path in (tmp_path / "images").rglob("*") if "S-01" in path.name]


def test_an_id_that_now_belongs_to_somebody_else_loses_its_image(
    tmp_path: Path, scans: Path, command: Command
) -> None:
    ids = write_ids(tmp_path / "ids.csv", P1="S-01", P2="S-02")
    assert command("--ids", str(ids))[0] == 0
    image = tmp_path / "images" / "S-02.nii.gz"
    # P9 is not exported yet: the image of P2 under P9's id would be trained on as P9's.
    write_ids(ids, P1="S-01", P9="S-02")
    code, out, _ = command("--ids", str(ids))
    assert code == 4 and "S-02: removed: the list of ids no longer gives its id to the patient" in out
    assert not image.exists()
    # Where both are here, each is made again; where only the export is gone, the image stays.
    write_ids(ids, P1="S-02", P2="S-01")
    assert command("--ids", str(ids))[1].startswith("2 prepared")
    assert read(tmp_path / "images" / "prepared" / "S-02.json").files[0].startswith("P1/")
    shutil.rmtree(scans / "P1")
    assert command("--ids", str(ids))[1].startswith("1 unchanged;") and image.exists()


def test_the_list_of_another_folder_removes_nothing(tmp_path: Path, command: Command) -> None:
    ids = write_ids(tmp_path / "ids.csv", P1="S-01", P2="S-02")
    command("--ids", str(ids))
    write_ids(ids, P1="T-01")
    code, _, err = command("--ids", str(ids))
    assert code == 4 and "names none of the 2 patients in images" in err.splitlines()[-1]
    assert len(list((tmp_path / "images").glob("*.nii.gz"))) == 2


def test_masks_come_along(tmp_path: Path, command: Command) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    drawn = (head(1) > 500).astype(np.uint8) * 3
    nib.save(nib.Nifti1Image(drawn, AFFINE), masks / "P1.nii.gz")
    nib.save(nib.Nifti1Image(drawn, np.diag([5.0, 5.0, 5.0, 1.0])), masks / "P2.nii.gz")
    nib.save(nib.Nifti1Image(drawn, AFFINE), masks / "P8.nii.gz")
    code, out, _ = command("--masks", str(masks))
    assert code == 4
    assert "P2: failed" in out and "not on the grid of series 1" in out
    assert "1 masks of nobody in this folder: P8" in out
    # data check takes the images, and counts nothing of what lies beside them as passed over.
    assert not find(tmp_path / "images", "folder", "t1").left_out
    assert detect_layout(tmp_path / "images") == "folder"
    with pytest.raises(DataError, match="images here and in labels/"):
        find_labels(tmp_path / "images", "folder")
    (label,) = find_labels(tmp_path / "images" / "labels", "folder")
    voxels, header = read_voxels(label)
    assert np.array_equal(voxels, drawn[::-1, ::-1])
    record = read(tmp_path / "images" / "prepared" / "P1.json")
    assert np.array_equal(to_original(voxels.astype(np.uint8), header.affine, record, order=0), drawn)


def test_programs_have_a_deadline_and_no_shell(tmp_path: Path, scans: Path, command: Command) -> None:
    shutil.rmtree(scans / "P2")
    tool = tmp_path / "tool.py"
    tool.write_text(
        "import sys, nibabel, numpy as np\n"
        "image = nibabel.load(sys.argv[1])\n"
        "voxels = np.asarray(image.dataobj)\n"
        "assert nibabel.aff2axcodes(image.affine) == ('R', 'A', 'S')\n"
        "voxels[15:] = 0\n"
        "nibabel.save(nibabel.Nifti1Image(voxels, image.affine), sys.argv[2])\n"
    )
    python = sys.executable
    bounds = [f"--set=prepare.least_{name}" for name in ("overlap=0.1", "nmi=1.0", "peak=-1", "covered=0")]
    code, out, err = command("--set", f"prepare.skull_strip={python} {tool} {{in}} {{out}}", *bounds)
    assert code == 0, out + err
    voxels, _ = read_voxels(find_images(tmp_path / "images", "folder", "t1")[0])
    assert not voxels[15:].any() and np.array_equal(
        voxels[:15], head(1)[::-1, ::-1][:15]
    )  # RAS turns the first axis
    software = read(tmp_path / "images" / "prepared" / "P1.json").software
    assert software["skull_strip"] == f"{python} {tool} {{in}} {{out}}" and software["bias_field"] == "none"
    cases = {
        f"{python} -c pass {{in}} {{out}}": "wrote no usable image",
        f"{python} -c 'raise SystemExit(3)' {{in}} {{out}}": "failed with 3",
        f"{python} -c 'import sys' {{in}} {{out}}; touch {tmp_path}/shell": "wrote no usable image",
    }
    for template, reason in cases.items():
        code, out, _ = command("--set", f"prepare.skull_strip={template}")
        assert code == 4 and reason in out, template
    slow = f"prepare.bias_field={python} -c 'import time; time.sleep(600)' {{in}} {{out}}"
    code, out, _ = command("--set", slow, "--set", "prepare.deadline_s=0.2")
    assert code == 4 and "took longer than 0.2 s" in out
    assert not (tmp_path / "shell").exists()
    assert not list((tmp_path / "images" / "prepared").glob(".work-*"))
    code, _, err = command("--set", "prepare.skull_strip=tool {in}")
    assert code == 4 and "does not say where {out} goes" in err


@pytest.mark.parametrize("setting", ["skull_strip", "bias_field"])
def test_a_program_that_is_not_there_touches_nothing(
    tmp_path: Path, scans: Path, command: Command, setting: str
) -> None:
    command()
    before = {path: path.read_bytes() for path in (tmp_path / "images").rglob("*") if path.is_file()}
    (tmp_path / "strip").write_text("#!/bin/sh\n")
    for program, said in {
        "/nowhere/tool": "no such program: check the path",
        "no-such-program": "no such program: check the path",
        f"{tmp_path}/strip": "may not be executed: chmod +x",
        "./strip": "write its whole path",
    }.items():
        code, _, err = command("--set", f"prepare.{setting}={program} {{in}} {{out}}")
        assert code == 4 and err.splitlines()[-1].endswith(f"[prepare] {setting}: {program}: {said}"), err
    assert before == {path: path.read_bytes() for path in (tmp_path / "images").rglob("*") if path.is_file()}


def test_a_program_that_fails_leaves_the_image_of_an_earlier_run(
    tmp_path: Path, scans: Path, command: Command
) -> None:
    command()
    images = tmp_path / "images"
    before = (images / "P1.nii.gz").read_bytes()
    broken = f"prepare.skull_strip={sys.executable} -c 'raise SystemExit(3)' {{in}} {{out}}"
    shutil.rmtree(scans / "P2")
    patient(scans, "P2", number=2)  # another series: the older image may be another person's
    code, out, _ = command("--set", broken)
    one, other = (next(line for line in out.splitlines() if line.startswith(name)) for name in ("P1", "P2"))
    assert code == 4 and "failed with 3" in one and one.endswith("; its image of an earlier run stays")
    assert other.endswith("; its image of an earlier run was removed")
    assert (images / "P1.nii.gz").read_bytes() == before and read(images / "prepared" / "P1.json").image
    assert not list(images.rglob("P2.*"))
    assert command()[1].startswith("1 unchanged, 1 prepared")


def test_a_crash_between_image_and_record_is_repaired(
    tmp_path: Path, scans: Path, atlas: Path, command: Command
) -> None:
    """The image of one run and the record of another: a mask would come back to another place."""
    command()
    image, record = tmp_path / "images" / "P1.nii.gz", tmp_path / "images" / "prepared" / "P1.json"
    before = image.read_bytes(), record.read_bytes()
    killed = (
        "import os, signal, sys\n"
        "from splitpeer.cli import main\n"
        "from splitpeer.prepare import one\n"
        "one.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [
            sys.executable, "-c", killed, "data", "prepare", "--from", scans, "--modality", "t1", "--out", "images",
            "--atlas", atlas, "--registration", "none", "--spacing", "10", "10", "10",
        ],
        cwd=tmp_path, capture_output=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert image.read_bytes() != before[0] and record.read_bytes() == before[1]
    # Nothing but the image has changed since the first run.
    assert command()[1].startswith("1 prepared, 1 unchanged")
    assert (image.read_bytes(), record.read_bytes()) == before


def test_several_workers_make_the_same_bytes(tmp_path: Path, scans: Path, command: Command) -> None:
    patient(scans, "P3", oddities=Oddities(missing=(9,)))
    patient(scans, "P4", seed=4)
    one = command("--workers", "1", registration="rigid")
    several = command("--workers", "3", "--out", "several", registration="rigid")
    assert one[0] == several[0] == 4 and one[1].replace("images/", "several/") == several[1]
    made = {
        path.relative_to(tmp_path / "images"): path
        for path in (tmp_path / "images").rglob("*")
        if path.is_file()
    }
    assert len(made) > 8
    for name, path in made.items():
        assert (tmp_path / "several" / name).read_bytes() == path.read_bytes().replace(
            b'"images"', b'"several"'
        ), name


def hanging(tmp_path: Path) -> str:
    """A program that says that it runs, and then does nothing."""
    tool = tmp_path / "hang.py"
    tool.write_text(
        "import os, sys, time\n"
        f"open(f'{tmp_path}/{{os.getpid()}}.runs', 'w').write(str(os.getppid()))\n"
        "time.sleep(600)\n"
    )
    return f"prepare.skull_strip={sys.executable} {tool} {{in}} {{out}}"


@pytest.mark.parametrize("how", ["interrupted", "worker killed", "caller killed"])
def test_workers_end_with_what_they_began(tmp_path: Path, scans: Path, atlas: Path, how: str) -> None:
    given = [
        "data", "prepare", "--from", scans, "--modality", "t1", "--out", "images", "--atlas", atlas,
        "--registration", "none", "--workers", "2", "--set", hanging(tmp_path),
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "splitpeer.cli", *map(str, given)],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    while len(running := [path for path in tmp_path.glob("*.runs") if path.read_text()]) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    programs, workers = [int(path.stem) for path in running], [int(path.read_text()) for path in running]
    if how == "interrupted":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all
    else:
        os.kill(workers[0] if how == "worker killed" else process.pid, signal.SIGKILL)
    _, said = process.communicate(timeout=100)
    wanted = {"interrupted": 130, "worker killed": 1, "caller killed": -signal.SIGKILL}[how]
    assert process.returncode == wanted and "Traceback" not in said, said
    if how == "worker killed":
        assert said.splitlines()[-1].endswith("run it again with fewer --workers")
        programs = programs[1:]  # the other one's is nobody's child any more
    for pid in (*workers, *programs):
        until = time.monotonic() + 60
        while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < until, f"{pid} still runs"
            time.sleep(0.05)
    for pid in (int(path.stem) for path in running):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(small_disk, command: Command) -> None:  # type: ignore[no-untyped-def]
    small_disk.fill(but=24 << 10)
    code, _, err = command("--out", str(small_disk.folder / "images"))
    assert code == 3 and len(err.splitlines()) == 1 and "make room, or change --out" in err
    assert not list(small_disk.folder.rglob("*.part")) and not list(small_disk.folder.rglob("*.nii.gz"))
    small_disk.make_room()
    assert command("--out", str(small_disk.folder / "images"))[0] == 0


def test_two_at_once_do_not_mix(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "images" / "prepared"
    folder.mkdir(parents=True)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    code, _, err = command()
    os.close(held)
    assert code == 4 and "another splitpeer data prepare" in err
    (folder / ".work-left").mkdir()
    assert command()[0] == 0 and not (folder / ".work-left").exists()


def test_rules_come_from_peer_toml(tmp_path: Path, scans: Path, command: Command, peer_toml: Path) -> None:
    write_series(scans / "P1", head(2), AFFINE, patient_id="P1", description="t1_mprage_nav", number=7)
    peer_toml.write_text(
        peer_toml.read_text() + '\n[prepare.series.t1]\ndescription = "nav$|^t1_mprage$"\nprefer = "newest"\n'
    )
    code, out, _ = command("--config", str(peer_toml), "--json")
    told = json.loads(out)
    assert code == 0 and told["complete"] and told["counts"] == "2 prepared"
    assert "series 7 't1_mprage_nav' (28 slices): the newest of 2" in told["outcomes"][0]["series"]
    peer_toml.write_text(peer_toml.read_text() + "preferred = 1\n")
    code, _, err = command("--config", str(peer_toml))
    assert code == 4 and "[prepare.series.t1] preferred is unknown: did you mean prefer?" in err


def test_a_modality_without_a_rule(command: Command) -> None:
    code, _, err = command("--modality", "swi")
    assert code == 4 and "[prepare.series.swi]" in err
