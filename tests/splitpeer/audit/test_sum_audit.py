"""`splitpeer audit` of a secure sum whose encoders learn: the sum, and the one gradient that hospitals are sent."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from splitpeer.audit import release_audit
from splitpeer.audit.rehearsal import Protection
from splitpeer.audit.sum_audit import SumAudit
from splitpeer.audit.sum_training import HUB, RUN, SumTraining
from splitpeer.data.loader import SiteData
from splitpeer.defences.key import from_seed
from splitpeer.defences.randomness import Release
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.halves import coordinator_half, gradient_stacks
from splitpeer.federation.seats import seats_of
from splitpeer.leakage import own_image
from splitpeer.leakage.tumour import train_segmenter
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.training.split_round import Parties, Place, split_round

from .test_audit_command import site as site
from .test_release_audit import SUM, run, words_of

POLICY = """fusion = "secure-sum"
partners = ["site-flair"]
min_partners = 1
"""


def _two_steps(*given: Any, **more: Any) -> Any:
    return train_segmenter(*given, **more | {"steps": 2})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that judge are not trained well; none of this is about them."""
    monkeypatch.setattr(release_audit, "make_judge", partial(release_audit.make_judge, tumour=False))
    monkeypatch.setattr(own_image, "train_segmenter", _two_steps)


@pytest.fixture
def job(place: Any, tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(place.job.read_text().replace("[model]\n", f"[model]\n{SUM}"))
    return path


@pytest.fixture
def summing(site: Path) -> Path:
    site.write_text(site.read_text().replace('defences = ["dropout:0.3"]\n', POLICY))
    return site


def test_a_site_reads_the_sum_and_its_gradient_before_it_joins(
    place: Any, summing: Path, job: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "audit"
    code = run("audit", "--config", summing, "--job", job, "--partners", place.shadow, "--shadow", place.shadow,
               "--labels", place.data / "labels", "--convention", "msd", "--steps", 2, "--samples", 2, "--budget", 1,
               "--quick", "--attack", "pca", "--attack", "sum-search:steps=3,width=4,iterations=2",
               "--out", out)  # fmt: skip
    assert code == 0, capsys.readouterr().err
    found = {str(path.parent.relative_to(out / "0-undefended")): json.loads(path.read_text())
             for path in out.glob("**/attack.json")}  # fmt: skip
    assert set(found) == {"sum", "others-known", "sum/labels", "sum/labels-all-steps"}
    images, labels = found["sum"], found["sum/labels"]
    capture = images["capture"]
    assert (capture["frozen"], capture["summed"], capture["steps"], capture["rehearsal"]) == (
        False,
        2,
        2,
        True,
    )
    # Integers go up; what comes back is one gradient in floats.
    levels = images["network"]["levels"]
    assert {(one["precision"], one["gradient_precision"]) for one in levels} == {("i16", "f32")}
    assert all(one["gradient_octets"] == 2 * one["octets"] for one in levels)
    assert [(e["attack"], e["modality"]) for e in images["entries"]] == [("pca", "t1"), ("sum-search", "t1")]
    assert all(e["defences"] == ["secure sum of 2 hospitals"] for e in images["entries"] + labels["entries"])
    assert [(e["attack"], e["goal"], e["reads"]) for e in labels["entries"]] == [
        ("gradient-norm", "mask", "of the sum")
    ]
    floors = labels["entries"][0]["scores"]["auc"]["floors"]
    assert any("own image" in name for name in floors) and any("other patients" in name for name in floors)
    assert labels["entries"][0]["scores"]["advantage_auc"]["mean"] is not None
    assert [e["attack"] for e in found["sum/labels-all-steps"]["entries"]] == [
        "gradient-norm", "gradient-field", "gradient-projector",
    ]  # fmt: skip
    page = words_of(out / "report.html")
    for said in (
        "each time it is trained on or evaluated", "every hospital is sent the same one", "Encoders learn in this job",
        "The partners are stand-ins", "What the sums of one window in many training steps show together",
        "The hospital with t1",
    ):  # fmt: skip
        assert said in page, said
    assert "Nothing: no gradient is sent" not in page and "once: the sum" not in page


def test_it_trains_as_the_parties_of_such_a_job_do(
    place: Any, summing: Path, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, under noise on the gradient; and what is kept of the gradients is what came back."""
    courses: list[SumTraining] = []
    played = SumTraining.play

    def noted(self: SumTraining, *given: Any) -> None:
        played(self, *given)
        courses.append(self)

    monkeypatch.setattr(SumTraining, "play", noted)
    config, settings = PeerConfig.load(summing), JobConfig.load(job)
    audit = SumAudit(config, settings, tmp_path / "out", labels=place.data / "labels", convention="msd",
                     shadow=place.shadow, partners=place.shadow, samples=2, shadow_images=12, wider=())  # fmt: skip
    monkeypatch.setattr(SumAudit, "_attack", lambda self, *given: Mock())
    monkeypatch.setattr(SumAudit, "attack_labels", lambda self, *given: [])
    protection = Protection(gradients=("gaussian:1",))
    audit.run(["pca"], [protection])
    (course,) = courses
    job_now, seats = course.job, seats_of(settings)
    own, _ = audit._own_parts("site-t1", seats.of("site-t1"), job_now, protection)
    twins = [*own, *course.partners.parts((), 0, "cpu")]
    task = course.cohort.labels.labels
    parties = Parties(
        coordinator_half(settings, job_now, seats.names, task, "cpu"),
        {Place(one.site, one.seat.name): one.half for one in twins},
        gradient_stacks(protection.gradients, job_now, seats, from_seed(0, HUB)),
    )
    training = audit._scene("site-t1", seats.of("site-t1"), job_now).training
    stream = TrainingStream.of(settings, job_now, training, course.cohort.labels, frozenset(training))
    for forward in (stream[index] for index in range(job_now.steps)):
        images = course._shown(forward)
        target = SiteData(course.cohort.labels).batch(forward.samples, (32, 32, 1), forward.seed, None)
        split_round(
            parties, {place: images[place.seat] for place in parties.sites}, target,
            Release(RUN, forward.mode, forward.step, forward.batch, forward.samples), terms=course.terms,
        )  # fmt: skip
    for mine, twin in zip((*course.own, *course.others), twins, strict=True):
        assert mine.seat == twin.seat and not any(p.requires_grad for p in mine.half.network.parameters())
        for (name, one), other in zip(
            mine.half.network.named_parameters(), twin.half.network.parameters(), strict=True
        ):
            assert torch.equal(one, other), (mine.site, name)
    first, followed = course.first(), course.followed()
    assert len(first) == 3 and all(len(one.shots) == 1 and one.shots[0].step == 1 for one in first)
    assert all(one.shots[0].seed is not None and len(one.shots[0].gradients) == 5 for one in first)
    assert followed and all(course._holds(one.sample) for one in followed)
