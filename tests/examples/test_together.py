"""Examples with a task of their own, as their READMEs say: hospitals together find what none finds alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from splitpeer.settings.job import JobConfig
from tests.examples.scripts import EXAMPLES, commands, refuses_to_overwrite, script


@dataclass(frozen=True)
class Example:
    """What is expected of one."""

    region: str
    """That no hospital finds alone."""
    runs: dict[str, tuple[str, ...]]
    """Job to its modalities, "together" first."""
    least: float
    """Dice together."""
    ahead: float
    """Of the best hospital alone, in Dice."""
    regions: dict[str, tuple[int, ...]]
    """To the values of the masks."""
    commands: int = 7


CASES = {
    "prostate": Example(
        "lesion", {"together": ("adc", "t2"), "t2": ("t2",), "adc": ("adc",)}, 0.75, 0.15,
        {"gland": (1, 2), "lesion": (2,)},
    ),
    "petct": Example(
        "tumour", {"together": ("ct", "pet"), "ct": ("ct",), "pet": ("pet",)}, 0.75, 0.15, {"tumour": (1,)}
    ),
    "gaps": Example(
        "lesion", {"together": ("flair", "t1"), "north": ("t1",), "east": ("t1",), "south": ("flair",)},
        0.6, 0.0, {"lesion": (1,)}, 9,
    ),
}  # fmt: skip
ALL = pytest.mark.parametrize("name", list(CASES))


@ALL
@pytest.mark.timeout(900)
def test_hospitals_find_together_what_none_finds_alone(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    done = script(name, tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    results = {
        run: json.loads((tmp_path / f"run/hub/runs/{run}/result.json").read_text()) for run in case.runs
    }
    job = JobConfig.load(EXAMPLES / name / "job.toml")
    assert all(result["complete"] and result["step"] == job.training.steps for result in results.values())
    assert {run: tuple(result["made_from"]) for run, result in results.items()} == case.runs
    dice = {run: result["dice"][case.region] for run, result in results.items()}
    alone = max(score for run, score in dice.items() if run != "together")
    assert dice["together"] > case.least and dice["together"] > alone + case.ahead, dice
    table = done.stdout.splitlines()[-len(case.runs) :]
    assert [line.split()[0] for line in table] == list(case.runs)
    if name == "gaps":
        # Nobody is left out: the table of `splitpeer status` and the scores count patients with one seat too.
        assert "2 of 2 seats: 25, 1 of 2 seats: 7" in done.stdout
        assert results["together"]["scored"] == 8 > results["together"]["scored_complete"]
    for site in job.sites:
        # Who is held out must not be drawn by chance, and neither must the weights.
        assert "\ninitial_weights = 7\n" in (tmp_path / "run" / site / "peer.toml").read_text()
        assert "job.complete" in (tmp_path / "run" / site / "together.log").read_text()


@ALL
def test_it_does_not_write_over_a_run(name: str, tmp_path: Path) -> None:
    assert refuses_to_overwrite(name, tmp_path)


@ALL
def test_the_job_names_its_task(name: str) -> None:
    task = JobConfig.load(EXAMPLES / name / "job.toml").task.task("task")
    assert {region.name: region.values for region in task.regions} == CASES[name].regions
    assert not task.exclusive


@ALL
def test_the_readme_and_the_script_give_the_same_commands(name: str) -> None:
    told, run = (
        commands((EXAMPLES / name / file).read_text(), "pki", "init") for file in ("README.md", "run.sh")
    )
    assert len(told) == CASES[name].commands
    assert told == run
