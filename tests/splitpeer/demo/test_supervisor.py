"""Daemons that die are started again, each in its own way; real processes, ended by pid."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from splitpeer.demo import supervisor
from splitpeer.demo.supervisor import Supervisor, cause

SLEEPS = "import time; print('up', flush=True); time.sleep(100)"
DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(100)"


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


class Ward:
    """A supervisor, what it told, and patience."""

    def __init__(self, folder: Path) -> None:
        self.told: list[str] = []
        self.supervisor = Supervisor(os.environ, self.told.append)
        self._folder = folder

    def start(self, name: str, first: str, later: str | None = None) -> None:
        self.supervisor.start(
            name, python(first), python(first if later is None else later), self._folder / name
        )

    def log(self, name: str) -> list[str]:
        return (self._folder / name).read_text().splitlines()

    def until(self, true: Callable[[], object], within: float = 20.0) -> None:
        ends = time.monotonic() + within
        while not true():
            assert time.monotonic() < ends, self.told
            self.supervisor.tend()
            time.sleep(0.01)


@pytest.fixture
def ward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ward]:
    monkeypatch.setattr(supervisor, "PAUSE_S", 0.05)
    made = Ward(tmp_path)
    yield made
    made.supervisor.stop(1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_killed(ward: Ward, number: signal.Signals) -> None:
    ward.start("t1", SLEEPS, "print('again', flush=True);" + SLEEPS)
    ward.start("t2", SLEEPS)
    ward.until(lambda: ward.log("t1") == ward.log("t2") == ["up"])
    before = ward.supervisor.pids()
    os.kill(before["t1"], number)
    ward.until(lambda: ward.log("t1") == ["up", "again", "up"])
    after = ward.supervisor.pids()
    assert ward.told == [
        f"t1 (pid {before['t1']}) was killed by {number.name}: started again as pid {after['t1']}"
    ]
    assert after["t2"] == before["t2"]
    assert after["t1"] != before["t1"]


@pytest.mark.parametrize(
    ("code", "again"), [(0, False), (1, False), (2, False), (3, True), (4, False), (5, True), (130, False)]
)
def test_exit_codes(ward: Ward, code: int, again: bool) -> None:
    """As the units in examples/lan: 3 (a wait that ended) and 5 (a bug) are worth another try."""
    ward.start("t1", f"import sys; sys.exit({code})", SLEEPS)
    if again:
        ward.until(lambda: ward.told)
        assert f"ended with exit code {code}: started again" in ward.told[0]
        assert ward.supervisor.ended("t1") is None
    else:
        ward.until(lambda: ward.supervisor.ended("t1") is not None)
        assert ward.supervisor.ended("t1") == code
        assert not ward.told
        assert not ward.supervisor.pids()


def test_not_for_ever(ward: Ward) -> None:
    ward.start("t1", "import os; os.kill(os.getpid(), 9)")
    ward.until(lambda: ward.supervisor.ended("t1") is not None)
    assert ward.supervisor.ended("t1") == -9
    assert ward.told[-1] == "t1 was killed by SIGKILL: started 5 times within 60 s, so no more"
    assert len(ward.told) == 6


def test_now_and_then_is_for_ever(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "WITHIN_S", 0.2)
    ward.start("t1", "import sys, time; time.sleep(0.1); sys.exit(3)")
    ward.until(lambda: len(ward.told) > supervisor.MOST + 3)
    assert ward.supervisor.ended("t1") is None


def test_stopped_kindly_or_by_force(ward: Ward) -> None:
    ward.start("kind", "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7));" + SLEEPS)
    ward.start("deaf", DEAF)
    ward.until(lambda: ward.log("kind") == ward.log("deaf") == ["up"])
    pids = ward.supervisor.pids()
    ward.supervisor.stop(0.5)
    assert (ward.supervisor.ended("kind"), ward.supervisor.ended("deaf")) == (7, -9)
    ward.supervisor.tend()
    assert not ward.told
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


SUPERVISES = """
import os, signal, sys, time
from pathlib import Path
from splitpeer.demo.supervisor import Supervisor
daemons = Supervisor(os.environ, print)
folder, code = Path(sys.argv[1]), sys.argv[2]
try:
    for name in ("t1", "t2"):
        daemons.start(name, [sys.executable, "-S", "-c", code], ["false"], folder / name)
    print("ready", flush=True)
    while True:
        daemons.tend()
        time.sleep(0.05)
except KeyboardInterrupt:
    pass
finally:
    try:
        daemons.stop()
    finally:
        print(daemons.ended("t1"), daemons.ended("t2"), daemons.pids(), flush=True)
"""
COUNTS = """
import signal, sys, time
heard = []
signal.signal(2, lambda *_: heard.append(2))
signal.signal(15, lambda *_: heard.append(15))
print("up", flush=True)
while not heard:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(10 + len(heard) if 2 not in heard else 99)
"""


@pytest.mark.parametrize(("code", "presses", "left"), [(COUNTS, 1, "11 11 {}"), (DEAF, 2, "-9 -9 {}")])
def test_ctrl_c(tmp_path: Path, code: str, presses: int, left: str) -> None:
    """One asks the daemons once, though the whole terminal's group hears it; a second one ends them at once."""
    running = subprocess.Popen(
        [sys.executable, "-c", SUPERVISES, str(tmp_path), code],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        ends = time.monotonic() + 20
        while any((tmp_path / name).read_text() != "up\n" for name in ("t1", "t2")):
            assert time.monotonic() < ends
            time.sleep(0.02)
        began = time.monotonic()
        for _ in range(presses):
            os.killpg(running.pid, signal.SIGINT)
            time.sleep(0.2)
        assert running.stdout.readline() == f"{left}\n"
        assert time.monotonic() - began < 10
        running.wait(10)
    finally:
        running.kill()
        running.communicate()


def test_in_words() -> None:
    assert cause(3) == "ended with exit code 3"
    assert cause(-9) == "was killed by SIGKILL"
    assert cause(-63) == "was killed by signal 63"
