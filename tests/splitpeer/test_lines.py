"""Lines on a full disk, and after a crash: complete ones in order, and no writer is stopped."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from splitpeer.storage import lines
from splitpeer.storage.lines import Lines

if TYPE_CHECKING:
    from tests.conftest import SmallDisk


def steps(path: Path) -> list[int]:
    """Of all lines, each of which must be whole."""
    text = path.read_bytes()
    assert text.endswith(b"\n") or not text
    return [json.loads(line)["step"] for line in text.splitlines()]


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == lines.__name__]


@pytest.fixture
def kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Lines:
    caplog.set_level(logging.INFO)
    return Lines(tmp_path / "metrics.jsonl", most=50)


def test_lines_are_appended(kept: Lines) -> None:
    for step in range(3):
        kept.add(step=step, loss=0.5)
    assert steps(kept.path) == [0, 1, 2]
    Lines(kept.path).add(step=3)
    assert steps(kept.path) == [0, 1, 2, 3]
    kept.begin()
    assert steps(kept.path) == []


def test_a_full_disk(small_disk: SmallDisk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    kept = Lines(small_disk.folder / "metrics.jsonl")
    kept.add(step=0)
    # Room for some lines, not for all, and never for the last one whole.
    small_disk.fill(but=4096)
    for step in range(1, 500):
        kept.add(step=step, loss=0.1234567 * step)
    written = steps(kept.path)
    assert written == list(range(len(written)))
    assert 50 < len(written) < 450
    assert kept.waiting == 500 - len(written)
    assert kept.path.stat().st_size % 4096, "the torn rest of a line was taken back"
    assert events(caplog) == ["lines.waiting"]
    small_disk.make_room()
    kept.add(step=500)
    assert steps(kept.path) == list(range(501))
    assert events(caplog) == ["lines.waiting", "lines.written"]
    assert caplog.records[-1].fields["lost"] == 0  # type: ignore[attr-defined]
    # A second time it is said again.
    small_disk.fill()
    for step in range(501, 900):
        kept.add(step=step)
    assert not kept.flush()
    assert events(caplog)[2:] == ["lines.waiting"]
    small_disk.make_room()
    assert kept.flush()
    assert steps(kept.path) == list(range(900))


def refuse(*arguments: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_waits_is_bounded(
    kept: Lines, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(lines.os, "write", refuse)
        for step in range(1000):
            kept.add(step=step)
    assert (kept.waiting, kept.lost) == (50, 950)
    kept.add(step=1000)
    assert steps(kept.path) == list(range(950, 1001)), "the newest"
    assert events(caplog) == ["lines.waiting", "lines.written"]
    assert caplog.records[-1].fields["lost"] == 950  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(20))
def test_a_disk_that_is_now_and_then_full(kept: Lines, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes are short, or fail, or half of it is written and then they fail: all arrives once and in order."""
    source, write = random.Random(seed), os.write

    def moody(file: int, data: memoryview) -> int:
        if source.random() < 0.4:
            refuse()
        return write(file, data[: source.randint(1, 40)])

    with monkeypatch.context() as patched:
        patched.setattr(lines.os, "write", moody)
        for step in range(200):
            if kept.waiting == 50:
                patched.setattr(lines.os, "write", write)
            kept.add(step=step, loss=source.random())
            steps(kept.path)
            patched.setattr(lines.os, "write", moody)
    kept.flush()
    assert steps(kept.path) == list(range(200))


@pytest.mark.parametrize("cut", [1, 2, 9, 12, 13, 14, 20])
def test_what_a_crash_tore_is_cut_off(kept: Lines, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    for step in range(10, 13):
        kept.add(step=step)  # 12 octets, and the end
    kept.path.write_bytes(kept.path.read_bytes()[:-cut])
    left = 3 if cut == 1 else 2 if cut <= 14 else 1
    Lines(kept.path).resume()
    assert steps(kept.path) == list(range(10, 10 + left))
    assert events(caplog) == ([] if cut in (1, 13, 14) else ["lines.torn"])
    Lines(kept.path).add(step=13)
    assert steps(kept.path) == [*range(10, 10 + left), 13]


TAILS = [bytes(5000), b'{"step": 3']
LINES = [b"\xff\n\n", b'7\n"x"\n', bytes(50) + b"\n"]


@pytest.mark.parametrize(
    ("tail", "opened"), [*((tail, True) for tail in (*TAILS, *LINES)), *((tail, False) for tail in TAILS)]
)
def test_no_line_is_ever_written_behind_a_torn_one(kept: Lines, tail: bytes, opened: bool) -> None:
    kept.add(step=0)
    with kept.path.open("ab") as file:
        file.write(tail)
    if opened:
        kept.resume()
    kept.add(step=1)
    assert steps(kept.path) == [0, 1]


def test_a_whole_line_without_its_end_on_a_full_disk(kept: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.path.write_bytes(b'{"step": 0}')
    with monkeypatch.context() as patched:
        patched.setattr(lines.os, "write", refuse)
        kept.resume()
        kept.add(step=1)
    assert kept.path.read_bytes() == b'{"step": 0}'
    kept.add(step=2)
    assert steps(kept.path) == [0, 1, 2]


def test_nothing_to_resume(kept: Lines, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept.resume()
    assert not kept.path.exists()
    Lines(tmp_path / "gone" / "metrics.jsonl").add(step=0)
    assert events(caplog) == ["lines.waiting"]


KILLED = """
import sys
from pathlib import Path
from splitpeer.storage.lines import Lines
kept, step = Lines(Path(sys.argv[1])), 0
print("ready", flush=True)
while True:
    kept.add(step=step, loss=0.5, more="x" * 3000)
    step += 1
"""


def test_killed_while_writing(kept: Lines) -> None:
    for _ in range(3):
        running = subprocess.Popen([sys.executable, "-c", KILLED, str(kept.path)], stdout=subprocess.PIPE)
        assert running.stdout is not None
        running.stdout.readline()
        while not kept.path.exists() or kept.path.stat().st_size < 200_000:
            assert running.poll() is None
        running.send_signal(signal.SIGKILL)
        running.wait()
        running.stdout.close()
        kept.resume()
        found = steps(kept.path)
        assert found == list(range(len(found)))
        kept.begin()
