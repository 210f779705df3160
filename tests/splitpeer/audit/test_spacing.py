"""A job that resamples: the adversary's similar images are on the grid of the patients under attack."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from splitpeer.audit import capture_audit, invited, site_audit, sweep
from splitpeer.audit.cohort import Cohort, Samples, most_tumour, shadow
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal
from splitpeer.cli import main
from splitpeer.settings.job import JobConfig
from tests.splitpeer.audit.conftest import MODALITIES, SALT
from tests.splitpeer.audit.test_audit_command import SWEEP
from tests.splitpeer.audit.test_audit_command import site as site

SPACING = (2.0, 2.0, 1.0)
GRID = (17, 17, 10)
"""The small patients', resampled."""


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


@pytest.fixture
def job(place: Any, tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(place.job.read_text().replace("[data]", f"[data]\nspacing = {list(SPACING)}"))
    return path


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """Of all similar images that are drawn."""
    found: set[tuple[int, ...]] = set()

    def noted(cohort: Cohort, *rest: Any, **named: Any) -> Samples:
        keys = cohort.keys()
        found.update(volumes.geometry(key).shape for volumes in cohort.images.values() for key in keys)
        return shadow(cohort, *rest, **named)

    for module in (capture_audit, invited, site_audit, sweep):
        monkeypatch.setattr(module, "shadow", noted)
    return found


def test_a_sites_audit(place: Any, site: Path, job: Path, grids: Any, tmp_path: Path) -> None:
    assert run("audit", "--quick", "--config", site, "--job", job, "--attack", "pca", "--shadow", place.shadow,
               "--steps", 1, "--views", 1, "--samples", 1, "--out", tmp_path / "audit") == 0  # fmt: skip
    assert grids == {GRID}


class Here(ThreadPoolExecutor):
    """Runs a sweep's tasks in this process, whose functions are watched."""

    def __init__(self, workers: int, **_: Any) -> None:
        super().__init__(1)


def test_a_sweep(place: Any, job: Path, grids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Here)
    plan = tmp_path / "sweep.toml"
    first = SWEEP.partition('[[configuration]]\nname = "gaussian')[0].replace(
        ', "whitebox:iterations=15"', ""
    )
    plan.write_text(first.format(data=place.data, shadow=place.shadow, strength=1))
    assert run("audit", "--sweep", plan, "--job", job, "--out", tmp_path / "sweep") == 0
    assert grids == {GRID}


def test_an_attack_on_a_capture(place: Any, job: Path, grids: Any, tmp_path: Path) -> None:
    config = JobConfig.load(job)
    cohort = Cohort.read(place.data, MODALITIES, salt=SALT, convention="msd", spacing=SPACING)
    rehearsal = Rehearsal(config, cohort, Protection(), tmp_path / "played", seed=3)
    targets = most_tumour(cohort, rehearsal.validation, rehearsal.window)
    played = rehearsal.play(Recording(targets=tuple(targets), views=1))
    assert run("attack", played.capture, "--seat", "t1", "--attack", "pca", "--samples", 1,
               "--out", tmp_path / "run", "--knows", f"shadow={place.shadow}", "--shadow-images", 6) == 0  # fmt: skip
    assert grids == {GRID}
