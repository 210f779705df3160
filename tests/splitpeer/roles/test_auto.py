"""`[wire]` "auto": links are measured before the job is offered, and a run keeps what was chosen."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from splitpeer.captures.reader import open_capture
from splitpeer.coordinator import coordinator, probing
from splitpeer.coordinator.record import RunRecord
from splitpeer.daemon import happenings as h
from splitpeer.errors import ConfigError, DeadlinePassed, JobFailed
from splitpeer.export.half import half_of
from splitpeer.site import client
from splitpeer.site import probes as site_probes
from splitpeer.site.invitation import objections, reservations
from splitproto import Session, dial
from splitproto.constants import MAX_PROBE
from splitproto.errors import RemoteError, Superseded, UnexpectedMessage
from splitproto.messages import Message, Probe, Probed
from splitproto.negotiation import Offer
from splitproto.probes import filling

from .scene import Scene
from .test_codings import replay
from .test_frozen import FROZEN
from .test_ranks import start_ranks

FEW: dict[str, Any] = {"steps": 4, "batch": 2, "checkpoint_every": 2}
HOURS, NEVER = 3600.0, 1e-9
"""Seconds in which any link carries a step, and none."""


def kept(scene: Scene) -> dict[str, str | None]:
    found: dict[str, str | None] = json.loads((scene.folder / "hub" / "state" / "try.run.json").read_text())[
        "codings"
    ]
    return found


@pytest.mark.parametrize(
    ("wire", "there", "back"),
    [({"activations": "auto", "gradients": "auto", "auto_s": HOURS}, None, None),
     ({"activations": "auto", "gradients": "auto", "auto_s": NEVER}, "int4", "int4"),
     ({"activations": "auto", "auto_s": NEVER}, "int4", None),
     ({"activations": "f16", "gradients": "auto", "auto_s": NEVER}, "f16", "int4")],
)  # fmt: skip
async def test_a_run_is_that_of_a_job_which_names_what_was_chosen(
    scene: Scene, wire: dict[str, Any], there: str | None, back: str | None
) -> None:
    """SP-11.22: bit for bit."""
    scene.cast("flair", "t1", training=FEW, wire=wire)
    ran = await scene.together()
    assert ran.result is not None and ran.result.complete, ran
    assert kept(scene) == {"activations": there, "gradients": back}
    named = {name: coding for name, coding in (("activations", there), ("gradients", back)) if coding}
    scene.job(training=FEW, wire=named)
    scene.assert_exact(as_travelled=True)


def test_processes_measure_once_and_a_resumed_run_keeps_what_was_chosen(scene: Scene) -> None:
    scene.cast(
        "t1",
        training={**FEW, "steps": 40},
        wire={"activations": "auto", "gradients": "auto", "auto_s": NEVER},
    )
    hub, clients = scene.start_all()
    scene.until_step(2)
    said = re.search(r"codings.chosen .*", hub.said)
    assert said is not None and re.search(r"site-t1 \S+ Mb/s up, \S+ Mb/s down, \S+ ms", said[0]), hub.said
    assert "int4 (" in said[0]
    assert "int4" in clients["t1"].said
    hub.signal(9)
    hub.code()
    # Whatever would be chosen now.
    scene.job(
        training={**FEW, "steps": 40}, wire={"activations": "auto", "gradients": "auto", "auto_s": HOURS}
    )
    again = scene.start("hub")
    assert again.code() == 0 and clients["t1"].code() == 0, again.said + clients["t1"].said
    assert "decided when the run began" in again.said and "Mb/s" not in again.said
    assert kept(scene) == {"activations": "int4", "gradients": "int4"}
    assert "Traceback" not in hub.said + again.said + clients["t1"].said


async def test_a_site_of_former_features_is_refused_in_one_line(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-10-1, SP-11.22-3."""
    scene.cast("t1", training=FEW, wire={"activations": "auto"})

    def older(**given: Any) -> Offer:
        return Offer(**{**given, "features": tuple(name for name in given["features"] if name != "probe")})

    monkeypatch.setattr(client, "Offer", older)
    async with scene.running() as on:
        await asyncio.wait([on.tasks["site-t1"]], timeout=30)
        error = on.tasks["site-t1"].exception()
    assert error is not None and str(error).endswith("the client does not offer probe"), error
    assert "\n" not in str(error)


async def test_a_coordinator_that_stops_while_it_waits_for_links_says_bye(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.cast("flair", "t1", training=FEW, wire={"activations": "auto"})
    holds: asyncio.Future[Session] = asyncio.get_running_loop().create_future()
    real = probing.Probing.hold

    async def hold(self: probing.Probing, site: str, session: Session) -> bool:
        holds.set_result(session)
        return await real(self, site, session)

    monkeypatch.setattr(probing.Probing, "hold", hold)
    async with scene.running(only=("hub", "site-t1")) as on, asyncio.timeout(30):
        session = await holds
        on.stops["hub"].set()
        await on.tasks["hub"]
        assert session.ended.result() is None, "both said bye"


async def test_a_site_that_never_comes_is_named_to_those_who_wait(scene: Scene) -> None:
    scene.cast("flair", "t1", training=FEW, wire={"activations": "auto"}, deadlines={"join_s": 1})
    async with scene.running(only=("hub", "site-t1")) as on, asyncio.timeout(30):
        with pytest.raises(DeadlinePassed, match="not measured after 1 s: the links of site-flair"):
            await on.tasks["hub"]
        with pytest.raises(JobFailed, match=r"the coordinator ended the job: .*links of site-flair"):
            await on.tasks["site-t1"]


async def test_a_link_that_breaks_while_it_is_measured_is_measured_when_it_is_back(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.cast("flair", "t1", training=FEW, wire={"activations": "auto", "auto_s": HOURS})
    broken: list[str] = []
    real = probing.ProbedLink.carry

    async def carry(self: probing.ProbedLink, way: str, octets: int) -> None:
        if not broken and self.session.peer.site == "site-t1":
            broken.append(way)
            self.session.carrier_lost(Superseded("cut"))
        await real(self, way, octets)

    monkeypatch.setattr(probing.ProbedLink, "carry", carry)
    ran = await scene.together()
    assert broken and ran.result is not None and ran.result.complete, ran


async def test_a_site_answers_no_probe_out_of_turn(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """SP-11.22-2."""
    scene.cast("t1", training=FEW, wire={"activations": "auto"})
    monkeypatch.setattr(probing, "Probe", lambda number, *rest: Probe(number % 8 + 1, *rest))
    async with scene.running() as on, asyncio.timeout(30):
        await asyncio.wait([on.tasks["site-t1"]])
        error = on.tasks["site-t1"].exception()
    assert isinstance(error, UnexpectedMessage) and "probe 2 where 1 was due" in str(error)


async def test_a_site_tells_what_was_measured(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """One line for a measured link: who asked, how much came and went, and why."""
    caplog.set_level("INFO")
    scene.cast("flair", "t1", training=FEW, wire={"activations": "auto", "gradients": "auto"})
    ran = await scene.together()
    assert ran.result is not None and ran.result.complete, ran
    octets = probing.FIRST + MAX_PROBE
    told = [one.fields for one in caplog.records if one.getMessage() == "link.probed"]
    assert told == 2 * [
        {"coordinator": "hub", "probes": 6, "octets_in": octets, "octets_out": octets,
         "why": "measured before a job is offered: zeros, nothing of a patient"}
    ]  # fmt: skip
    assert isinstance(h.LinkProbed("hub", 6, 0, 0), h.Happening) and h.LinkProbed.sparing


async def test_a_link_that_was_not_measured_is_not_told(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ran = await scene.cast("t1", training={**FEW, "steps": 1}).together()
    assert ran.result is not None and ran.result.complete, ran
    assert "link.up" in caplog.text and "link.probed" not in caplog.text


MOST = 1 << 20
"""Octets of one message that a coordinator of the following tests takes."""


@pytest.fixture
def takes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "Offer", lambda **given: Offer(**given | {"max_message": MOST}))


@pytest.mark.usefixtures("takes_little")
async def test_a_coordinator_that_takes_little_asks_for_no_more(scene: Scene) -> None:
    """SP-10-7: a probe and its answer are messages like any other."""
    scene.cast("t1", training=FEW, wire={"activations": "auto", "auto_s": HOURS})
    ran = await scene.together()
    assert ran.result is not None and ran.result.complete, ran


@pytest.mark.usefixtures("takes_little")
async def test_a_probe_that_asks_for_more_than_its_sender_takes_does_not_end_the_site(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SP-10-7, SP-11.22-2: refused before memory is taken for the answer; the site dials again."""
    scene.cast("t1", training=FEW, wire={"activations": "auto"})
    monkeypatch.setattr(probing, "Probe", lambda number, back, sent: Probe(number, MAX_PROBE, sent))
    monkeypatch.setattr(client, "REST_S", 0.01)
    made: list[int] = []
    monkeypatch.setattr(site_probes, "filling", made.append)
    async with scene.running() as on, asyncio.timeout(30):
        while caplog.text.count("policy.refused") < 2:
            assert not on.tasks["site-t1"].done(), on.tasks["site-t1"]
            await asyncio.sleep(0.01)
        refused = [one.fields for one in caplog.records if one.getMessage() == "policy.refused"]
        assert (
            "probe 1 asks for an answer of 4194304 octets, but the coordinator takes 1048576"
            in (refused[0]["cause"])
        )
        on.stops["site-t1"].set()
        await on.tasks["site-t1"]
    assert made == []


async def test_an_answer_to_no_probe_ends_a_link_that_is_held(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.22-2: a site cannot pass for one whose link takes no time, nor fill the coordinator's memory."""
    scene.cast("flair", "t1", training=FEW, wire={"activations": "auto"})

    async def ahead(self: client.Client, session: Session) -> Message:
        session._connection.conversation.unanswered = 1
        await session.send(Probed(1, filling(MAX_PROBE)))
        return await session.receive(30)

    monkeypatch.setattr(client.Client, "_join", ahead)
    async with scene.running(only=("hub", "site-t1")) as on, asyncio.timeout(30):
        await asyncio.wait([on.tasks["site-t1"]])
        error = on.tasks["site-t1"].exception()
    assert isinstance(error, RemoteError) and "a probed that no probe asked for" in str(error), error


async def test_a_link_that_is_held_and_answers_is_not_given_up_for_a_second(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SP-11.14-4 where sites have joined: a copied certificate does not cost the first its place."""
    scene.cast("flair", "t1", training=FEW, wire={"activations": "auto"})
    held: asyncio.Queue[tuple[Session, bool | None]] = asyncio.Queue()
    real = probing.Probing.hold

    async def hold(self: probing.Probing, site: str, session: Session) -> bool:
        held.put_nowait((session, None))
        answer = await real(self, site, session)
        held.put_nowait((session, answer))
        return answer

    monkeypatch.setattr(probing.Probing, "hold", hold)
    async with scene.running(only=("hub", "site-t1")) as on, asyncio.timeout(30):
        first, _ = await held.get()
        config = scene.config("site-t1")
        again = await dial(
            str(config.network.coordinator), config.credentials(), config.allow_list(), Offer()
        )
        second, _ = await held.get()
        assert await held.get() == (second, False)
        with pytest.raises(RemoteError, match="another link of site-t1 is alive"):
            await again.receive(5)
        assert first.alive
        first.carrier_lost(Superseded("cut"))
        assert await held.get() == (first, False)
        assert not on.tasks["hub"].done()


def test_a_coding_that_is_written_later_is_not_that_of_the_run(scene: Scene) -> None:
    scene.cast("t1", training=FEW, wire={"activations": "auto", "gradients": "auto", "auto_s": NEVER})

    async def until_it_began() -> None:
        async with scene.running() as on:
            while not list((scene.folder / "hub" / "state").glob("try.run.json")):
                assert not on.tasks["hub"].done()
                await asyncio.sleep(0.01)

    asyncio.run(until_it_began())
    for wire in ({}, {"activations": "f16", "gradients": "auto"}):
        scene.job(training=FEW, wire=wire)
        with pytest.raises(
            ConfigError, match=r"\[wire\] has changed since the run .* as int4 and .* as int4"
        ):
            RunRecord(scene.config("hub"), scene.settings, True, h.Reporter())
    scene.job(training=FEW, wire={"activations": "int4", "gradients": "auto"})
    assert RunRecord(scene.config("hub"), scene.settings, True, h.Reporter()).codings == ("int4", "int4")


def test_what_was_chosen_is_recorded_exported_and_driven_again(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """A capture holds no probe; who reads job.toml later finds what the run chose."""
    wire = {"activations": "auto", "gradients": "auto", "auto_s": NEVER}
    scene.cast("t1", training={**FEW, "steps": 2}, wire=wire)
    ran = asyncio.run(scene.together(curious=("hub", "site-t1")))
    assert ran.result is not None and ran.result.complete, ran
    hub = scene.folder / "hub"
    for who, more in (
        ("hub", ("coordinator", "--config", hub / "peer.toml", "--job", hub / "job.toml")),
        ("site-t1", ("client", "--config", scene.folder / "site-t1" / "peer.toml")),
    ):
        capture = open_capture(scene.capture(who))
        assert capture.header.job is not None and capture.header.job.activations == "int4"
        assert not [one for one in capture.records() if one.head.name in ("probe", "probed")]
        code, shown, error = replay(capsys, scene.capture(who), "--json", "--drive", *more)
        assert code == 0, error + shown
        assert json.loads(shown)["agrees"]
    assert half_of(scene.config("hub"), "try", scene.settings).facts["precision"] == "int4"


async def test_what_frozen_encoders_release_may_be_left_open_too(scene: Scene) -> None:
    scene.cast("flair", "t1", training={**FROZEN, "steps": 3}, wire={"activations": "auto", "auto_s": NEVER})
    ran = await scene.together()
    assert ran.result is not None and ran.result.complete, ran
    index = json.loads(next((scene.folder / "hub" / "state").glob("*/bank/bank.json")).read_text())
    assert index["precision"] == "int4"


@pytest.mark.timeout(300)
def test_rank_0_chooses_and_the_other_ranks_need_not_know(scene: Scene) -> None:
    scene.cast("t1", training=FEW, wire={"activations": "auto", "gradients": "auto", "auto_s": NEVER})
    leader, other = start_ranks(scene)
    site = scene.start("site-t1")
    assert leader.code(240) == other.code(60) == site.code() == 0, leader.said + other.said + site.said
    assert "codings.chosen" in leader.said and "codings.chosen" not in other.said
    assert kept(scene) == {"activations": "int4", "gradients": "int4"}


def test_who_checks_a_job_is_told_what_may_be_chosen(scene: Scene) -> None:
    scene.cast("t1", training=FEW, wire={"gradients": "auto"})
    job, config = scene.settings, scene.config("site-t1")
    assert objections(job, config) == reservations(job, config) == []
    scene.client("t1", policy={"coordinators": ["hub"], "precision": ["f32", "int8"]})
    config = scene.config("site-t1")
    assert objections(job, config) == []
    (said,) = reservations(job, config)
    assert '[wire] "auto" may choose f16, int4, which this site declines (policy precision)' in said
    scene.job(training=FEW)
    assert reservations(scene.settings, config) == []
