"""A missing seat is a state: pause, skip, drop; joining again; dropout, so that the network can do without one."""

from __future__ import annotations

import asyncio
import json
import signal

import nibabel as nib
import pytest
import torch

from splitpeer.data.loader import SiteData
from splitpeer.data.sampling import TrainingSchedule
from splitpeer.federation.seats import seats_of
from splitpeer.storage import checkpoint
from splitpeer.training.dropout import left_out
from splitpeer.training.loss import region_loss
from splitpeer.training.optimiser import make_optimiser, make_schedule

THREE = ("flair", "t1", "t2")
STEPS = 40


async def until(true, on) -> None:
    """Wait for `true()` while nobody has ended."""
    async with asyncio.timeout(60):
        while not true():
            assert not any(task.done() for task in on.tasks.values())
            await asyncio.sleep(0.002)


def the_whole_without(scene) -> tuple[list[float], torch.nn.Module]:
    """The whole network in this process, each step without the seats that the run's metrics name."""
    torch.set_num_threads(1)
    job, network, masks = scene.settings, scene.network(), scene.masks()
    seats = seats_of(job).names
    parts = {**{m: network.encoders[m] for m in seats}, "decoder": network.decoder}
    training, window = job.training, (*job.data.window, 1)[:3]
    optimisers = {
        name: make_optimiser(part.parameters(), training.optimiser, training.learning_rate)
        for name, part in parts.items()
    }
    schedules = {name: make_schedule(o, training.schedule, training.steps) for name, o in optimisers.items()}
    batches = TrainingSchedule(
        scene.patients()[0], masks, window=window, batch=training.batch, steps=training.steps,
        seed=job.job.seed, positive_fraction=job.data.positive_fraction,
    )  # fmt: skip
    images = {m: SiteData(scene.images(m)) for m in seats}
    without = {line["step"]: line.get("without", []) for line in scene.metrics() if "loss" in line}
    losses = []
    for step in range(1, training.steps + 1):
        samples, seed = batches.batch(step - 1)
        here = [m for m in seats if m not in without[step]]
        x = {m: torch.from_numpy(images[m].batch(samples, window, seed, m)) for m in here}
        target = torch.from_numpy(SiteData(masks).batch(samples, window, seed, None))
        for optimiser in optimisers.values():
            optimiser.zero_grad()
        activations = {m: network.encoders[m](x[m]) for m in here}
        loss = region_loss(network.decoder(activations, without[step]), target)
        loss.backward()
        for name, schedule in schedules.items():
            if name in ("decoder", *here):
                optimisers[name].step()
            schedule.step()
        losses.append(loss.item())
    return losses, network


def assert_exact_without(scene) -> None:
    losses, network = the_whole_without(scene)
    assert scene.losses() == losses
    split, whole = scene.weights(scene.settings.training.steps), network.state_dict()
    assert [name for name in whole if not torch.equal(whole[name], split[name])] == []


async def test_seat_dropout_is_the_whole_networks_dropout(scene) -> None:
    """SP-11-37: who is left out of a step advances over it, and learns nothing from it."""
    scene.cast(*THREE, training={"steps": 14, "seat_dropout": 0.4, "checkpoint_every": 4})
    ran = await scene.together()
    assert ran.result.complete, ran
    assert set(ran.clients.values()) == {None}
    without = [line.get("without", []) for line in scene.metrics() if "loss" in line]
    assert without == [sorted(left_out(scene.settings.job.seed, step, THREE, 0.4)) for step in range(1, 15)]
    assert len({tuple(names) for names in without}) > 3
    assert_exact_without(scene)


def test_what_is_left_out_follows_from_the_seed_and_is_never_all() -> None:
    """SP-11-37."""
    drawn = [left_out(3, step, THREE, 0.5) for step in range(1, 2001)]
    assert drawn == [left_out(3, step, THREE, 0.5) for step in range(1, 2001)]
    assert drawn != [left_out(4, step, THREE, 0.5) for step in range(1, 2001)]
    assert max(map(len, drawn)) == 2
    # Of eight equally likely draws one leaves all out, and then one is taken back: (3 * .5 - 1/8) / 3 each.
    for modality in THREE:
        assert sum(modality in out for out in drawn) / 2000 == pytest.approx((1.5 - 0.125) / 3, abs=0.04)
    assert left_out(3, 1, THREE, 0.0) == frozenset()


@pytest.mark.parametrize("mode", ["drop", "skip"])
def test_a_run_goes_on_without_a_site_and_takes_it_back(scene, mode: str) -> None:
    """SP-11-35, SP-11-36."""
    scene.cast(
        *THREE,
        training={"steps": 400, "checkpoint_every": 20},
        deadlines={"join_s": 60, "step_s": 60, "return_s": 30},
        absence={"mode": mode},
        **{"absence.per_site_s": {"site-t1": 0.3}},
    )
    hub, clients = scene.start_all()
    scene.until_step(25)
    clients["t1"].signal(signal.SIGKILL)
    hub.until(r"site\.absent .*site-t1")
    gone = len(scene.losses())
    scene.until_step(gone + 2)
    again = scene.start("site-t1")
    hub.until(r"site\.present .*site-t1")
    assert hub.code() == 0, hub.said
    assert [again.code(), clients["flair"].code(), clients["t2"].code()] == [0, 0, 0]
    steps = [line for line in scene.metrics() if "loss" in line]
    without = [line["step"] for line in steps if line.get("without")]
    # One stretch, and all at the end are complete.
    assert without == list(range(without[0], without[-1] + 1))
    # It was killed after step 25, and the step after its absence was noted was made without it.
    assert 25 < without[0] <= gone + 1
    assert without[-1] < 400
    assert {tuple(line["without"]) for line in steps if line.get("without")} == {("t1",)}
    result = json.loads((scene.output / "result.json").read_text())
    assert result["absences"] == {"site-t1": len(without)}
    assert result["made_from"] == ["flair", "t1", "t2"]
    # It went back to its own newest checkpoint; nobody else went back.
    assert not any(line.get("rollback") for line in scene.metrics())
    (run,) = [path for path in (scene.folder / "site-t1" / "state").iterdir() if [*path.glob("step-*")]]
    assert checkpoint.load(run, 400)[1]["step"] == 400


async def test_a_site_that_only_lost_its_link_keeps_what_it_has_learned(scene) -> None:
    """SP-11-31, SP-11-36: dropped and back, with its memory: a network that missed these steps has these weights."""
    scene.cast(
        *THREE,
        training={"steps": STEPS, "checkpoint_every": 100},
        absence={"mode": "drop"},
        **{"absence.per_site_s": {"site-t1": 0.05}},
    )
    async with scene.running() as on:
        await until(lambda: len(scene.losses()) >= 8, on)
        site = next(site for site in on.coordinator.sites if site.seat_names == "t1")
        site.leave_out("the test wants to go on without it")
        await asyncio.wait(on.tasks.values(), timeout=90)
        assert [task.exception() for task in on.tasks.values()] == [None] * 4
    without = [line["step"] for line in scene.metrics() if line.get("without")]
    assert without
    assert without[-1] < STEPS
    assert_exact_without(scene)


def test_with_pause_the_job_fails_and_names_the_site(scene) -> None:
    """SP-11-35."""
    scene.cast(
        "flair",
        "t1",
        training={"steps": 400},
        absence={"mode": "pause"},
        **{"absence.per_site_s": {"site-t1": 1}},
        deadlines={"return_s": 60},
    )
    hub, clients = scene.start_all()
    scene.until_step(5)
    clients["t1"].signal(signal.SIGKILL)
    assert hub.code() == 3, hub.said
    assert "site site-t1 (t1) did not come back within 1 s; waiting for: " in hub.last


def test_too_few_sites_end_the_job(scene) -> None:
    """SP-11-35."""
    scene.cast(
        *THREE,
        training={"steps": 2000},
        absence={"mode": "drop", "least_sites": 2},
        deadlines={"return_s": 0.3},
    )
    hub, clients = scene.start_all()
    scene.until_step(5)
    clients["t1"].signal(signal.SIGKILL)
    hub.until(r"site\.absent .*site-t1")
    scene.until_step(len(scene.losses()) + 2)
    clients["t2"].signal(signal.SIGKILL)
    assert hub.code() == 3, hub.said
    assert "1 sites are left, least_sites is 2" in hub.last
    assert "site-t1 (t1): site site-t1 (t1) did not come back within 0.3 s" in hub.last


async def test_scores_say_what_they_were_made_from(scene) -> None:
    """SP-11-38."""
    scene.cast(*THREE, training={"steps": 3}, evaluation={"missing": True})
    ran = await scene.together()
    assert ran.result.complete, ran
    assert ran.result.made_from == ["flair", "t1", "t2"]
    assert set(ran.result.missing) == set(THREE)
    assert all(set(dice) == set(ran.result.dice) for dice in ran.result.missing.values())
    masks = list((scene.output / "predictions").glob("*.nii.gz"))
    assert {nib.load(mask).header["descrip"].tobytes().rstrip(b"\0") for mask in masks} == {
        b"splitproto flair t1 t2"
    }


def test_a_site_that_drained_comes_back_without_a_rollback_of_the_others(scene) -> None:
    """SP-11-34: it saved exactly the step that it had applied, and goes back there alone."""
    scene.cast("flair", "t1", training={"steps": 150, "checkpoint_every": 100})
    hub, clients = scene.start_all()
    scene.until_step(13)
    clients["t1"].signal(signal.SIGTERM)
    assert clients["t1"].code() == 0, clients["t1"].said
    hub.until(r"site\.(left|lost) .*site-t1")
    again = scene.start("site-t1")
    assert hub.code() == 0, hub.said
    assert (again.code(), clients["flair"].code()) == (0, 0)
    assert "site.restored" in hub.said
    assert not any(line.get("rollback") for line in scene.metrics())
    scene.assert_exact()


def test_a_coordinator_killed_and_started_again_goes_on_by_itself(scene) -> None:
    """SP-11-1, SP-11-39."""
    scene.cast("flair", "t1", training={"steps": 60, "checkpoint_every": 10})
    hub, clients = scene.start_all()
    scene.until_step(13)
    hub.signal(signal.SIGKILL)
    hub.code()
    again = scene.start("hub")
    assert again.code() == 0, again.said
    assert "run.resumed" in again.said
    assert [client.code() for client in clients.values()] == [0, 0]
    scene.assert_exact()
    record = json.loads((scene.folder / "hub" / "state" / "try.run.json").read_text())
    assert record["state"] == "over"
    assert record["told"] == ["site-flair", "site-t1"]
    # It died before it could say so: started again it waits for nobody, and has the same to say.
    said, result = again.last, (scene.output / "result.json").read_text()
    third = scene.start("hub")
    assert third.code() == 0, third.said
    assert "job.was_complete" in third.said and "--fresh" in third.said
    assert third.last == said
    assert (scene.output / "result.json").read_text() == result


async def test_each_site_hears_the_farewell_as_it_comes(scene) -> None:
    """SP-11-39: the coordinator died while it told them; who was told, unnoted, never comes again."""
    scene.cast("flair", "t1", training={"steps": 3}, deadlines={"return_s": 60})
    assert (await scene.together()).result.complete
    path = scene.folder / "hub" / "state" / "try.run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "farewell", "told": []}))
    async with scene.running(resume=None, only=["hub", "site-t1"]) as on:
        async with asyncio.timeout(20):
            await on.tasks["site-t1"]
        assert not on.tasks["hub"].done()
        assert json.loads(path.read_text())["told"] == ["site-t1"]
