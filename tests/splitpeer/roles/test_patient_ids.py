"""Patients that sites call by different names: who is told what, when, and what settles it."""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from splitpeer.errors import DeadlinePassed, JobFailed


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture):
    """What was logged as `name`: lines(name) -> the fields of each."""
    caplog.set_level(logging.DEBUG, "splitpeer")
    return lambda name: [r.fields for r in caplog.records if r.getMessage() == name]


def renamed(scene, modality: str, name) -> Path:
    """The site's images under other names: name(number, patient) -> stem."""
    folder = scene.folder / f"renamed-{modality}"
    folder.mkdir()
    for number, path in enumerate(sorted((scene.federation.data / modality).iterdir()), 1):
        shutil.copy(path, folder / f"{name(number, path.name.removesuffix('.nii.gz'))}.nii.gz")
    scene.client(modality, data={"images": str(folder)})
    return folder


def labels_renamed(scene, name) -> None:
    """The masks under other names."""
    folder = scene.folder / "renamed-labels"
    folder.mkdir()
    for number, path in enumerate(sorted((scene.federation.data / "labels").iterdir()), 1):
        shutil.copy(path, folder / f"{name(number, path.name.removesuffix('.nii.gz'))}.nii.gz")
    scene.coordinator(data={"labels": str(folder)})


WAYS = {
    "unpadded": (
        lambda n, p: f"{n:03d}",
        lambda n, p: str(8 + n),
        "without zeros in front (9): other sites may",
    ),
    "suffixed": (
        lambda n, p: f"P{n:03d}",
        lambda n, p: f"P{n:03d}_T1",
        "6 of 6 ids end in the name of a modality",
    ),
    "nnU-Net": (lambda n, p: f"P{n:03d}", lambda n, p: f"P{n:03d}_0000", "all ids end in '_0000'"),
}


@pytest.mark.parametrize("way", WAYS)
async def test_ids_that_differ_are_counted_pair_by_pair_and_explained_where_they_are(
    scene, lines, way
) -> None:
    """SP-11-41."""
    others, own, hint = WAYS[way]
    scene.cast("flair", "t1")
    labels_renamed(scene, others)
    renamed(scene, "flair", others)
    renamed(scene, "t1", own)
    ran = await scene.together()
    assert isinstance(ran.error, JobFailed)
    said = str(ran.error)
    assert "0 patients are at all sites, 2 are needed (labels 6, site-flair 6, site-t1 6; in common: " in said
    assert "labels and site-flair 6, labels and site-t1 0, site-flair and site-t1 0)" in said
    assert 'list them (layout "csv")' in said
    assert "salt" not in said
    found = [entry["cause"] for entry in lines("data.warning")]
    assert any(hint in cause for cause in found), found
    # Names of files are in the log of the site that has them, and in nothing that is sent.
    assert not any(own(n, "") in f"{said} {ran.clients['site-flair']}" for n in (3, 4) if way != "unpadded")


async def test_overlaps_are_told_at_each_joining_and_not_when_all_are_here(scene, lines) -> None:
    scene.cast("flair", "t1", deadlines={"join_s": 60})
    renamed(scene, "t1", lambda n, p: f"{p}_T1")
    async with scene.running(only=["hub", "site-t1"]):
        async with asyncio.timeout(30):
            while not lines("site.overlap"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        (told,) = lines("site.overlap")
    assert (told["site"], told["patients"], told["shared"]) == ("site-t1", 6, "labels 0")
    assert "data.warning" in told["hint"]


async def test_a_site_that_fits_is_told_without_a_warning(scene, caplog, lines) -> None:
    scene.cast("flair", "t1", training={"steps": 1})
    assert (await scene.together()).result.complete
    told = lines("site.overlap")
    assert told[0]["shared"] == "labels 6"
    assert "labels 6" in told[1]["shared"]
    assert "6" in told[1]["shared"].partition(", ")[2]
    assert not any("hint" in entry for entry in told)
    assert not lines("data.warning")


async def test_a_list_settles_names_that_differ(scene) -> None:
    scene.cast("flair", "t1", training={"steps": 1})
    folder = renamed(scene, "t1", lambda n, p: f"{n}_T1")
    patients = sorted(p.name.removesuffix(".nii.gz") for p in (scene.federation.data / "t1").iterdir())
    rows = [f"{patient},renamed-t1/{n}_T1.nii.gz" for n, patient in enumerate(patients, 1)]
    listed = folder.parent / "patients.csv"
    listed.write_text("\n".join(["patient,path", *rows]))
    scene.client("t1", data={"images": str(listed), "layout": "csv"})
    ran = await scene.together()
    assert ran.result is not None, ran.error
    assert ran.result.patients == 6


async def test_a_start_lists_what_it_did_not_take(scene, lines) -> None:
    scene.cast("t1", deadlines={"join_s": 20})
    folder = renamed(scene, "t1", lambda n, p: p)
    (folder / "gone.nii.gz").symlink_to(folder / "nowhere")
    (folder / "extra.nrrd").write_bytes(b"")
    (folder / "MUELLER_Erika (copy).nii.gz").symlink_to(folder / "MUELLER_Erika.nii.gz")
    labels = scene.folder / "labels"
    shutil.copytree(scene.federation.data / "labels", labels)
    (labels / "seg.mgz").write_bytes(b"")
    scene.coordinator(data={"labels": str(labels)})
    ran = await scene.together()
    assert not isinstance(ran.error, DeadlinePassed)
    found = "\n".join(entry["cause"] for entry in lines("data.warning"))
    assert "1 not taken: gone.nii.gz: a link to a file that does not exist" in found
    assert "1 not taken: extra.nrrd: not NIfTI" in found
    assert "1 not taken: seg.mgz: FreeSurfer's format" in found
    assert "'MUELLER_Erika' and 'MUELLER_Erika (copy)' are taken for 2 patients, and look like one" in found


async def test_a_key_in_an_error_is_a_file_in_the_own_log(scene, make, lines) -> None:
    scene.cast("flair", "t1")
    folder = renamed(scene, "t1", lambda n, p: p)
    make.nifti(folder / f"{make.PATIENTS[3]}.nii.gz", np.ones((40, 38, 34), np.float32))
    ran = await scene.together()
    assert isinstance(ran.error, JobFailed)
    files = {entry["file"] for entry in lines("patient.file")}
    assert files == {
        str(folder / f"{make.PATIENTS[3]}.nii.gz"),
        *(str(scene.federation.data / kind / f"{make.PATIENTS[3]}.nii.gz") for kind in ("flair", "labels")),
    }
    assert not any(make.PATIENTS[3] in str(error) for error in (ran.error, *ran.clients.values()))
