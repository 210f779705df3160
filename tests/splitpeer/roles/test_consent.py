"""SP-11.13-2: a patient withdraws consent in the middle of a run, which continues, exactly, without the patient."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splitpeer.coordinator.withdrawals import Withdrawals
from splitpeer.daemon import happenings as h
from splitpeer.data import consent
from splitpeer.data.sampling import batch_digest
from splitpeer.errors import DataError, PatientUnusable
from splitpeer.federation.terms import job_on_wire, seat_descriptors
from splitpeer.logs import handle
from splitpeer.settings.job import JobData
from splitpeer.settings.peer import PeerData
from splitpeer.site.job import SiteJob
from splitpeer.site.leaving import Leaving
from splitpeer.site.named import Named
from splitpeer.site.opening import open_job
from splitproto.messages import Activations, Forward, JobOffer, Withdraw
from splitproto.records import Sample, Seat, Unusable
from splitproto.tensors import schema_digest

from .scene import PATIENTS
from .test_withdrawal import STEPS, AtStep, Stage


@pytest.fixture
def stage(scene) -> Stage:
    scene.cast("flair", "t1", training=STEPS)
    scene.client("t1", data={"withdrawn": str(scene.folder / "withdrawn.txt"), "cache_mib": 0})
    return Stage(scene)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of images that are read, in order."""
    from splitpeer.data import volumes

    seen: list[str] = []
    for name in ("read_header", "read_voxels"):
        real = getattr(volumes, name)

        def noted(case, *rest, _real=real):
            seen.append(case.path.parent.name + "/" + case.path.name)
            return _real(case, *rest)

        monkeypatch.setattr(volumes, name, noted)
    return seen


def listed(scene) -> Path:
    return scene.folder / "withdrawn.txt"


async def test_in_the_middle_of_a_run(scene, stage, opened) -> None:
    """The list appears; the patient is out from the next batch on that has it, and its files are not read again."""
    patient = stage.training[0]
    key = scene.key(patient)
    so_far: list[int] = []

    def withdraw() -> None:
        listed(scene).write_text(f"# by letter\n{patient}\n")
        so_far.append(len(opened))

    ran = await scene.together(view=AtStep(3, withdraw))
    assert ran.result is not None, ran
    assert all(error is None for error in ran.clients.values()), ran.clients
    assert [(w["patient"], w["site"], w["cause"]) for w in ran.result.withdrawn] == [
        (handle(key), "site-t1", "consent")
    ]
    assert stage.withdrawn()[key] > 3
    # One file may have been in the hands of the thread that reads ahead.
    assert f"t1/{patient}.nii.gz" not in opened[so_far[0] + 1 :]
    stage.assert_exact()


async def test_before_a_run_the_patient_is_not_even_listed(scene, stage, opened) -> None:
    patient = stage.training[0]
    listed(scene).write_text(patient)
    ran = await scene.together()
    assert ran.result is not None, ran
    assert (ran.result.patients, ran.result.withdrawn) == (5, [])
    assert f"t1/{patient}.nii.gz" not in opened
    trail = (scene.folder / "hub" / "state").glob("audit*.jsonl")
    assert not any(scene.key(patient).hex() in path.read_text() for path in trail)


async def test_a_run_that_goes_on_is_told(scene, stage) -> None:
    """The coordinator knows the patient: the site that comes back lists it as withdrawn."""
    patient = stage.training[0]
    async with scene.running() as on:
        while not any(line["step"] >= 5 for line in scene.metrics()):
            assert not on.tasks["hub"].done(), on.tasks["hub"]
            await asyncio.sleep(0.01)
        for stop in on.stops.values():
            stop.set()
        await asyncio.wait(on.tasks.values())
    listed(scene).write_text(patient)
    ran = await scene.together(resume=True)
    assert ran.result is not None, ran
    assert set(stage.withdrawn()) == {scene.key(patient)}
    assert [w["cause"] for w in ran.result.withdrawn] == ["consent"]
    stage.assert_exact()


async def test_a_list_that_cannot_be_read_lets_nothing_out(scene, stage, monkeypatch) -> None:
    """Nobody knows who has withdrawn: the site says so in one line and stops; the others hear no name of a file."""
    monkeypatch.setattr(consent, "PAUSE_S", 0.0)
    ran = await scene.together(view=AtStep(3, lambda: listed(scene).write_bytes(b"\xff")))
    error = ran.clients["site-t1"]
    assert isinstance(error, DataError)
    assert "the list of withdrawn patients is not UTF-8, so nothing is sent" in str(error)
    assert ran.result is None
    assert "withdrawn.txt" not in str(ran.error)
    last = max(line["step"] for line in scene.metrics() if "loss" in line)
    assert last < scene.settings.training.steps


def take_up(scene, run: bytes = bytes(16)) -> SiteJob:
    """What site t1 does with an offer of its job."""
    job, seats = job_on_wire(scene.settings), (Seat("t1", ("t1",)),)
    offer = JobOffer(run, seats, job, schema_digest(seat_descriptors(job, seats)))
    return open_job(offer, scene.config("site-t1"), h.Reporter())


def test_what_was_computed_is_not_sent_a_second_time(scene, stage, opened) -> None:
    """SP-11-16 does not hold for a patient who has withdrawn in between."""
    site = take_up(scene)
    site.inventory()
    samples = tuple(Sample(scene.key(patient), (0, 0, 3)) for patient in stage.training[:2])
    asked = Forward("train", 1, 0, samples, batch_digest(1, samples, None))
    for answer in (Activations, Withdraw):
        site.forget_batches()
        site.announce(asked)
        sent = site.forward(site.due())
        assert isinstance(sent, answer)
        listed(scene).write_text(stage.training[1])
    assert sent.patients == (Unusable(samples[1].key, "consent"),)
    # Nor is the file read ahead, once the next one has withdrawn as well.
    with listed(scene).open("a") as file:
        file.write(f"\n{stage.training[0]}\n")
    opened.clear()
    with pytest.raises(PatientUnusable, match="withdrawn consent") as caught:
        site._read(asked)
    assert (caught.value.key, opened) == (samples[0].key, [])
    patients, unusable = site.inventory()
    assert Unusable(samples[1].key, "consent") in unusable
    assert samples[1].key not in {patient.key for patient in patients}
    site.close()


def test_many_at_once_wait_for_the_operator(scene, stage) -> None:
    """A list that was exported wrongly would erase a feature bank, which cannot be collected again."""
    site = take_up(scene)
    site.inventory()
    samples = (Sample(scene.key(PATIENTS[0]), (0, 0, 3)),)
    asked = Forward("train", 1, 0, samples, batch_digest(1, samples, None))
    site.announce(asked)
    listed(scene).write_text("\n".join([*PATIENTS[1:5], "somebody-else"]))
    for held in (site.inventory, lambda: site.forward(site.due()), lambda: site._read(asked)):
        with pytest.raises(
            DataError, match=r"withdraws 4 of the run's 6 persons at once, more than 3 .*raise the limit"
        ) as error:
            held()
        assert "\n" not in str(error.value)
    site.close()


def test_a_few_at_once_are_told_and_do_not_count_again(tmp_path: Path) -> None:
    keys = [bytes([number]) * 16 for number in range(6)]

    def opened(**data: Any) -> Leaving:
        return Leaving(tmp_path, Named(tmp_path), PeerData(withdrawn=tmp_path / "list.txt", **data))

    Named(tmp_path).add((key, key) for key in keys)
    opened().check(keys[:3])
    with pytest.raises(DataError, match="withdraws 2 of the run's 6 persons at once, more than 1 "):
        opened(max_withdrawn_at_once=1).check(keys[:5])
    opened(max_withdrawn_at_once=1).check(keys[:4])
    opened(max_withdrawn_at_once=2).check(keys)
    stranger = [bytes([number]) * 16 for number in range(100, 200)]
    opened(max_withdrawn_at_once=1).check(stranger)
    assert PeerData(max_withdrawn_at_once=0.2).most_leaving(100) == 20


def test_a_person_of_many_time_points_is_one(tmp_path: Path) -> None:
    """One line of the list withdraws all of them."""
    keys = [bytes([number]) * 16 for number in range(8)]
    Named(tmp_path).add((key, keys[max(0, number - 4)]) for number, key in enumerate(keys))
    Leaving(tmp_path, Named(tmp_path), PeerData(withdrawn=tmp_path / "list.txt")).check(keys[:5])


def test_patients_whom_other_runs_have_shown_do_not_count() -> None:
    """SP-11.13-10."""
    keys = [bytes([number]) * 16 for number in range(20)]
    record = SimpleNamespace(withdrawn=(), patients=dict.fromkeys(keys))
    settings = JobData(window=(32, 32), max_withdrawn=2)
    withdrawals = Withdrawals(record, settings)
    assert withdrawals.beyond("site-t1", [Unusable(key, "shown") for key in keys]) == ""
    mixed = [Unusable(key, "shown" if key[0] else "consent") for key in keys]
    assert withdrawals.beyond("site-t1", mixed) == ""
    said = withdrawals.beyond("site-t1", [Unusable(key, "consent") for key in keys[:3]])
    assert "may withdraw 2" in said and "\n" not in said


def test_a_new_run_misses_a_list_that_was_there(scene, stage) -> None:
    """Neither another run nor another process takes its absence to mean that nobody has withdrawn."""
    patient = stage.training[0]
    listed(scene).write_text(patient)
    site = take_up(scene)
    assert scene.key(patient) not in {one.key for one in site.inventory()[0]}
    site.close()
    listed(scene).unlink()
    with pytest.raises(DataError, match="is gone, so nothing is sent"):
        take_up(scene, bytes([1] * 16))


def test_a_restart_does_not_tell_of_a_patient_who_was_never_named(scene, stage) -> None:
    listed(scene).write_text(stage.training[0])
    for _ in range(2):
        site = take_up(scene)
        patients, unusable = site.inventory()
        assert (scene.key(stage.training[0]) in {patient.key for patient in patients}, unusable) == (
            False,
            [],
        )
        site.close()


def test_a_patient_of_the_run_whose_files_were_deleted_is_withdrawn(scene, stage) -> None:
    folder = stage.own("t1")
    scene.client("t1", data={"withdrawn": str(listed(scene)), "images": str(folder), "cache_mib": 0})
    site = take_up(scene)
    site.inventory()
    site.close()
    listed(scene).write_text(stage.training[0])
    (folder / f"{stage.training[0]}.nii.gz").unlink()
    site = take_up(scene)
    _, unusable = site.inventory()
    assert unusable == [Unusable(scene.key(stage.training[0]), "consent")]
    site.close()


def test_the_status_of_a_daemon_names_no_patient(scene, stage) -> None:
    """Real processes; the list is there from the start with an id that nobody has."""
    listed(scene).write_text("NOBODY\n")
    hub, clients = scene.start_all()
    assert hub.code() == 0, hub.said
    assert [client.code() for client in clients.values()] == [0, 0]
    assert "1 of its ids belong to no patient here: compare the spelling" in clients["t1"].said
    status = json.loads((scene.folder / "site-t1" / "state" / "status.json").read_text())
    assert "NOBODY" not in json.dumps(status)
