"""Inference among real processes: `splitpeer serve`, a spool, and a coordinator that is killed."""

from __future__ import annotations

import json
import signal
import time

import nibabel as nib

from splitpeer.daemon.spooled import SpoolResult

from .served import DATA, LISTED, LONG_S, SLOW, assert_mask, held_out, request, spool


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
