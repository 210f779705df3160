"""[policy] releases = "once" and preset = "private": what a site declines, and what it never answers twice."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitpeer.daemon import happenings as h
from splitpeer.data.sampling import batch_digest
from splitpeer.errors import ConfigError, DataError
from splitpeer.federation.terms import job_on_wire, judge
from splitpeer.logs import handle
from splitpeer.privacy.ledger import NAME as LEDGER
from splitpeer.settings import templates
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PRIVATE, PRIVATE_RUNS, PeerConfig
from splitpeer.site import answers
from splitpeer.site.answers import check_windows
from splitpeer.site.job import SiteJob
from splitpeer.site.opening import open_job
from splitpeer.site.people import NAME as KEY
from splitpeer.site.people import People
from splitpeer.site.shown import NAME, Shown
from splitpeer.site.tiling import Rule, Tiling
from splitpeer.training.windows import window_origins
from splitproto.errors import PolicyRefused, SiteFailed
from splitproto.messages import Forward, Withdraw
from splitproto.records import Sample, Unusable

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


def test_the_same_run_id_with_other_terms_is_another_run(frozen: Scene) -> None:
    """SP-11.17-9: the coordinator chooses ids; a job of another name has a folder of its own."""
    first = begin(frozen)
    answer(first, question(frozen, 0, PATIENTS[0], [0, 1]))
    first.close()
    offer = offer_of(frozen)
    for new, changes in enumerate(({"name": "other"}, {"name": "others", "weight_decay": 0.5}), 1):
        other = open_job(
            replace(offer, job=replace(offer.job, **changes)), frozen.config("site-t1"), h.Reporter()
        )
        with pytest.raises(PolicyRefused, match="of a patient whom this encoder has shown in another run"):
            other.announce(question(frozen, 0, PATIENTS[0], [0, 1]))
        answer(other, question(frozen, 0, PATIENTS[new], [0]))
        other.close()
    # A deadline is no part of a run's terms: the coordinator may have changed it when it restarted.
    later = replace(offer, job=replace(offer.job, seconds_per_step=7.0))
    again = open_job(later, frozen.config("site-t1"), h.Reporter())
    answer(again, question(frozen, 0, PATIENTS[0], [0, 1]))
    again.close()


@pytest.mark.parametrize("once", [True, False])
def test_a_run_whose_folder_was_removed_shows_nobody_again(frozen: Scene, once: bool) -> None:
    """SP-11.17-4: which windows have left is unknown then; the coordinator could ask for others in their place."""
    if not once:
        frozen.client("t1")
    first = begin(frozen)
    answer(first, question(frozen, 0, PATIENTS[0], [0, 1]))
    first.close()
    shutil.rmtree(first.folder)
    for _ in range(2):
        again = begin(frozen)
        with pytest.raises(
            PolicyRefused, match="unknown since the run's folder was removed: begin a new"
        ) as one:
            again.announce(question(frozen, 0, PATIENTS[0], [0, 1]))
        assert "\n" not in str(one.value)
        answer(again, question(frozen, 1, PATIENTS[1], [0]))
        again.close()


def test_a_crash_between_answer_and_people_costs_nothing(
    frozen: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is kept first, so that a person without one is of a folder that is gone; then both are made good."""
    first, asked = begin(frozen), question(frozen, 0, PATIENTS[0], [0, 1])
    with monkeypatch.context() as patched:
        patched.setattr(Shown, "note", lambda self, people: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer(first, asked)
    first.close()
    assert not (frozen.folder / "site-t1" / "state" / NAME).exists()
    again = begin(frozen)
    answer(again, asked)
    again.close()
    assert (frozen.folder / "site-t1" / "state" / NAME).read_text().count("\n") == 1
    other = begin(frozen, OTHER_RUN)
    with pytest.raises(PolicyRefused, match="shown in another run"):
        other.announce(asked)
    other.close()


# --- views of one place ----------------------------------------------------------------------------------------


def test_windows_shifted_by_a_voxel_are_refused(frozen: Scene) -> None:
    """SP-11.17-10: they would be 64 views of one place, each of them "once"; after a restart too."""
    site, asked = begin(frozen), question(frozen, 0, PATIENTS[0], [0])
    key, (x, y, z) = asked.samples[0].key, asked.samples[0].origin
    answer(site, asked)

    def shifted(number: int, *origins: tuple[int, int, int]) -> Forward:
        samples = tuple(Sample(key, origin) for origin in origins)
        return Forward("release", 0, number, samples, batch_digest(0, samples, None))

    border = [
        size - width for size, width in zip(frozen.masks().geometry(key).shape, (32, 32, 1), strict=True)
    ]
    for process in range(2):
        for shift in range(1, min(border[:2])):
            for origin in ((x + shift, y, z), (x, y + shift, z), (x + shift, y + shift, z + 1)):
                with pytest.raises(
                    PolicyRefused, match=r"overlap of 0.5 allows \(policy max_overlap\)"
                ) as one:
                    site.announce(shifted(1 + shift, origin))
        assert "\n" not in str(one.value)
        with pytest.raises(PolicyRefused, match="max_overlap"):
            site.announce(shifted(1, (border[0], y, z), (border[0] - 1, y, z)))
        site.close()
        if not process:
            site = begin(frozen)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_the_windows_of_a_job_are_one_grid(overlap: float) -> None:
    """SP-11.17-10: every tiling of this product, in any order, at any border; a closer one than allowed is not."""
    chance = random.Random(7)
    shapes = [tuple(chance.randint(1, 24) for _ in range(3)) for _ in range(20)]
    for shape in [*shapes, (32, 32, 3), (33, 24, 16)]:
        for window in ((16, 16, 1), (8, 8, 8), (7, 5, 3)):
            origins = window_origins(shape, window, overlap)
            chance.shuffle(origins)
            tiling = Tiling(Rule(window, lambda key, size=shape: size, 0.5))
            for first in range(0, len(origins), 16):
                some = origins[first : first + 16]
                assert tiling.fits(b"", some), (shape, window, some)
                tiling.add(b"", some)
    closer = Tiling(Rule((8, 8, 8), lambda key: (40, 40, 40), 0.5))
    assert not closer.fits(b"", window_origins((40, 40, 40), (8, 8, 8), 0.75))


def test_a_place_is_in_few_windows_whatever_is_asked() -> None:
    """SP-11.17-10: on each axis two, and a third at the far border. In a volume smaller than a window, one."""
    size, width = 33, 8
    tiling = Tiling(Rule((width, 1, 1), lambda key: (size, 1, 1), 0.5))
    chance, left = random.Random(3), list[int]()
    for _ in range(2000):
        at = chance.randint(0, size - width)
        if tiling.fits(b"", [(at, 0, 0)]):
            tiling.add(b"", [(at, 0, 0)])
            left.append(at)
    views = [sum(at <= place < at + width for at in set(left)) for place in range(size)]
    assert max(views) <= 3 and len(set(left)) <= len(window_origins((size, 1, 1), (width, 1, 1), 0.5))
    small = Tiling(Rule((8, 1, 1), lambda key: (3, 1, 1), 0.5))
    small.add(b"", [(-2, 0, 0)])
    assert small.fits(b"", [(-2, 0, 1)]) and not any(
        small.fits(b"", [(at, 0, 0)]) for at in (-5, -4, -3, -1, 0)
    )


def test_what_cannot_be_written_down_is_not_begun(frozen: Scene) -> None:
    check_windows([(32, 32, 3)] * 10_000, (32, 32, 1), 1)
    with pytest.raises(
        PolicyRefused, match=r"releases 150000 windows .* 1 MiB \(policy max_record_mib\)"
    ) as one:
        check_windows([(33, 32, 3)] * 25_000, (32, 32, 1), 1)
    assert "\n" not in str(one.value)
    site = begin(frozen)
    site.inventory()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(answers, "LEAST_OCTETS", 1 << 20)
        with pytest.raises(PolicyRefused, match="max_record_mib"):
            site.inventory()
    site.close()


def test_an_operator_may_allow_closer_windows(frozen: Scene) -> None:
    frozen.client("t1", policy={**ONCE, "max_overlap": 0.9})
    site = begin(frozen)
    key = frozen.key(PATIENTS[0])
    for number, x in enumerate((0, 4, 8)):
        samples = (Sample(key, (x, 0, 0)),)
        answer(site, Forward("release", 0, number, samples, batch_digest(0, samples, None)))
    site.close()


# --- runs of one patient ---------------------------------------------------------------------------------------


def test_a_patient_is_shown_in_so_many_runs_whatever_the_encoder(frozen: Scene) -> None:
    """SP-11.17-11: weights are drawn for each run, so `once` alone would limit nothing."""

    def run(number: int) -> SiteJob:
        return open_job(
            replace(offer_of(frozen), run=bytes([number]) * 16), frozen.config("site-t1"), h.Reporter()
        )

    runtime = {"initial_weights": "private"}
    frozen.client("t1", policy={**ONCE, "max_runs_per_patient": 2}, runtime=runtime)
    for number in (1, 2, 1):
        site = run(number)
        answer(site, question(frozen, 0, PATIENTS[0], [0]))
        site.close()
    third = run(3)
    with pytest.raises(
        PolicyRefused, match=r"as many other runs .* \(policy max_runs_per_patient = 2\)"
    ) as one:
        third.announce(question(frozen, 0, PATIENTS[0], [5]))
    assert "\n" not in str(one.value)
    answer(third, question(frozen, 0, PATIENTS[1], [0]))
    third.close()
    frozen.client("t1", policy={**ONCE, "max_runs_per_patient": 3}, runtime=runtime)
    third = run(3)
    answer(third, question(frozen, 1, PATIENTS[0], [5]))
    third.close()


def test_a_run_that_nobody_is_left_for_is_declined(frozen: Scene) -> None:
    """SP-11.17-9, SP-11.17-11: before the others have joined it."""
    first = begin(frozen)
    for number, patient in enumerate(PATIENTS):
        answer(first, question(frozen, number, patient, [0]))
    first.close()
    with pytest.raises(
        PolicyRefused, match="every patient of this site is one whom this encoder has shown"
    ) as one:
        begin(frozen, OTHER_RUN)
    assert "\n" not in str(one.value)
    begin(frozen).close()
    frozen.client("t1", policy={"coordinators": ["hub"], "max_runs_per_patient": 1})
    with pytest.raises(
        PolicyRefused, match="every patient of this site is one who was shown in as many other"
    ):
        open_job(replace(offer_of(frozen), run=OTHER_RUN), frozen.config("site-t1"), h.Reporter())


def test_a_run_does_without_whom_others_have_shown(frozen: Scene) -> None:
    """SP-11.17-12: listed with the cause, and withdrawn if asked for nevertheless; on resuming too."""
    first = begin(frozen)
    answer(first, question(frozen, 0, PATIENTS[0], [0]))
    first.close()
    gone = Unusable(frozen.key(PATIENTS[0]), "shown")
    for number in range(2):
        other = begin(frozen, OTHER_RUN)
        listed, unusable = other.inventory()
        assert unusable == [gone] and {one.key for one in listed} == {frozen.key(p) for p in PATIENTS[1:]}
        sent = answer(other, question(frozen, 5, PATIENTS[0], [0]))
        assert isinstance(sent, Withdraw) and sent.patients == (gone,)
        answer(other, question(frozen, number, PATIENTS[1], [number]))
        other.close()
    again = begin(frozen)
    listed, unusable = again.inventory()
    assert unusable == [Unusable(frozen.key(PATIENTS[1]), "shown")] and frozen.key(PATIENTS[0]) in {
        one.key for one in listed
    }
    again.close()


def test_a_run_between_a_crash_and_the_resume_counts(frozen: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """SP-11.17-9: the answer was kept, its people were not, and then another run has shown them."""
    first, asked = begin(frozen), question(frozen, 0, PATIENTS[0], [0, 1])
    with monkeypatch.context() as patched:
        patched.setattr(Shown, "note", lambda self, people: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer(first, asked)
    first.close()
    other = begin(frozen, OTHER_RUN)
    answer(other, question(frozen, 0, PATIENTS[0], [3]))
    other.close()
    again = begin(frozen)
    assert again.released.knows(asked)
    with pytest.raises(PolicyRefused, match="shown in another run"):
        again.announce(asked)
    again.inventory()
    assert isinstance(answer(again, asked), Withdraw)
    again.close()


@pytest.mark.parametrize("record", [NAME, LEDGER])
def test_a_lost_key_of_people_does_not_forget_whom_records_name(tmp_path: Path, record: str) -> None:
    People(tmp_path).account(PATIENTS[0])
    (tmp_path / KEY).unlink()
    (tmp_path / record).write_text("{}\n")
    with pytest.raises(DataError, match=rf"people\.key: is missing, and {record} .* from a backup") as one:
        People(tmp_path).account(PATIENTS[0])
    assert "\n" not in str(one.value) and not (tmp_path / KEY).exists()


def test_runs_that_train_encoders_count_too(scene: Scene) -> None:
    """SP-11.17-11: each of their steps is a view."""
    scene.cast("t1", training={"steps": 20})
    scene.client("t1", policy={"coordinators": ["hub"], "max_runs_per_patient": 1})
    offer, asked = offer_of(scene), replace(question(scene, 0, PATIENTS[0], [0]), mode="evaluate")
    for run in (offer.run, offer.run):
        site = open_job(replace(offer, run=run), scene.config("site-t1"), h.Reporter())
        answer(site, asked)
        site.close()
    other = open_job(replace(offer, run=OTHER_RUN), scene.config("site-t1"), h.Reporter())
    with pytest.raises(PolicyRefused, match="max_runs_per_patient = 1"):
        other.announce(asked)
    other.close()


def test_the_preset_shows_a_patient_in_one_run_unless_more_are_allowed(scene: Scene) -> None:
    scene.cast("t1")
    for written, meant in (({}, PRIVATE_RUNS), ({"max_runs_per_patient": 3}, 3)):
        policy = {"coordinators": ["hub"], "preset": "private", **written}
        scene.client("t1", policy=policy, runtime={"initial_weights": "private"})
        assert scene.config("site-t1").policy.max_runs_per_patient == meant


# --- the record ------------------------------------------------------------------------------------------------


def test_nothing_leaves_that_the_record_has_no_room_for(frozen: Scene) -> None:
    frozen.client("t1", policy={**ONCE, "max_record_mib": 1})
    state = frozen.folder / "site-t1" / "state"
    People(state).account(PATIENTS[0])
    line = {"run": "aa" * 16, "terms": "", "encoders": [], "people": ["00" * 16] * 29_000}
    (state / NAME).write_text(json.dumps(line) + "\n")
    assert (1 << 20) - 10_000 < (state / NAME).stat().st_size < 1 << 20
    site, told = begin(frozen), r"released\.jsonl: reaches 1 MiB.* raise \[policy\] max_record_mib"
    (state / NAME).write_bytes((state / NAME).read_bytes())
    answer(site, question(frozen, 0, PATIENTS[0], [0]))
    site.close()
    with (state / NAME).open("a") as file:
        file.write(json.dumps({**line, "people": ["00" * 16] * 3000}) + "\n")
    with pytest.raises(DataError, match=told) as one:
        begin(frozen)
    assert "\n" not in str(one.value)


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
    with pytest.raises(
        SiteFailed, match="the answer to release 0 is not the one that was given before"
    ) as one:
        answer(site, asked)
    # The cure, in words that the coordinator hears too.
    assert f"splitpeer bank drop RUN --patient {handle(asked.samples[0].key)}" in str(one.value)
    assert "\n" not in str(one.value)
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
    key.chmod(0o644)
    with pytest.raises(
        DataError, match=r"people\.key: others on this machine may read .*: chmod 600 "
    ) as one:
        People(tmp_path / "a").account(scan)
    assert "\n" not in str(one.value)
    key.chmod(0o600)
    key.write_bytes(b"short")
    with pytest.raises(DataError, match=r"people\.key: is not a key of 32 bytes"):
        People(tmp_path / "a").account(scan)
