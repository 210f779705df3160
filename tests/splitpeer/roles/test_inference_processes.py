"""Inference among real processes: `splitpeer serve`, a spool, and a coordinator that is killed."""

from __future__ import annotations

import json
import signal
import time

import nibabel as nib

from splitpeer.daemon.spooled import SpoolResult
from splitpeer.site.answers import ANSWERS
from splitpeer.site.secret import SERVICE_KEY

from .scene import SHAPE
from .served import DATA, LISTED, LONG_S, SLOW, assert_mask, held_out, request, spool
from .test_private_inference import cast_sum


def wait(scene, modality: str, name: str) -> SpoolResult:
    here, ends = spool(scene, modality), time.monotonic() + LONG_S
    while not (status := here.status(name)).final:
        assert time.monotonic() < ends, (status, [one.last for one in scene.started])
        time.sleep(0.02)
    assert status.state == "done", status
    return here.result(name)


def test_a_service_that_is_killed_goes_on_with_the_requests_that_wait(scene) -> None:
    """SP-11.19-2, SP-11.19-15: all stop with exit code 0, and no log names the patient."""
    scene.cast(
        "t1ce", "t2", training=SLOW, data=DATA, inference={"serve": "always"}, evaluation={"batch": 16}
    )
    for modality in ("t1ce", "t2"):
        scene.client(modality, policy={"coordinators": ["hub"], **LISTED}, network={"reconnect_s": 60})
    hub, sites = scene.start_all()
    hub.until(r"inference\.ready")
    patient = held_out(scene)[0]
    first = wait(scene, "t1ce", spool(scene, "t1ce").ask(request(patient)))
    image = nib.load(scene.output / "predictions" / f"{patient}.nii.gz")
    assert_mask(first, image)
    assert json.loads((scene.folder / "hub" / "state" / "try.run.json").read_text())["state"] == "serving"
    hub.signal(signal.SIGKILL)
    hub.code()
    name = spool(scene, "t2").ask(request(patient))
    again = scene.start("hub")
    assert (wait(scene, "t2", name).values == first.values).all()
    scene.stop(again, *sites.values())
    for site in sites.values():
        assert "inference.located" in site.said
        assert patient not in site.said
        assert "Traceback" not in site.said


def test_a_site_that_is_killed_within_an_epoch_goes_on_in_it(scene) -> None:
    """SP-11.18-17, SP-11.18-18: what it masks with is on its disk before it is used, and no earlier key is."""
    cast_sum(
        scene, ("t1ce", "t2"), {"min_partners": 1}, training=SLOW, evaluation={"overlap": 0.25, "batch": 1}
    )
    hub, sites = scene.start_all()
    hub.until(r"inference\.ready")
    patient = held_out(scene)[0]
    first = wait(scene, "t1ce", spool(scene, "t1ce").ask(request(patient)))
    (folder,) = (scene.folder / "site-t2" / "state").glob("try-*")
    ends = time.monotonic() + LONG_S
    while (before := json.loads((folder / SERVICE_KEY).read_text()))["epoch"] < 2:
        assert time.monotonic() < ends, before
        time.sleep(0.01)
    answers = folder / ANSWERS
    told = len(answers.read_text().splitlines())
    name = spool(scene, "t1ce").ask(request(patient))
    while len(answers.read_text().splitlines()) == told:
        assert time.monotonic() < ends, hub.last
        time.sleep(0.002)
    sites["t2"].signal(signal.SIGKILL)
    sites["t2"].code()
    assert not spool(scene, "t1ce").status(name).final
    assert len(answers.read_text().splitlines()) < told + SHAPE[2]
    assert json.loads((folder / SERVICE_KEY).read_text()) == before
    sites["t2"] = scene.start("site-t2")
    assert (wait(scene, "t1ce", name).values == first.values).all()
    while (after := json.loads((folder / SERVICE_KEY).read_text()))["epoch"] < 3:
        assert time.monotonic() < ends, after
        time.sleep(0.01)
    held = b"".join(path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file())
    assert before["shared"]["site-t1ce"].encode() not in held
    scene.stop(hub, *sites.values())
