"""Averages of a seat's encoders among the parties of a run: who is asked and told; and whole runs, bit for bit."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from splitpeer.coordinator.averaging import Averaging
from splitpeer.daemon import happenings as h
from splitpeer.errors import ConfigError, JobFailed
from splitpeer.federation.seats import Seats
from splitpeer.models.registry import averaged_tensors, make_backbone, on_wire, unet_backbone
from splitpeer.site.client import Client
from splitpeer.site.job import SiteJob
from splitpeer.training.averaging import average
from splitpeer.training.split_round import Place
from splitproto.errors import LinkLost
from splitproto.messages import Activations, Averaged, Message
from splitproto.records import Job, Seat
from splitproto.session import Session

from .gaps import Whole, cast, who

CUT = unet_backbone(2, (2, 4, 4, 8, 8, 4))
SEATS = Seats(
    (Seat("mri", ("t2", "flair")), Seat("t1", ("t1",))),
    {"east": ("mri", "t1"), "north": ("t1",), "south": ("t1",)},
)
COUNTS = {("north", "t1"): 5, ("south", "t1"): 2, ("east", "t1"): 3, ("east", "mri"): 9}


def terms(every: int | None, backbone: Any = CUT) -> Job:
    return Job(
        name="j",
        **on_wire(backbone),
        precision="f32",
        window=(32, 32),
        spacing=(),
        augment=False,
        batch=2,
        steps=10,
        optimiser="adam",
        learning_rate=0.01,
        weight_decay=0.0,
        schedule="constant",
        seconds_per_step=10.0,
        average_every=every,
    )


class Site:
    """Tells weights of its own and remembers what it was asked."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.said = name, list[tuple[Any, ...]]()
        rng = np.random.default_rng(number)
        self.weights = {
            seat.name: {
                name: rng.normal(size=shape).astype(np.float32)
                for name, shape in averaged_tensors(CUT, len(seat.modalities)).items()
            }
            for seat in SEATS.seats
        }
        self.has: dict[str, Mapping[str, np.ndarray]] = {}
        self.lost_by: Callable[[], None] = lambda: None

    async def share(self, step: int, seat: str, expected: Sequence[Any]) -> dict[str, np.ndarray]:
        self.said.append(("share", step, seat))
        assert [(d.name, d.shape) for d in expected] == [(n, a.shape) for n, a in self.weights[seat].items()]
        return self.weights[seat]

    async def average(self, step: int, seat: str, tensors: Mapping[str, np.ndarray]) -> None:
        self.said.append(("average", step, seat))
        self.has[seat] = tensors
        self.lost_by()


class Team:
    def __init__(self, names: Sequence[str] = ("south", "north", "east"), *, needed: bool = False) -> None:
        self.sites = {name: Site(name, number) for number, name in enumerate(sorted(SEATS.filled))}
        self.present = [self.sites[name] for name in names]
        self.needed = needed

    async def ask_all(self, verb: Callable[[Site], Any], sites: Sequence[Site]) -> dict[Site, Any]:
        return {site: await verb(site) for site in sites}

    def leave_out(self, site: Site, cause: str) -> None:
        if self.needed:
            raise JobFailed(cause)
        self.present.remove(site)

    def asked(self) -> list[tuple[Any, ...]]:
        """Since it was looked last."""
        said = [(site.name, *one) for site in self.sites.values() for one in site.said]
        for site in self.sites.values():
            site.said.clear()
        return sorted(said)


class Play:
    def __init__(self, team: Team, every: int | None = 2) -> None:
        self.team, self.told, self.counts = team, list[Any](), dict(COUNTS)

        async def computed(function: Any, *args: Any, what: str) -> Any:
            return function(*args)

        self.averaging = Averaging(
            terms(every),
            SEATS,
            team,
            computed,
            h.Reporter(self.told.append),  # type: ignore[arg-type]
        )

    def before(self, step: int) -> None:
        asyncio.run(self.averaging.before(step, lambda site, seat: self.counts[site, seat]))


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def mean(team: Team, names: Sequence[str], counts: Sequence[int]) -> Mapping[str, np.ndarray]:
    return average([team.sites[name].weights["t1"] for name in names], counts)


def test_before_steps_1_3_5_those_of_one_seat_go_on_from_their_mean() -> None:
    """SP-11.16-1, SP-11.16-4: by the names of the sites, whatever their order in the team."""
    team = Team()
    play = Play(team)
    for step in (1, 2, 3, 4):
        play.before(step)
        expected = [
            (name, verb, step - 1, "t1")
            for name in ("east", "north", "south")
            for verb in ("average", "share")
        ]
        assert team.asked() == (expected if step % 2 else [])
    whole = mean(team, ("east", "north", "south"), (3, 5, 2))
    assert all(same(site.has["t1"], whole) for site in team.present)
    assert not any("mri" in site.has for site in team.present)
    assert [(one.step, dict(one.sites)) for one in play.told] == [
        (0, {"t1": ["east", "north", "south"]}), (2, {"t1": ["east", "north", "south"]}),
    ]  # fmt: skip


def test_a_job_without_averages_asks_nobody() -> None:
    """SP-11.16-1."""
    team = Team()
    play = Play(team, None)
    for step in (1, 2, 3):
        play.before(step)
    assert team.asked() == [] and play.told == []


def test_one_site_alone_is_not_asked() -> None:
    """SP-11.16-1."""
    team = Team(("north",))
    Play(team).before(1)
    assert team.asked() == []


def test_a_step_that_is_begun_again_with_the_same_parties_asks_nobody() -> None:
    """SP-11.16-7."""
    team = Team()
    play = Play(team)
    play.before(1)
    team.asked()
    play.before(1)
    assert team.asked() == []


def test_without_a_patient_the_average_is_another_of_the_same_weights() -> None:
    """SP-11.16-7."""
    team = Team()
    play = Play(team)
    play.before(1)
    team.asked()
    play.counts["south", "t1"] = 1
    play.before(1)
    assert team.asked() == [(name, "average", 0, "t1") for name in ("east", "north", "south")]
    whole = mean(team, ("east", "north", "south"), (3, 5, 1))
    assert all(same(site.has["t1"], whole) for site in team.present)
    play.counts |= {(name, "t1"): 0 for name in ("east", "north", "south")}
    play.before(1)
    assert all(same(site.has["t1"], site.weights["t1"]) for site in team.present), "each has its own again"


def test_only_seats_of_several_sites_with_patients_are_averaged() -> None:
    """SP-11.16-1, SP-11.16-4: without a patient there is nothing to weigh by."""
    team = Team()
    play = Play(team)
    play.counts = dict.fromkeys(play.counts, 0)
    play.before(1)
    assert not any(site.has for site in team.sites.values()) and play.told == []
    play.counts["south", "t1"] = 1
    play.before(1)
    alone = team.sites["south"].weights["t1"]
    assert all(same(site.has["t1"], alone) and site.has.keys() == {"t1"} for site in team.present)


def test_who_gets_lost_before_the_step_is_not_in_the_average() -> None:
    """SP-11.16-7."""
    team = Team()
    play = Play(team)
    play.before(1)
    team.present.remove(team.sites["east"])
    play.before(1)
    rest = mean(team, ("north", "south"), (5, 2))
    assert all(same(site.has["t1"], rest) for site in team.present)
    team.present.remove(team.sites["north"])
    play.before(1)
    assert same(team.sites["south"].has["t1"], team.sites["south"].weights["t1"])
    # Who is back is asked again.
    team.asked()
    team.present.append(team.sites["north"])
    play.before(1)
    assert ("north", "share", 0, "t1") in team.asked()
    assert all(same(site.has["t1"], rest) for site in team.present)


def test_who_gets_lost_while_it_is_sent_is_not_in_the_average() -> None:
    """SP-11.16-1."""
    team = Team()
    play = Play(team)
    east = team.sites["east"]
    east.lost_by = lambda: team.present.remove(east)
    play.before(1)
    rest = mean(team, ("north", "south"), (5, 2))
    assert all(same(site.has["t1"], rest) for site in team.present)
    assert [dict(one.sites) for one in play.told] == [{"t1": ["north", "south"]}]


def test_after_a_rollback_the_average_is_made_again() -> None:
    """SP-11.16-7."""
    team = Team()
    play = Play(team)
    play.before(1)
    first = team.sites["north"].has["t1"]
    team.asked()
    play.averaging.forget()
    play.before(1)
    assert len(team.asked()) == 6
    assert same(team.sites["north"].has["t1"], first)


@pytest.mark.parametrize("weight", [3e38, -3e38, 1025.0])
def test_a_site_cannot_break_the_encoders_of_others(weight: float) -> None:
    """SP-11.16-3: finite, but the next layers would overflow."""
    team = Team()
    play = Play(team)
    next(iter(team.sites["east"].weights["t1"].values())).flat[0] = weight
    play.before(1)
    assert team.sites["east"] not in team.present
    rest = mean(team, ("north", "south"), (5, 2))
    assert all(same(site.has["t1"], rest) for site in team.present)


@pytest.mark.parametrize("needed", [True, False])
def test_weights_of_nan_are_the_sites_failure(needed: bool) -> None:
    """SP-11.16-3."""
    team = Team(needed=needed)
    play = Play(team)
    next(iter(team.sites["east"].weights["t1"].values())).flat[0] = np.nan
    if needed:
        with pytest.raises(JobFailed, match="the encoder of site east holds values that are not finite"):
            play.before(1)
        return
    play.before(1)
    assert team.sites["east"] not in team.present
    rest = mean(team, ("north", "south"), (5, 2))
    assert all(same(site.has["t1"], rest) for site in team.present)


def test_an_encoder_of_too_many_tensors_is_refused_at_the_start() -> None:
    deep = make_backbone("swin-unetr", 2, {"depths": (18, 18, 18, 18)})
    with pytest.raises(
        ConfigError, match=r"average_every: an encoder of this network has \d+ tensors, and at most 256"
    ):
        Averaging(terms(2, deep), SEATS, Team(), None, h.Reporter())  # type: ignore[arg-type]


async def test_a_coordinator_says_so_before_it_waits_for_anybody(scene, monkeypatch) -> None:
    monkeypatch.setattr("splitpeer.coordinator.averaging.MAX_TENSORS", 3)
    cast(scene, training={"steps": 2, "average_every": 2}, policy=SHARING)
    with pytest.raises(ConfigError, match="at most 3 can be sent at once: take a network with fewer blocks"):
        await scene.together(only=who())


async def test_a_site_declines_when_it_is_offered_such_a_job(scene, monkeypatch) -> None:
    monkeypatch.setattr("splitpeer.site.averaging.MAX_TENSORS", 3)
    cast(scene, training={"steps": 2, "average_every": 2}, policy=SHARING)
    ran = await scene.together(only=who())
    assert isinstance(ran.error, JobFailed)
    assert re.search(r"averages encoders of \d+ tensors, and at most 3 can be sent at once", str(ran.error))


# --- whole runs --------------------------------------------------------------------------------------------

SHARING = {"coordinators": ["hub"], "share_encoder": True}


async def test_two_hospitals_of_one_seat_go_on_from_their_average_every_2_steps(scene, caplog) -> None:
    """SP-11.16: losses and weights are those of the same in one process."""
    cast(scene, training={"steps": 9, "average_every": 2}, policy=SHARING)
    with caplog.at_level(logging.INFO):
        ran = await scene.together(only=who())
    assert ran.result is not None and ran.result.complete, ran
    whole = Whole(scene).train()
    whole.assert_exact()
    assert whole.averaged == [0, 2, 4, 6, 8]
    told = [r.fields for r in caplog.records if r.getMessage() == "job.averaged"]
    assert told == [{"after_step": step, "seats": "t1 site-t1 + stranger"} for step in whole.averaged]
    shared = [r.fields for r in caplog.records if r.getMessage() == "encoder.shared"]
    assert len(shared) == 10 and all(line["seat"] == "t1" for line in shared)
    trail = (scene.folder / "stranger" / "state" / "audit.jsonl").read_text()
    assert trail.count('"encoder.shared"') == 5


async def test_without_averages_each_hospital_keeps_its_own(scene) -> None:
    cast(scene, training={"steps": 9})
    ran = await scene.together(only=who())
    assert ran.result.complete, ran
    whole = Whole(scene).train()
    whole.assert_exact()
    one, other = (whole.encoders[Place(site, "t1")].state_dict() for site in ("site-t1", "stranger"))
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("checkpoint_every", "alone"), [(2, True), (5, False)])
async def test_who_forgets_the_average_before_its_step_gets_it_again(
    scene, monkeypatch, checkpoint_every: int, alone: bool
) -> None:
    """SP-11.16-6, SP-11.16-7: from a checkpoint of the step before alone, or all go back and make it again."""
    training = {"steps": 9, "average_every": 2, "checkpoint_every": checkpoint_every}
    cast(scene, training=training, policy=SHARING)
    work, taken, forgot = Client._work, list[Averaged](), list[Message]()

    async def forgetful(self: Client, session: Session, job: SiteJob) -> Any:
        async def send(message: Message, *rest: Any, _send: Any = session.send) -> None:
            if taken and not forgot and self._config.peer.site == "stranger":
                forgot.append(message)
                await asyncio.to_thread(job.close)
                self._job = None
                raise LinkLost("cut by the test")
            await _send(message, *rest)
            if isinstance(message, Averaged) and message.step == 8 and job is self._job:
                taken.extend([message] if self._config.peer.site == "stranger" else [])

        monkeypatch.setattr(session, "send", send)
        return await work(self, session, job)

    monkeypatch.setattr(Client, "_work", forgetful)
    ran = await scene.together(only=who())
    assert ran.result is not None and ran.result.complete, ran
    assert forgot and forgot[0].name in ("activations", "advanced")
    assert any(line.get("rollback") for line in scene.metrics()) is not alone
    Whole(scene).train().assert_exact()


@pytest.mark.parametrize("site", ["site-t1", "stranger"])
@pytest.mark.parametrize("arrived", [True, False])
async def test_a_link_is_lost_after_the_activations_of_an_averaged_step(
    scene, monkeypatch, site: str, arrived: bool
) -> None:
    """SP-11.16-6: the step is pending and made from the average; the same activations are sent again, nothing is
    rolled back, and the next average is of weights that have seen the step once."""
    cast(scene, training={"steps": 12, "average_every": 2, "checkpoint_every": 4}, policy=SHARING)
    work, lost = Client._work, list[int]()

    async def losing(self: Client, session: Session, job: SiteJob) -> Any:
        async def send(message: Message, *rest: Any, _send: Any = session.send) -> None:
            due = isinstance(message, Activations) and message.mode == "train" and message.step in (5, 7, 9)
            if due and not lost and self._config.peer.site == site:
                lost.append(message.step)
                if arrived:
                    await _send(message, *rest)
                session.fail(LinkLost("cut by the test"))
                raise LinkLost("cut by the test")
            await _send(message, *rest)

        monkeypatch.setattr(session, "send", send)
        return await work(self, session, job)

    monkeypatch.setattr(Client, "_work", losing)
    ran = await scene.together(only=who())
    assert ran.result is not None and ran.result.complete, ran
    assert lost and not any(line.get("rollback") for line in scene.metrics())
    whole = Whole(scene).train()
    whole.assert_exact()
    assert lost[0] - 1 in whole.averaged


@pytest.mark.parametrize("killed", who())
def test_whoever_is_killed_the_averages_are_made_again(scene, killed: str) -> None:
    """SP-11.16-7: nothing was stopped in good order; all go back to step 10, and step 10's average was not saved."""
    cast(scene, training={"steps": 30, "average_every": 5, "checkpoint_every": 10}, policy=SHARING)
    running = {name: scene.start(name) for name in who()}
    scene.until_step(13)
    running[killed].signal(signal.SIGKILL)
    running[killed].code()
    running[killed] = scene.start(killed)
    assert [daemon.code() for daemon in running.values()] == [0, 0, 0, 0], running["hub"].said
    assert re.search(r"job\.rollback step=(10|20) ", running["hub"].said)
    Whole(scene).train().assert_exact()


async def test_a_site_that_does_not_share_declines(scene) -> None:
    """SP-11.16-8."""
    cast(scene, training={"steps": 9, "average_every": 2}, policy={"coordinators": ["hub"]})
    ran = await scene.together(only=who())
    assert isinstance(ran.error, JobFailed)
    assert "the job averages encoders" in str(ran.error) and "(share_encoder)" in str(ran.error)
    assert "\n" not in str(ran.error)
