"""What a start costs, what it says while it imports, and how it is stopped meanwhile. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from splitpeer.daemon.observe import PeerHead, look

NEVER = (
    "dp_accounting",
    "monai",
    "nilearn",
    "pandas",
    "skimage",
    "sklearn",
    "scipy.stats",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
)
"""Packages that cost from a tenth of a second to several, and that no run of a network of ours needs."""
AT_THE_END = ("matplotlib", "nibabel", "pydicom", "scipy.ndimage", "scipy.spatial")
"""Those with which a coordinator measures, draws and writes once it has trained, and a site without masks never."""
AT_IMPORT = """
import os, signal, sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})
# A test run in the background inherits an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Hook())
from splitpeer.cli import main
main(["serve"])
"""
"""A daemon that gets a signal at the moment in which it imports `module`."""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def site(scene) -> Path:
    return scene.client("t1")


@pytest.fixture
def start(site: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=site, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    _, text = process.communicate(timeout=100)
    return process.returncode, text.splitlines()


def test_a_daemon_imports_what_it_trains_with_and_no_more() -> None:
    program = (
        "import sys, splitpeer.site.client, splitpeer.coordinator.coordinator\n"
        f"print(*sorted(set({NEVER + AT_THE_END}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.split() == []


def imported(log: str, before: str = "") -> set[str]:
    """What a process had imported when the first line with `before` was written; empty: when it ended."""
    found = set()
    for line in log.splitlines():
        if line.startswith("import time:"):
            found.add(line.rpartition("|")[2].strip())
        elif before and before in line:
            return found
    assert not before, f"no {before} in:\n{log}"
    return found


def test_a_run_imports_each_library_when_it_is_needed(scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the start until the scores, in real processes: torch itself imports some only when it trains."""
    scene.cast("t1", "t2", training={"steps": 2, "checkpoint_every": 2})
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    hub, site = scene.start_python("hub"), scene.start_python("site-t1")
    other = scene.start("site-t2")
    assert [daemon.code(100) for daemon in (hub, site, other)] == [0, 0, 0]
    for daemon in (hub, site):
        assert not imported(daemon.said) & set(NEVER)
        assert {"torch", "splitpeer.training.split_step"} <= imported(daemon.said, "peer.start ")
    assert not imported(site.said) & set(AT_THE_END)
    assert not imported(hub.said, "job.step ") & set(AT_THE_END)
    assert set(AT_THE_END) - {"pydicom"} <= imported(hub.said), "they are used after all"


@pytest.mark.parametrize(
    "module",
    ["splitpeer.cli.outcome", "cryptography.x509", "click", "pydantic", "splitpeer.cli.root", "resource"],
)
def test_ctrl_c_before_a_command_runs_is_one_line(module: str, start: Start) -> None:
    code, lines = ended(start("-c", AT_IMPORT.format(module=module, number=signal.SIGINT)))
    assert (code, lines) == (130, ["splitpeer: interrupted"])


@pytest.mark.parametrize(
    "module", ["splitpeer.site.client", "torch", "torch._C", "torch.nn", "splitpeer.site.job"]
)
@pytest.mark.parametrize(
    ("number", "code", "text"),
    [
        (signal.SIGINT, 130, "splitpeer: interrupted"),
        (signal.SIGTERM, 0, "splitpeer: stopped while starting"),
    ],
)
def test_a_daemon_that_is_stopped_while_it_imports(
    module: str, number: signal.Signals, code: int, text: str, start: Start
) -> None:
    found, lines = ended(start("-c", AT_IMPORT.format(module=module, number=number)))
    assert found == code
    assert [line for line in lines[1:] if "peer.notice" not in line] == [text], lines
    assert "peer.starting" in lines[0]


def test_an_ignored_interrupt_stays_ignored(start: Start) -> None:
    """As nohup and shells want it for what runs in the background."""
    program = AT_IMPORT.format(module="torch", number=signal.SIGINT).replace("default_int_handler", "SIG_IGN")
    process = start("-c", program)
    assert process.stderr is not None
    assert "peer.starting" in process.stderr.readline()
    assert any("peer.start " in line for line in process.stderr)
    process.terminate()
    assert ended(process)[0] == 0


def test_a_line_is_shown_before_anything_heavy_is_imported(start: Start) -> None:
    process = start("-X", "importtime", "-m", "splitpeer.cli", "serve")
    assert process.stderr is not None
    before = []
    while "peer.starting" not in (line := process.stderr.readline()):
        assert line, "ended without a word"
        before.append(line)
    assert "role=client site=site-t1" in line
    assert not any("| torch" in line.replace("|  ", "| ") for line in before)
    assert any("pydantic" in line for line in before), "imports are listed"


def test_the_folder_is_held_and_status_says_so_before_torch_is_imported(start: Start, site: Path) -> None:
    """A process that has stopped itself at the import of torch, and another start meanwhile."""
    first = start("-c", AT_IMPORT.format(module="torch", number=signal.SIGSTOP))
    _, status = os.waitpid(first.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    seen = look(PeerHead.load(site / "peer.toml"))
    assert (seen.state, seen.phase, seen.pid) == ("running", "starting", first.pid)
    code, lines = ended(start("-m", "splitpeer.cli", "serve"))
    assert code == 4
    assert len(lines) == 1 and f"another splitpeer (pid {first.pid}) uses this state folder" in lines[0]
    first.terminate()
    first.send_signal(signal.SIGCONT)
    assert ended(first)[0] == 0


def test_of_two_that_start_together_one_runs(start: Start) -> None:
    both = [start("-m", "splitpeer.cli", "serve") for _ in range(2)]
    loser = both[0] if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT).si_pid == both[0].pid else both[1]
    winner = both[1 - both.index(loser)]
    code, lines = ended(loser)
    assert code == 4 and f"another splitpeer (pid {winner.pid})" in lines[-1], lines
    assert winner.stderr is not None
    assert "peer.starting" in winner.stderr.readline()
    assert any("peer.start " in line for line in winner.stderr), "the other start has changed nothing"
    winner.terminate()
    assert ended(winner)[0] == 0
