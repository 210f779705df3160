"""SP-11.14: a second holder of a site's certificate (a copied key, a daemon started twice) takes nobody's place."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from types import SimpleNamespace

import pytest

from splitpeer.cli.outcome import exit_code
from splitpeer.coordinator import holder
from splitpeer.coordinator.coordinator import Coordinator
from splitpeer.daemon import happenings as h
from splitpeer.daemon.console import LogView
from splitpeer.daemon.sinks.budgets import LIMITS
from splitpeer.daemon.sinks.trail import TrailSink
from splitpeer.daemon.trail import NAME as TRAIL
from splitpeer.daemon.trail import entries
from splitpeer.errors import DataError
from splitpeer.site.client import Client
from splitpeer.site.run_folders import COMPLETE
from splitpeer.site.secret import NAME, site_secret
from splitproto import RemoteError, SplitprotoError, dial
from splitproto.errors import SecondHolder, Superseded
from splitproto.messages import Bye, JobAccept, JobDecline, JobOffer

from .test_misbehaviour import peer
from .test_misbehaviour import replace as replaced

LONG = {"steps": 60, "checkpoint_every": 5}


def site_of(on, seat: str):
    return next(site for site in on.coordinator.sites if site.seat_names == seat)


async def until(done, on) -> None:
    while not done():
        for name, task in on.tasks.items():
            if task.done() and task.exception() is not None:
                raise AssertionError(f"{name}: {task.exception()}")
        await asyncio.sleep(0.01)


def noted(scene, event: str) -> list[dict]:
    return [line for line in entries(scene.folder / "hub" / "state" / TRAIL) if line["event"] == event]


def run_folder(scene, who: str):
    (folder,) = [path for path in (scene.folder / who / "state").iterdir() if [*path.glob("step-*")]]
    return folder


@pytest.mark.parametrize("mode", ["pause", "drop"])
async def test_a_copied_certificate_does_not_take_the_sites_place(scene, mode: str) -> None:
    """SP-11.14-1 to SP-11.14-3: the thief is refused for good; the link and weights of the site are untouched."""
    scene.cast("flair", "t1", training=LONG, absence={"mode": mode})
    async with scene.running() as on:
        await until(lambda: len(scene.losses()) >= 3, on)
        scene.client("t1", peer={"state": "another"})
        async with scene.running(only=["site-t1"]) as thief:
            await asyncio.wait(thief.tasks.values(), timeout=60)
            error = thief.tasks["site-t1"].exception()
        assert isinstance(error, RemoteError) and error.name == "second-holder", error
        assert exit_code(error) == 2
        assert "a copied key" in str(error) and "--readmit" in str(error) and "\n" not in str(error)
        await asyncio.wait(on.tasks.values(), timeout=60)
        assert [task.exception() for task in on.tasks.values()] == [None, None, None]
        assert on.tasks["hub"].result().absences == {}
    assert not any(line.get("rollback") for line in scene.metrics())
    scene.client("t1")
    scene.assert_exact()
    (line,) = noted(scene, "site.second_holder")
    assert line["site"] == "site-t1"
    assert line["address"] and line["other_address"] and line["serial"] == line["other_serial"]
    secret = run_folder(scene, "site-t1") / NAME
    assert secret.stat().st_mode & 0o777 == 0o600 and len(secret.read_bytes()) == 32
    record = json.loads((scene.folder / "hub" / "state" / "try.run.json").read_text())
    assert secret.read_bytes().hex() not in json.dumps(record)
    assert len(bytes.fromhex(record["holders"]["site-t1"])) == 32


async def test_no_thief_trains_while_the_site_is_away(scene) -> None:
    """SP-11.14-3: with `drop`, where nobody asks for the site; it comes back and has its part."""
    scene.cast("flair", "t1", training=LONG, absence={"mode": "drop"}, deadlines={"return_s": 0.2})
    async with scene.running() as on:
        await until(lambda: len(scene.losses()) >= 3, on)
        on.stops["site-t1"].set()
        await asyncio.wait((on.tasks.pop("site-t1"),), timeout=60)
        scene.client("t1", peer={"state": "another"})
        async with scene.running(only=["site-t1"]) as thief:
            await asyncio.wait(thief.tasks.values(), timeout=60)
            assert "another holder of the certificate" in str(thief.tasks["site-t1"].exception())
        assert len(scene.losses()) < LONG["steps"], "the job was over before the site could come back"
        scene.client("t1")
        async with scene.running(only=["site-t1"]) as back:
            await asyncio.wait((on.tasks["hub"], *back.tasks.values()), timeout=60)
            assert back.tasks["site-t1"].exception() is None
            assert on.tasks["hub"].result().complete
    assert len(noted(scene, "site.second_holder")) == 1


async def test_a_copied_state_folder_waits_while_the_first_link_lives(scene) -> None:
    """SP-11.14-4: both know the secret; the one that answers keeps its link, the other tries again with pauses."""
    scene.cast("flair", "t1", training=LONG)
    async with scene.running() as on:
        await until(lambda: len(scene.losses()) >= 6, on)
        shutil.copytree(scene.folder / "site-t1" / "state", scene.folder / "site-t1" / "copied")
        scene.client("t1", peer={"state": "copied"})
        async with scene.running(only=["site-t1"]) as second:
            await asyncio.wait(on.tasks.values(), timeout=60)
            assert not second.tasks["site-t1"].done(), second.tasks["site-t1"]
            assert [task.exception() for task in on.tasks.values()] == [None, None, None]
    assert not any(line.get("rollback") for line in scene.metrics())
    assert "is alive" in noted(scene, "site.second_holder")[0]["cause"]
    assert noted(scene, "site.superseded") == []


def test_a_link_that_no_longer_answers_gives_way(scene) -> None:
    """SP-11.14-4, SP-9-6: a site whose machine hangs is started elsewhere with its state folder."""
    scene.cast("flair", "t1", training={**LONG, "steps": 20})
    hub, clients = scene.start_all()
    scene.until_step(6)
    clients["t1"].signal(signal.SIGSTOP)
    try:
        shutil.copytree(scene.folder / "site-t1" / "state", scene.folder / "site-t1" / "moved")
        (scene.folder / "site-t1" / "moved" / "lock").unlink(missing_ok=True)
        scene.client("t1", peer={"state": "moved"})
        moved = scene.start("site-t1")
        assert hub.code() == 0, hub.said
        assert moved.code() == 0, moved.said
    finally:
        clients["t1"].signal(signal.SIGKILL)
    (line,) = noted(scene, "site.superseded")
    assert line["address"] and line["other_address"] and line["serial"] == line["other_serial"]
    assert "site.superseded" in hub.said


async def test_a_site_that_lost_its_state_is_refused_until_it_is_readmitted(scene) -> None:
    """SP-11.14-5; the binding outlives the coordinator's process."""
    scene.cast("flair", "t1", training=LONG)
    async with scene.running() as on:
        await until(lambda: len(scene.losses()) >= 6, on)
        for stop in on.stops.values():
            stop.set()
        await asyncio.wait(on.tasks.values(), timeout=60)
    shutil.rmtree(scene.folder / "site-t1" / "state")
    async with scene.running(resume=True) as on:
        await asyncio.wait((on.tasks["site-t1"],), timeout=60)
        assert "second holder" not in str(on.tasks["hub"])
        assert "--readmit" in str(on.tasks["site-t1"].exception())
        on.stops["hub"].set()
        await asyncio.wait((on.tasks["hub"],), timeout=60)
    hub = Coordinator(
        scene.config("hub"), scene.settings, asyncio.Event(), LogView(), resume=True, readmit=("site-t1",)
    )
    assert list(hub._files.record.holders) == ["site-flair"]
    running = asyncio.create_task(hub.run())
    async with scene.running(only=["site-flair", "site-t1"]) as on:
        await asyncio.wait((running, *on.tasks.values()), timeout=60)
        assert running.result().complete
        assert [task.exception() for task in on.tasks.values()] == [None, None]
    record = json.loads((scene.folder / "hub" / "state" / "try.run.json").read_text())
    assert sorted(record["holders"]) == ["site-flair", "site-t1"]


async def test_links_that_join_and_say_nothing_do_not_lock_the_site_out(scene) -> None:
    """SP-11.14-6: a thief holds links open in the middle of joining; the newest four stay."""
    scene.cast("t1", training={"steps": 3})
    config = scene.config("site-t1")
    async with scene.running(only=["hub"]) as on:
        await asyncio.sleep(0.05)
        silent = []
        for _ in range(holder.JOINING + 3):
            silent.append(await dial(config.network.coordinator, config.credentials(), config.allow_list()))
            assert isinstance(await silent[-1].receive(20), JobOffer)
        for session in silent[:3]:
            with pytest.raises(SplitprotoError, match="too many links"):
                await session.receive(20)
        assert all(session.alive for session in silent[3:])
        async with scene.running(only=["site-t1"]) as site:
            await asyncio.wait((on.tasks["hub"], *site.tasks.values()), timeout=60)
            assert on.tasks["hub"].result().complete
            assert site.tasks["site-t1"].exception() is None
        await asyncio.gather(*(session.close("failed", timeout=0.1) for session in silent))


class Link:
    """What a holding needs of a session."""

    def __init__(self, address: str, answers: bool = True) -> None:
        self.address, self.alive, self._answers = address, True, answers
        self.peer = type("Peer", (), {"serial": "17"})
        self.failed: list[Exception] = []

    async def answers(self, timeout: float) -> bool:
        return self._answers and self.alive

    def fail(self, error: Exception) -> None:
        self.failed.append(error)
        self.alive = False


async def test_a_flood_of_second_links_is_counted_and_not_written(caplog) -> None:
    """SP-11.14-3: the log takes a line now and then, the trail a hundred."""
    lines: list[dict] = []
    trail = TrailSink(lambda event, **fields: lines.append({"event": event, **fields}))
    holding = holder.Holding("site-t1", h.Reporter(trail))
    first, seated = Link("10.0.0.1"), []
    await holding.take(first, b"k" * 32, lambda: None)
    seated.append(first)
    for number in range(1000):
        with pytest.raises(Superseded):
            await holding.take(Link(f"10.0.1.{number}"), b"k" * 32, lambda: first)
        holding.note_second(Link(f"10.0.1.{number}"), first, "again")
    assert first.alive and len(lines) == LIMITS[h.SecondLink].noted
    assert lines[-1]["and_more"]
    assert len([r for r in caplog.records if r.getMessage() == "site.second_holder"]) == 1


def test_a_secret_that_is_damaged_is_named(tmp_path) -> None:
    secret = site_secret(tmp_path / "run")
    assert site_secret(tmp_path / "run") == secret and len(secret) == 32
    (tmp_path / "run" / NAME).write_bytes(secret[:-1])
    with pytest.raises(DataError, match="is not a key of 32 bytes"):
        site_secret(tmp_path / "run")


def test_a_secret_that_others_may_read_is_not_used(tmp_path) -> None:
    secret = site_secret(tmp_path / "run")
    (tmp_path / "run" / NAME).chmod(0o640)
    with pytest.raises(DataError, match=r"others on this machine may read .* place in the run: chmod 600"):
        site_secret(tmp_path / "run")
    (tmp_path / "run" / NAME).chmod(0o600)
    assert site_secret(tmp_path / "run") == secret


# --- what a link says that has shown no key ----------------------------------------------------------------


async def test_a_strangers_decline_ends_nothing(scene, caplog) -> None:
    """SP-11.14-3: a decline proves nothing, so it is the site's own only while nobody has its place."""
    caplog.set_level("INFO", "splitpeer")
    scene.cast("flair", "t1", training={"steps": 2})
    async with scene.running(only=["hub", "site-t1"]) as on:
        await until(lambda: site_of(on, "t1").here, on)
        for _ in range(3):
            await peer(scene, replaced(JobAccept, lambda accept: [JobDecline(0x0505, "no")]))
        assert not on.tasks["hub"].done()
        async with scene.running(only=["site-flair"]) as other:
            await asyncio.wait((*on.tasks.values(), *other.tasks.values()), timeout=60)
            assert on.tasks["hub"].result().complete
            assert on.tasks["site-t1"].exception() is None
    # However often it comes, the trail has one line of it.
    assert len(noted(scene, "site.refused")) == 1 and noted(scene, "job.declined") == []


async def test_who_does_not_fit_does_not_get_the_place(scene) -> None:
    """SP-11.14-4: a place is taken last, and by the key that was shown while it was free or its own."""
    scene.cast("flair", "t1", training={"steps": 2})
    async with scene.running(only=["hub"]) as on:
        holding = site_of(on, "t1").holding
        site_of(on, "t1").expect({b"x" * 16: None}, {b"x" * 16: {"t1"}}, 1)  # as while a run is under way
        ended = await peer(scene, lambda message: [message])
        assert "lacks 1 of the run's 1 patients" in ended
        assert holding.holder is None, "what does not fit was bound all the same"


async def test_a_place_that_was_taken_meanwhile_is_not_taken_again() -> None:
    """SP-11.14-4: between showing a key and listing its patients, somebody else may have joined."""
    bound: list[bytes] = []
    holding = holder.Holding("site-t1", h.Reporter())
    holding.restore(None, lambda site, key: bound.append(key))
    # Two links showed a key while the place was free; one of them lists its patients first.
    await holding.take(None, b"k" * 32, lambda: None)
    with pytest.raises(SecondHolder):
        await holding.take(None, b"t" * 32, lambda: None)
    assert bound == [b"k" * 32]


async def test_a_run_that_was_not_trained_to_its_end_is_not_kept_before_others(scene) -> None:
    """SP-11.15-6: a coordinator that says complete at once would push out trained weights."""
    scene.cast("t1", training={"steps": 2})
    ran = await scene.together()
    assert ran.result.complete
    folder = run_folder(scene, "site-t1")
    assert (folder / COMPLETE).exists()
    client = Client(scene.config("site-t1"), asyncio.Event())
    (folder / COMPLETE).unlink()
    client._job = SimpleNamespace(
        folder=folder, applied=1, job=SimpleNamespace(name="try", steps=2, frozen=False)
    )
    assert client._over(Bye("complete", "at once"), "hub")
    assert not (folder / COMPLETE).exists()
    client._compute.close()
