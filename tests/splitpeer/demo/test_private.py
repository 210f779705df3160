"""The private demo: its hospitals are private, its folder is good for one run, its page says what was seen."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest

from splitpeer.demo.federation import SITES, Federation
from splitpeer.demo.private import PrivateJob, refuse_second_run
from splitpeer.demo.sum_leak import Rebuilt, write_page
from splitpeer.errors import ConfigError
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig

JOB = PrivateJob(patients=6, validation=2, steps=4, batch=2, seed=3)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    made = Federation(tmp_path, JOB)
    made.set_up()
    return made


def test_the_job_and_every_hospital_are_private(federation: Federation) -> None:
    job = JobConfig.load(federation.hub / "job.toml")
    assert (job.training.encoders, job.model.fusion) == ("frozen", "secure-sum")
    for site in SITES:
        policy = PeerConfig.load(federation.folder / site / "peer.toml").policy
        assert policy is not None
        assert policy.preset == "private"
        assert sorted((site, *policy.partners)) == sorted(SITES)
        assert policy.min_partners == 3


def test_weights_are_those_of_the_settings(federation: Federation) -> None:
    settings = tomllib.loads((federation.folder / "hospital-t1" / "peer.toml").read_text())
    assert settings["model"]["weights"] == f"../{JOB.encoders}/t1.safetensors"
    assert PrivateJob(strangers=5).encoders != PrivateJob(strangers=6).encoders


def test_hospitals_show_their_patients_once(federation: Federation) -> None:
    refuse_second_run(federation)
    state = federation.folder / "hospital-t2" / "state"
    state.mkdir()
    (state / "released.jsonl").write_text("")
    with pytest.raises(ConfigError, match="remove the folder"):
        refuse_second_run(federation)


def test_the_page_has_the_figures_and_a_picture(tmp_path: Path) -> None:
    truth = np.random.default_rng(0).normal(size=(2, 96, 96)).astype(np.float32)
    found = Rebuilt(truth, truth, truth[::-1].copy(), np.zeros_like(truth))
    assert found.figures["inverse on one hospital's values, ssim"] == pytest.approx(1, abs=1e-3)
    assert found.figures["inverse on the sum, ssim"] < 0.5
    write_page(tmp_path / "report.html", found)
    page = (tmp_path / "report.html").read_text()
    assert "The sum itself is not protected" in page
    assert "one hospital's values 1.00" in page
    assert "data:image/png;base64," in page
