"""Jobs that a site does not want, and data that cannot be used: who says what, with which code, and no names."""

from __future__ import annotations

import errno
import logging
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from splitpeer.cli.outcome import exit_code
from splitpeer.errors import ConfigError, DataError, DeadlinePassed, DiskTrouble, JobFailed
from splitpeer.logs import handle
from splitpeer.site.job import SiteJob
from splitproto.messages import Forward


@pytest.fixture(autouse=True)
def everything_said(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, "splitpeer")
    caplog.set_level(logging.DEBUG, "splitproto")
    return lambda: "\n".join(f"{r.getMessage()} {getattr(r, 'fields', {})}" for r in caplog.records)


# --- policy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "job", "reason"),
    [
        ({"levels": [1, 2, 3, 4]}, {}, "level x0 may not leave this site (policy levels: [1, 2, 3, 4])"),
        (
            {"precision": ["f32"]},
            {"training": {"precision": "bf16", "steps": 2}},
            "precision bf16 is not allowed here (policy: f32)",
        ),
    ],
)
async def test_a_site_declines_what_its_policy_withholds(scene, policy, job, reason: str) -> None:
    """SP-11-2."""
    scene.cast("flair", "t1", **job)
    scene.client("t1", policy=policy)
    ran = await scene.together()
    assert isinstance(ran.error, JobFailed)
    assert str(ran.error) == f"site site-t1 declined the job: {reason}"
    declined, other = ran.clients["site-t1"], ran.clients["site-flair"]
    assert isinstance(declined, JobFailed)
    assert str(declined) == f"job try declined: {reason}"
    # The others are told who did not want what.
    assert isinstance(other, JobFailed)
    assert reason in str(other)
    assert not scene.losses()


# --- geometry ----------------------------------------------------------------------------------------------


def assert_no_key_is_told(scene, keys) -> None:
    """What is copied out of a hospital, or shown to its staff, holds no patient's key, not even in part."""
    told = [path for name in ("audit.jsonl", "status.json") for path in scene.folder.rglob(name)]
    assert {path.name for path in told} == {"audit.jsonl", "status.json"}
    for path in told:
        text = path.read_text()
        assert not any(key.hex()[:8] in text for key in keys), path


def variant(scene, make, modality: str, patient: str, **how) -> None:
    """The site's images, with one patient stored differently."""
    images = scene.folder / "images"
    shutil.copytree(scene.federation.data / modality, images)
    import nibabel as nib

    path = images / f"{patient}.nii.gz"
    voxels = nib.load(path).get_fdata(dtype="float32")[: how.pop("cut", None)]
    make.nifti(path, voxels, **how)
    scene.client(modality, data={"images": str(images)})


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"cut": -1}, "shape 45x38x34 against 44x38x34"),
        ({"spacing": 1.5}, "spacing 1x1x1 against 1.5x1.5x1.5 mm"),
        ({"turned": 10}, "direction: turned by 10 degrees"),
        ({"turned": 40}, "direction: turned by 40 degrees"),
        ({"turned": -15}, "direction: turned by 15 degrees"),
        # Mirrored about the scanner's origin, which is the volume's corner: the head lies elsewhere.
        ({"axes": "LPS"}, "origin 0x0x0 against -44x-37x0 mm"),
    ],
)
async def test_sites_that_disagree_on_a_grid(scene, make, everything_said, how, what: str) -> None:
    """SP-11-5."""
    scene.cast("flair", "t1")
    variant(scene, make, "t1", make.PATIENTS[2], **how)
    ran = await scene.together()
    key = scene.masks().keys()
    assert isinstance(ran.error, JobFailed)
    assert what in str(ran.error)
    assert "site-t1" in str(ran.error)
    (named,) = [k for k in key if handle(k) in str(ran.error)]
    assert scene.masks().case(named).patient == make.PATIENTS[2]
    for error in ran.clients.values():
        assert isinstance(error, JobFailed)
        assert what in str(error)
    # A peer's own log names its own file, on a line of its own.
    said = [line for line in everything_said().splitlines() if not line.startswith("patient.file ")]
    everything = "\n".join([*said, str(ran)])
    assert not any(patient in everything for patient in make.PATIENTS)
    assert not any(k.hex()[:8] in everything for k in key)
    assert_no_key_is_told(scene, key)


def other_salt(scene, content: str) -> str:
    salt = scene.folder / "salt"
    salt.write_text(content)
    salt.chmod(0o600)
    return str(salt)


async def test_a_wrong_salt_is_named_at_both_sides_before_patients_are_compared(
    scene, everything_said
) -> None:
    """SP-11.5-4."""
    scene.cast("flair", "t1", deadlines={"join_s": 2})
    right = scene.masks().salt_check.hex()
    scene.client("t1", data={"salt": other_salt(scene, "ab" * 32)})
    wrong = scene.images("t1").salt_check.hex()
    ran = await scene.together()
    said = (
        f"the patient salt of site-t1 (check value {wrong}) is not the coordinator's: "
        "install the same federation.salt at both (each start's log shows its own check value)"
    )
    assert exit_code(ran.clients["site-t1"]) == 1
    assert str(ran.clients["site-t1"]) == f"the peer says: {said}"
    # The check value is all that a stranger would need to be heard further.
    assert right not in said
    log = everything_said()
    (refused,) = [line for line in log.splitlines() if line.startswith("site.refused")]
    assert "'site': 'site-t1'" in refused
    assert said in refused
    # Only this site is refused: the others wait for it.
    assert isinstance(ran.error, DeadlinePassed)
    assert "site-t1" in str(ran.error)
    assert f"'salt_check': '{right}'" in log
    assert f"'salt_check': '{wrong}'" in log


async def test_a_salt_with_a_byte_order_mark_is_the_same(scene) -> None:
    """SP-11.5-3."""
    scene.cast("t1", training={"steps": 1})
    written = (scene.federation.pki / "federation.salt").read_text().strip()
    scene.client("t1", data={"salt": other_salt(scene, f"\ufeff{written.upper()}\r\n")})
    ran = await scene.together()
    assert ran.result is not None, ran.error
    assert ran.result.complete


async def test_patients_that_not_all_hold_are_left_out(scene, make) -> None:
    """SP-11-41."""
    scene.cast("flair", "t1", training={"steps": 2}, data={"validation": 1})
    images = scene.folder / "fewer"
    shutil.copytree(scene.federation.data / "t1", images)
    (images / f"{make.PATIENTS[0]}.nii.gz").unlink()
    make.patient(scene.folder / "more", "NOBODY_Else", 99)
    shutil.copy(scene.folder / "more" / "t1" / "NOBODY_Else.nii.gz", images)
    scene.client("t1", data={"images": str(images)})
    ran = await scene.together()
    assert ran.result is not None, ran.error
    assert ran.result.patients == len(make.PATIENTS) - 1


# --- files that break ------------------------------------------------------------------------------------------


def cut_short(scene, modality: str) -> Path:
    """Every image keeps its header and loses its end: joining works, training does not."""
    images = scene.folder / f"broken-{modality}"
    shutil.copytree(scene.federation.data / modality, images)
    for path in images.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return images


def test_corrupt_images_are_named_where_they_lie_and_nowhere_else(scene, make) -> None:
    """SP-11.13-10: more than may be withdrawn."""
    scene.cast("flair", "t1")
    scene.client("t1", data={"images": str(cut_short(scene, "t1"))})
    hub, clients = scene.start_all()
    assert clients["t1"].code() == 1, clients["t1"].said
    assert "broken-t1/" in clients["t1"].said
    assert "truncated or corrupt" in clients["t1"].said
    assert hub.code() == 1
    assert re.fullmatch(
        r"splitpeer: site site-t1 cannot use the files of (\d) \(the file is truncated or damaged: \1\) "
        r"of the run's 6 patients, and may withdraw 1 \(\[data\] max_withdrawn\)",
        hub.last,
    ), hub.last
    assert clients["flair"].code() == 1
    assert "site site-t1 cannot use the files of" in clients["flair"].last
    for said in (hub.said, clients["flair"].said):
        assert "broken" not in said
        assert not any(patient in said for patient in make.PATIENTS)
        assert "Traceback" not in said


async def test_a_corrupt_mask_stays_the_coordinators_own_affair(scene) -> None:
    scene.cast("flair")
    scene.coordinator(data={"labels": str(cut_short(scene, "labels"))})
    ran = await scene.together()
    assert isinstance(ran.error, DataError)
    assert "broken-labels/" in str(ran.error)
    (error,) = ran.clients.values()
    assert isinstance(error, JobFailed)
    assert str(error) == (
        "the coordinator ended the job: the coordinator cannot continue: the coordinator cannot use the files of "
        "2 (the file is truncated or damaged: 2) of the run's 6 patients, and may withdraw 1 ([data] max_withdrawn); "
        "see its log"
    )


async def test_masks_of_another_convention(scene) -> None:
    scene.cast("flair")
    scene.coordinator(data={"convention": "brats"})
    ran = await scene.together()
    assert isinstance(ran.error, DataError)
    assert ran.error.exit_code == 4
    assert "label value(s) 3 are not in convention 'brats'" in str(ran.error)
    (error,) = ran.clients.values()
    assert isinstance(error, JobFailed)
    assert "the mask holds values outside its convention" in str(error)


@pytest.mark.parametrize(
    ("convention", "change", "warning"),
    [
        ("brats2023", lambda mask: mask, "is the convention 'msd'?"),
        ("msd", lambda mask: (mask > 0).astype("uint8"), "all masks hold only 0 and 1"),
        ("msd", lambda mask: mask * (mask != 3), "no mask holds 3 (enhancing)"),
        ("msd", lambda mask: mask, ""),
    ],
)
def test_verify_warns_of_masks_that_do_not_fit_their_convention(
    scene, make, convention: str, change, warning: str
) -> None:
    import nibabel as nib

    scene.cast("t1")
    for path in (scene.federation.data / "labels").iterdir():
        make.nifti(scene.folder / "masks" / path.name, change(np.asarray(nib.load(path).dataobj)))
    scene.coordinator(data={"labels": str(scene.folder / "masks"), "convention": convention})
    hub = scene.start("hub", "--verify")
    hub.until("job.waiting")
    said = [line for line in hub.said.splitlines() if "data.warning" in line]
    assert len(said) == bool(warning), said
    assert warning in "".join(said)
    scene.stop(hub)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 9 GiB for /data/MUELLER_Erika"), "it is out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: /data/MUELLER_Erika"),
            "it is out of memory",
        ),
        (OSError(errno.EMFILE, "Too many open files", "/data/MUELLER_Erika"), "it has too many open files"),
        (ConfigError("/data/MUELLER_Erika: wrong"), "its settings do not fit"),
        (DiskTrouble("/data/MUELLER_Erika: full", "disk-full"), "its disk is full"),
        (ZeroDivisionError("MUELLER_Erika"), "a defect of its software"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
async def test_the_others_hear_what_kind_of_trouble_it_is(
    scene, monkeypatch, error: Exception, words: str
) -> None:
    """SP-11.13-2, SP-12-1."""
    scene.cast("flair", "t1")
    forward = SiteJob.forward

    def fails(job: SiteJob, asked: Forward) -> object:
        if job.seats[0].name == "t1" and asked.step == 2:
            raise error
        return forward(job, asked)

    monkeypatch.setattr(SiteJob, "forward", fails)
    ran = await scene.together()
    said = f"site site-t1 cannot continue: {words}; see its log"
    for heard in (ran.error, ran.clients["site-flair"]):
        assert isinstance(heard, JobFailed)
        assert said in str(heard)
        assert "MUELLER" not in str(heard)


# --- before anything begins --------------------------------------------------------------------------------------


async def refused(scene, who: str, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        async with scene.running(only=[who]) as on:
            await on.tasks[who]
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said_at_the_end(daemon) -> list[str]:
    """What is no line of the log: those begin with the time."""
    return [
        line for line in daemon.said.splitlines() if not re.match(r"\d\d:\d\d:\d\d (info|warning) ", line)
    ]


def test_a_missing_folder_ends_the_client_before_it_dials(scene) -> None:
    scene.cast("t1")
    scene.client("t1", data={"images": str(scene.folder / "nowhere")})
    client = scene.start("site-t1")
    assert client.code() == 4
    (error,) = said_at_the_end(client)
    assert error.startswith(f"splitpeer: {scene.folder / 'nowhere'}")


def test_a_port_in_use(scene) -> None:
    scene.cast("t1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", scene.port))
        taken.listen()
        hub = scene.start("hub")
        assert hub.code() == 4
    (error,) = said_at_the_end(hub)
    assert (
        error
        == f"splitpeer: port {scene.port} of 127.0.0.1 is in use: stop what listens there or choose another"
    )


async def test_an_output_folder_that_cannot_be(scene) -> None:
    scene.cast("t1", output={"folder": "file/runs"})
    (scene.folder / "hub" / "file").write_text("")
    assert "[output] folder" in await refused(scene, "hub", ConfigError)


async def test_resume_wants_the_same_job(scene) -> None:
    scene.cast("t1", training={"steps": 2})
    with pytest.raises(ConfigError, match="nothing to resume"):
        async with scene.running(only=["hub"], resume=True):
            pass
    assert (await scene.together()).result.complete
    for change in ({"data": {"validation": 1}}, {"job": {"seed": 8}}, {"model": {"fusion": "mean"}}):
        scene.job(training={"steps": 2}, **change)
        with pytest.raises(ConfigError, match=r"job\.toml has changed"):
            async with scene.running(only=["hub"], resume=True):
                pass
    # How far ahead and how often is nobody's result.
    scene.job(training={"steps": 2, "ahead": 1, "checkpoint_every": 1})
    assert (await scene.together(resume=True)).result.complete


async def test_a_start_that_fails_does_not_cost_what_could_be_resumed(scene) -> None:
    scene.cast("t1", training={"steps": 2})
    assert (await scene.together()).result.complete
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", scene.port))
        taken.listen()
        await refused(scene, "hub", ConfigError)
    ran = await scene.together(resume=True)
    assert ran.result is not None, ran.error
    assert ran.result.complete


# --- before the start ------------------------------------------------------------------------------------------


def unplaced(scene, modality: str) -> Path:
    """The images of a site, one of them without orientation codes."""
    import nibabel as nib

    images = scene.folder / f"unplaced-{modality}"
    shutil.copytree(scene.federation.data / modality, images)
    path = sorted(images.iterdir())[0]
    image = nib.load(path)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("refuse", [False, True])
def test_a_start_looks_at_every_header_and_its_own_log_names_the_file(scene, make, refuse: bool) -> None:
    scene.cast("flair", "t1", training={"steps": 1})
    path = unplaced(scene, "t1")
    rule = {"unknown_orientation": "refuse"} if refuse else {}
    scene.client("t1", data={"images": str(path.parent), **rule})
    hub, clients = scene.start_all()
    code = hub.code()
    said = clients["t1"].said
    wanted = "patient.unusable" if refuse else "data.warning"
    line = next(line for line in said.splitlines() if wanted in line)
    assert sum(wanted in line for line in said.splitlines()) == 1
    assert f"{path}: orientation unknown (qform and sform codes are 0)" in line
    for other in (hub.said, clients["flair"].said):
        assert "orientation unknown" not in other
        assert str(path) not in other
    # Left out, or in the wrong place: the guess puts the volume's centre at 0, where the others have its corner.
    assert code == (0 if refuse else 1), hub.said
    if not refuse:
        assert "equal voxels lie up to" in hub.last
