"""examples/localhost as its README says: run.sh trains with two hospitals and leaves no process behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.examples.scripts import EXAMPLES, commands, refuses_to_overwrite, script


@pytest.mark.timeout(300)
def test_run_trains_to_the_end(tmp_path: Path) -> None:
    done = script("localhost", tmp_path / "run", PATIENTS="4")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run/hub/runs/localhost/result.json").read_text())
    assert result["complete"] and result["step"] == 20 and result["patients"] == 4
    for site in ("north", "south"):
        assert "job.complete" in (tmp_path / "run" / site / "log").read_text()


def test_it_does_not_write_over_a_run(tmp_path: Path) -> None:
    assert refuses_to_overwrite("localhost", tmp_path)


def test_the_readme_and_the_script_give_the_same_commands() -> None:
    told, run = (commands((EXAMPLES / "localhost" / file).read_text()) for file in ("README.md", "run.sh"))
    assert len(told) == 11
    assert told == run
