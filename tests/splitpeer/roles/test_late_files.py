"""Files that come after a site took up a run: what inference may learn of them, and what training may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from splitpeer.daemon import happenings as h
from splitpeer.data.sampling import batch_digest
from splitpeer.errors import DataError
from splitpeer.federation.terms import job_on_wire, seat_descriptors
from splitpeer.site import job as job_module
from splitpeer.site.job import SiteJob
from splitpeer.site.opening import open_job
from splitproto.errors import PolicyRefused
from splitproto.messages import Activations, Forward, JobOffer, Locate, Located
from splitproto.records import Sample, Seat
from splitproto.tensors import schema_digest

from .scene import PATIENTS, Scene

LATE, REQUEST = PATIENTS[0], b"r" * 16


@pytest.fixture
def folder(scene: Scene, tmp_path: Path) -> Path:
    """The site's own folder of images, without one of the patients."""
    made = tmp_path / "mine"
    made.mkdir()
    for path in (scene.federation.data / "t1").iterdir():
        if not path.name.startswith(LATE):
            (made / path.name).symlink_to(path)
    return made


@pytest.fixture
def site(scene: Scene, folder: Path) -> Any:
    scene.cast("t1")
    scene.client(
        "t1",
        data={"images": str(folder), "withdrawn": str(scene.folder / "withdrawn.txt"), "cache_mib": 0},
        policy={"coordinators": ["hub"], "inference": "listed", "inference_for": ["site-a"]},
    )
    job, seats = job_on_wire(scene.settings), (Seat("t1", ("t1",)),)
    offer = JobOffer(bytes(16), seats, job, schema_digest(seat_descriptors(job, seats)))
    opened = open_job(offer, scene.config("site-t1"), h.Reporter())
    opened.inventory()
    yield opened
    opened.close()


def come(scene: Scene, folder: Path, name: str = LATE) -> None:
    source = scene.federation.data / "t1" / f"{LATE}.nii.gz"
    (folder / f"{name}.nii.gz").symlink_to(source)


def locate(site: SiteJob, key: bytes) -> Located:
    return site.locate(Locate(REQUEST, key, "site-a"), lambda *_: False)


def asked(mode: str, key: bytes) -> Forward:
    step, samples = int(mode == "train"), (Sample(key, (0, 0, 3)),)
    return Forward(mode, step, 0, samples, batch_digest(step, samples, None))


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_who_withdrew_before_being_told_of_is_absent(
    scene: Scene, folder: Path, site: SiteJob, first: bool
) -> None:
    """SP-11.13-2: neither that the patient was here, nor that consent was withdrawn, before or after a look found the
    file."""
    key, withdrawn = scene.key(LATE), scene.folder / "withdrawn.txt"
    come(scene, folder)
    if not first:
        assert site.holds(key)
    withdrawn.write_text(LATE)
    assert locate(site, key).cause == "absent"
    assert site.holds(key) is not first
    # The coordinator knows of this one.
    withdrawn.write_text(f"{LATE}\n{PATIENTS[1]}")
    assert locate(site, scene.key(PATIENTS[1])).cause == "consent"


def test_who_withdrew_while_a_file_was_bad_is_not_listed_again(scene: Scene, site: SiteJob) -> None:
    """The list grew between the check and the reading of a batch."""
    key = scene.key(PATIENTS[1])
    (scene.folder / "withdrawn.txt").write_text(PATIENTS[1])
    site._bad_for_now.add(key)
    site.unusable[key] = "consent"
    assert locate(site, key).cause == "consent"
    assert site.unusable[key] == "consent"


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_who_was_not_listed_is_asked_for_in_inference_alone(
    scene: Scene, folder: Path, site: SiteJob, mode: str
) -> None:
    key = scene.key(LATE)
    come(scene, folder)
    assert locate(site, key).patient is not None
    with pytest.raises(PolicyRefused, match="was not listed"):
        site.announce(asked(mode, key))
    site.announce(asked("infer", key))
    assert isinstance(site.forward(site.due()), Activations)
    # The next link's inventory has the patient.
    site.forget_batches()
    assert key in {patient.key for patient in site.inventory()[0]}
    site.announce(asked(mode, key))


def test_a_look_that_fails_changes_nothing(
    scene: Scene, folder: Path, site: SiteJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.15-8: files that are unclear do not end the site; those that are known still serve."""
    come(scene, folder)

    def unclear(*_: object) -> None:
        raise DataError("two files of one patient")

    with monkeypatch.context() as broken:
        broken.setattr(job_module, "keyed", unclear, raising=False)
        broken.setattr(site.channels, "learn", unclear)
        assert locate(site, scene.key(LATE)).cause == "absent"
        assert locate(site, scene.key(PATIENTS[1])).patient is not None
    assert locate(site, scene.key(LATE)).patient is not None
