"""examples/localhost as its README says: run.sh trains with two hospitals and leaves no process behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "localhost"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.timeout(300)
def test_run_trains_to_the_end(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": PATH, "PATIENTS": "4", "PORT": str(free_port())}
    done = subprocess.run(
        [FOLDER / "run.sh", tmp_path / "run"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run/hub/runs/localhost/result.json").read_text())
    assert result["complete"] and result["step"] == 20 and result["patients"] == 4
    for site in ("north", "south"):
        assert "job.complete" in (tmp_path / "run" / site / "log").read_text()


def test_it_does_not_write_over_a_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [FOLDER / "run.sh", tmp_path], env={**os.environ, "PATH": PATH}, capture_output=True, text=True
    )
    assert done.returncode == 4
    assert done.stderr == f"run.sh: {tmp_path} exists: remove it, or name another folder\n"


def test_the_readme_and_the_script_give_the_same_commands() -> None:
    def commands(text: str) -> set[tuple[str, ...]]:
        text = text.replace('"$address"', "tcp://127.0.0.1:7443").replace('"$patients"', "8")
        lines = re.findall(r"^\s*(?:OMP_NUM_THREADS=1 )?(splitpeer .*)$", text, flags=re.MULTILINE)
        return {tuple(shlex.split(re.sub(r" >.*", "", line))) for line in lines}

    told, run = commands((FOLDER / "README.md").read_text()), commands((FOLDER / "run.sh").read_text())
    assert len(told) == 11
    assert told == run
