"""The network in one process comes to what its halves come to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitpeer.audit.cohort import Cohort
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal
from splitpeer.demo.baselines import Baseline, train
from splitpeer.settings.job import JobConfig
from tests.splitpeer.audit.conftest import JOB, MODALITIES, SALT, write_cohort


@pytest.mark.parametrize("complete_first", [0, 2])
def test_the_centralised_network_reaches_what_a_rehearsal_reaches(
    tmp_path: Path, complete_first: int
) -> None:
    torch.set_num_threads(1)
    data, job, salt = tmp_path / "data", tmp_path / "job.toml", tmp_path / "salt"
    write_cohort(data, 6, seed=1)
    job.write_text(JOB.replace("window =", f"complete_first = {complete_first}\nwindow ="))
    salt.write_text(SALT.hex())
    salt.chmod(0o600)
    reached = train(Baseline("all", MODALITIES, job, data, salt))
    config = JobConfig.load(job)
    cohort = Cohort.read(data, MODALITIES, salt=SALT, convention="msd")
    rehearsal = Rehearsal(config, cohort, Protection(), tmp_path / "played", seed=config.job.seed)
    played = rehearsal.play(Recording())
    assert reached.dice == played.dice and reached.hd95 == played.hd95
    assert any(reached.dice.values())
