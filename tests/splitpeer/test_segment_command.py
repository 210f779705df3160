"""`splitpeer segment`: a mask lies where the patient's image has it; what goes wrong is one line, and no file."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pytest

from splitpeer.cli import main
from splitpeer.cli.segmenting import doing
from splitpeer.daemon import asking
from splitpeer.daemon.spool import Spool, Waiting, folder_of
from splitpeer.daemon.spooled import Status
from splitpeer.data.files import Case
from splitpeer.data.geometry import Geometry
from splitpeer.data.nifti import read_header
from splitpeer.data.resampling import resampled_grid
from tests.splitpeer.daemon.spooling import TASK
from tests.splitpeer.daemon.stand_in import answers_on, daemon, masks_of

if TYPE_CHECKING:
    from tests.conftest import SmallDisk

SHAPE = (12, 10, 6)
AFFINES = {
    # A file in LPS order, one with permuted axes, and an oblique one.
    "P001": np.array([[-10.0, 0, 0, 40], [0, -12, 0, 50], [0, 0, 30, -20], [0, 0, 0, 1]]),
    "P002": np.array([[0, 0, 20.0, -9], [15, 0, 0, -8], [0, -10, 0, 30], [0, 0, 0, 1]]),
    "P003": np.array([[9.8, -2, 0, 1], [2, 9.8, 0, 2], [0, 0, 25, 3], [0, 0, 0, 1]]),
}


@pytest.fixture
def site(peer_toml: Path) -> Path:
    """The folder of a hospital with an image of each patient."""
    folder = peer_toml.parent / "images"
    folder.mkdir()
    generator = np.random.default_rng(7)
    for patient, affine in AFFINES.items():
        voxels = generator.integers(1, 900, SHAPE).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, affine), folder / f"{patient}.nii.gz")
    return peer_toml.parent


def grids(site: Path, spacing: tuple[float, float, float] | None = None) -> dict[str, Geometry]:
    """The grid of each patient in a run."""
    found = {
        patient: read_header(Case(patient, site / "images" / f"{patient}.nii.gz")).geometry
        for patient in AFFINES
    }
    return {p: g if spacing is None else resampled_grid(g, spacing) for p, g in found.items()}


@pytest.fixture
def segment(site: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """`splitpeer segment ARGUMENTS`; returns what it printed."""

    def call(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as left:
            main(["segment", *map(str, arguments), "--config", str(site / "peer.toml")])
        out, err = capsys.readouterr()
        assert left.value.code == code, err
        return out, err

    return call


def files_of(folder: Path) -> set[str]:
    """All that lies there, hidden files as well."""
    return {path.name for path in folder.rglob("*")}


def at(path: Path, patient: str) -> np.ndarray:
    """The voxels of a mask, which must lie on the grid of the patient's file."""
    image = nib.Nifti1Image.from_filename(path)
    assert image.shape == SHAPE and np.allclose(image.affine, AFFINES[patient], atol=1e-4)
    return np.asarray(image.dataobj)


@pytest.mark.parametrize("patient", sorted(AFFINES))
def test_the_mask_is_on_the_grid_of_the_patient_s_file(
    site: Path, segment: Callable[..., tuple[str, str]], patient: str
) -> None:
    with daemon(site / "state", answers_on(grids(site))):
        out, err = segment(patient, "--out", site / "mask.nii.gz")
    voxels = at(site / "mask.nii.gz", patient)
    # nibabel brings the file to RAS order in its own way.
    turned = nib.as_closest_canonical(nib.Nifti1Image(voxels, AFFINES[patient]))
    assert np.array_equal(
        np.asarray(turned.dataobj), TASK.labels(masks_of(grids(site)[patient]).astype(bool))
    )
    assert f"{patient}: whole " in out and "made from t1" in out
    assert err.splitlines()[-1].startswith(f"warning: {patient}: Made without flair")
    beside = json.loads((site / "mask.json").read_text())
    assert beside["modalities"] == {"used": ["t1"], "missing": ["flair"]}
    assert beside["run"] == {"id": "ab" * 8, "name": "glioma", "step": 40, "model_sha256": "cd" * 32}
    assert {stat.S_IMODE((site / name).stat().st_mode) for name in ("mask.nii.gz", "mask.json")} == {0o600}
    assert os.listdir(folder_of(site / "state")) == []


def test_a_resampled_grid_is_left_again(site: Path, segment: Callable[..., tuple[str, str]]) -> None:
    coarse = grids(site, (20.0, 20.0, 30.0))
    with daemon(site / "state", answers_on(coarse)):
        segment("P001", "--out", site / "mask.nii.gz")
    voxels = at(site / "mask.nii.gz", "P001")
    # Where all eight coarse voxels around a fine one say the same, so does it.
    affine = np.linalg.inv(coarse["P001"].affine) @ AFFINES["P001"]
    masks, checked = masks_of(coarse["P001"]), 0
    for index in np.ndindex(SHAPE):
        place = (affine @ (*index, 1))[:3]
        if (place > np.array(coarse["P001"].shape) - 1).any():
            continue
        corners = np.ix_((0, 1), *((int(np.floor(p + 1e-6)), int(np.ceil(p - 1e-6))) for p in place))
        around = masks[corners].reshape(2, -1)
        if (around == around[:, :1]).all():
            checked += 1
            assert TASK.masks(voxels[index][None])[:, 0].tolist() == around[:, 0].tolist()
    assert checked > 300


def test_outlines_on_a_finer_grid_follow_the_probabilities(
    site: Path, segment: Callable[..., tuple[str, str]]
) -> None:
    coarse, found = grids(site, (20.0, 20.0, 30.0)), {}
    for outside in (0.1, 0.45):
        with daemon(site / "state", answers_on(coarse, sure=(outside, 0.9))):
            segment("P001", "--out", site / f"{outside}.nii.gz")
        found[outside] = at(site / f"{outside}.nii.gz", "P001") > 0
    # Next to an outline, .45 and .9 are more than .5 over most of the way; the coarse masks are the same.
    assert found[0.45][found[0.1]].all() and found[0.45].sum() > found[0.1].sum()


def test_many_patients_into_a_folder(site: Path, segment: Callable[..., tuple[str, str]]) -> None:
    with daemon(site / "state", answers_on(grids(site), used=("t1", "flair"), missing=())):
        out, err = segment(
            *AFFINES, "--out", site / "out", "--report", site / "pages", "--probabilities", "--json"
        )
    rows = {row["patient"]: row for row in json.loads(out)}
    assert rows.keys() == AFFINES.keys() and "warning" not in err
    for patient, row in rows.items():
        at(site / "out" / f"{patient}.nii.gz", patient)
        found = nib.Nifti1Image.from_filename(site / "out" / f"{patient}_probabilities.nii.gz")
        assert found.shape == (*SHAPE, 2) and sorted(np.unique(found.dataobj).round(3)) == [0.1, 0.9]
        assert "flair" in (site / "pages" / f"{patient}.html").read_text()
        assert {Path(name).name for name in row["files"]} == {
            f"{patient}{end}" for end in (".nii.gz", ".json", "_probabilities.nii.gz", "_probabilities.json", ".html")
        }  # fmt: skip
    assert files_of(site / "out") | files_of(site / "pages") == {
        Path(name).name for row in rows.values() for name in row["files"]
    }


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status(state="waiting"), "waiting"),
        (Status(state="waiting", reason="for the coordinator"), "waiting: for the coordinator"),
        (Status(state="queued", ahead=3), "queued, 3 before it"),
        (Status(state="queued"), "queued, the next one"),
        (Status(state="working", done=12, total=64), "working, 12 of 64 windows"),
    ],
)
def test_a_state_in_words(status: Status, words: str) -> None:
    assert doing(status) == words


# --- what can go wrong: one line, the exit code, no file --------------------------------------------------------


def fails(cause: str, reason: str) -> Callable[[Spool, Waiting], None]:
    return lambda spool, one: (spool.note(one.id, Status.failed(cause, reason)) and None) or None


@pytest.mark.parametrize(
    ("cause", "code"),
    [("refused", 1), ("absent", 1), ("incomplete", 1), ("not-served", 1), ("lost", 2), ("busy", 3), ("disk", 3),
     ("unknown", 4), ("internal", 1)],
)  # fmt: skip
def test_what_the_daemon_refuses(
    site: Path, segment: Callable[..., tuple[str, str]], cause: str, code: int
) -> None:
    with daemon(site / "state", fails(cause, "north does not allow it")):
        _, err = segment("P001", "--out", site / "mask.nii.gz", code=code)
    assert err == "splitpeer: north does not allow it\n"
    assert "mask.nii.gz" not in files_of(site) and os.listdir(folder_of(site / "state")) == []


def test_one_patient_of_several_fails(site: Path, segment: Callable[..., tuple[str, str]]) -> None:
    good = answers_on(grids(site))

    def answer(spool: Spool, one: Waiting) -> None:
        if one.request.patient == "P002":
            spool.note(one.id, Status.failed("misaligned", "north and south differ in shape"))
        else:
            good(spool, one)

    with daemon(site / "state", answer):
        out, err = segment(*AFFINES, "--out", site / "out", "--json", code=1)
    assert "P002: north and south differ in shape" in err
    assert err.splitlines()[-1] == "splitpeer: 1 of 3 patients were not segmented"
    assert {row["patient"]: row.get("exit", 0) for row in json.loads(out)} == {
        "P001": 0,
        "P002": 1,
        "P003": 0,
    }
    assert "P002.nii.gz" not in files_of(site / "out") and "P003.nii.gz" in files_of(site / "out")


def test_there_is_no_daemon(site: Path, segment: Callable[..., tuple[str, str]]) -> None:
    _, err = segment("P001", "--out", site / "mask.nii.gz", code=2)
    assert "no daemon runs" in err and len(err.splitlines()) == 1
    assert not (site / "state").exists()


def test_a_daemon_without_a_spool(site: Path, segment: Callable[..., tuple[str, str]]) -> None:
    with daemon(site / "state", None):
        _, err = segment("P001", "--out", site / "mask.nii.gz", code=4)
    assert "never served" in err and len(err.splitlines()) == 1


def test_a_daemon_that_takes_no_requests(
    site: Path, segment: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "TAKEN_S", 0.2)
    monkeypatch.setattr(asking, "WITHDRAW_S", 0.1)
    with daemon(site / "state", lambda spool, one: None):
        _, err = segment("P001", "--out", site / "mask.nii.gz", code=1)
    assert "takes no requests" in err and len(err.splitlines()) == 1
    assert os.listdir(folder_of(site / "state")) == []


def test_the_deadline_passes(site: Path, segment: Callable[..., tuple[str, str]]) -> None:
    def waits(spool: Spool, one: Waiting) -> None:
        spool.note(one.id, Status(state="waiting", reason="for the coordinator"))

    with daemon(site / "state", waits):
        _, err = segment("P001", "--out", site / "mask.nii.gz", "--wait", "1", code=3)
    assert "deadline" in err and err.splitlines()[0] == "P001: waiting: for the coordinator"


def test_the_daemon_dies_and_does_not_come_back(
    site: Path, segment: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "ALIVE_S", 0.0)
    monkeypatch.setattr(asking, "RETURN_S", 0.3)
    monkeypatch.setattr(asking.SpoolAsker, "check", lambda self: None)
    Spool(folder_of(site / "state")).open()
    _, err = segment("P001", "--out", site / "mask.nii.gz", code=2)
    assert "is not back after 0.3 s" in err
    assert os.listdir(folder_of(site / "state")) == []


def test_the_image_is_another_by_now(site: Path, segment: Callable[..., tuple[str, str]]) -> None:
    before = grids(site)
    nib.save(nib.Nifti1Image(np.ones((9, 9, 9), np.int16), AFFINES["P001"]), site / "images" / "P001.nii.gz")
    with daemon(site / "state", answers_on(before)):
        _, err = segment("P001", "--out", site / "mask.nii.gz", code=4)
    assert "another grid" in err and not (site / "mask.nii.gz").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["P009", "--out", "m.nii.gz"], "P009: no image of this patient here"),
        (["P001", "--out", "m.dcm"], ".nii.gz or .nii"),
        (["P001", "--out", "no/m.nii.gz"], "there is no folder"),
        (["P001", "P002", "--out", "m.nii.gz"], "a folder"),
        (["P001", "--out", "images/P001.nii.gz"], "not overwritten"),
        (["P001", "--out", "m.nii.gz", "--modality", "t2"], "has no t2"),
        (["P001", "--out", "m.nii.gz", "--dicom-seg", "m.dcm"], "--dicom"),
        (["P001", "--out", "m.nii.gz", "--require", "0"], "neither all nor"),
        (["P001", "--out", "m.nii.gz", "--wait", "0"], "--wait"),
    ],
)
def test_mistakes_are_found_before_anybody_is_asked(
    site: Path,
    segment: Callable[..., tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(site)
    with daemon(site / "state", lambda spool, one: pytest.fail("a daemon was asked")):
        before = files_of(site)
        _, err = segment(*arguments, code=4)
        assert files_of(site) == before
    assert said in err and len(err.splitlines()) == 1


def test_a_full_disk_leaves_what_was_there(
    site: Path, segment: Callable[..., tuple[str, str]], small_disk: SmallDisk
) -> None:
    out = small_disk.folder / "mask.nii.gz"
    out.write_bytes(b"older")
    small_disk.fill(but=8192)
    before = files_of(small_disk.folder)
    with daemon(site / "state", answers_on(grids(site))):
        _, err = segment("P001", "--out", out, "--report", small_disk.folder / "page.html", "--force", code=3)
        assert "page.html cannot be written (No space left on device)" in err.splitlines()[-1]
        assert ".splitpeer-" not in err
        assert files_of(small_disk.folder) == before and out.read_bytes() == b"older"
        small_disk.make_room()
        segment("P001", "--out", out, "--report", small_disk.folder / "page.html", "--force")
    assert files_of(small_disk.folder) == {"mask.nii.gz", "mask.json", "page.html"}
    at(out, "P001")


def test_ctrl_c_withdraws_the_request(site: Path) -> None:
    heard: list[str] = []

    def works(spool: Spool, one: Waiting) -> None:
        heard.append(one.id)
        spool.note(one.id, Status(state="working", done=len(heard), total=10_000))

    with daemon(site / "state", works) as spool:
        asks = subprocess.Popen(
            [sys.executable, "-m", "splitpeer.cli", "segment", "P001", "--out", "mask.nii.gz"],
            cwd=site, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        until = time.monotonic() + 60
        while not heard and time.monotonic() < until:
            time.sleep(0.02)
        asks.send_signal(signal.SIGINT)
        _, err = asks.communicate(timeout=60)
        assert asks.returncode == 130, err
        assert err.splitlines()[-1] == "splitpeer: interrupted" and "Traceback" not in err
        assert os.listdir(spool.folder) == [] and spool.waiting() == []
    assert "mask.nii.gz" not in files_of(site)
