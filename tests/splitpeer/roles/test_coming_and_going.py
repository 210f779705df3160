"""Sites that leave while others are waited for, come back unfit, or are missed; and what every log says of it."""

from __future__ import annotations

import asyncio
import re
import signal

import pytest

from splitpeer.daemon.board import Board
from splitpeer.errors import DeadlinePassed

from .test_misbehaviour import peer
from .test_troublesome_sites import dies_after

WITHOUT = r"job\.without seat=t1 after_step=\d+ cause="


async def until(true, *tasks: asyncio.Task, seconds: float = 30) -> None:
    """Wait for `true()` while none of `tasks` has ended."""
    async with asyncio.timeout(seconds):
        while not true():
            assert not any(task.done() for task in tasks), tasks
            await asyncio.sleep(0.002)


def site(on, seat: str):
    return next(site for site in on.coordinator.sites if site.seat_names == seat)


def said(caplog, event: str) -> list[dict]:
    return [r.fields for r in caplog.records if r.getMessage() == event]


# --- while gathering -----------------------------------------------------------------------------------------


async def test_a_site_that_leaves_while_others_are_waited_for_is_waited_for_again(scene, caplog) -> None:
    caplog.set_level("INFO", "splitpeer")
    scene.cast("flair", "t1", training={"steps": 2})
    async with scene.running(only=["hub", "site-flair"]) as on:
        flair, hub = site(on, "flair"), on.tasks["hub"]
        await until(lambda: flair.here, hub)
        session = flair.session
        on.stops["site-flair"].set()
        await until(lambda: not flair.here, hub)
        # The bye was answered: the site need not wait until it gives that up.
        await asyncio.wait([on.tasks["site-flair"]], timeout=20)
        assert on.tasks["site-flair"].exception() is None
        assert session.ended.result() is None
        await until(lambda: len(said(caplog, "job.waiting")) == 3, hub)
        assert [line["sites"] for line in said(caplog, "job.waiting")] == [
            "site-flair (flair), site-t1 (t1)", "site-t1 (t1)", "site-flair (flair), site-t1 (t1)",
        ]  # fmt: skip
        assert [line["cause"] for line in said(caplog, "site.left")] == ["the site was asked to stop"]
        assert on.coordinator._duty.board._sites["site-flair"]["state"] == "awaited"
        async with scene.running(only=["site-flair", "site-t1"]) as back:
            await asyncio.wait([hub, *back.tasks.values()], timeout=60)
            assert hub.result().complete


async def test_a_link_that_breaks_while_others_are_waited_for_is_noticed(scene, caplog) -> None:
    caplog.set_level("INFO", "splitpeer")
    scene.cast("flair", "t1", training={"steps": 2})
    async with scene.running(only=["hub", "site-flair"]) as on:
        flair, hub = site(on, "flair"), on.tasks["hub"]
        await until(lambda: flair.here, hub)
        on.tasks["site-flair"].cancel()
        await until(lambda: not flair.here, hub)
        await until(lambda: len(said(caplog, "job.waiting")) == 3, hub)
        assert "job.all_here" not in {r.getMessage() for r in caplog.records}


async def test_nobody_who_left_counts_as_here_when_the_wait_is_over(scene) -> None:
    scene.cast("flair", "t1", training={"steps": 2}, deadlines={"join_s": 3.0})
    async with scene.running(only=["hub", "site-flair"]) as on:
        await until(lambda: site(on, "flair").here, on.tasks["hub"])
        on.stops["site-flair"].set()
        await asyncio.wait([on.tasks["hub"]], timeout=30)
        with pytest.raises(DeadlinePassed, match=r"missing after 3 s: site-flair \(flair\), site-t1 \(t1\)"):
            on.tasks["hub"].result()


# --- coming back unfit ---------------------------------------------------------------------------------------


def swap_modality(scene, one: str, other: str) -> None:
    path = scene.folder / "site-t1" / "peer.toml"
    path.write_text(path.read_text().replace(f'modality = "{one}"', f'modality = "{other}"'))


def lose_patient(scene) -> None:
    folder = scene.config("site-t1").data.images
    scene.moved = next(iter(sorted(folder.iterdir())))
    aside = folder.with_name("t1-less")
    aside.mkdir()
    for path in folder.iterdir():
        if path != scene.moved:
            (aside / path.name).write_bytes(path.read_bytes())
    path = scene.folder / "site-t1" / "peer.toml"
    path.write_text(path.read_text().replace(str(folder), str(aside)))


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda scene: swap_modality(scene, "t1", "t2"), "this site holds t2"),
        (lose_patient, "lacks 1 of the run's"),
    ],
)
async def test_a_site_that_comes_back_unfit_stays_away_and_ends_no_run(
    scene, caplog, spoil, cause: str
) -> None:
    """SP-11-35: with *drop* the run continues without it, and takes it back once it fits again."""
    caplog.set_level("INFO", "splitpeer")
    scene.cast(
        "flair", "t1", training={"steps": 4000, "checkpoint_every": 50},
        absence={"mode": "drop", "least_sites": 1}, **{"absence.per_site_s": {"site-t1": 0.5}},
    )  # fmt: skip
    peer_toml = scene.folder / "site-t1" / "peer.toml"
    async with scene.running() as on:
        hub, kept = on.tasks["hub"], peer_toml.read_text()
        await until(lambda: len(scene.losses()) >= 4, hub)
        on.stops["site-t1"].set()
        await asyncio.wait([on.tasks["site-t1"]], timeout=30)
        spoil(scene)
        async with scene.running(only=["site-t1"]) as unfit:
            await asyncio.wait([unfit.tasks["site-t1"]], timeout=30)
            assert unfit.tasks["site-t1"].exception() is not None
        await until(lambda: any(cause in line["cause"] for line in said(caplog, "site.refused")), hub)
        await until(lambda: site(on, "t1").absent, hub)
        peer_toml.write_text(kept)
        async with scene.running(only=["site-t1"]) as back:
            await until(lambda: said(caplog, "site.present"), hub, back.tasks["site-t1"])


async def test_with_pause_an_unfit_site_is_waited_for_and_the_end_says_why(scene) -> None:
    """SP-11-35."""
    scene.cast(
        "flair", "t1", training={"steps": 4000}, absence={"mode": "pause"},
        **{"absence.per_site_s": {"site-t1": 3.0}},
    )  # fmt: skip
    async with scene.running() as on:
        hub = on.tasks["hub"]
        await until(lambda: len(scene.losses()) >= 4, hub)
        on.stops["site-t1"].set()
        await asyncio.wait([on.tasks["site-t1"]], timeout=30)
        swap_modality(scene, "t1", "t2")
        async with scene.running(only=["site-t1"]) as unfit:
            await asyncio.wait([unfit.tasks["site-t1"]], timeout=30)
        await asyncio.wait([hub, on.tasks["site-flair"]], timeout=40)
        why = r"did not come back within 3 s; .*declined the job: .*this site holds t2"
        with pytest.raises(DeadlinePassed, match=why):
            hub.result()
        # The others read the same.
        assert re.search(why, str(on.tasks["site-flair"].exception()))


# --- what the logs say ---------------------------------------------------------------------------------------


def test_the_others_hear_whom_the_run_goes_on_without_and_when_it_is_back(scene) -> None:
    """SP-11-42."""
    scene.cast(
        "flair", "t1", "t2", training={"steps": 2000, "checkpoint_every": 20},
        absence={"mode": "drop"}, **{"absence.per_site_s": {"site-t1": 0.3}},
    )  # fmt: skip
    hub, clients = scene.start_all()
    scene.until_step(5)
    clients["t1"].signal(signal.SIGKILL)
    for other in ("flair", "t2"):
        clients[other].until(WITHOUT + r'"site site-t1 \(t1\) did not come back within 0.3 s')
    again = scene.start("site-t1")
    for other in ("flair", "t2"):
        clients[other].until(r"job\.with_again seat=t1 ")
    absent = [line for line in scene.metrics() if line.get("without")]
    assert absent and all(line["without"] == line["absent"] == ["t1"] for line in absent)
    scene.stop(hub, again, clients["flair"], clients["t2"])
    assert len(re.findall(WITHOUT, clients["flair"].said)) == 1


async def test_dropout_is_no_absence(scene) -> None:
    scene.cast("flair", "t1", training={"steps": 12, "seat_dropout": 0.4})
    assert (await scene.together()).result.complete
    left_out = [line for line in scene.metrics() if line.get("without")]
    assert left_out and not any("absent" in line for line in left_out)


def test_a_run_that_begins_without_a_site_says_so(scene) -> None:
    scene.cast(
        "flair", "t1", training={"steps": 400, "checkpoint_every": 5},
        absence={"mode": "drop", "least_sites": 1}, deadlines={"join_s": 8.0},
    )  # fmt: skip
    hub, clients = scene.start_all()
    scene.until_step(6)
    scene.stop(hub, *clients.values())
    hub, flair = scene.start("hub"), scene.start("site-flair")
    hub.until(r"job\.begins_without sites=site-flair missing=site-t1 ")
    flair.until(WITHOUT + '"it did not join within 8 s"')
    assert "job.all_here" not in hub.said
    hub.until(r'job\.rollback step=\d+ before=0 cause="the coordinator was restarted"')
    scene.stop(hub, flair)


def test_a_rollback_says_why(scene) -> None:
    scene.cast("flair", "t1", training={"steps": 4000, "checkpoint_every": 10})
    hub, clients = scene.start_all()
    scene.until_step(15)
    clients["t1"].signal(signal.SIGKILL)
    again = scene.start("site-t1")
    hub.until(r'job\.rollback step=\d+ before=\d+ cause="site-t1 came back without its memory"')
    scene.stop(hub, again, clients["flair"])


# --- signals and rates ---------------------------------------------------------------------------------------


def test_a_closed_terminal_leaves_in_good_order(scene) -> None:
    scene.cast("flair", "t1", training={"steps": 4000, "checkpoint_every": 1000})
    hub, clients = scene.start_all()
    scene.until_step(10)
    for daemon in (hub, *clients.values()):
        daemon.signal(signal.SIGHUP)
    assert [daemon.code() for daemon in (hub, *clients.values())] == [0, 0, 0]
    for who in ("hub", "site-flair", "site-t1"):
        newest = max((scene.folder / who / "state").glob("*/step-*.safetensors"))
        assert int(newest.stem.removeprefix("step-")) >= 10, who


def test_a_rate_does_not_count_the_time_without_a_coordinator(scene, monkeypatch) -> None:
    scene.cast("t1")
    clock = [100.0]
    monkeypatch.setattr("splitpeer.daemon.board.time.monotonic", lambda: clock[0])
    board = Board(scene.config("site-t1"))

    def rate() -> float | None:
        return board._document()["work"].get("step_per_s")

    for step in range(10):
        board.set(step=step)
        rate()
        clock[0] += 0.1
    assert rate() == pytest.approx(10.0, rel=0.2)
    board.pause()
    clock[0] += 600
    assert rate() is None
    for step in range(10, 20):
        board.set(step=step)
        rate()
        clock[0] += 0.1
    assert rate() == pytest.approx(10.0, rel=0.2)


async def test_a_peer_that_dies_while_gathering_is_missed_at_once(scene) -> None:
    """A peer of the test's own: gone without a bye, before the others are here."""
    scene.cast("flair", "t1", training={"steps": 2})
    from splitproto.messages import Inventory

    async with scene.running(only=["hub"]) as on:
        ended = await peer(scene, dies_after(Inventory))
        assert "died" in ended
        await until(lambda: not site(on, "t1").here, on.tasks["hub"])
