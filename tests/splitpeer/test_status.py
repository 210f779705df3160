"""The board and its file, the lock of the state folder, and what can be seen of a daemon from outside."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitpeer.cli.status import headline
from splitpeer.daemon import board as status
from splitpeer.daemon import duty as on_duty
from splitpeer.daemon import observe as seen
from splitpeer.daemon.board import Board
from splitpeer.daemon.duty import Duty
from splitpeer.daemon.lock import StateLock, holder
from splitpeer.daemon.observe import PeerHead, Seen, look
from splitpeer.errors import ConfigError, DataError, JobFailed, PeerError
from splitpeer.settings.peer import PeerConfig
from splitpeer.storage import durable


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def make_duty(peer_toml: Path) -> Callable[[], Duty]:
    return lambda: Duty(PeerConfig.load(peer_toml, environ={}))


@pytest.fixture
def duty(make_duty: Callable[[], Duty]) -> Duty:
    return make_duty()


@pytest.fixture
def board(duty: Duty) -> Board:
    return duty.board


def document(state: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((state / "status.json").read_text())
    return found


async def written(
    state: Path, wanted: Callable[[dict[str, Any]], object], timeout: float = 20.0
) -> dict[str, Any]:
    """The document, as soon as it is as wanted."""
    async with asyncio.timeout(timeout):
        while not ((state / "status.json").exists() and wanted(document(state))):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return document(state)


# --- the board -----------------------------------------------------------------------------------------------


async def test_what_is_told_is_shown(duty: Duty, board: Board, state: Path) -> None:
    async with duty.on_duty():
        board.ready()
        board.phase("training", job="glioma", step=3, steps=12)
        board.set(loss=0.25, checkpoints=[0, 2])
        board.site("charite", seats="t1", state="present", link_since=time.monotonic() - 60, octets_in=5)
        board.waits("activations of step 4", who="charite", deadline_s=30)
        shown = await written(state, lambda d: d["waits"])
        assert stat.S_IMODE((state / "status.json").stat().st_mode) == 0o600
        assert stat.S_IMODE((state / "lock").stat().st_mode) == 0o600
        assert int((state / "lock").read_text()) == shown["pid"] == os.getpid()
        assert (shown["role"], shown["site"], shown["modality"], shown["ready"]) == (
            "client",
            "ukm",
            "flair",
            True,
        )
        assert shown["phase"] == "training"
        assert {k: shown["work"][k] for k in ("job", "step", "steps", "loss", "checkpoints")} == {
            "job": "glioma", "step": 3, "steps": 12, "loss": 0.25, "checkpoints": [0, 2]}  # fmt: skip
        (wait,) = shown["waits"]
        assert wait["until"]["monotonic"] - wait["since"]["monotonic"] == pytest.approx(30, abs=0.01)
        link = shown["sites"]["charite"]["link_since"]["monotonic"]
        assert shown["written"]["monotonic"] - link == pytest.approx(60, abs=2)
        assert shown["ended"] is None
        board.phase("done")
    shown = document(state)
    assert (shown["ended"]["phase"], shown["ended"]["cause"]) == ("done", "")
    assert sorted(os.listdir(state)) == ["lock", "status.json"]


async def test_since_when_is_noted_when_something_changes(duty: Duty, board: Board, state: Path) -> None:
    async with duty.on_duty():
        board.waits("activations of step 4", who="ukm", deadline_s=30)
        board.site("ukm", state="absent")
        board.phase("training")
        first = await written(state, lambda d: d["waits"])
        board.waits("activations of step 4", who="ukm", deadline_s=60)
        board.site("ukm", state="absent", octets_in=1)
        board.phase("training", step=1)
        again = await written(state, lambda d: d["work"])
        assert again["waits"][0]["since"] == first["waits"][0]["since"]
        assert again["waits"][0]["until"]["monotonic"] > first["waits"][0]["until"]["monotonic"] + 29
        assert again["sites"]["ukm"]["state_since"] == first["sites"]["ukm"]["state_since"]
        assert again["phase_since"] == first["phase_since"]
        board.waits("step 4 to be applied", who="ukm")
        board.waits("the disk")
        board.site("ukm", state="present")
        board.phase("saving")
        last = await written(state, lambda d: d["phase"] == "saving")
        assert [(w["who"], w["what"], w["until"]) for w in last["waits"]] == [
            ("", "the disk", None),
            ("ukm", "step 4 to be applied", None),
        ]
        assert last["waits"][1]["since"] != first["waits"][0]["since"]
        assert last["sites"]["ukm"]["state_since"] != first["sites"]["ukm"]["state_since"]
        board.waits(None, who="ukm")
        board.waits(None)
        board.waits(None, who="never waited for")
        assert (await written(state, lambda d: not d["waits"]))["phase"] == "saving"


async def test_whatever_it_is_told_the_work_goes_on(duty: Duty, board: Board, state: Path) -> None:
    board.phase("before duty", step=1)
    async with duty.on_duty():
        board.set(
            loss=float("nan"),
            rate=np.float32(0.5),
            count=np.int64(7),
            sites={"a"},
            thing=object(),
            text="\x1b[2J" + "x" * 1000,
            nested={1: [None, {"deep": float("inf")}]},
            step="seven",
            octets_in=None,
        )
        shown = (await written(state, lambda d: "thing" in d["work"]))["work"]
        assert (shown["loss"], shown["rate"], shown["count"], shown["sites"]) == (None, 0.5, 7, ["a"])
        assert shown["text"].startswith("?[2Jx")
        assert len(shown["text"]) == 300
        assert shown["nested"] == {"1": [None, {"deep": None}]}

        class Malicious:
            def __str__(self) -> str:
                raise RuntimeError("no")

        board.set(thing=Malicious())
        await asyncio.sleep(0.7)
        board.set(thing="mended")
        await written(state, lambda d: d["work"]["thing"] == "mended")


async def test_it_is_written_on_change_but_not_more_than_twice_a_second(
    duty: Duty, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    monkeypatch.setattr(durable, "replace", lambda path, text, **_: times.append(time.monotonic()))
    monkeypatch.setattr(on_duty, "BEAT_S", 1.5)
    async with duty.on_duty():
        for step in range(100):
            board.set(step=step)
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.6)
        busy = len(times)
        async with asyncio.timeout(30):
            while len(times) < busy + 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        between = np.diff(times)
    assert min(between[: busy - 1]) > 0.4
    # Nothing happened: a sign of life all the same.
    assert min(between[busy:]) > 1.4


async def test_a_reader_never_finds_half_a_file(
    duty: Duty, board: Board, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_duty, "TICK_S", 0.001)
    stop, wrong, read = threading.Event(), [], [0]

    def reads() -> None:
        while not stop.is_set():
            try:
                document(state)
                read[0] += 1
            except ValueError as error:
                wrong.append(error)

    async with duty.on_duty():
        await written(state, lambda d: True)
        thread = threading.Thread(target=reads)
        thread.start()
        for step in range(300):
            board.set(step=step, text="x" * step)
            await asyncio.sleep(0.002)
        stop.set()
        thread.join()
    assert read[0] > 100
    assert wrong == []


async def test_a_full_disk_is_one_warning(
    duty: Duty, board: Board, state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(on_duty, "TICK_S", 0.01)
    room = threading.Event()
    true = durable.replace

    def full(path: Path, text: bytes, **options: bool) -> None:
        if not room.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        true(path, text, **options)

    monkeypatch.setattr(durable, "replace", full)
    async with duty.on_duty():
        for step in range(20):
            board.set(step=step)
            await asyncio.sleep(0.02)
        assert not (state / "status.json").exists()
        room.set()
        board.set(step=20)
        await written(state, lambda d: d["work"]["step"] == 20)
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == ["status.failed"]


def test_a_write_that_fails_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    durable.replace(path, b"before", sync=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            durable.replace(path, b"after", sync=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


async def test_on_a_full_disk_old_figures_are_shown_as_old(
    duty: Duty, board: Board, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon lives and says so at once, not after the silence that marks one that hangs."""
    monkeypatch.setattr(on_duty, "TICK_S", 0.01)
    head = PeerHead.load(state.parent / "peer.toml")

    def full(path: Path, text: bytes, **options: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with duty.on_duty():
        board.set(step=1)
        await written(state, lambda d: d["work"].get("step") == 1)
        assert look(head).stale is None
        with monkeypatch.context() as patch:
            patch.setattr(durable, "replace", full)
            # As if it had been written an hour ago.
            document = json.loads((state / "status.json").read_text())
            document["written"]["monotonic"] -= 3600
            document["written"]["at"] = "2026-01-01T00:00:00.000Z"
            (state / "status.json").write_text(json.dumps(document))
            os.utime(state / "status.json", (0, 0))
            assert look(head).state == "silent"
            board.set(step=2)
            async with asyncio.timeout(20):
                while look(head).state == "silent":  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            seen_now = look(head)
            assert seen_now.state == "running"
            assert seen_now.stale == pytest.approx(3600, abs=30)
            assert seen_now.as_json()["stale_s"] == pytest.approx(3600, abs=30)
            assert "its disk is full or failing: figures of 60 min ago" in headline(seen_now)
        board.set(step=3)
        await written(state, lambda d: d["work"].get("step") == 3)
        assert look(head).stale is None


async def test_a_disk_that_hangs_holds_nobody_up(
    duty: Duty, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "LAST_WORD_S", 0.2)
    disk = threading.Event()
    monkeypatch.setattr(durable, "replace", lambda path, text, **_: disk.wait(30))
    longest = 0.0
    async with duty.on_duty():
        for step in range(60):
            before = time.monotonic()
            board.set(step=step)
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert longest < 5
    disk.set()


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (JobFailed("the loss is not a number"), "the loss is not a number"),
        (DataError("/srv/images/MUELLER_Erika.nii.gz: torn"), "DataError"),
        (ConfigError("/srv/images/MUELLER_Erika.nii.gz: torn"), "ConfigError"),
        (asyncio.CancelledError(), "CancelledError"),
    ],
)
async def test_why_it_ended_is_said_without_naming_files(
    duty: Duty, board: Board, state: Path, error: BaseException, cause: str
) -> None:
    with pytest.raises(type(error)):  # noqa: PT012
        async with duty.on_duty():
            board.phase("evaluating")
            raise error
    ended = document(state)["ended"]
    assert (ended["phase"], ended["cause"]) == ("evaluating", cause)
    assert holder(state) is None


def test_a_pace_follows_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    pace = status._Pace()
    assert pace.rate(0) is None
    for step in range(1, 200):
        clock[0] += 0.5
        rate = pace.rate(2 * step)
    assert rate == pytest.approx(4.0, rel=0.05)
    assert len(pace._marks) < 70
    clock[0] += 120
    assert pace.rate(398) < 1.0, "it stands still"
    assert pace.rate(100) is None, "a rollback"
    # Steps that take longer than the window still have a rate.
    for step in range(101, 110):
        clock[0] += 90
        slow = pace.rate(step)
    assert slow == pytest.approx(1 / 90)
    clock[0] += 60
    assert pace.rate(109) == pytest.approx(1 / 90), "it is in the middle of a step"


# --- the lock ------------------------------------------------------------------------------------------------


async def test_one_daemon_per_folder(make_duty: Callable[[], Duty], state: Path) -> None:
    async with make_duty().on_duty():
        with pytest.raises(ConfigError) as refused:
            async with make_duty().on_duty():
                pass
        assert f"(pid {os.getpid()}) uses this state folder: {state}: stop it" in str(refused.value)
        assert "\n" not in str(refused.value)
        assert document(state)["ended"] is None, "the one that was refused wrote nothing"
    async with make_duty().on_duty():
        assert holder(state) is not None
    assert holder(state) is None
    left = make_duty()
    duty = left.on_duty()
    await duty.__aenter__()
    left.forsake()
    async with make_duty().on_duty():
        pass
    await duty.__aexit__(None, None, None)


async def test_a_folder_that_cannot_be_written_is_not_held(duty: Duty, state: Path, monkeypatch) -> None:
    def full() -> None:
        raise OSError("no more threads")

    monkeypatch.setattr(duty.board, "open", full)
    with pytest.raises(OSError, match="threads"):
        async with duty.on_duty():
            pass
    assert holder(state) is None


async def test_those_who_look_keep_nobody_out(make_duty: Callable[[], Duty], state: Path) -> None:
    async with make_duty().on_duty():
        pass
    stop = threading.Event()

    def looks() -> None:
        while not stop.is_set():
            holder(state)

    watchers = [threading.Thread(target=looks) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    try:
        for _ in range(20):
            async with make_duty().on_duty():
                pass
    finally:
        stop.set()
        for watcher in watchers:
            watcher.join()


async def test_somebody_who_looks_a_little_longer(make_duty: Callable[[], Duty], state: Path) -> None:
    async with make_duty().on_duty():
        pass
    looking = os.open(state / "lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.12, os.close, (looking,)).start()
    async with make_duty().on_duty():
        pass


async def test_a_folder_that_cannot_be_used(duty: Duty, state: Path) -> None:
    state.write_text("a file")  # noqa: ASYNC240
    with pytest.raises(ConfigError, match=r"lock: cannot be written .*: free it, or change \[peer\] state"):
        async with duty.on_duty():
            pass


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is nobody's business."""
    process = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(100)"],
                               stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_a_signal_reaches_the_holder_and_nobody_else(
    state: Path, stranger: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    lock = StateLock(state)
    assert lock.take()
    held = holder(state)
    assert held is not None
    assert held.pid == os.getpid()
    got: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    try:
        assert held.signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert got == [signal.SIGUSR1]
    # The number of a process in a container, or on another machine that shares this disk, is somebody else here.
    (state / "lock").write_text(f"{stranger.pid}\n")
    held = holder(state)
    assert held is not None
    with pytest.raises(ConfigError, match="another container or machine"):
        held.signal(signal.SIGKILL)
    (state / "lock").write_text("")
    held = holder(state)
    assert held is not None
    assert held.pid is None
    with pytest.raises(ConfigError, match="does not say which process"):
        held.signal(signal.SIGKILL)
    # What a daemon that was killed left there; its number may be anybody's by now.
    (state / "lock").write_text(f"{stranger.pid}\n")
    held = holder(state)
    lock.release()
    assert holder(state) is None
    assert held is not None
    assert not held.signal(signal.SIGKILL)
    assert stranger.poll() is None


# --- seen from outside ---------------------------------------------------------------------------------------


def test_never_started(peer_toml: Path) -> None:
    found = look(PeerHead.load(peer_toml))
    assert (found.state, found.runs, found.site, found.role) == ("never", False, "ukm", "client")
    assert not (peer_toml.parent / "state").exists(), "who looks leaves nothing"


async def test_running_then_silent_then_stopped(
    duty: Duty, board: Board, peer_toml: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = PeerHead.load(peer_toml)
    async with duty.on_duty():
        board.phase("training", step=3, steps=12)
        await written(state, lambda d: d["work"])
        found = look(head)
        assert (found.state, found.pid, found.step) == ("running", os.getpid(), "step 3 of 12")
        quiet = replace(found, monotonic=found.monotonic + seen.SILENT_S + 1)
        assert seen._state(quiet) == "silent"
        assert quiet.last_sign == pytest.approx(16, abs=1)
        # A daemon that has just taken the lock is not what its predecessor wrote.
        text = (state / "status.json").read_text()
        (state / "status.json").write_text(text.replace(f'"pid": {os.getpid()}', '"pid": 1'))
        found = look(head)
        assert (found.state, found.phase) == ("running", "")
        os.utime(state / "lock", (0, time.time() - 60))
        assert look(head).state == "silent"
    found = look(head)
    assert (found.state, found.runs, found.phase, found.cause) == ("stopped", False, "training", "")


def test_killed(peer_toml: Path, state: Path) -> None:
    program = (
        "import asyncio\nfrom pathlib import Path\nfrom splitpeer.settings.peer import PeerConfig\n"
        "from splitpeer.daemon.duty import Duty\n"
        "async def main():\n"
        "    duty = Duty(PeerConfig.load(Path('peer.toml')))\n"
        "    async with duty.on_duty():\n"
        "        duty.board.phase('training', step=5, steps=12)\n"
        "        await asyncio.sleep(100)\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=peer_toml.parent)
    head = PeerHead.load(peer_toml)
    ends = time.monotonic() + 60
    while look(head).step != "step 5 of 12":
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert (look(head).state, look(head).pid) == ("running", process.pid)
    process.kill()
    process.wait()
    found = look(head)
    assert (found.state, found.step, found.phase) == ("died", "step 5 of 12", "training")


async def test_ages_survive_a_reboot(
    duty: Duty, board: Board, peer_toml: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with duty.on_duty():
        board.phase("training")
    path = state / "status.json"
    changed = document(state)
    changed["written"]["monotonic"] = 9e9
    path.write_text(json.dumps(changed))
    assert look(PeerHead.load(peer_toml)).last_sign < -1e9
    monkeypatch.setattr(seen, "boot", lambda: "another start")
    assert look(PeerHead.load(peer_toml)).last_sign == pytest.approx(0, abs=3)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 3, "pid": 1}', '{"version": 2}'])
async def test_a_file_that_is_none_of_ours(duty: Duty, peer_toml: Path, state: Path, text: str) -> None:
    async with duty.on_duty():
        pass
    (state / "status.json").write_text(text)
    found = look(PeerHead.load(peer_toml))
    assert found.state == ("died" if text == '{"version": 2}' else "never")
    assert isinstance(found, Seen)
    assert found.as_json()["last_sign_s"] is None


async def test_the_file_of_another_version_is_named(
    duty: Duty, board: Board, peer_toml: Path, state: Path
) -> None:
    head = PeerHead.load(peer_toml)
    board._head["version"] = 1
    async with duty.on_duty():
        await written(state, lambda d: d["version"] == 1)
        found = look(head)
        assert (found.state, found.other_version, found.step) == ("running", 1, "")
        assert headline(found) == (
            f"running (pid {os.getpid()}); its status.json is of version 1, and this splitpeer reads 2"
        )
    found = look(head)
    assert headline(found) == "not running; its status.json is of version 1, and this splitpeer reads 2"
    assert found.as_json()["other_version"] == 1


def test_settings_that_became_wrong_are_no_hindrance(peer_toml: Path) -> None:
    peer_toml.write_text(peer_toml.read_text() + '\n[runtime]\nthreads = "many"\n\n[unknown]\nkey = 1\n')
    with pytest.raises(PeerError):
        PeerConfig.load(peer_toml, environ={})
    assert look(PeerHead.load(peer_toml)).state == "never"
    peer_toml.write_text("[peer]\nsite = 'ukm'\n")
    with pytest.raises(ConfigError, match=r"\[peer\] role is missing"):
        PeerHead.load(peer_toml)
