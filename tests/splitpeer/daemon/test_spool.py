"""The spool between a daemon and those who ask it: what lies there is whole, private, bounded, and survives both."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from splitpeer.daemon import spool as spool_module
from splitpeer.daemon.spool import KEEP_S, ORPHAN_S, Spool, folder_of
from splitpeer.daemon.spooled import CAUSES, FINAL, TRANSITIONS, SpoolRequest, SpoolResult, Status, now
from splitpeer.errors import ConfigError, DataError, DeadlinePassed, DiskTrouble
from splitpeer.storage import durable
from tests.splitpeer.daemon.spooling import TASK, mask, provenance, request


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    opened = Spool(folder_of(tmp_path))
    opened.open()
    return opened


def ids(spool: Spool) -> list[str]:
    return [one.id for one in spool.waiting()]


def age(path: Path, seconds: float) -> None:
    at = time.time() - seconds
    os.utime(path, (at, at))


# --- the way through ------------------------------------------------------------------------------------------


def test_a_request_is_answered(spool: Spool) -> None:
    asked = request(want="mask", require=2)
    name = spool.ask(asked)
    assert spool.status(name) == Status(state="waiting")
    [waiting] = spool.waiting()
    assert (waiting.id, waiting.request, waiting.given_up) == (name, asked, "")
    assert spool.note(name, Status(state="queued", ahead=3))
    assert spool.note(name, Status(state="working", done=2, total=8))
    assert spool.status(name).done == 2
    given = mask(asked)
    assert spool.deliver(name, given)
    assert (spool.status(name).state, spool.status(name).done) == ("done", 8)
    assert ids(spool) == []
    found = spool.result(name)
    assert found.provenance == given.provenance
    assert np.array_equal(found.values, given.values) and found.values.dtype == np.uint8
    assert found.task == TASK and found.grid.shape == (6, 5, 4)
    spool.forget(name)
    assert os.listdir(spool.folder) == []
    with pytest.raises(DataError, match="gone"):
        spool.status(name)


def test_probabilities_become_the_regions_of_the_task(spool: Spool) -> None:
    asked = request(want="probabilities")
    values = np.random.default_rng(1).random((2, 4, 4, 4), np.float32)
    name = spool.ask(asked)
    assert spool.deliver(name, SpoolResult(provenance(asked), "probabilities", values))
    found = spool.result(name)
    assert np.array_equal(found.values, values)
    assert np.array_equal(found.regions, values > 0.5)


def test_requests_are_answered_in_the_order_they_came(spool: Spool) -> None:
    start = now()
    late, early = (
        spool.ask(request().model_copy(update={"created": start + timedelta(seconds=s)})) for s in (1, 0)
    )
    assert ids(spool) == [early, late]


def test_only_its_user_can_read_it(spool: Spool) -> None:
    before = os.umask(0)
    try:
        name = spool.ask(request())
        spool.note(name, Status(state="queued"))
        spool.deliver(name, mask(request()))
        spool.cancel(name)
    finally:
        os.umask(before)
    assert stat.S_IMODE(spool.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in spool.folder.iterdir()} == {0o600}
    assert len(list(spool.folder.iterdir())) == 4
    spool.folder.chmod(0o755)
    spool.open()
    assert stat.S_IMODE(spool.folder.stat().st_mode) == 0o700


# --- states ---------------------------------------------------------------------------------------------------


def test_nothing_follows_an_answer(spool: Spool) -> None:
    for last in sorted(FINAL):
        for state, after in TRANSITIONS.items():
            assert (last in after) == (state not in FINAL)
        name = spool.ask(request())
        assert spool.note(
            name,
            Status.failed("lost", "gone") if last == "failed" else Status.model_validate({"state": last}),
        )
        before = spool.status(name)
        for state in TRANSITIONS:
            assert not spool.note(name, Status.model_validate({"state": state}))
        assert not spool.deliver(name, mask(request()))
        assert spool.status(name) == before
        assert not (spool.folder / f"{name}.result.safetensors").exists()


def test_a_failure_is_the_asker_s_error(spool: Spool) -> None:
    codes = {}
    for cause, kind in CAUSES.items():
        name = spool.ask(request())
        spool.note(name, Status.failed(cause, "two\nlines \x1b[31m"))
        error = spool.status(name).error()
        assert type(error) is kind and str(error) == "two lines ?[31m"
        codes[cause] = json.loads((spool.folder / f"{name}.status.json").read_bytes())["exit"]
    assert codes == {
        "request": 4, "unknown": 4, "absent": 1, "incomplete": 1, "refused": 1, "misaligned": 1, "unusable": 1,
        "not-served": 1, "lost": 2, "busy": 3, "deadline": 3, "disk": 3, "internal": 1,
    }  # fmt: skip


def test_an_asker_gives_up(spool: Spool) -> None:
    kept, dropped, cancelled = (spool.ask(request(str(number))) for number in range(3))
    late = spool.ask(request(until=now() - timedelta(seconds=1)))
    spool.note(cancelled, Status(state="working", done=1, total=9))
    spool.cancel(cancelled)
    spool.forget(dropped)
    waiting = {one.id: one for one in spool.waiting()}
    assert {name: one.given_up for name, one in waiting.items()} == {
        kept: "", cancelled: "cancel", late: "deadline"
    }  # fmt: skip
    spool.give_up(waiting[cancelled])
    spool.give_up(waiting[late])
    assert spool.status(cancelled).state == "cancelled"
    assert (spool.status(late).state, spool.status(late).cause) == ("failed", "deadline")
    assert ids(spool) == [kept]
    assert not spool.note(dropped, Status(state="working"))
    assert not spool.deliver(dropped, mask(request()))
    assert not [path for path in spool.folder.iterdir() if path.name.startswith(dropped)]


def test_a_deadline_passes_while_the_folder_does_not_change(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = spool.ask(request(until=now() + timedelta(hours=1)))
    a_minute_ago = (time.time() - 60,) * 2
    os.utime(spool.folder, a_minute_ago)
    assert [one.given_up for one in spool.waiting()] == [""]
    (spool.folder / f"{'a' * 32}.request.json").write_bytes(request().write())
    os.utime(spool.folder, a_minute_ago)
    assert ids(spool) == [name], "the folder was read although it did not change"
    (spool.folder / f"{'a' * 32}.request.json").unlink()
    os.utime(spool.folder, a_minute_ago)
    later = now() + timedelta(hours=2)
    monkeypatch.setattr(spool_module, "now", lambda: later)
    assert [(one.id, one.given_up) for one in spool.waiting()] == [(name, "deadline")]


# --- crashes --------------------------------------------------------------------------------------------------

DAEMON = """
import os, signal, sys
from pathlib import Path
from splitpeer.daemon.spool import Spool
from splitpeer.daemon.spooled import Status
spool = Spool(Path(sys.argv[1]))
spool.open()
for one in spool.waiting():
    spool.note(one.id, Status(state="working", done=3, total=9))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_request_survives_the_daemon_that_worked_on_it(spool: Spool) -> None:
    asked = request()
    name = spool.ask(asked)
    killed = subprocess.run([sys.executable, "-c", DAEMON, str(spool.folder)], check=False)
    assert killed.returncode < 0
    assert spool.status(name).state == "working"
    again = Spool(spool.folder)
    again.open()
    assert [(one.id, one.request) for one in again.waiting()] == [(name, asked)]
    assert again.note(name, Status(state="waiting"))
    assert again.deliver(name, mask(asked))


def test_old_answers_and_what_crashes_left_are_removed(spool: Spool) -> None:
    fetched, fresh, open_ = (spool.ask(request(str(number))) for number in range(3))
    for name in (fetched, fresh):
        spool.deliver(name, mask(request()))
    for path in spool.folder.glob(f"{fetched}*"):
        age(path, KEEP_S + 60)
    for path in spool.folder.glob(f"{open_}*"):
        age(path, 10 * KEEP_S)
    half = spool.folder / f"{open_}.result{durable.PART}"
    orphan = spool.folder / f"{'0' * 32}.status.json"
    theirs = spool.folder / "README.txt"
    for path in (half, orphan, theirs):
        path.write_bytes(b"{")
        age(path, ORPHAN_S + 60)
    new = spool.folder / f"{'1' * 32}.result{durable.PART}"
    new.write_bytes(b"")
    spool.open()
    left = {path.name.partition(".")[0] for path in spool.folder.iterdir()}
    assert left == {fresh, open_, "README", "1" * 32}
    assert not half.exists() and not orphan.exists()
    # Nobody who asked so long ago still waits.
    assert [(one.id, one.given_up) for one in spool.waiting()] == [(open_, "deadline")]


# --- what others may have written -----------------------------------------------------------------------------

GOOD = {"version": 1, "patient": "P007", "created": "2026-01-02T03:04:05Z", "asker": "anna"}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"version": True}, {"patient": ""}, {"patient": "  "}, {"patient": "a\nb"}, {"patient": 7},
        {"patient": "x" * 256}, {"want": "everything"}, {"require": 0}, {"require": "none"}, {"require": 1.0},
        {"created": "yesterday"}, {"created": "2026-01-02T03:04:05"}, {"asker": ""}, {"colour": "red"}, {"until": 5},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_a_request_that_is_not_valid_is_answered_so(spool: Spool, change: dict[str, object]) -> None:
    assert SpoolRequest.read(json.dumps(GOOD).encode()).patient == "P007"
    (spool.folder / f"{'a' * 32}.request.json").write_text(json.dumps(GOOD | change))
    assert spool.waiting() == []
    status = spool.status("a" * 32)
    assert (status.state, status.cause, status.exit) == ("failed", "request", 4)
    assert next(iter(change)) in status.reason


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff\xfe", b"[" * 5000, b'{"version": ' + b"1" * 5000 + b"}", b"x" * (64 << 10)],
    ids=["empty", "list", "half", "utf16", "deep", "digits", "long"],
)
def test_a_request_that_is_no_json_is_answered_so(spool: Spool, content: bytes) -> None:
    (spool.folder / f"{'a' * 32}.request.json").write_bytes(content)
    assert spool.waiting() == []
    assert spool.status("a" * 32).cause == "request"


def test_no_link_is_followed_and_no_pipe_waited_for(spool: Spool, tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    good.write_text(json.dumps(GOOD))
    (spool.folder / f"{'a' * 32}.request.json").symlink_to(good)
    os.mkfifo(spool.folder / f"{'b' * 32}.request.json")
    assert spool.waiting() == []
    assert {spool.status(c * 32).cause for c in "ab"} == {"request"}


@pytest.mark.parametrize("name", ["../" * 10 + "a" * 2, "A" * 32, "a" * 33, ""])
def test_a_name_is_no_path(spool: Spool, name: str) -> None:
    with pytest.raises(DataError, match="32 hexadecimal digits"):
        spool.status(name)


def test_a_torn_result_is_refused(spool: Spool) -> None:
    asked = request()
    name = spool.ask(asked)
    spool.deliver(name, mask(asked))
    path = spool.folder / f"{name}.result.safetensors"
    whole = path.read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="ask again"):
            spool.result(name)


def test_a_result_whose_parts_do_not_fit_is_refused() -> None:
    asked = request()
    good = mask(asked)
    bad = [
        SpoolResult(good.provenance, "mask", good.values[:1]),
        SpoolResult(good.provenance, "mask", good.values.astype(np.float32)),
        SpoolResult(good.provenance, "mask", good.values * 2),
        SpoolResult(good.provenance, "mask", good.values[:, :0]),
        SpoolResult(good.provenance, "probabilities", np.full((2, 2, 2, 2), np.nan, np.float32)),
        SpoolResult(provenance(asked, affine=np.zeros((4, 4))), "mask", good.values),
    ]
    for one in bad:
        with pytest.raises(ValueError, match="its "):
            SpoolResult.decode(one.encode())


# --- limits and trouble ---------------------------------------------------------------------------------------


def test_more_requests_than_are_allowed(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "MOST_OPEN", 2)
    first, second = spool.ask(request()), spool.ask(request())
    with pytest.raises(DeadlinePassed, match="2 requests"):
        spool.ask(request())
    (spool.folder / f"{'f' * 32}.request.json").write_bytes(request().write())
    assert ids(spool) == [first, second]
    assert spool.status("f" * 32).cause == "busy"
    spool.deliver(first, mask(request()))
    assert ids(spool) == [second]
    spool.ask(request())


def test_a_spool_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="never served"):
        Spool(folder_of(tmp_path)).ask(request())
    (tmp_path / "inference").write_text("")
    with pytest.raises(ConfigError, match="not a folder"):
        Spool(folder_of(tmp_path)).ask(request())


def test_a_full_disk(spool: Spool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked = request("Jane Doe")
    one, two = spool.ask(asked), spool.ask(asked)
    write, full = os.write, True

    def no_room(file: int, data: bytes) -> int:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", no_room)
    with pytest.raises(DiskTrouble, match="make room"):
        spool.ask(asked)
    assert not spool.deliver(one, mask(asked))
    assert spool.note(two, Status(state="working", done=1, total=2))
    assert ids(spool) == [two]
    assert sorted(path.name for path in spool.folder.iterdir()) == sorted(
        f"{name}.request.json" for name in (one, two)
    )
    full = False
    assert ids(spool) == [two]
    assert (spool.status(one).cause, spool.status(one).exit) == ("disk", 3)
    assert "make room" in spool.status(one).reason
    assert "Jane" not in caplog.text and "spool.trouble" in caplog.text


def test_no_patient_is_in_a_log_line(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    name = spool.ask(request("Jane Doe"))
    (spool.folder / f"{'a' * 32}.request.json").write_text('{"patient": "Jane Doe"}')
    spool.waiting()
    spool.note(name, Status.failed("unknown", "no image of Jane Doe"))
    for path in spool.folder.iterdir():
        age(path, 2 * KEEP_S)
    spool.tidy()
    assert "spool.tidied" in caplog.text and "Jane" not in caplog.text
