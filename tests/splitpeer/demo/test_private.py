"""The private demo: its hospitals are private, its folder is good for one run, its page says what was seen."""

from __future__ import annotations

import base64
import json
import re
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitpeer.cli import main
from splitpeer.demo import sum_attacks
from splitpeer.demo.federation import SITES, Federation
from splitpeer.demo.private import MAKER, PrivateJob, refuse_second_run
from splitpeer.errors import ConfigError
from splitpeer.pretraining import encoder_file
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
    assert settings["model"]["weights"] == JOB.weights("hospital-t1")
    assert PrivateJob(strangers=5).weights("hospital-t1") != PrivateJob(strangers=6).weights("hospital-t1")


def test_steps_are_counted_while_they_are_made(federation: Federation) -> None:
    assert federation.steps() == 0
    federation.results.mkdir()
    (federation.results / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3}\n{"step": 1, "dice": {}}\n{"step": 2, "lo'
    )
    assert federation.steps() == 1


def test_hospitals_show_their_patients_once(federation: Federation) -> None:
    refuse_second_run(federation)
    state = federation.folder / "hospital-t2" / "state"
    state.mkdir()
    (state / "released.jsonl").write_text("")
    with pytest.raises(ConfigError, match="remove the folder"):
        refuse_second_run(federation)


def _shorter(attack: str) -> str:
    return re.sub("(steps|iterations|width)=[0-9]+", r"\1=4", attack)


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The command at toy size, with five real daemons; only the attacks are cut short."""
    attacks = {
        name: tuple(_shorter(attack) for attack in written)
        for name, written in sum_attacks.EFFORT.attacks.items()
    }
    monkeypatch.setattr(sum_attacks, "EFFORT", sum_attacks.AttackEffort(attacks, finder_steps=0))
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    out = tmp_path / "demo"
    with pytest.raises(SystemExit) as left:
        main(["demo", "--private", "--out", str(out), "--patients", "4", "--validation", "1", "--steps", "2",
              "--strangers", "4", "--pretraining-steps", "2"])  # fmt: skip
    assert not left.value.code
    yield out
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.timeout(400)
def test_the_command_says_what_the_coordinator_could_see(ran: Path) -> None:
    summary = json.loads((ran / "summary.json").read_text())
    assert set(summary["leakage"]) == {
        f"{attack} on {what}, ssim"
        for attack in ("pca", "inverse")
        for what in ("the sum", "the sum, mean over contrasts")
    } | {
        "pca on one hospital's values, ssim", "whitebox on one hospital's values, ssim",
        "whitebox on one hospital's values and all others' images, ssim",
    }  # fmt: skip
    said = json.loads((ran / "report.json").read_text())
    assert {row["name"] for row in said["configurations"]} == {
        "secure sum of 4 hospitals",
        "secure sum of 4 hospitals, others known",
        "secure sum of 4 hospitals, others known with their images",
    }
    runs = {Path(one["path"]).name: one["run"] for one in said["folders"]}
    # Of the sum every contrast is judged.
    counts = {"sum": 8, "others-known": 2, "others-collude": 1}
    assert {name: len(run["entries"]) for name, run in runs.items()} == counts
    # A collusion is held against what the others' images show without anything that was sent.
    for entry in runs["others-collude"]["entries"]:
        assert any(floor.startswith("drawn from ") for floor in entry["scores"]["ssim"]["floors"])
    assert not any("Parties that work together" in line for line in said["not_tested"])
    assert runs["sum"]["patients"] and "Neighbouring slices of a sum" in " ".join(said["not_tested"])
    for run in runs.values():
        capture = run["capture"]
        assert (capture["frozen"], capture["summed"], capture["rehearsal"], capture["samples"]) == (
            True,
            4,
            False,
            1,
        )
    assert summary["sent_bytes"] > 4 * 96 * 27_072  # hospitals, windows, and octets of widths 1, 1, 2, 4, 8
    made = {
        site: encoder_file.read(next((ran / site).glob("encoder-*.safetensors"))).described for site in SITES
    }
    assert len({one.of_network for one in made.values()}) == 1
    assert [one.modalities for one in made.values()] == [(modality,) for modality in SITES.values()]
    assert not list((ran / MAKER / "partners").iterdir())
    page = (ran / "report.html").read_text()
    for words in (
        "What the coordinator can see", "What the coordinator cannot see", "Nothing: no gradient is sent.",
        "at least two partners do", "The sum itself is not protected.", "synthetic patients", "all 4 encoders",
    ):  # fmt: skip
        assert words in page, words
    pictures = [base64.b64decode(one) for one in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert len(pictures) >= 6 and all(one.startswith(b"\x89PNG") for one in pictures)
    assert len(set(pictures)) > 6, "the true image, an average one, and what was rebuilt"
    for name in ("dice.png", "segmentation.png"):
        assert (ran / name).exists() == (name in {path.name for path in ran.glob("*.png")})
    # The bank has the sums, and no site's own values are on the coordinator's disk.
    (bank,) = (ran / "hub" / "state").glob("*/bank")
    assert [path.name for path in bank.iterdir() if path.is_dir()] == ["(sum)"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--strangers", "8"), "--strangers needs --private"),
        (("--pretraining-steps", "8"), "--pretraining-steps needs --private"),
        (("--private", "--missing"), "--private excludes --baselines, --missing and --seat-dropout"),
        (
            ("--private", "--seat-dropout", "0.5"),
            "--private excludes --baselines, --missing and --seat-dropout",
        ),
    ],
)
def test_flags_of_the_other_mode_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["demo", "--out", str(tmp_path / "out"), *arguments])
    assert (left.value.code, said in capsys.readouterr().err) == (4, True)
    assert not (tmp_path / "out").exists()
