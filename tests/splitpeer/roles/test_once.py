"""[policy] releases = "once" and preset = "private": what a site declines, and what it never answers twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitpeer.daemon import happenings as h
from splitpeer.errors import ConfigError, DataError
from splitpeer.federation.terms import job_on_wire, judge
from splitpeer.settings import templates
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PRIVATE, PeerConfig
from splitpeer.site.job import SiteJob
from splitpeer.site.opening import open_job
from splitpeer.site.people import People
from splitpeer.site.released import NAME
from splitproto.errors import PolicyRefused, SiteFailed

from .scene import PATIENTS, Scene
from .test_releases import FROZEN, answer, octets, offer_of, question

ONCE = {"coordinators": ["hub"], "releases": "once"}
OTHER_RUN = bytes(16)


@pytest.fixture
def frozen(scene: Scene) -> Scene:
    scene.cast("t1", training=FROZEN)
    scene.client("t1", policy=ONCE)
    return scene


def begin(scene: Scene, run: bytes | None = None, **runtime: Any) -> SiteJob:
    offer = offer_of(scene)
    if runtime:
        scene.client("t1", policy=ONCE, runtime=runtime)
    return open_job(replace(offer, run=run) if run else offer, scene.config("site-t1"), h.Reporter())


# --- once ------------------------------------------------------------------------------------------------------


def test_a_job_that_trains_encoders_is_declined(scene: Scene) -> None:
    """SP-11.17-9."""
    scene.cast("t1")
    scene.client("t1", policy=ONCE)
    with pytest.raises(
        PolicyRefused, match=r"again in every epoch; this site releases each once \(policy"
    ) as one:
        judge(offer_of(scene), scene.config("site-t1"))
    assert "\n" not in str(one.value)


def test_an_encoder_shows_a_patient_in_one_run_only(frozen: Scene) -> None:
    """SP-11.17-9: after a restart too, and when the run's folder is gone; other patients may be asked for."""
    first = begin(frozen)
    sent = octets(answer(first, question(frozen, 0, PATIENTS[0], [0, 1])))
    first.close()
    again = begin(frozen)
    assert octets(answer(again, question(frozen, 0, PATIENTS[0], [0, 1]))) == sent
    answer(again, question(frozen, 1, PATIENTS[0], [2]))
    again.close()
    for _ in range(2):
        other = begin(frozen, OTHER_RUN)
        for windows in ([0, 1], [7]):
            with pytest.raises(
                PolicyRefused, match="of a patient whom this encoder has shown in another run"
            ) as one:
                other.announce(question(frozen, 5, PATIENTS[0], windows))
            assert "\n" not in str(one.value)
        answer(other, question(frozen, 0, PATIENTS[1], [0]))
        other.close()


def test_other_weights_are_another_encoder(frozen: Scene) -> None:
    """Weights drawn for each run; the record knows both runs."""
    for run in (bytes(range(16)), OTHER_RUN):
        site = begin(frozen, run, initial_weights="private")
        answer(site, question(frozen, 0, PATIENTS[0], [0]))
        site.close()
    lines = [
        json.loads(line) for line in (frozen.folder / "site-t1" / "state" / NAME).read_text().splitlines()
    ]
    assert [line["run"] for line in lines] == [bytes(range(16)).hex(), OTHER_RUN.hex()]
    assert lines[0]["encoders"] != lines[1]["encoders"]
    assert lines[0]["people"] == lines[1]["people"]


def test_without_the_policy_another_run_is_answered(frozen: Scene) -> None:
    frozen.client("t1")
    for run in (bytes(range(16)), OTHER_RUN):
        site = begin(frozen, run)
        answer(site, question(frozen, 0, PATIENTS[0], [0]))
        site.close()


def test_a_second_answer_is_not_given(frozen: Scene) -> None:
    """SP-11.17-5: what cannot be computed again does not leave."""
    site = begin(frozen)
    asked = question(frozen, 0, PATIENTS[0], [0, 1])
    answer(site, asked)
    half = site.encoders.halves["t1"]
    for parameter in half.network.parameters():
        parameter.data += 0.25
    with pytest.raises(SiteFailed, match="the answer to release 0 is not the one that was given before"):
        answer(site, asked)
    site.close()


# --- kept noise ------------------------------------------------------------------------------------------------


def test_kept_noise_needs_once_or_the_image(scene: Scene) -> None:
    scene.cast("t1")
    kept = ["gaussian:1,kept=true@0"]
    scene.client("t1", policy={"coordinators": ["hub"], "defences": kept})
    with pytest.raises(ConfigError, match=r"gaussian:1,kept=true@0 is undone by a second view of a window"):
        scene.config("site-t1")
    scene.client("t1", policy={**ONCE, "defences": kept, "image_defences": ["voxel-noise:0.5"]})
    assert scene.config("site-t1").policy.releases == "once"
    scene.client("t1", policy={"coordinators": ["hub"], "image_defences": ["voxel-noise:0.5"]})
    assert scene.config("site-t1").policy.image_defences
    with pytest.raises(ConfigError, match="is undone by the next step, which has other weights"):
        assert scene.cast("t1", defences={"gradients": kept}).settings


# --- the preset ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weaker",
    [
        {"encoders": "any"},
        {"fusion": "any"},
        {"releases": "any"},
        {"share_encoder": True},
        {"min_partners": 1},
    ],
)
def test_a_preset_is_not_weakened(scene: Scene, weaker: dict[str, Any]) -> None:
    scene.cast("t1")
    scene.client("t1", policy={"coordinators": ["hub"], "preset": "private", **weaker})
    (key,) = weaker
    with pytest.raises(ConfigError, match=rf'{key} = .* weakens preset = "private", which has'):
        scene.config("site-t1")


def test_a_preset_is_these_keys_and_may_be_stricter(scene: Scene) -> None:
    scene.cast("t1")
    policy = {"coordinators": ["hub"], "preset": "private", "min_partners": 4, "levels": [3, 4]}
    scene.client("t1", policy=policy, runtime={"initial_weights": "private"})
    policy = scene.config("site-t1").policy
    assert {key: getattr(policy, key) for key in PRIVATE} == {**PRIVATE, "min_partners": 4}


def test_a_private_site_declines_what_is_not_private(scene: Scene) -> None:
    scene.cast("t1")
    scene.client(
        "t1", policy={"coordinators": ["hub"], "preset": "private"}, runtime={"initial_weights": "private"}
    )
    config = scene.config("site-t1")
    with pytest.raises(PolicyRefused, match="the job trains the sites' encoders"):
        judge(replace(offer_of(scene), recorded=False), config)
    with pytest.raises(
        PolicyRefused, match=r"does not say whether it records; this site is not to be recorded"
    ):
        judge(offer_of(scene), config)
    scene.cast("t1", training=FROZEN)
    with pytest.raises(
        PolicyRefused, match=r"would read this site's own values.*\(policy fusion = secure-sum\)"
    ):
        judge(replace(offer_of(scene), recorded=False), config)


def test_the_private_templates_fit_each_other(tmp_path: Path) -> None:
    sites = {"north": ["t1"], "south": ["flair"], "west": ["t2"]}
    (tmp_path / "job.toml").write_text(templates.job_toml("glioma", sites, private=True))
    (tmp_path / "peer.toml").write_text(
        templates.peer_toml(
            role="client", site="north", federation="demo", modality="t1", private=True
        ).replace("partners = []", 'partners = ["south", "west"]')
    )
    job = job_on_wire(JobConfig.load(tmp_path / "job.toml"))
    policy = PeerConfig.load(tmp_path / "peer.toml").policy
    assert job.frozen and job.fusion is not None and job.fusion.parties - 1 >= policy.min_partners
    assert policy.preset == "private" and policy.partners == ("south", "west")


# --- people ----------------------------------------------------------------------------------------------------


def test_an_account_is_a_persons_and_a_sites(tmp_path: Path) -> None:
    """Whatever the federation: no salt of one goes into it."""
    here, there = People(tmp_path / "a"), People(tmp_path / "b")
    assert not (tmp_path / "a").exists(), "made on first use"
    scan, next_scan = "BraTS-GLI-00005-000", "BraTS-GLI-00005-001"
    assert here.account(scan) == here.account(next_scan) == People(tmp_path / "a").account(scan)
    assert here.account(scan) not in (there.account(scan), here.account("BraTS-GLI-00006-000"))
    key = tmp_path / "a" / "people.key"
    assert key.stat().st_mode & 0o077 == 0
    key.write_bytes(b"short")
    with pytest.raises(DataError, match=r"people\.key: is not a key of 32 bytes"):
        People(tmp_path / "a").account(scan)
