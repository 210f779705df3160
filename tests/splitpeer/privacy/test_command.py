"""`splitpeer privacy`: figures for a person, and for a program."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from splitpeer.cli.privacy import privacy
from splitpeer.errors import ConfigError
from splitpeer.privacy.accounting import epsilon, noise_for, unknown_noise
from splitpeer.privacy.ledger import Ledger
from splitpeer.settings import templates

NOISE = noise_for(8, 1e-5, 40)


@pytest.fixture
def run(tmp_path):
    text = templates.peer_toml(role="client", site="north", federation="demo", modality="t1")
    (tmp_path / "peer.toml").write_text(text)
    budget = [f'policy.defences=["dp-gaussian:noise={NOISE!r}"]', "policy.epsilon=8", "policy.delta=1e-5"]

    def run(*arguments: str, settings=budget) -> str:
        given = ["--config", str(tmp_path / "peer.toml"), *(x for s in settings for x in ("--set", s))]
        return CliRunner().invoke(privacy, [*given, *arguments], catch_exceptions=False).output

    run.state = tmp_path / "state"
    return run


def test_what_is_spent_can_be_read_beside_a_running_site(run) -> None:
    assert run().startswith("epsilon 0 of 8 is spent (delta 1e-05)")
    ledger = Ledger(run.state, 8, 1e-5)
    ledger.pay(b"r" * 16, [b"a" * 16] * 40 + [b"b" * 16], NOISE, learning=False, training=True)
    said = run()
    assert "by the patient that paid most; 2 have paid, 1 half of it or more, 1 all of it" in said
    assert (b"a" * 16).hex() not in said
    assert json.loads(run("--json"))["epsilon"] == pytest.approx(epsilon({NOISE: 40}, 1e-5))
    ledger.close()


def test_what_is_spent_with_and_without_the_others_noise(run) -> None:
    """`shared=4,honest=3`: by the assumption, and if nobody but this site keeps its noise to itself."""
    whole = 2 * NOISE
    shared = f'policy.defences=["dp-gaussian:noise={whole!r},shared=4,honest=3"]'
    settings = [shared, "policy.epsilon=8", "policy.delta=1e-5"]
    counted, own = unknown_noise(whole, 4, 3), unknown_noise(whole, 4, 1)
    ledger = Ledger(run.state, 8, 1e-5)
    for patient, records in ((b"a" * 16, 5), (b"b" * 16, 7)):
        ledger.pay(b"r" * 16, [patient] * records, counted, learning=False, training=True, own=own)
    ledger.close()
    said = run(settings=settings)
    assert (
        "the noise is that of 4 sites, and the budget counts on 2 of the 3 others to keep theirs secret"
        in said
    )
    alone = epsilon({own: 7}, 1e-5)
    assert f"if all others tell the coordinator their noise, epsilon is {alone:.3g}" in said
    found = json.loads(run("--json", settings=settings))
    assert found["epsilon"] == pytest.approx(epsilon({counted: 7}, 1e-5))
    assert found["alone"] == pytest.approx(alone)
    nobody = [shared.replace("honest=3", "honest=1"), *settings[1:]]
    assert "the budget counts on no other site to keep theirs secret" in run(settings=nobody)


def test_without_a_budget_there_is_nothing_to_show(run) -> None:
    with pytest.raises(ConfigError, match="no budget to show"):
        run(settings=[])


def test_what_a_study_needs(run) -> None:
    study = [
        "plan",
        "--epsilon",
        "8",
        "--epochs",
        "50",
        "--windows",
        "155",
        "--evaluations",
        "0",
        "--patients",
        "300",
    ]
    lines = run(*study).splitlines()
    assert lines[0].split()[:4] == ["frozen", "encoder", "7750", "records"]
    assert "noise=105.7,frozen=true" in lines[0]
    assert "2325000 records" in lines[1]
    for line, count in zip(lines[:2], (7750, 2_325_000), strict=True):
        assert 7.9 < epsilon({float(line.split("noise=")[1].split(",")[0]): count}, 1e-5) <= 8
    assert lines[2:] == [
        "with all of it spent, a test with 1% false alarms finds 25.5% of a person's images at most"
    ]
    found = json.loads(run(*study, "--json"))
    assert found["learning"]["noise"] == pytest.approx(noise_for(8, 1e-5, 2_325_000))
    sites = run(*study, "--sites", "4").splitlines()
    assert sites[0] == lines[0] + ",shared=4,honest=4"
    assert sites[-1].startswith("if all other sites work with the coordinator, epsilon is ")
    said = float(sites[-1].rpartition(" ")[2])
    assert said == pytest.approx(epsilon({noise_for(8, 1e-5, 1) / 2: 1}, 1e-5), rel=0.01)
