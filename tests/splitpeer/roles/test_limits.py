"""SP-11.15: what a coordinator with a valid certificate may ask of a site, and that it cannot switch a site off."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import Awaitable, Callable

import pytest

from splitpeer.daemon import happenings as h
from splitpeer.daemon.trail import NAME as TRAIL
from splitpeer.daemon.trail import entries
from splitpeer.data.sampling import batch_digest
from splitpeer.errors import DiskTrouble, JobFailed
from splitpeer.federation.terms import check_bounds, cut_descriptors, job_on_wire
from splitpeer.models.registry import backbone_of
from splitpeer.settings.bounds import Bounds
from splitpeer.site import budgets, client, run_folders
from splitpeer.site.answers import ANSWERS
from splitpeer.site.client import Client
from splitpeer.site.shown import NAME as SHOWN
from splitproto import Listener, RemoteError, Session, SplitprotoError
from splitproto.errors import PolicyRefused
from splitproto.messages import (
    Activations,
    Begin,
    Forward,
    JobDecline,
    JobOffer,
    Progress,
    Rollback,
    RolledBack,
)
from splitproto.records import Sample, Seat
from splitproto.tensors import schema_digest
from tests.cuts import unet
from tests.splitpeer.roles.scene import JOINT

Ask = Callable[[Session, Callable[..., Forward]], Awaitable[None]]


async def malicious(
    scene, ask: Ask, times: int = 1, change: dict | None = None, run: bytes = bytes(16)
) -> tuple:
    """A coordinator that joins `site-t1` and then does as `ask` does; (why each link ended, the site's task)."""
    hub, job = scene.config("hub"), dataclasses.replace(job_on_wire(scene.settings), **(change or {}))
    offer = JobOffer(run, (Seat("t1", ("t1",)),), job, schema_digest(cut_descriptors(job)))
    stop = asyncio.Event()
    site = asyncio.create_task(Client(scene.config("site-t1"), stop).run())
    ends: list[object] = []

    async def once(listener: Listener) -> None:
        session = await listener.accept(30)
        try:
            await session.send(offer)
            answer = await session.receive(30)
            if isinstance(answer, JobDecline):
                ends.append(answer)
                await session.close("failed")
                return
            patients: list = []
            while True:
                piece = await session.receive(30)
                patients += piece.patients
                if piece.last:
                    break
            await session.send(Begin(0, len(patients)))

            def forward(mode: str, step: int, batch: int = 0, origin: int = 0) -> Forward:
                samples = tuple(Sample(patients[0].key, (origin, 0, 10)) for _ in range(job.batch))
                return Forward(mode, step, batch, samples, batch_digest(step, samples, None))

            await ask(session, forward)
        except SplitprotoError as error:
            ends.append(error)
        await session.close("failed", timeout=0.2)

    try:
        async with asyncio.timeout(90):
            async with Listener(
                hub.network.listen,
                hub.credentials(),
                scene.settings.allow_list(),
                JOINT,
            ) as listener:
                for _ in range(times):
                    await once(listener)
            await asyncio.wait((site,), timeout=0.3)
            return ends, site.done() and (site.exception() or True)
    finally:
        stop.set()
        await asyncio.gather(site, return_exceptions=True)


@pytest.fixture
def brisk(monkeypatch):
    monkeypatch.setattr(client, "REST_S", 0.05)


async def one_window_for_ever(session: Session, forward) -> None:
    for batch in range(10_000):
        await session.send(forward("evaluate", 0, batch))
        assert isinstance(await session.receive(30), Activations)


async def one_step_for_ever(session: Session, forward) -> None:
    for number in range(10_000):
        await session.send(forward("train", 1, origin=number % 2))
        assert isinstance(await session.receive(30), Activations)
        await session.send(Rollback(0))
        assert isinstance(await session.receive(30), RolledBack)


async def rollbacks_for_ever(session: Session, forward) -> None:
    for _ in range(10_000):
        await session.send(Rollback(0))
        assert isinstance(await session.receive(30), RolledBack)


async def progress_for_ever(session: Session, forward) -> None:
    for number in range(1_000_000):
        await session.send(Progress(number, {"loss": 1.0}))
        await asyncio.sleep(0)


CASES = {
    "one window": (one_window_for_ever, {"max_window_evaluations": 20}, "max_window_evaluations"),
    "one step": (one_step_for_ever, {"max_step_repeats": 5}, "max_step_repeats"),
    "rollbacks": (rollbacks_for_ever, {"max_rollbacks": 7}, "max_rollbacks"),
    "progress": (progress_for_ever, {"max_messages_per_s": 5}, "max_messages_per_s"),
}


@pytest.mark.parametrize("case", CASES)
async def test_a_budget_ends_the_link_with_one_code_and_the_site_stays_up(
    scene, brisk, caplog, case: str
) -> None:
    """SP-11.15-2, SP-11.15-3, SP-11.15-4, SP-11.15-8; the second link finds the budget spent still."""
    ask, policy, setting = CASES[case]
    scene.cast("t1")
    scene.client("t1", policy={"coordinators": ["hub"], **policy})
    ends, gone = await malicious(scene, ask, times=2)
    assert len(ends) == 2 and not gone
    for end in ends:
        assert isinstance(end, RemoteError) and end.name == "policy-refused", end
        assert setting in str(end) and "\n" not in str(end)
    refused = [r for r in caplog.records if r.getMessage() == "policy.refused"]
    assert len(refused) == 2
    noted = entries(scene.folder / "site-t1" / "state" / TRAIL)
    assert len([line for line in noted if line["event"] == "policy.refused"]) == 2


async def test_messages_that_are_not_taken_do_not_end_the_daemon(scene, brisk, monkeypatch) -> None:
    """SP-11.15-4, SP-11.15-8: more than the site's memory has room for; it ends the link and stays."""
    from splitproto import session as sessions

    async def flood(session: Session, forward) -> None:
        monkeypatch.setattr(sessions, "UNREAD", 1000)
        for _ in range(200):
            for number in range(100):
                await session.send(Progress(number, {"loss": 1.0}))
            await asyncio.sleep(0)

    scene.cast("t1")
    ends, gone = await malicious(scene, flood)
    assert not gone
    assert isinstance(ends[0], RemoteError) and ends[0].name in ("flow-control", "policy-refused")


async def test_budgets_outlive_the_process(scene, tmp_path) -> None:
    """SP-11.15-5."""
    bounds = Bounds(max_rollbacks=2, max_step_repeats=10, max_window_evaluations=3)
    folder = tmp_path / "run"
    folder.mkdir()
    first = budgets.Budgets(folder, bounds)
    first.rollback()
    evaluate = Forward("evaluate", 0, 0, (Sample(bytes(16), (0, 0, 0)),), bytes(32))
    for _ in range(3):
        first.computed(evaluate)
    first.flush()
    again = budgets.Budgets(folder, bounds)
    with pytest.raises(budgets.BudgetSpent):
        again.computed(evaluate)
    again.computed(dataclasses.replace(evaluate, samples=(Sample(bytes(16), (1, 0, 0)),)))
    again.rollback()
    with pytest.raises(budgets.BudgetSpent):
        again.rollback()
    with pytest.raises(budgets.BudgetSpent):
        budgets.Budgets(folder, bounds).rollback()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2 << 20


def test_new_runs_of_a_day(tmp_path) -> None:
    """SP-11.15-5."""
    bounds = Bounds(max_runs_per_day=3)
    for number in range(3):
        budgets.new_run(tmp_path, bounds, now=1000.0 + number)
    with pytest.raises(budgets.BudgetSpent, match="max_runs_per_day"):
        budgets.new_run(tmp_path, bounds, now=2000.0)
    budgets.new_run(tmp_path, bounds, now=1000.5 + budgets.DAY_S)


def test_the_tally_never_counts_too_few() -> None:
    tally = budgets.Tally()
    for _ in range(50):
        for number in range(2000):
            tally.add(number.to_bytes(4, "big"))
    counts = [budgets.Tally(tally.octets()).add(number.to_bytes(4, "big")) for number in range(2000)]
    assert min(counts) == 51
    assert sum(count > 55 for count in counts) < 20
    assert len(tally.octets()) <= 1 << 20


def test_a_rate_forgives_with_time() -> None:
    now = 0.0
    rate = budgets.Rate(10, lambda: now)
    assert [rate.take() for _ in range(101)] == [True] * 100 + [False]
    now = 0.5
    assert [rate.take() for _ in range(6)] == [True] * 5 + [False]


@pytest.mark.parametrize(
    ("change", "policy", "setting"),
    [
        ({"spacing": (0.11, 0.11, 0.11)}, {}, "max_voxels"),
        ({"spacing": (0.5, 0.5, 0.5)}, {"max_voxels": 100_000}, "max_voxels"),
        (unet((512, 512, 512, 1024, 1024, 32)), {}, "max_parameters"),
        ({}, {"max_memory_mib": 1, "max_voxels": 10_000_000}, "max_memory_mib"),
        (unet((64, 128, 256, 256, 256, 32)), {"max_state_mib": 20}, "max_state_mib"),
    ],
)
async def test_terms_beyond_the_policy_are_declined_before_anything_is_taken(
    scene, change, policy, setting
) -> None:
    """SP-11.15-7."""
    scene.cast("t1")
    scene.client("t1", policy={"coordinators": ["hub"], **policy})

    async def nothing(session: Session, forward) -> None:
        raise AssertionError("the job was accepted")

    ends, gone = await malicious(scene, nothing, change=change)
    (declined,) = ends
    assert isinstance(declined, JobDecline) and declined.code == PolicyRefused.code
    assert setting in declined.reason
    assert gone, "terms that the policy forbids end the daemon, as before"
    assert [path for path in (scene.folder / "site-t1" / "state").iterdir() if [*path.glob("step-*")]] == []


def test_the_defaults_take_a_full_size_job(scene) -> None:
    scene.cast("t1")
    job = job_on_wire(scene.settings)
    full = dataclasses.replace(
        job, dimensions=3, **unet((32, 32, 64, 128, 256, 32), 3), window=(128, 128, 128), batch=1
    )
    check_bounds(full, backbone_of(full), (Seat("t1", ("t1",)),), Bounds(), 240 * 240 * 155)


def run(
    state, job: str, number: int, *, mib: int = 1, complete: bool = False, step: int = 1, answers: str = ""
):
    folder = state / f"{job}-{number:032x}"
    folder.mkdir(parents=True)
    (folder / f"step-{step:08d}.safetensors").write_bytes(bytes(mib << 20))
    (folder / ANSWERS).write_text(answers)
    if complete:
        run_folders.mark_complete(folder, h.Reporter())
    for path in folder.iterdir():
        os.utime(path, (number, number))
    return folder


def test_old_runs_go_and_the_newest_complete_one_of_a_job_stays(tmp_path) -> None:
    """SP-11.15-6."""
    old, best, newest = (run(tmp_path, "brats", n, complete=n < 3) for n in (1, 2, 3))
    other, stranger = run(tmp_path, "glioma", 4, complete=True), tmp_path / "brats-notes"
    stranger.mkdir()
    current = tmp_path / f"brats-{9:032x}"
    run_folders.make_room(tmp_path, current, Bounds(max_runs=4), 1 << 20, h.Reporter())
    assert [folder.exists() for folder in (old, best, newest, other, stranger)] == [
        False,
        True,
        True,
        True,
        True,
    ]
    run_folders.make_room(tmp_path, current, Bounds(max_state_mib=4), 2 << 20, h.Reporter())
    assert [folder.exists() for folder in (best, newest, other)] == [True, False, True]
    with pytest.raises(PolicyRefused, match="max_state_mib"):
        run_folders.make_room(tmp_path, current, Bounds(max_state_mib=3), 2 << 20, h.Reporter())
    assert best.exists() and other.exists()
    # The present run is never in its own way.
    run_folders.make_room(tmp_path, best, Bounds(max_runs=2), 1 << 20, h.Reporter())
    assert best.exists()
    with pytest.raises(DiskTrouble, match="max_state_mib"):
        run_folders.check_room(tmp_path, Bounds(max_state_mib=2), 1 << 20)


def pruned(state, bounds: Bounds) -> list[str]:
    gone = []
    told = h.Reporter(lambda happened: gone.append(happened.folder))
    run_folders.make_room(state, state / "now", bounds, 0, told)
    return [name.rpartition("-")[0] for name in gone]


def test_a_run_that_could_continue_goes_after_complete_ones(tmp_path) -> None:
    """SP-11.15-6: and with it its key, its answers, and the only view of its patients."""
    weeks = run(tmp_path, "weeks", 1, step=0, answers="{}\n")
    run(tmp_path, "joint", 2)
    run(tmp_path, "idle", 3, step=0)
    for number in (4, 5):
        run(tmp_path, "done", number, complete=True)
    assert pruned(tmp_path, Bounds(max_runs=5)) == ["done"]
    assert pruned(tmp_path, Bounds(max_runs=4)) == ["idle"]
    (tmp_path / SHOWN).write_text(
        json.dumps({"run": f"{1:032x}", "terms": "", "encoders": [], "people": ["aa"]}) + "\n"
    )
    assert pruned(tmp_path, Bounds(max_runs=3, max_runs_per_patient=1)) == ["joint"]
    for policy in ({"max_runs_per_patient": 1}, {"releases": "once"}):
        with pytest.raises(
            PolicyRefused, match=r"2 runs that this site keeps: remove folders of runs"
        ) as one:
            pruned(tmp_path, Bounds(max_runs=2, **policy))
        assert "\n" not in str(one.value) and weeks.exists()
    # Where patients may be shown again, a run that nobody continued must not stop new ones for ever.
    assert pruned(tmp_path, Bounds(max_runs=2)) == ["weeks"]


def test_runs_that_are_complete_before_anything_was_done_fill_nothing(tmp_path) -> None:
    """SP-11.15-6: a coordinator may say so at once, and of 16 jobs."""
    for number in range(1, 17):
        run(tmp_path, f"job{number}", number, step=0, complete=True)
    assert pruned(tmp_path, Bounds()) == ["job1"]
    run(tmp_path, "real", 17, step=0, answers="{}\n", complete=True)
    assert pruned(tmp_path, Bounds()) == ["job2"]


def test_a_link_in_the_state_folder_is_not_followed(tmp_path) -> None:
    """SP-11.15-6."""
    state, precious = tmp_path / "state", tmp_path / "precious"
    precious.mkdir()
    (precious / "scan").write_bytes(b"x")
    state.mkdir()
    (state / f"brats-{1:032x}").symlink_to(precious)
    run(state, "brats", 2)
    run_folders.make_room(state, state / "now", Bounds(max_runs=1), 0, h.Reporter())
    assert (precious / "scan").exists()


@pytest.mark.parametrize("mode", ["pause", "skip", "drop"])
async def test_a_decline_at_the_beginning_is_as_the_mode_says(scene, mode: str) -> None:
    """SP-11-35."""
    scene.cast("t1", "t2", training={"steps": 3}, absence={"mode": mode})
    scene.client("t1", policy={"coordinators": ["hub"], "levels": [4]})
    ran = await scene.together()
    assert isinstance(ran.clients["site-t1"], JobFailed)
    if mode == "pause":
        assert "site site-t1 declined the job" in str(ran.error)
        return
    assert ran.error is None and ran.result.complete
    assert ran.clients["site-t2"] is None
    assert ran.result.absences == {"site-t1": 3}
