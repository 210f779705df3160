"""Runs that are complete and serve segmentations, made once for many tests: each takes one up in a copy of its folders.

A test writes the peers' files again (`cast`), since ports and folders are its own; what no run depends on may differ.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from splitpeer.daemon.spool import Spool, folder_of
from splitpeer.daemon.spooled import SpoolRequest, SpoolResult, Status, now
from splitpeer.storage.request_banks import RequestBanks

from .scene import SHAPE, Running, Scene, write_patient

# One window a slice.
DATA = {"window": [48, 48], "validation": 1}
# Slow, so that masks hold some voxels with any kernels: at .05 three steps of Adam may leave none.
SLOW = {"steps": 3, "batch": 1, "checkpoint_every": 3, "learning_rate": 1e-5}
LONG_S = 60.0
LISTED = {"inference": "listed", "inference_for": ["site-t1ce", "site-t2"]}


# --- runs ------------------------------------------------------------------------------------------------


def finish(scene: Scene) -> Scene:
    """Run the job of a scene until it serves, and stop all."""

    async def served() -> None:
        async with scene.running() as on:
            record = scene.folder / "hub" / "state" / "try.run.json"
            await until(lambda: record.exists() and json.loads(record.read_text())["state"] == "serving")
            await stop(on, *on.tasks)

    asyncio.run(served())
    return scene


def take_up(made: Scene, scene: Scene) -> None:
    """What the peers of `made` have on disk is that of the peers of `scene`."""
    shutil.copytree(made.folder, scene.folder, symlinks=True, dirs_exist_ok=True)


def serving(scene: Scene, **options: Any) -> AbstractAsyncContextManager[Running]:
    """All peers go on where they stopped."""
    return scene.running(resume=None, **options)


async def stop(on: Running, *names: str) -> None:
    """In order, the coordinator first."""
    for name in names:
        on.stops[name].set()
        await asyncio.wait({on.tasks[name]}, timeout=LONG_S)
        on.tasks[name].result()


def cast_with_folders(scene: Scene, policy: Mapping[str, Mapping[str, Any]], **job: Any) -> Scene:
    """Sites whose images are links in folders of their own, so that patients can come.

    Args:
        policy: by modality.
    """
    scene.cast(*policy, **{"data": DATA, "inference": {}, **job})
    for modality, own in policy.items():
        images = images_of(scene, modality)
        images.mkdir(parents=True, exist_ok=True)
        for path in (scene.federation.data / modality).iterdir():
            if not (images / path.name).exists():
                (images / path.name).symlink_to(path)
        scene.client(
            modality,
            data={"images": str(images), "withdrawn": str(withdrawn_at(scene, modality)), "cache_mib": 0},
            policy={"coordinators": ["hub"], **own},
            **({"runtime": {"initial_weights": "private"}} if own.get("preset") == "private" else {}),
        )
    return scene


def cast_joint(scene: Scene, policy: Mapping[str, Mapping[str, Any]] = {}, **job: Any) -> Scene:
    """Two sites that compute for each other, unless `policy` says otherwise."""
    usual = {"training": SLOW, "evaluation": {"batch": 16}}
    return cast_with_folders(scene, {"t1ce": LISTED, "t2": LISTED, **policy}, **{**usual, **job})


def cast_frozen(scene: Scene, **job: Any) -> Scene:
    """The same with frozen encoders."""
    training = {"encoders": "frozen", **SLOW}
    return cast_joint(scene, training=training, evaluation={"overlap": 0.25, "batch": 16}, **job)


def comes(
    scene: Scene,
    patient: str,
    number: int,
    shape: tuple[int, int, int] = SHAPE,
    modalities: Sequence[str] | None = None,
) -> None:
    """A patient's images are there from now on, at the sites with folders of their own."""
    write_patient(scene.folder / f"new-{patient}", patient, number, shape)
    for modality in scene.modalities if modalities is None else modalities:
        file = scene.folder / f"new-{patient}" / modality / f"{patient}.nii.gz"
        file.rename(images_of(scene, modality) / file.name)


def images_of(scene: Scene, modality: str) -> Path:
    return scene.folder / "images" / modality


def request_banks(scene: Scene) -> RequestBanks:
    """What the coordinator keeps of patients who are not of the run."""
    (run,) = (scene.folder / "hub" / "state").glob("try-*")
    return RequestBanks(run)


def nobody_asks(scene: Scene, patient: str) -> None:
    """Any more, for a week and a day."""
    folder = request_banks(scene).folder / scene.key(patient).hex()
    then = folder.stat().st_mtime - 8 * 86_400
    os.utime(folder, (then, then))


def withdrawn_at(scene: Scene, modality: str) -> Path:
    """The list of a site's patients who have withdrawn consent."""
    return scene.folder / f"withdrawn-{modality}.txt"


# --- requests --------------------------------------------------------------------------------------------


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while not holds():  # noqa: ASYNC110 (files have no events)
            await asyncio.sleep(0.02)


def spool(scene: Scene, modality: str) -> Spool:
    return Spool(folder_of(scene.folder / f"site-{modality}" / "state"))


def request(patient: str, **more: Any) -> SpoolRequest:
    return SpoolRequest(patient=patient, created=now(), asker="somebody", **more)


async def asked(scene: Scene, modality: str, patient: str, **more: Any) -> str:
    """Ask, as soon as the site's daemon takes requests."""
    here = spool(scene, modality)
    await until(here.folder.exists)
    return here.ask(request(patient, **more))


async def ended(scene: Scene, modality: str, name: str) -> Status:
    here = spool(scene, modality)
    await until(lambda: here.status(name).final)
    return here.status(name)


async def refused(scene: Scene, modality: str, patient: str, **more: Any) -> Status:
    """How a request ends that comes to nothing."""
    status = await ended(scene, modality, await asked(scene, modality, patient, **more))
    assert status.state == "failed", status
    return status


async def segmented(scene: Scene, modality: str, patient: str, **more: Any) -> SpoolResult:
    name = await asked(scene, modality, patient, **more)
    status = await ended(scene, modality, name)
    assert status.state == "done", status
    return spool(scene, modality).result(name)


def held_out(scene: Scene) -> list[str]:
    masks = scene.masks()
    return [masks.case(key).patient for key in scene.patients()[1]]


def assert_mask(result: SpoolResult, image: nib.Nifti1Image) -> None:
    """It is that of the run; and not an empty one, which would be equal to any other."""
    assert result.regions.any()
    assert (result.task.labels(result.regions) == np.asarray(image.dataobj)).all()
