"""Taking part privately: the preset, what `init --private` writes, and a job against a policy before anybody joins."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest

from splitpeer.cli import main
from splitpeer.cli.root import root
from splitpeer.errors import ConfigError
from splitpeer.federation.terms import judge
from splitpeer.models import build_encoder
from splitpeer.preflight import machine
from splitpeer.pretraining import encoder_file
from splitpeer.pretraining.encoder_file import EncoderFacts, Past
from splitpeer.settings import templates
from splitpeer.settings.job import JobConfig
from splitpeer.settings.loading import to_toml
from splitpeer.settings.peer import PRIVATE, PRIVATE_NOISE, PRIVATE_RATE, PeerConfig
from splitpeer.site.invitation import offer_to
from splitproto import pki

DOCS = Path(__file__).parents[2] / "docs"
ANNEX = DOCS / "private-annex.md"
NOW = datetime.now(UTC)
SITES = {"north": "t1", "south": "t2", "west": "flair"}
NAMED = [f"--site={site}={modality}" for site, modality in SITES.items()]


def private(folder: Path, text: str = "", **environ: str) -> PeerConfig:
    """A hospital's settings, with `text` at the end of [policy]."""
    made = templates.peer_toml(
        role="client",
        site="north",
        federation="demo",
        modality="t1",
        private=True,
        partners=("south", "west"),
    )
    (folder / "peer.toml").write_text(made.replace('preset = "private"', f'preset = "private"\n{text}'))
    return PeerConfig.load(folder / "peer.toml", environ=environ)


# ---- the preset


def test_the_preset_holds_for_values_as_they_are_understood(tmp_path: Path) -> None:
    """Text that stands for a number or a truth value is no weaker than what it stands for."""
    policy = private(tmp_path, 'min_partners = "3"', SPLITPEER_POLICY__SHARE_ENCODER="false").policy
    assert policy is not None
    assert {key: getattr(policy, key) for key in PRIVATE} == {**PRIVATE, "min_partners": 3}
    assert private(tmp_path, SPLITPEER_POLICY__MIN_PARTNERS="4").policy.min_partners == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_partners", "1"),
        ("share_encoder", "yes"),
        ("recorded_by_coordinator", "true"),
        ("encoders", "any"),
        ("fusion", "any"),
        ("releases", "any"),
    ],
)
def test_the_environment_does_not_weaken_the_preset(tmp_path: Path, key: str, value: str) -> None:
    environ = {f"SPLITPEER_POLICY__{key.upper()}": value}
    with pytest.raises(ConfigError, match=rf'\[policy\]: {key} = .* weakens preset = "private", which has'):
        private(tmp_path, **environ)


@pytest.mark.parametrize("page", ["private.md", "private-annex.md"])
def test_the_docs_say_what_the_preset_stands_for(page: str) -> None:
    text = " ".join((DOCS / page).read_text().split())
    assert all(f"`{key} = {json.dumps(value)}`" in text for key, value in PRIVATE.items())


def test_the_commands_of_the_annex_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """An auditor types them as they are written."""
    found = {
        tuple(line.split()) for line in re.findall(r"`splitpeer ([a-z]+(?: [a-z]+)?)\b", ANNEX.read_text())
    }
    assert ("bank", "drop") in found and ("config", "check") in found
    for words in found:
        known = root.get_command(click.Context(root), words[0])
        assert known is not None, words
        if isinstance(known, click.Group):
            assert known.get_command(click.Context(known), words[1]) is not None, words


def test_the_preset_takes_no_seed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'preset = "private" with a seed for \[runtime\] initial_weights'):
        private(tmp_path, SPLITPEER_RUNTIME__INITIAL_WEIGHTS="7")


def test_a_site_is_no_partner_of_itself(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"\[policy\] partners names north, which is this site: list the others"
    ):
        private(tmp_path, SPLITPEER_POLICY__PARTNERS='["south", "north"]')


# ---- what init writes


@pytest.fixture
def hospitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """Certificates, a salt, and a folder of images; the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SPLITPEER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "_synchronised", lambda: True)
    pki.create_ca(tmp_path / "pki", "demo", now=NOW)
    pki.issue(tmp_path / "pki", "coordinator", "hub", hosts=["localhost"], now=NOW)
    for site in SITES:
        pki.issue(tmp_path / "pki", "client", site, now=NOW)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "p1.nii.gz").write_bytes(b"")
    return tmp_path


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code, and all that was said."""
    try:
        code: Any = main(arguments)
    except SystemExit as left:
        code = left.code
    said = capsys.readouterr()
    return code or 0, said.out + said.err


def hospital(capsys: pytest.CaptureFixture[str], site: str, *more: str) -> tuple[int, str]:
    given = ("--role", "client", "--site", site, "--modality", SITES[site], "--images", "images", "--private")
    return cli(capsys, "init", *given, "--output", f"{site}.toml", *more)


def test_what_init_writes_is_checked_and_accepted(
    hospitals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(capsys, "init", "job", "--private", *NAMED) == (
        0, "job.toml: job glioma; edit it, then: splitpeer config check job.toml\n",
    )  # fmt: skip
    assert cli(capsys, "config", "check", "job.toml")[0] == 0
    job = JobConfig.load(Path("job.toml"))
    for site in SITES:
        others = [other for other in SITES if other != site]
        assert hospital(capsys, site, "--partners", ",".join(others))[0] == 0
        made = encoder(SITES[site], PRICED)
        code, said = cli(capsys, "config", "check", f"{site}.toml", "--job", "job.toml", *made)
        assert (code, "job.toml: ok: job glioma would be accepted" in said) == (0, True), said
        config = PeerConfig.load(Path(f"{site}.toml"), environ={})
        judge(offer_to(job, site), config)
        assert config.policy is not None
        assert config.policy.partners == tuple(others)


def test_the_templates_of_private_jobs_offer_what_is_accepted(hospitals: Path) -> None:
    """Every key of job.toml that is refused in such a job is absent, as a comment too."""
    text = templates.job_toml("glioma", {site: [modality] for site, modality in SITES.items()}, private=True)
    for refused in (
        "average_every", "seat_dropout", "missing", "gradients", "mode =", "least_sites", "min_seats", "precision",
        "sum_bits", "percentile", "seed = 1", "own_steps",
    ):  # fmt: skip
        assert refused not in text, refused
    text = templates.peer_toml(role="client", site="north", federation="demo", modality="t1", private=True)
    for refused in ("recorded_by_coordinator = true", "bf16", "percentile", "share_encoder = true"):
        assert refused not in text, refused


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        (
            NAMED[:1],
            "a private job needs three sites or more: with two, each can subtract its own part",
        ),
        (NAMED[:2], "a private job needs three sites or more"),
        (
            [*NAMED, "--site=east=t1"],
            "north and east both hold t1: in a private job each modality is one site's",
        ),
    ],
)
def test_init_writes_no_private_job_that_is_declined(
    hospitals: Path, capsys: pytest.CaptureFixture[str], sites: list[str], said: str
) -> None:
    code, text = cli(capsys, "init", "job", "--private", *sites)
    assert (code, said in text) == (4, True), text
    assert not Path("job.toml").exists()


def test_a_private_job_without_sites_says_how_many_it_wants(
    hospitals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(capsys, "init", "job", "--private")[0] == 0
    assert "Three sites or more" in Path("job.toml").read_text()


@pytest.mark.parametrize(
    ("partners", "said"),
    [
        ("south", "--partners south: a private site wants two or more"),
        ("south,north", "--partners names north, which is this site"),
        ("south,south", "--partners south,south: name each once"),
        ("south,We st", "is not a name"),
    ],
)
def test_partners_are_others(
    hospitals: Path, capsys: pytest.CaptureFixture[str], partners: str, said: str
) -> None:
    code, text = hospital(capsys, "north", "--partners", partners)
    assert (code, said in text) == (4, True), text
    assert not Path("north.toml").exists()


def test_partners_without_the_preset(hospitals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = ("init", "--role", "client", "--site", "north", "--modality", "t1", "--partners", "south")
    assert cli(capsys, *client)[0] == 0
    assert PeerConfig.load(Path("peer.toml"), environ={}).policy.partners == ("south",)  # type: ignore[union-attr]
    code, said = cli(capsys, "init", "--role", "coordinator", "--partners", "south", "--force")
    assert (code, "--partners is for clients" in said) == (4, True)


# ---- what is left open


def test_what_the_preset_leaves_open_is_told(hospitals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hospital(capsys, "north")[0] == 0
    code, said = cli(capsys, "config", "check", "north.toml")
    assert code == 0
    (weights,) = [line for line in said.splitlines() if "[model] weights" in line]
    (partners,) = [line for line in said.splitlines() if "[policy] partners" in line]
    assert "no run begins, as min_encoder_noise = 0.2 wants one that has learned behind it" in weights
    assert "is empty: every job is declined: name the other sites of the sum" in partners
    _, said = cli(capsys, "doctor", "--config", "north.toml", "--offline", "--json")
    told = [one for one in json.loads(said) if one["check"] == "policy"]
    assert [one["level"] for one in told] == ["ok", "warning", "warning"]
    assert told[0]["text"].startswith("preset private: only jobs that keep our encoder frozen")
    assert "a patient is shown in 1 run at most" in told[0]["text"]
    (hospitals / "t1.safetensors").write_bytes(b"")
    settings = PeerConfig.load(Path("north.toml"), {"policy.partners": ["south"]}, {}).resolved()
    Path("north.toml").write_text(to_toml(settings | {"model": {"weights": "t1.safetensors"}}))
    said = cli(capsys, "config", "check", "north.toml")[1]
    assert "[model] weights" not in said
    assert "[policy] partners names 1 site, min_partners wants 2: every job is declined" in said
    assert "is lower than the preset's" not in said
    said = cli(capsys, "config", "check", "north.toml", "--set", "policy.min_encoder_rate=0.5")[1]
    assert "[policy] min_encoder_rate = 0.5 is lower than the preset's 1: a sum may show more" in said
    Path("north.toml").write_text(to_toml(settings))
    said = cli(capsys, "config", "check", "north.toml", *ANY_ENCODER)[1]
    assert 'every run draws a new encoder, for which releases = "once" begins again' in said


# ---- a job against a policy


def invited(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    return cli(capsys, "config", "check", "north.toml", "--job", "job.toml", *more)


PRICED = Past(
    "phantom", "regions", 4, 5, 2, "adam", 0.1, None, (2.0, 1.0), noise=PRIVATE_NOISE, rate=PRIVATE_RATE
)
ANY_ENCODER = ("--set", "policy.min_encoder_noise=0", "--set", "policy.min_encoder_rate=0")


def encoder(modality: str, *stages: Past) -> tuple[str, ...]:
    """Write an encoder for job.toml; what names it."""
    job, path = JobConfig.load(Path("job.toml")), Path("encoder.safetensors")
    backbone = job.model.backbone()
    facts = EncoderFacts.of(backbone, [modality], ["zscore-nonzero"], (), job.data.window, stages)
    encoder_file.write(path, build_encoder(backbone, seed=0).state_dict(), facts)
    return ("--set", f"model.weights={path}")


def test_a_job_is_checked_against_a_policy(hospitals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that would be declined, in one line, and as JSON."""
    assert hospital(capsys, "north", "--partners", "south,east")[0] == 0
    assert cli(capsys, "init", "job", *NAMED)[0] == 0
    code, said = invited(capsys, *ANY_ENCODER)
    assert code == 4
    line = said.splitlines()[-1]
    assert line.startswith("splitpeer: job.toml: would be declined: ")
    assert "this site keeps its own as it is (policy encoders = frozen)" in line
    assert "only a sum over sites may be read (policy fusion = secure-sum)" in line
    code, said = invited(capsys, "--json", *ANY_ENCODER)
    found = [one["text"] for one in json.loads(said) if (one["check"], one["level"]) == ("job", "problem")]
    assert (code, len(found)) == (4, 2)
    assert cli(capsys, "init", "job", "--private", "--force", *NAMED)[0] == 0
    assert invited(capsys, *encoder("t1", PRICED)) == (
        4,
        "splitpeer: job.toml: would be declined: west is in the sum and not among those whom this site accepts "
        "(policy partners: south, east)\n",
    )


def test_a_job_that_is_not_for_this_site(hospitals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hospital(capsys, "north", "--partners", "south,west")[0] == 0
    assert cli(capsys, "init", "job", "--site", "south=t2", "--site", "west=flair")[0] == 0
    code, said = invited(capsys)
    assert (code, "job.toml: [sites] does not name north" in said) == (4, True), said
    assert cli(capsys, "init", "job", "--force", "--site", "south=t2", "--site", "north=flair")[0] == 0
    code, said = invited(capsys)
    assert "the job wants flair from us, this site holds t1" in said


def test_costs_are_told_as_well(hospitals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hospital(capsys, "north", "--partners", "south,west")[0] == 0
    assert cli(capsys, "init", "job", "--private", *NAMED)[0] == 0
    code, said = invited(capsys, "--set", "policy.max_parameters=10")
    assert (code, "where this site allows 10 (max_parameters)" in said) == (4, True), said


def test_weights_that_anyone_can_compute_are_declined(
    hospitals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SP-14-3: a recipe with a seed; steps on own images after it change little."""
    assert hospital(capsys, "north", "--partners", "south,west")[0] == 0
    assert cli(capsys, "init", "job", "--private", *NAMED)[0] == 0
    private = replace(PRICED, noise=0.0, rate=0.0)
    seeded, own = replace(private, seed=1), replace(private, data="own", labels="none")
    weights = ("--set", "model.weights=encoder.safetensors", *ANY_ENCODER)
    assert "encoder.safetensors: no such file" in invited(capsys, *weights)[1]
    for stages, taken in (
        ([private], True),
        ([private, seeded], True),
        ([seeded], False),
        ([seeded, own], False),
    ):
        code, said = invited(capsys, *encoder("t1", *stages), *ANY_ENCODER)
        assert (code, "takes no weights that began from a seed" in said) == (
            (0, False) if taken else (4, True)
        ), said
    # Encoders that learned behind noise count on it.
    weights = (*encoder("t1", PRICED), *ANY_ENCODER)
    for defence, taken in (
        ("gaussian:0.2", True),
        ("gaussian:0.3", True),
        ("gaussian:0.1", False),
        ("gaussian:0.2@0", False),
    ):
        code, said = invited(capsys, *weights, "--set", f'policy.defences=["{defence}"]')
        assert (code, "learned behind noise of 0.2" in said) == ((0, False) if taken else (4, True)), said
    other = ("--site=north=t2", "--site=south=t1", "--site=west=flair")
    assert cli(capsys, "init", "job", "--private", "--force", *other)[0] == 0
    assert "does not fit this job: its channels: t1, the job's: t2" in invited(capsys, *weights)[1]


def test_the_preset_wants_encoders_of_the_recipe_that_init_writes(
    hospitals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Less noise, a lower price, or no training at all is declined, unless the hospital writes that it accepts it."""
    assert hospital(capsys, "north", "--partners", "south,west")[0] == 0
    assert cli(capsys, "init", "job", "--private", *NAMED)[0] == 0
    recipe, policy = JobConfig.load(Path("job.toml")).pretraining, PeerConfig.load(Path("north.toml")).policy
    assert recipe is not None and policy is not None
    assert (recipe.noise, recipe.rate) == (policy.min_encoder_noise, policy.min_encoder_rate)
    quiet, cheap = replace(PRICED, noise=0.1), replace(PRICED, rate=0.9)
    for made, said in (
        (
            (),
            "min_encoder_noise = 0.2 wants an encoder of splitpeer pretrain, and seat t1 starts from random",
        ),
        (encoder("t1", quiet), "min_encoder_noise = 0.2, and the encoder of seat t1 learned with 0.1"),
        (encoder("t1", cheap), "min_encoder_rate = 1, and the encoder of seat t1 learned with 0.9"),
    ):
        if made:
            encoder("t1", quiet if "noise" in said else cheap)
        code, text = invited(capsys, *made)
        assert (code, said in text) == (4, True), text
        assert invited(capsys, *made, *ANY_ENCODER)[0] == 0
    more = ("--set", "policy.min_encoder_noise=0.3", "--set", 'policy.defences=["gaussian:0.3"]')
    assert "min_encoder_noise = 0.3" in invited(capsys, *encoder("t1", PRICED), *more)[1]


def test_a_job_has_no_job(hospitals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(capsys, "init", "job", "--private", *NAMED)[0] == 0
    code, said = cli(capsys, "config", "check", "job.toml", "--job", "job.toml")
    assert (code, "--job is for a site's peer.toml" in said) == (4, True), said
