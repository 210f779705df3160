"""Several sites at one seat, and patients with gaps: the same grouping in one process, bit for bit."""

from __future__ import annotations

import asyncio
import json
import logging
import re

import nibabel as nib
import pytest

from splitpeer.coordinator.remote_site import RemoteSite, Unable
from splitpeer.errors import ConfigError, JobFailed
from splitpeer.site import client
from splitproto import Offer
from splitproto.errors import LinkLost
from splitproto.messages import Forward, Progress
from splitproto.session import Session

from .gaps import WHERE, Whole, cast, link, losses, names, who
from .scene import PATIENTS


@pytest.mark.parametrize("fusion", ["concat", "mean"])
async def test_two_hospitals_at_one_seat_and_patients_with_gaps(scene, fusion) -> None:
    """Weights of all parties, losses and Dice."""
    cast(scene, model={"fusion": fusion}, evaluation={"missing": True})
    ran = await scene.together(only=who())
    assert ran.result is not None and ran.result.complete, ran
    whole = Whole(scene).train()
    whole.assert_exact()
    assert ran.result.dice == whole.dice()
    assert ran.result.patients == 6 and ran.result.scored == 2
    assert ran.result.scored_complete == 1
    assert [line.get("without", []) for line in scene.metrics() if "loss" in line] == whole.without
    for path in (scene.output / "predictions").iterdir():
        key = scene.key(path.name.removesuffix(".nii.gz"))
        made_from = bytes(nib.load(path).header["descrip"]).rstrip(b"\0").decode()
        assert made_from == " ".join(["splitproto", *whole.seats_of(key)])
    assert set(ran.result.missing) == {"flair", "t1"}


async def test_a_site_is_asked_for_its_own_patients_only(scene, monkeypatch) -> None:
    seen: dict[str, set[bytes]] = {site: set() for site in WHERE}
    send = Session.send

    async def spying(self, message, *args, **options):  # type: ignore[no-untyped-def]
        if isinstance(message, Forward):
            seen[self.peer.site] |= {sample.key for sample in message.samples}
        await send(self, message, *args, **options)

    monkeypatch.setattr(Session, "send", spying)
    ran = await scene.together(only=who()) if cast(scene, training={"steps": 20}) else None
    assert ran is not None and ran.result.complete, ran
    every = [scene.key(name) for name in names(scene)]
    assert seen["stranger"] == {every[2], every[5]}, "the first by name fills"
    assert seen["site-t1"] == {every[0], every[1], every[4]}
    assert seen["site-flair"] == {every[0], every[1], every[3], every[4]}


async def test_complete_patients_first(scene) -> None:
    cast(scene, data={"complete_first": 6, "validation": 1})
    ran = await scene.together(only=who())
    assert ran.result.complete, ran
    whole = Whole(scene).train()
    whole.assert_exact()
    assert not any(whole.without[:6])


async def test_dropout_leaves_out_a_seat_at_all_its_sites(scene) -> None:
    cast(scene, training={"seat_dropout": 0.5, "steps": 16})
    ran = await scene.together(only=who())
    assert ran.result.complete, ran
    whole = Whole(scene).train()
    whole.assert_exact()
    assert ["t1"] in whole.without and ["flair"] in whole.without


async def test_without_min_seats_only_complete_patients_are_used(scene) -> None:
    cast(scene, data={"min_seats": 2, "validation": 1})
    ran = await scene.together(only=who())
    assert ran.result.complete and ran.result.patients == 3, ran
    Whole(scene).train().assert_exact()


async def test_too_few_patients_and_what_to_do(scene) -> None:
    where = {"site-flair": {"flair": (0, 1)}, "site-t1": {"t1": (2,)}, "stranger": {"t1": (3,)}}
    cast(scene, where, data={"min_seats": 2})
    ran = await scene.together(only=who())
    assert isinstance(ran.error, JobFailed)
    said = str(ran.error)
    assert said.startswith(
        "no patient has 2 of 2 seats, 2 are needed (patients with 1 of 2 seats: 4; labels 6, "
    )
    assert "write patient ids alike" in said and said.endswith("or lower [data] min_seats")


async def test_no_complete_patient_to_begin_with(scene) -> None:
    where = {"site-flair": {"flair": (0, 1)}, "site-t1": {"t1": (2,)}, "stranger": {"t1": (3,)}}
    cast(scene, where, data={"complete_first": 2, "validation": 1})
    ran = await scene.together(only=who())
    assert isinstance(ran.error, ConfigError) and "complete_first = 2" in str(ran.error)


async def test_the_table_of_who_has_whom(scene, caplog) -> None:
    """Counts only."""
    cast(scene, training={"steps": 1})
    with caplog.at_level(logging.INFO):
        ran = await scene.together(only=who())
    assert ran.result.complete, ran
    (line,) = [r.fields for r in caplog.records if r.getMessage() == "job.patients"]
    assert line["shared"] == 6 and line["complete"] == 3 and line["held_out"] == 2
    assert line["with_seats"] == "2 of 2: 3, 1 of 2: 3"
    assert line["fills"] == "site-flair flair 4, site-t1 t1 3, stranger t1 2"
    status = json.loads((scene.folder / "hub" / "state" / "status.json").read_text())
    assert status["work"]["patients"] == {
        "used": 6, "complete": 3, "held_out": 2, "held_out_complete": 1,
        "seats": ["flair", "t1"], "with_seats": {"2": 3, "1": 3},
        "fills": {"site-flair": {"flair": 4}, "site-t1": {"t1": 3}, "stranger": {"t1": 2}},
    }  # fmt: skip
    assert not re.search("|".join(PATIENTS), json.dumps(status))


def test_a_run_goes_on_with_the_same_seating(scene) -> None:
    """SP-11-39: who fills whom is in the record; the result is that of a run nobody stopped."""
    cast(scene, training={"steps": 30, "checkpoint_every": 10})
    hub, *clients = [scene.start(name) for name in who()]
    scene.until_step(12)
    scene.stop(hub, *clients)
    record = json.loads((scene.folder / "hub" / "state" / "try.run.json").read_text())
    whole = Whole(scene)
    assert record["patients"] == {
        key.hex(): {seat: whole.filler(key, seat) for seat in whole.seats_of(key)} for key in whole.keys
    }
    # One that could fill more now does not.
    link(scene, "site-t1", "t1", 2)
    hub, *clients = [scene.start(name) for name in who()]
    assert [daemon.code() for daemon in (hub, *clients)] == [0, 0, 0, 0], hub.said
    whole.train().assert_exact()


def test_a_site_that_lost_a_patient_of_its_own_is_told(scene) -> None:
    cast(scene, training={"steps": 400, "checkpoint_every": 5})
    hub, *clients = [scene.start(name) for name in who()]
    scene.until_step(6)
    scene.stop(hub, *clients)
    (scene.folder / "images" / "stranger" / "t1" / f"{names(scene)[5]}.nii.gz").unlink()
    hub, *clients = [scene.start(name) for name in who()]
    assert hub.code() != 0
    assert "1 of the run's 6 patients lack an image or a mask that they had: bring them back" in hub.said


async def test_a_run_without_one_of_two_sites_of_a_seat(scene, monkeypatch) -> None:
    """SP-11-42: a seat is missing where nobody is left who fills it."""
    cast(
        scene,
        training={"steps": 60, "checkpoint_every": 50},
        absence={"mode": "drop"},
        deadlines={"return_s": 1},
    )
    told: list[set[str]] = []
    send = Session.send

    async def spying(self, message, *args, **options):  # type: ignore[no-untyped-def]
        if isinstance(message, Progress) and message.missing is not None:
            told.append({one.seat for one in message.missing})
        await send(self, message, *args, **options)

    monkeypatch.setattr(Session, "send", spying)
    async with scene.running(only=who()) as on:
        while on.coordinator is None or on.coordinator.result.step < 5:
            assert not on.tasks["hub"].done(), on.tasks["hub"].exception()
            await asyncio.sleep(0.01)
        on.tasks["stranger"].cancel()
        result = await on.tasks["hub"]
    assert result.complete and result.absences.keys() == {"stranger"}
    assert told == [], "t1 is still there, of other patients"
    assert len(losses(scene)) == 60


SEVERAL = {
    "site-flair": {"flair": (0, 1, 3), "t2": (0, 2, 3, 4)},
    "site-t1": {"t1": (0, 1, 2, 4)},
    "stranger": {"t1": (1, 3, 5), "t2": (0, 1, 5)},
}
"""Two sites hold two modalities, and the second one's T1 of 1 and T2 of 0 are the first one's to fill."""


@pytest.mark.parametrize("fusion", ["concat", "mean"])
async def test_sites_of_several_seats_and_several_sites_of_a_seat(scene, fusion) -> None:
    """SP-11.8-5, SP-11-10."""
    cast(scene, SEVERAL, model={"fusion": fusion}, training={"steps": 16, "seat_dropout": 0.3})
    ran = await scene.together(only=who(SEVERAL))
    assert ran.result is not None and ran.result.complete, ran
    whole = Whole(scene, SEVERAL).train()
    whole.assert_exact()
    assert ran.result.dice == whole.dice()
    assert ran.result.sites == {"site-flair": "flair, t2", "site-t1": "t1", "stranger": "t1, t2"}


async def test_a_seat_of_two_channels(scene) -> None:
    where = {"site-flair": {"flair": (0, 1, 3, 4, 5), "t2": (0, 1, 2, 3, 4)}, "site-t1": {"t1": (0, 1, 2, 4)}}
    cast(scene, where, seats={"mri": ["t2", "flair"]})
    ran = await scene.together(only=who(where))
    assert ran.result is not None and ran.result.complete, ran
    assert ran.result.seats == ["mri", "t1"] and ran.result.patients == 5
    assert ran.result.sites == {"site-flair": "mri", "site-t1": "t1"}


async def test_an_evaluation_goes_on_without_a_site_whose_new_link_cannot(scene, monkeypatch) -> None:
    """SP-10-8: the feature may be gone on the next link, in the middle of an evaluation."""
    cast(scene, training={"steps": 2})
    made: list[Offer] = []
    real, unable = RemoteSite.compute_on, []

    def offer(**given):  # type: ignore[no-untyped-def]
        made.append(Offer(**given))
        return made[-1]

    async def losing(self, link, parts, index, until):  # type: ignore[no-untyped-def]
        evaluates = self.name == "site-t1" and parts[index].forward.mode == "evaluate"
        if evaluates and "evaluate" in made[1].features:
            object.__setattr__(made[1], "features", ("train", "dtype.f32"))
            link.session.fail(LinkLost("cut by the test"))
        answer = await real(self, link, parts, index, until)
        if isinstance(answer, Unable):
            unable.append(self.name)
        return answer

    monkeypatch.setattr(client, "Offer", offer)
    monkeypatch.setattr(RemoteSite, "compute_on", losing)
    ran = await scene.together(only=who())
    assert ran.error is None and ran.result.complete, ran
    assert unable == ["site-t1"]
    assert ran.result.made_from == ["flair", "t1"] and ran.result.scored == 2
    made_from = {
        path.name: bytes(nib.load(path).header["descrip"]).rstrip(b"\0").decode()
        for path in (scene.output / "predictions").iterdir()
    }
    complete, other = (f"{name}.nii.gz" for name in names(scene)[4:])
    assert made_from == {complete: "splitproto flair", other: "splitproto t1"}
    assert ran.result.scored_complete == 0
