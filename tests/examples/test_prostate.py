"""examples/prostate as its README says: two hospitals together find lesions that neither finds alone."""

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

from splitpeer.settings.job import JobConfig

FOLDER = Path(__file__).parents[2] / "examples" / "prostate"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.timeout(900)
def test_two_hospitals_find_what_neither_finds_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": PATH, "PORT": str(free_port())}
    done = subprocess.run(
        [FOLDER / "run.sh", tmp_path / "run"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = {
        name: json.loads((tmp_path / f"run/hub/runs/{name}/result.json").read_text())
        for name in ("together", "t2", "adc")
    }
    assert all(result["complete"] and result["step"] == 150 for result in results.values())
    assert [results[name]["modalities"] for name in results] == [["adc", "t2"], ["t2"], ["adc"]]
    dice = {name: result["dice"]["lesion"] for name, result in results.items()}
    assert dice["together"] > 0.75 and dice["together"] > max(dice["t2"], dice["adc"]) + 0.15, dice
    assert "together" in done.stdout.splitlines()[-3]
    for site in ("north", "south"):
        assert "job.complete" in (tmp_path / "run" / site / "together.log").read_text()


def test_it_does_not_write_over_a_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [FOLDER / "run.sh", tmp_path], env={**os.environ, "PATH": PATH}, capture_output=True, text=True
    )
    assert done.returncode == 4
    assert done.stderr == f"run.sh: {tmp_path} exists: remove it, or name another folder\n"


def test_the_job_names_its_task() -> None:
    job = JobConfig.load(FOLDER / "job.toml")
    task = job.task.task("task")
    assert task.region_names == ("gland", "lesion") and not task.exclusive
    assert [region.values for region in task.regions] == [(1, 2), (2,)]


def test_the_readme_and_the_script_give_the_same_commands() -> None:
    def commands(text: str) -> set[tuple[str, ...]]:
        text = text.replace('"$address"', "tcp://127.0.0.1:7443")
        lines = re.findall(r"^\s*(splitpeer (?:pki|init) .*)$", text, flags=re.MULTILINE)
        return {tuple(shlex.split(line)) for line in lines}

    told, run = commands((FOLDER / "README.md").read_text()), commands((FOLDER / "run.sh").read_text())
    assert len(told) == 7
    assert told == run
