"""The audit trail: chained, append-only, complete after a crash; any edit is found."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from splitpeer.cli import main
from splitpeer.daemon import trail
from splitpeer.daemon.trail import Trail, entries, verify
from splitpeer.errors import ConfigError, DataError, DiskTrouble

if TYPE_CHECKING:
    from tests.conftest import SmallDisk


@pytest.fixture
def kept(tmp_path: Path) -> Trail:
    made = Trail(tmp_path / "state")
    made.note("peer.start", role="client", site="ukm")
    made.note("job.accepted", job="glioma", levels=["x0", "x4"], recorded=None, patients=12)
    made.note("peer.stop", cause="asked to stop\n\x1b[2J")
    return made


def test_lines_are_chained_and_private(kept: Trail) -> None:
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o600
    assert [e["event"] for e in entries(kept.path)] == ["peer.start", "job.accepted", "peer.stop"]
    assert [e["n"] for e in entries(kept.path)] == [1, 2, 3]
    assert entries(kept.path)[2]["cause"] == "asked to stop??[2J"
    verdict = verify(kept.path)
    assert (verdict.whole, verdict.entries) == (True, 3)
    assert kept.note("peer.start") == verify(kept.path).last_chain != verdict.last_chain
    for line in kept.path.read_text().splitlines():
        assert json.loads(line)["chain"]


def changed(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b"12", b"13"), lines[2]]


def forged(lines: list[bytes]) -> list[bytes]:
    return [lines[0], b"nothing happened here\n", *lines[1:]]


@pytest.mark.parametrize(
    "edit",
    [
        changed,
        forged,
        lambda lines: [lines[0], lines[2]],
        lambda lines: lines[1:],
        lambda lines: [lines[1], lines[0], lines[2]],
        lambda lines: [*lines, lines[2]],
        lambda lines: [*lines, b'{"event":"peer.stop"}\n'],
        lambda lines: [lines[0], b"\n", *lines[1:]],
    ],
)
def test_every_edit_is_found(kept: Trail, edit: Callable[[list[bytes]], list[bytes]]) -> None:
    kept.path.write_bytes(b"".join(edit(kept.path.read_bytes().splitlines(keepends=True))))
    verdict = verify(kept.path)
    assert not verdict.whole
    assert verdict.problem


@pytest.mark.parametrize("cut", [1, 2, 30, 100])
def test_a_crash_in_the_middle_of_a_line(kept: Trail, cut: int) -> None:
    whole = kept.path.read_bytes()
    kept.path.write_bytes(whole[:-cut])
    left = kept.path.read_bytes()
    assert verify(kept.path).whole
    kept.note("peer.start")
    assert kept.path.read_bytes().startswith(left), "appended only"
    verdict = verify(kept.path)
    assert verdict.whole, verdict
    events = [e["event"] for e in entries(kept.path)]
    if cut == 1:  # only the newline was lost
        assert events == ["peer.start", "job.accepted", "peer.stop", "peer.start"]
    else:
        assert events == ["peer.start", "job.accepted", "trail.torn", "peer.start"]
        # What the crash left is part of the record: it cannot be dropped or changed afterwards.
        torn = kept.path.read_bytes().splitlines(keepends=True)
        kept.path.write_bytes(b"".join([*torn[:2], b"x" + torn[2], *torn[3:]]))
        assert not verify(kept.path).whole


@pytest.mark.parametrize("left", range(0, 260, 7))
def test_a_loss_of_power(kept: Trail, left: int) -> None:
    """The tail is zeros, for a page or for many; the next line says so."""
    whole = kept.path.read_bytes()
    for zeros in (1, 4096, 200_000):
        kept.path.write_bytes(whole[: len(whole) - left] + bytes(zeros))
        kept.note("peer.start")
        verdict = verify(kept.path)
        assert verdict.whole, (zeros, verdict)
        assert [e["event"] for e in entries(kept.path)][-2:] == ["trail.torn", "peer.start"]


def test_a_full_disk(small_disk: SmallDisk) -> None:
    """What finds no room is not there at all: no half line, no crash that was none."""
    trail = Trail(small_disk.folder)
    trail.note("peer.start")
    small_disk.fill(but=4096)
    said = []
    for number in range(100):
        try:
            said.append(trail.note("link.up", peer="x" * (number % 7), number=number))
        except DiskTrouble as error:
            assert "(No space left on device): make room, or change [peer] state" in str(error)  # noqa: PT017
        octets = trail.path.read_bytes()
        assert octets.endswith(b"\n")
        assert verify(trail.path).entries == len(octets.splitlines()) == len(said) + 1
    assert 5 < len(said) < 60
    small_disk.make_room()
    assert trail.note("peer.stop") == verify(trail.path).last_chain
    assert verify(trail.path).whole
    assert "trail.torn" not in [e["event"] for e in entries(trail.path)]


KILLED = """
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from splitpeer.daemon.trail import Trail
kept = Trail(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    kept.note("link.up", peer="x" * 300)
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    for turn in range(1, 4):
        running = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
        assert running.stdout is not None
        running.stdout.readline()
        while not (tmp_path / trail.NAME).exists() or verify(tmp_path / trail.NAME).entries < 40 * turn:
            assert running.poll() is None
        running.kill()
        running.wait()
        running.stdout.close()
        Trail(tmp_path).note("peer.start")
        assert verify(tmp_path / trail.NAME).whole


def test_two_processes_write_one_chain(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from splitpeer.daemon.trail import Trail\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for n in range(100): Trail(Path(sys.argv[1])).note('peer.start', n_th=n)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.stdout.readline() for process in running] == ["ready\n"] * 2  # type: ignore[union-attr]
    for process in running:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    for process in running:
        process.communicate(timeout=60)
    assert [process.returncode for process in running] == [0, 0]
    verdict = verify(tmp_path / trail.NAME)
    assert (verdict.whole, verdict.entries) == (True, 200), verdict


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(ConfigError, match=r"audit trail cannot be written .*change \[peer\] state"):
        Trail(tmp_path / "state").note("peer.start")
    with pytest.raises(DataError, match="cannot be read"):
        verify(tmp_path / "none.jsonl")


def test_the_command_shows_and_checks(kept: Trail, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as left:
            main(("trail", str(kept.path), *arguments))
        return int(left.value.code or 0)

    assert run() == 0
    said = capsys.readouterr()
    assert "job.accepted  job=glioma" in said.out
    assert "3 lines, whole; last chain" in said.err
    kept.path.write_bytes(kept.path.read_bytes().replace(b"ukm", b"abc"))
    assert run("--json") == 4
    assert json.loads(capsys.readouterr().out)["problem"] == "line 1 is not chained to the line before it"
