"""The recorder: what it keeps, what it leaves out, and that none of its troubles disturbs the recorded peer."""

from __future__ import annotations

import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitpeer.captures.appended import BLOCK
from splitpeer.captures.parts import PartWriter
from splitpeer.captures.reader import open_capture
from splitpeer.captures.recorder import Limits, Recorder, read_key
from splitpeer.errors import ConfigError, DataError
from splitproto.capture import Gap, Header, Recorded, Sampling
from splitproto.messages import (
    Activations,
    Applied,
    Begin,
    Forward,
    Gradients,
    JobAccept,
    Logits,
    LossGradients,
    Message,
    Progress,
)
from splitproto.records import Sample

RUN = bytes(range(16))
HEADER = Header("coordinator", "hub", "fed", "test", 1.0, run=RUN)
KEYS = (bytes([0xAB]) * 16, bytes([0xCD]) * 16)


def batch(step: int, patient: int = 0, size: int = 100, mode: str = "train") -> list[tuple[str, Message]]:
    """The messages of one step, `size` float32 in each of the two with tensors."""
    array = {"x0": np.full((1, size), step, "<f4")}
    key = Sample(KEYS[patient], (0, 0, 0))
    number = 0 if mode == "train" else patient
    there = [
        ("out", Forward(mode, step, number, (key,), bytes(32))),
        ("in", Activations(mode, step, number, bytes(32), array)),
    ]
    back: list[tuple[str, Message]] = [("out", Gradients(step, array)), ("in", Applied(step))]
    return there + (back if mode == "train" else [])


def record(recorder: Recorder, *said: list[tuple[str, Message]]) -> None:
    for one in said:
        for direction, message in one:
            recorder.tap("charite", direction, message)


def written(path: Path, key: bytes | None = None) -> list[tuple[str, int]]:
    """(name, step) of all messages; every one is read."""
    capture = open_capture(path, key)
    return [(one.name, getattr(one.message, "step", -1)) for one in capture.records()]


def until(true: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def warnings(caplog: pytest.LogCaptureFixture, name: str) -> list[dict[str, Any]]:
    return [r.fields for r in caplog.records if r.getMessage() == name]  # type: ignore[attr-defined]


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that takes nothing until the event is set."""
    free, append = threading.Event(), PartWriter.append

    def slow(self: PartWriter, buffers: Any, *, direct: bool) -> None:
        assert free.wait(30)
        append(self, buffers, direct=direct)

    monkeypatch.setattr(PartWriter, "append", slow)
    yield free
    free.set()


def new_key(path: Path) -> bytes:
    path.write_bytes(secrets.token_bytes(32))
    return path.read_bytes()


# --- what is kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encrypted", [False, True])
def test_everything_in_order_also_what_came_before_the_header(tmp_path: Path, encrypted: bool) -> None:
    key = new_key(tmp_path / "capture.key") if encrypted else None
    path = tmp_path / "coord.cap"
    recorder = Recorder(path, key=key)
    recorder.tap("charite", "in", JobAccept(bytes(16), 0, (), 3))
    assert not path.exists()
    before = time.time()
    recorder.open(HEADER)
    record(recorder, batch(1), batch(1, mode="evaluate"))
    recorder.tap("charite", "out", Progress(1, {"loss": 0.5}))
    state = recorder.close("closed", "done")
    assert (state.records, state.lost, state.ended) == (8, 0, "closed")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == state.octets
    capture = open_capture(path, key)
    found = list(capture.records())
    names = [
        "job-accept",
        "forward",
        "activations",
        "gradients",
        "applied",
        "forward",
        "activations",
        "progress",
    ]
    assert [one.name for one in found] == names
    assert [one.direction for one in found] == ["in", "out", "in", "out", "in", "out", "in", "out"]
    assert {one.peer for one in found} == {"charite"}
    assert found[0].time <= before <= found[1].time <= time.time()
    assert found[2].message.tensors["x0"].tolist() == [[1.0] * 100]  # type: ignore[attr-defined]
    verdict = capture.verify()
    assert (verdict.whole, verdict.ended, verdict.records) == (True, True, 8)
    assert verdict.last_chain == state.last_chain
    assert capture.end is not None
    assert (capture.end.reason, capture.end.text) == ("closed", "done")
    assert (b"charite" in path.read_bytes()) is not encrypted


def test_every_third_step(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.cap", sampling=Sampling(every=3))
    recorder.open(HEADER)
    record(recorder, *(batch(step) for step in range(1, 9)), batch(5, mode="evaluate"))
    recorder.tap("charite", "out", Begin(0, 1))
    assert recorder.close().lost == 0
    names = ["forward", "activations", "gradients", "applied"]
    steps = [(name, step) for step in (1, 4, 7) for name in names]
    assert written(tmp_path / "a.cap") == [*steps, ("forward", 5), ("activations", 5), ("begin", 0)]
    assert open_capture(tmp_path / "a.cap").header.sampling == Sampling(3)


def test_chosen_patients(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.cap", sampling=Sampling(keys=("cdc", "00")))
    recorder.open(HEADER)
    record(recorder, batch(1), batch(2, 1), batch(9, 0, mode="evaluate"), batch(9, 1, mode="evaluate"))
    # A step that is asked for again after a rollback, with other patients.
    record(recorder, batch(1, 1), batch(2, 0))
    recorder.close()
    names = ["forward", "activations", "gradients", "applied"]
    expected = [
        *((name, 2) for name in names),
        ("forward", 9),
        ("activations", 9),
        *((name, 1) for name in names),
    ]
    assert written(tmp_path / "a.cap") == expected


def test_each_sites_part_of_a_batch_is_chosen_by_itself(tmp_path: Path) -> None:
    """Parts are announced one after the other, and the answers come later; logits are of the whole batch."""
    recorder = Recorder(tmp_path / "a.cap", sampling=Sampling(keys=("cd",)))
    recorder.open(HEADER)
    parts, array = {"a": [1], "b": [0], "labels": [0, 1]}, {"x0": np.zeros((1, 8), "<f4")}
    samples = {peer: tuple(Sample(KEYS[one], (0, 0, 0)) for one in has) for peer, has in parts.items()}
    for peer in ("a", "b"):
        recorder.tap(peer, "out", Forward("train", 1, 0, samples[peer], bytes(32)))
    recorder.tap("b", "out", Logits(1, samples["labels"], bytes(32), None, array))
    recorder.tap("b", "in", LossGradients(1, bytes(32), None, array))
    for peer in ("a", "b"):
        recorder.tap(peer, "in", Activations("train", 1, 0, bytes(32), array))
        recorder.tap(peer, "out", Gradients(1, array))
    recorder.close()
    kept = [
        (one.peer, one.message.name)
        for one in open_capture(tmp_path / "a.cap").records()
        if isinstance(one, Recorded)
    ]
    of_a = [("a", "activations"), ("a", "gradients")]
    assert kept == [("a", "forward"), ("b", "logits"), ("b", "loss-gradients"), *of_a]


# --- what is not ------------------------------------------------------------------------------------------


def test_a_slow_disk_makes_a_gap_and_nobody_waits(
    tmp_path: Path, stuck: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path / "a.cap", limits=Limits(queue=10_000))
    recorder.open(HEADER)
    record(recorder, *(batch(step, size=1000) for step in range(1, 5)))
    assert recorder.state.lost > 0, "and tap has returned, though nothing could be written"
    stuck.set()
    until(lambda: recorder.state.records == 3)
    record(recorder, batch(9))
    state = recorder.close()
    (part,) = open_capture(tmp_path / "a.cap").parts
    kinds = [one.name if isinstance(one, Recorded) else one.kind for one in part.records()]
    assert kinds.count("gap") == 1
    gap = kinds.index("gap")
    assert kinds[gap + 1 :] == ["forward", "activations", "gradients", "applied", "end"]
    (found,) = (one for one in part.records() if isinstance(one, Gap))
    assert (found.reason, found.records) == ("queue", state.lost)
    assert state.records + state.lost == 20
    (warning,) = warnings(caplog, "capture.gap")
    assert warning["messages"] == state.lost
    verdict = open_capture(tmp_path / "a.cap").verify()
    assert (verdict.whole, verdict.gaps, verdict.lost) == (True, 1, state.lost)


def test_what_a_slow_disk_leaves_waiting_goes_to_the_cache(
    tmp_path: Path, stuck: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways, append = [], PartWriter.append

    def noted(self: PartWriter, buffers: Any, *, direct: bool) -> None:
        ways.append(direct)
        append(self, buffers, direct=direct)

    monkeypatch.setattr(PartWriter, "append", noted)
    recorder = Recorder(tmp_path / "a.cap", limits=Limits(queue=50_000))
    recorder.open(HEADER)
    record(recorder, *(batch(step, size=1000) for step in range(1, 5)))
    until(lambda: ways)
    stuck.set()
    assert recorder.close().lost == 0
    # The first may have been taken before the others came.
    assert sorted(ways[1:]) == ways[1:], "through the cache while more than half of the queue is taken"
    assert (ways[1], ways[-1]) == (False, True)
    assert open_capture(tmp_path / "a.cap").verify().records == 16


def test_a_gap_at_the_very_end_is_noted(tmp_path: Path, stuck: threading.Event) -> None:
    recorder = Recorder(tmp_path / "a.cap", limits=Limits(queue=5_000))
    recorder.open(HEADER)
    record(recorder, batch(1, size=1000), batch(2, size=1000))
    threading.Timer(0.05, stuck.set).start()
    state = recorder.close()
    assert open_capture(tmp_path / "a.cap").verify().lost == state.lost > 0


def test_too_much_before_the_header_is_a_gap(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.cap", limits=Limits(early=6_000))
    record(recorder, batch(1, size=1000), batch(2, size=1000))
    recorder.open(HEADER)
    record(recorder, batch(3))
    recorder.close()
    gaps = open_capture(tmp_path / "a.cap").gaps()
    assert [(gap.reason, gap.records) for gap in gaps] == [("early", 1), ("early", 4)], (
        "what is small still fits"
    )
    assert written(tmp_path / "a.cap")[-1] == ("applied", 3)


def test_the_cap_ends_the_capture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.cap"
    recorder = Recorder(path, limits=Limits(total=60_000))
    recorder.open(HEADER)
    record(recorder, *(batch(step, size=1000) for step in range(1, 20)))
    until(lambda: recorder.state.ended)
    recorder.tap("charite", "out", Begin(0, 1))
    state = recorder.close()
    assert state.ended == "size"
    assert state.records + state.lost == 19 * 4 + 1
    assert path.stat().st_size <= 60_000
    capture = open_capture(path)
    verdict = capture.verify()
    assert (verdict.whole, verdict.ended, verdict.records) == (True, True, state.records)
    assert verdict.last_chain == state.last_chain
    assert capture.end is not None
    assert capture.end.reason == "size"
    assert len(warnings(caplog, "capture.ended")) == 1


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encrypted", [False, True])
def test_rotation(tmp_path: Path, encrypted: bool) -> None:
    key = new_key(tmp_path / "key") if encrypted else None
    recorder = Recorder(tmp_path / "coord.cap", limits=Limits(part=20_000), key=key)
    recorder.open(HEADER)
    said = [batch(step, size=1000) for step in range(1, 9)]
    record(recorder, *said)
    state = recorder.close()
    files = sorted(file.name for file in tmp_path.glob("*.cap"))
    assert len(files) > 2
    assert all((tmp_path / file).stat().st_size <= 20_000 for file in files)
    assert sum((tmp_path / file).stat().st_size for file in files) == state.octets
    capture = open_capture(tmp_path / "coord.cap", key)
    assert [part.path.name for part in capture.parts] == ["coord.cap"] + [
        f"coord.{n}.cap" for n in range(1, len(files))
    ]
    assert [part.header.part for part in capture.parts] == list(range(len(files)))
    steps = [message.step for one in said for _, message in one]  # type: ignore[attr-defined]
    assert [step for _, step in written(tmp_path / "coord.cap", key)] == steps
    verdict = capture.verify()
    assert (verdict.whole, verdict.ended, verdict.records) == (True, True, 32)
    assert verdict.last_chain == state.last_chain
    salts = {part.header.salt for part in capture.parts}
    assert len(salts) == (len(files) if encrypted else 1)


def test_a_message_larger_than_a_part_has_its_own(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.cap", limits=Limits(part=8_000))
    recorder.open(HEADER)
    record(recorder, batch(1, size=10_000))
    recorder.close()
    assert [name for name, _ in written(tmp_path / "a.cap")] == [
        "forward",
        "activations",
        "gradients",
        "applied",
    ]


def test_a_restart_goes_on_in_a_new_part(tmp_path: Path) -> None:
    path = tmp_path / "coord.cap"
    for step in (1, 2, 3):
        recorder = Recorder(path)
        recorder.open(HEADER)
        record(recorder, batch(step))
        recorder.close()
        if step == 2:
            # As a crash leaves it: without its end and with a torn record.
            later = tmp_path / "coord.1.cap"
            later.write_bytes(later.read_bytes()[:-5000])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["coord.1.cap", "coord.2.cap", "coord.cap"]
    capture = open_capture(path)
    assert [step for _, step in written(path)] == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    verdict = capture.verify()
    assert (verdict.whole, verdict.ended, verdict.gaps) == (True, True, 1)


def test_a_recording_goes_on_after_a_file_of_version_2(tmp_path: Path) -> None:
    vectors = Path(__file__).parents[3] / "spec" / "vectors" / "capture.json"
    (case,) = (one for one in json.loads(vectors.read_text())["cases"] if one["name"] == "version-2")
    path = tmp_path / "a.cap"
    path.write_bytes(bytes.fromhex(case["input"]))
    recorder = Recorder(path)
    recorder.open(replace(HEADER, federation="brats", run=open_capture(path).header.run))
    record(recorder, batch(1))
    recorder.close()
    capture = open_capture(path)
    assert [part.header.block for part in capture.parts] == [1, BLOCK]
    verdict = capture.verify()
    assert (verdict.whole, verdict.ended, verdict.records) == (True, True, 6)


def test_another_run_is_not_mixed_in_and_nothing_is_overwritten(tmp_path: Path) -> None:
    path, other = tmp_path / "a.cap", bytes(range(100, 116))
    for run in (RUN, other, other):
        recorder = Recorder(path)
        recorder.open(Header("coordinator", "hub", "fed", "test", 1.0, run=run))
        record(recorder, batch(1))
        recorder.close()
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["a-64656667.1.cap", "a-64656667.cap", "a.cap"]
    assert open_capture(path).header.run == RUN
    assert open_capture(tmp_path / "a-64656667.cap").verify().records == 8


def test_a_file_that_is_no_capture_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.cap", f"a-{RUN.hex()[:8]}.cap"):
        (tmp_path / name).write_text("a diary")
    recorder = Recorder(tmp_path / "a.cap")
    recorder.open(HEADER)
    record(recorder, batch(1))
    until(lambda: recorder.state.ended)
    state = recorder.close()
    assert (state.ended, state.records, state.lost, state.last_chain) == ("failed", 0, 4, None)
    assert {file.read_text() for file in tmp_path.iterdir()} == {"a diary"}
    (warning,) = warnings(caplog, "capture.ended")
    assert "move it away" in warning["why"]


def test_a_file_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.cap").write_text("a diary")
    with pytest.raises(FileExistsError):
        PartWriter(tmp_path / "a.cap", 0, None, HEADER, None)
    assert (tmp_path / "a.cap").read_text() == "a diary"


# --- trouble ----------------------------------------------------------------------------------------------


def test_without_a_header_there_is_no_file(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.cap")
    record(recorder, batch(1))
    assert recorder.close().records == 0
    recorder.open(HEADER)
    record(recorder, batch(2))
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_and_opening_twice(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.cap")
    recorder.open(HEADER)
    recorder.open(HEADER)
    first, second = recorder.close("failed", "line\nbreak"), recorder.close("closed")
    assert first == second
    assert first.ended == "failed"
    end = open_capture(tmp_path / "a.cap").end
    assert end is not None
    assert end.text == "line?break"


def test_what_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder that can be written to"):
        Recorder(tmp_path / "missing" / "a.cap")
    with pytest.raises(DataError, match="folder that can be written to"):
        Recorder(tmp_path)
    with pytest.raises(ConfigError, match="32 bytes"):
        Recorder(tmp_path / "a.cap", key=b"short")
    with pytest.raises(ConfigError, match="hexadecimal"):
        Recorder(tmp_path / "a.cap", sampling=Sampling(keys=("BraTS_001",)))


def test_keys(tmp_path: Path) -> None:
    key = new_key(tmp_path / "key")
    assert read_key(tmp_path / "key") == key
    (tmp_path / "text").write_text("secret\n")
    with pytest.raises(DataError, match="32 bytes"):
        read_key(tmp_path / "text")
    with pytest.raises(DataError, match="No such file"):
        read_key(tmp_path / "none")


def test_a_message_that_cannot_be_written_ends_the_recording_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path / "a.cap")
    recorder.open(HEADER)
    record(recorder, batch(1))
    recorder.tap("charite", "out", Gradients(2, {"x0": np.zeros(3, "complex64")}))
    until(lambda: recorder.state.ended)
    record(recorder, batch(2))
    state = recorder.close()
    assert (state.ended, state.records, state.lost) == ("failed", 4, 5)
    verdict = open_capture(tmp_path / "a.cap").verify()
    assert (verdict.whole, verdict.ended, verdict.records) == (True, True, 4)
    assert "complex64" in warnings(caplog, "capture.ended")[0]["why"]


def test_almost_full_the_disk_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(PartWriter, "free", property(lambda self: 300_000 - self.octets))
    recorder = Recorder(tmp_path / "a.cap", limits=Limits(spare=250_000))
    recorder.open(HEADER)
    record(recorder, *(batch(step, size=1000) for step in range(1, 20)))
    until(lambda: recorder.state.ended)
    state = recorder.close()
    assert state.ended == "disk"
    assert 30_000 < (tmp_path / "a.cap").stat().st_size <= 50_000
    capture = open_capture(tmp_path / "a.cap")
    assert capture.verify().whole
    assert capture.end is not None
    assert capture.end.reason == "disk"
    assert len(warnings(caplog, "capture.ended")) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system of 1 MiB")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("trusted", [True, False])
def test_a_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool) -> None:
    """What the disk says of its room is believed, or (not trusted) writing itself fails."""
    if not trusted:
        monkeypatch.setattr(PartWriter, "free", property(lambda self: 1 << 40))
    recorder = Recorder(small_disk / "a.cap", limits=Limits(spare=64 << 10))
    recorder.open(HEADER)
    record(recorder, *(batch(step, size=20_000) for step in range(1, 12)))
    until(lambda: recorder.state.ended)
    record(recorder, batch(30))
    state = recorder.close()
    assert state.ended == "disk"
    assert state.records + state.lost == 48
    left = os.statvfs(small_disk)
    assert trusted == (left.f_bavail * left.f_frsize >= 64 << 10)
    verdict = open_capture(small_disk / "a.cap").verify()
    assert (verdict.whole, verdict.ended, verdict.records) == (True, True, state.records)
    assert verdict.last_chain == state.last_chain


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    head = "import sys\nfrom test_recorder import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("key", ["", "00" * 32])
def test_a_file_that_may_not_grow(tmp_path: Path, key: str) -> None:
    """The same as a full disk or a quota, for any user: writing fails in the middle of a record."""
    # Header, 15 steps and a forward are whole; of the activations' two blocks one is left, and then takes the end.
    path, limit = tmp_path / "a.cap", (1 + 15 * 6 + 2) * BLOCK + 1000
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
        recorder = Recorder(Path(sys.argv[1]), key=bytes.fromhex(sys.argv[2]) or None)
        recorder.open(HEADER)
        record(recorder, *(batch(step, size=1000) for step in range(1, 20)))
        until(lambda: recorder.state.ended)
        record(recorder, batch(30))
        print(recorder.close().ended, recorder.state.records)
    """
    process = started(code, path, key, limit)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    reason, records = out.split()
    assert (reason, path.stat().st_size <= limit) == ("size", True)
    verdict = open_capture(path, bytes.fromhex(key) or None).verify()
    # Encrypted, the number of the torn record is not used again: then there is no end.
    assert (verdict.whole, verdict.ended, verdict.records) == (True, not key, int(records))
    assert verdict.records == 15 * 4 + 1


def test_killed_while_recording(tmp_path: Path) -> None:
    path = tmp_path / "a.cap"
    code = """
        recorder = Recorder(Path(sys.argv[1]))
        recorder.open(HEADER)
        for step in range(1, 1_000_000):
            record(recorder, batch(step, size=10_000))
            until(lambda: recorder.state.records > 4 * step - 20)
            print(step, flush=True)
    """
    process = started(code, path)
    assert process.stdout is not None
    assert process.stderr is not None
    while process.stdout.readline().strip() != "40":
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    capture = open_capture(path)
    verdict = capture.verify()
    assert not verdict.ended
    assert verdict.whole or "cut off" in (verdict.problem or "")
    assert verdict.records >= 4 * 40 - 20
    steps = [step for _, step in written(path)]
    assert steps == [1 + n // 4 for n in range(verdict.records)]
    # And the run goes on in a new part.
    recorder = Recorder(path)
    recorder.open(HEADER)
    record(recorder, batch(99))
    recorder.close()
    assert open_capture(path).verify().whole


def test_a_process_that_forgets_to_close_ends_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.cap"
    code = """
        recorder = Recorder(Path(sys.argv[1]))
        recorder.open(HEADER)
        record(recorder, batch(1))
        raise SystemExit(3)
    """
    process = started(code, path)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 3, err
    capture = open_capture(path)
    assert capture.verify().records == 4
    assert capture.end is not None
    assert capture.end.reason == "failed"


# --- the claim that `tap` rests on ------------------------------------------------------------------------


def test_arrays_that_were_sent_or_received_do_not_change(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from splitpeer.models import build_decoder, build_encoder, unet_backbone
    from splitpeer.training.optimiser import Schedule
    from splitpeer.training.split_step import ClientHalf, CoordinatorHalf

    backbone = unet_backbone(2, (2, 2, 4, 4, 8, 2))

    def half(kind: Any, network: Any) -> Any:
        optimiser = torch.optim.Adam(network.parameters(), 1e-2)
        return kind(network, optimiser, Schedule(optimiser, "constant", 10))

    client = half(ClientHalf, build_encoder(backbone, seed=0))
    coordinator = half(CoordinatorHalf, build_decoder(backbone, ("t1",), seed=1))
    path = tmp_path / "a.cap"
    recorder = Recorder(path)
    recorder.open(HEADER)
    copies: list[dict[str, np.ndarray]] = []

    def pass_on(
        direction: str, kind: Any, arrays: dict[str, np.ndarray], *head: Any
    ) -> dict[str, np.ndarray]:
        """What arrives is writable, as a connection's own arrays are."""
        arrived = {name: array.copy() for name, array in arrays.items()}
        for one in (arrays, arrived):
            copies.append({name: array.copy() for name, array in one.items()})
            taps.append((direction, kind(*head, one)))
        return arrived

    taps: list[tuple[str, Message]] = []
    images = torch.randn(2, 1, 32, 32)
    target = (torch.rand(2, 3, 32, 32) > 0.5).float()
    for step in (1, 2):
        sent = pass_on("in", Activations, client.forward(images), "train", step, 0, bytes(32))
        _, gradients = coordinator.step({"t1": sent}, target)
        client.backward(pass_on("out", Gradients, gradients["t1"], step))
        evaluated = pass_on("in", Activations, client.evaluate(images), "evaluate", step, 0, bytes(32))
        coordinator.predict({"t1": evaluated})
    record(recorder, taps)
    recorder.close()
    found = [one.message.tensors for one in open_capture(path).records()]  # type: ignore[attr-defined]
    for kept, copy in zip(found, copies, strict=True):
        assert all(np.array_equal(kept[name], copy[name]) for name in copy)
