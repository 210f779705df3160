"""What goes wrong in runs with frozen encoders: said in one line, nothing lost, nothing released twice."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splitpeer.errors import ConfigError, DataError, DiskTrouble, JobFailed
from splitpeer.site.answers import ANSWERS
from splitpeer.site.shown import NAME as SHOWN
from splitpeer.storage.bank import INDEX

from .scene import PATIENTS, Scene
from .test_frozen import FROZEN, assert_same, bank_of, digests

POLICY = {"coordinators": ["hub"]}


def cast(scene: Scene, **over: Any) -> Scene:
    job = {"training": {**FROZEN, "steps": 6}, "evaluation": {"batch": 16, "overlap": 0.0}, **over}
    return scene.cast("t1ce", "t2", **job)


async def collected(scene: Scene) -> None:
    """Complete, but for the last step: as if the coordinator had died there."""
    ran = await scene.together()
    assert ran.error is None and ran.result.complete, ran
    (scene.output / "result.json").unlink()
    path = scene.folder / "hub" / "state" / "try.run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "running"}))


def some_release(scene: Scene) -> Path:
    return sorted((bank_of(scene) / "site-t2").iterdir())[1]


@pytest.mark.parametrize("spoil", ["cut", "flip", "swap"])
async def test_a_spoilt_release_ends_the_run_in_one_line_and_is_asked_for_again(scene, spoil) -> None:
    cast(scene)
    await collected(scene)
    before, path = digests(bank_of(scene)), some_release(scene)
    octets = path.read_bytes()
    match spoil:
        case "cut":
            path.write_bytes(octets[:-7])
        case "flip":
            path.write_bytes(octets[:-7] + bytes([octets[-7] ^ 1]) + octets[-6:])
        case "swap":
            shutil.copy(path.with_name("00000000.safetensors"), path)
    for checkpoint in path.parents[2].glob("step-*"):
        if checkpoint.name != "step-00000005.safetensors":
            checkpoint.unlink()
    ran = await scene.together(resume=True, only=["hub"])
    assert isinstance(ran.error, DataError), ran
    assert str(path) in str(ran.error) and "\n" not in str(ran.error)
    assert "remove it and start again: the site is asked for it once more" in str(ran.error)
    path.unlink()
    ran = await scene.together(resume=True)
    assert ran.error is None and ran.result.complete, ran
    assert ran.clients == {"site-t1ce": None, "site-t2": None}
    assert digests(bank_of(scene)) == before, "the same question got the same octets"
    assert_same(scene)


async def test_an_encrypted_bank_trains_as_any_other_and_needs_its_key(scene, tmp_path) -> None:
    cast(scene)
    key = tmp_path / "bank.key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    scene.coordinator(bank={"key": str(key)})
    await collected(scene)
    assert not [*bank_of(scene).rglob("*.safetensors")] and [*bank_of(scene).rglob("*.sealed")]
    assert_same(scene)
    key.write_bytes(bytes(32))
    ran = await scene.together(resume=True, only=["hub"])
    assert isinstance(ran.error, DataError) and "encrypted with another key" in str(ran.error), ran
    scene.coordinator()
    ran = await scene.together(resume=True, only=["hub"])
    assert isinstance(ran.error, DataError) and "is encrypted: name its key ([bank] key)" in str(ran.error), (
        ran
    )
    scene.client("t2", bank={"key": str(key)})
    with pytest.raises(ConfigError, match=r"\[bank\] is not for a client"):
        scene.config("site-t2")


async def test_a_site_with_other_weights_is_turned_away(scene) -> None:
    """SP-11.17-6: a decoder must not be trained with two encoders where it knows one."""
    cast(scene, deadlines={"join_s": 4, "step_s": 60, "return_s": 4})
    await collected(scene)
    some_release(scene).unlink()
    folder = next((scene.folder / "site-t2" / "state").glob("try-*"))
    (folder / "step-00000000.safetensors").unlink()
    scene.client("t2", runtime={"initial_weights": "private"})
    ran = await scene.together(resume=True)
    assert "other encoder weights than when it released what the feature bank holds" in str(ran.error), ran
    assert "other encoder weights" in str(ran.clients["site-t2"])
    assert not some_release(scene).name.startswith("00000001")


async def test_a_disk_that_cannot_hold_the_bank_is_refused_before_the_first_release(
    scene, monkeypatch
) -> None:
    cast(scene)
    for modality in scene.modalities:
        scene.client(modality, network={"reconnect_s": 3})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    ran = await scene.together()
    assert isinstance(ran.error, DiskTrouble) and "1 MiB are free: make room" in str(ran.error), ran
    assert not [*scene.folder.rglob(SHOWN), *scene.folder.rglob(ANSWERS)], "nothing has left"


async def test_the_size_is_told_before_the_first_release_and_status_shows_how_much_is_there(
    scene, caplog
) -> None:
    caplog.set_level(logging.INFO, "splitpeer")
    cast(scene)
    ran = await scene.together()
    assert ran.result.complete, ran
    lines = [(r.getMessage(), r.fields) for r in caplog.records if hasattr(r, "fields")]
    names = [name for name, _ in lines]
    assert names.index("bank.planned") < names.index("bank.complete") < names.index("job.complete")
    planned = dict(lines)["bank.planned"]
    windows = sum(len(one["origins"]) for one in json.loads((bank_of(scene) / INDEX).read_text())["releases"])
    assert (planned["windows"], planned["kept"], planned["encrypted"]) == (windows, 0, "no")
    hub = json.loads((scene.folder / "hub" / "state" / "status.json").read_text())["work"]
    assert hub["bank"].startswith(f"{windows} of {windows} windows, ")
    site = json.loads((scene.folder / "site-t2" / "state" / "status.json").read_text())["work"]
    assert site["released"] == windows // 2
    assert dict(lines)["job.released"]["patients"] == len(PATIENTS)
    assert "bank drop" in dict(lines)["job.released"]["hint"]
    trail = (scene.folder / "site-t2" / "state" / "audit.jsonl").read_text()
    assert '"job.released"' in trail


async def test_a_withdrawn_patient_is_released_no_more_and_trained_on_by_nobody(scene) -> None:
    """SP-11.17-7."""
    cast(scene, data={"window": [32, 32], "validation": 2, "max_withdrawn": 2, "min_patients": 2})
    copy = scene.folder / "images"
    shutil.copytree(scene.federation.data / "t2", copy)
    scene.client("t2", data={"images": str(copy), "salt": str(scene.federation.pki / "federation.salt")})
    patient = next(name for name in PATIENTS if scene.key(name) in scene.patients()[0])
    path = copy / f"{patient}.nii.gz"
    octets = path.read_bytes()
    path.write_bytes(octets[: len(octets) // 2])  # its header is fine
    ran = await scene.together()
    assert ran.error is None and ran.result.complete, ran
    assert [(one["site"], one["step"]) for one in ran.result.withdrawn] == [("site-t2", 1)]
    index = json.loads((bank_of(scene) / INDEX).read_text())
    theirs = [one for one in index["releases"] if one["patient"] == scene.key(patient).hex()]
    assert theirs
    kept = {str(p.relative_to(bank_of(scene))) for p in bank_of(scene).rglob("*.safetensors")}
    assert not kept & {f"{one['site']}/{one['number']:08d}.safetensors" for one in theirs}


async def test_other_terms_than_those_of_the_bank(scene) -> None:
    cast(scene)
    await collected(scene)
    scene.job(training={**FROZEN, "steps": 6}, evaluation={"batch": 16, "overlap": 0.5})
    ran = await scene.together(resume=True, only=["hub"])
    assert isinstance(ran.error, DataError | JobFailed | ConfigError), ran
    assert "was made on other terms ([evaluation] overlap?)" in str(ran.error)
