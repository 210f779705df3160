"""A site with frozen encoders: each window leaves once, the same question gets the same octets, no more is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from splitpeer.daemon import happenings as h
from splitpeer.data.sampling import batch_digest
from splitpeer.errors import ConfigError, DataError
from splitpeer.federation.terms import cut_descriptors, job_on_wire, judge, services
from splitpeer.settings.job import JobConfig
from splitpeer.site.answers import ANSWERS, answers_of
from splitpeer.site.job import SiteJob
from splitpeer.site.opening import open_job
from splitpeer.site.released import Released
from splitpeer.training.windows import window_origins
from splitproto.errors import PolicyRefused, SchemaMismatch
from splitproto.messages import Activations, Forward, JobOffer, Withdraw
from splitproto.records import Sample, Seat
from splitproto.tensors import schema_digest

from .scene import PATIENTS, Scene

RUN = bytes(range(16))
FROZEN = {"steps": 20, "encoders": "frozen"}


def offer_of(scene: Scene, **changes: Any) -> JobOffer:
    job = replace(job_on_wire(scene.settings), **changes)
    return JobOffer(RUN, (Seat("t1", ("t1",)),), job, schema_digest(cut_descriptors(job)))


@pytest.fixture
def begin(scene: Scene) -> Callable[..., SiteJob]:
    """A process of one site that takes up a frozen run, with private weights and noise."""
    scene.cast("t1", training=FROZEN)
    scene.client(
        "t1",
        runtime={"initial_weights": "private"},
        policy={"coordinators": ["hub"], "defences": ["gaussian:0.5"]},
    )
    return lambda: open_job(offer_of(scene), scene.config("site-t1"), h.Reporter())


def question(scene: Scene, number: int, patient: str, windows: Sequence[int], **more: Any) -> Forward:
    """Some of the windows of a patient."""
    key = scene.key(patient)
    origins = window_origins(scene.masks().geometry(key).shape, (32, 32, 1), 0.25)
    samples = tuple(Sample(key, origins[place]) for place in windows)
    step, seed, places = more.get("step", 0), more.get("seed"), more.get("places")
    return Forward("release", step, number, samples, batch_digest(step, samples, seed, places), seed, places)


def answer(site: SiteJob, asked: Forward) -> Activations | Withdraw:
    site.announce(asked)
    due = site.due()
    assert due == asked
    return site.forward(due)


def octets(sent: Activations | Withdraw) -> dict[str, bytes]:
    assert isinstance(sent, Activations)
    return {name: array.tobytes() for name, array in sent.tensors.items()}


def test_the_same_question_gets_the_same_octets_from_any_process(scene, begin) -> None:
    """SP-11.17-5, SP-11.17-6: with private weights and noise, and though nothing that left is kept here."""
    first = begin()
    asked = [question(scene, n, PATIENTS[0], [2 * n, 2 * n + 1]) for n in range(3)]
    sent = [octets(answer(first, one)) for one in asked]
    assert sent[0] != sent[1]
    assert octets(answer(first, asked[1])) == sent[1]
    assert first.released.windows == 6
    label = first.label()
    first.close()
    second = begin()
    assert second.incarnation != first.incarnation
    assert (second.released.windows, second.label()) == (6, label)
    assert [octets(answer(second, one)) for one in reversed(asked)] == sent[::-1]
    second.close()


def test_the_label_changes_with_any_weight_and_tells_nothing(scene, begin) -> None:
    """SP-11.17-6."""
    site = begin()
    known = site.label()
    assert known is not None and len(known) == 32
    half = site.encoders.halves["t1"]
    parameter = [*half.network.parameters()][-1]
    values = parameter.data.view(-1)
    values[0] = torch.nextafter(values[0], torch.tensor(9.0))
    assert site.label() != known
    assert site.encoders.digest() not in (known, site.label())
    site.close()
    for file in ("holder.key", "step-00000000.safetensors"):
        (site.folder / file).unlink()
    other = begin()
    assert other.label() != known
    other.close()


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"windows": [0, 1, 0]}, "one window twice"),
        ({"windows": [0, 1], "number": 5}, "2 windows that were released before, as of 0"),
        ({"windows": [5, 6, 1], "number": 5}, "1 windows that were released before, as of 0"),
        ({"windows": [5, 6]}, "release 0 was answered for other windows before"),
        ({"windows": [5, 6], "number": 5, "seed": 7}, "nothing is augmented"),
        ({"windows": [5, 6], "number": 5, "step": 1}, "of step 0"),
        ({"windows": [5, 6], "number": 5, "places": (0, 2)}, "without places"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_question_about_what_has_left_is_refused(scene, begin, wrong, cause) -> None:
    """SP-11.17-3, SP-11.17-4: by the next process too."""
    first = begin()
    answer(first, question(scene, 0, PATIENTS[0], [0, 1]))
    for site in (first, begin()):
        asked = question(scene, **{"number": 0, "patient": PATIENTS[0], **wrong})
        with pytest.raises(PolicyRefused, match=cause):
            site.announce(asked)
        assert site.released.windows == 2
        site.close()


def test_two_questions_announced_together_do_not_get_one_window_twice(scene, begin) -> None:
    """SP-11.17-4."""
    site = begin()
    for number, windows in enumerate([[0, 1], [1, 2]]):
        site.announce(question(scene, number, PATIENTS[0], windows))
    assert isinstance(site.forward(site.due()), Activations)
    with pytest.raises(PolicyRefused, match="1 windows that were released before"):
        site.forward(site.due())
    assert site.released.windows == 2
    site.close()


def test_no_other_mode_is_part_of_a_frozen_job(scene, begin) -> None:
    """SP-11.17-1: in addition to the states of the link."""
    site = begin()
    for mode in ("train", "evaluate"):
        with pytest.raises(PolicyRefused, match=f"{mode} of step 0 is not part of this job"):
            site.announce(replace(question(scene, 0, PATIENTS[0], [0]), mode=mode))
    site.close()
    scene.job()
    joint = replace(offer_of(scene), run=bytes(16))
    site = open_job(joint, scene.config("site-t1"), h.Reporter())
    with pytest.raises(PolicyRefused, match="release of step 0 is not part of this job"):
        site.announce(question(scene, 0, PATIENTS[0], [0]))
    assert site.label() is None
    site.close()


def test_a_withdrawn_patient_makes_no_other_release_void(scene, begin, tmp_path) -> None:
    """SP-11.17-7: each batch has its own answer, in order."""
    gone = tmp_path / "withdrawn.txt"
    gone.write_text("")
    path = scene.client(
        "t1",
        data={
            "images": str(scene.federation.data / "t1"),
            "salt": str(scene.federation.pki / "federation.salt"),
            "withdrawn": str(gone),
        },
    )
    site = begin()
    plan = [(0, PATIENTS[0], [0]), (1, PATIENTS[1], [0]), (2, PATIENTS[0], [1]), (3, PATIENTS[1], [1])]
    for number, patient, windows in plan:
        site.announce(question(scene, number, patient, windows))
    assert isinstance(site.forward(site.due()), Activations)
    gone.write_text(f"{PATIENTS[1]}\n")
    answers = [site.forward(site.due()) for _ in plan[1:]]
    assert [type(one).__name__ for one in answers] == ["Withdraw", "Activations", "Withdraw"], path
    assert [one.batch for one in answers] == [1, 2, 3]
    assert site.due() is None
    assert (site.released.windows, site.released.patients) == (2, 1)
    site.close()


def test_what_has_left_survives_a_torn_line_and_nothing_worse(tmp_path) -> None:
    """SP-11.17-4: a line torn by a crash is of an answer that never left; any other damage is not guessed at."""
    samples = (Sample(bytes(16), (0, -3, 5)),)
    asked = [Forward("release", 0, n, (replace(samples[0], origin=(n, 0, 0)),), bytes(32)) for n in range(3)]
    released = Released(answers_of(tmp_path, 1))
    for one in asked[:2]:
        released.check(one)
        released.note(one, {})
    path = tmp_path / ANSWERS
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"batch":2,"win')
    again = Released(answers_of(tmp_path, 1))
    assert (again.windows, again.knows(asked[1]), again.knows(asked[2])) == (2, True, False)
    again.note(asked[2], {})
    assert Released(answers_of(tmp_path, 1)).windows == 3
    path.write_bytes(whole.replace(b'"batch":0', b'"batch":x'))
    with pytest.raises(DataError, match=r"answers\.jsonl: damaged, so nobody knows what has left"):
        Released(answers_of(tmp_path, 1))


# --- whether the job is taken at all -------------------------------------------------------------------------


def test_a_frozen_job_needs_a_link_for_releases_alone(scene) -> None:
    """SP-11.17-2."""
    scene.cast("t1", training=FROZEN)
    config, offer = scene.config("site-t1"), offer_of(scene)
    assert offer.job.encoders == "frozen"
    judge(offer, config, services(frozen=True))
    with pytest.raises(SchemaMismatch, match="release was not agreed"):
        judge(offer, config, ("dtype.f32",))
    for one in ("train", "evaluate", "average"):
        with pytest.raises(
            SchemaMismatch, match=f"{one} was agreed on this link, and is not for frozen encoders"
        ):
            judge(offer, config, (*services(frozen=True), one))
    joint = offer_of(scene, encoders=None)
    judge(joint, config, services(frozen=False))
    with pytest.raises(
        SchemaMismatch, match="release was agreed on this link, and is not for joint encoders"
    ):
        judge(joint, config, (*services(frozen=False), "release"))
    scene.client("t1", policy={"coordinators": ["hub"], "share_encoder": True})
    with pytest.raises(SchemaMismatch, match="it cannot do both"):
        judge(offer_of(scene, average_every=2), scene.config("site-t1"))


def test_a_site_that_keeps_its_encoder_declines_every_other_job(scene) -> None:
    """SP-11.17-2."""
    scene.cast("t1", training=FROZEN)
    scene.client("t1", policy={"coordinators": ["hub"], "encoders": "frozen"})
    config = scene.config("site-t1")
    judge(offer_of(scene), config)
    for other in (None, "joint"):
        with pytest.raises(PolicyRefused, match=r"keeps its own as it is \(policy encoders = frozen\)"):
            judge(offer_of(scene, encoders=other), config)


@pytest.mark.parametrize(
    ("over", "named"),
    [
        ({"training": {**FROZEN, "average_every": 2}}, "average_every"),
        ({"training": FROZEN, "defences": {"gradients": ["marvell:0.3"]}}, "gradients"),
        ({"training": FROZEN, "absence": {"mode": "drop"}}, 'mode = "drop"'),
        ({"training": FROZEN, "wire": {"gradients": "int8"}}, r"\[wire\] gradients"),
    ],
)
def test_what_a_frozen_job_cannot_have(scene, over, named) -> None:
    scene.cast("t1", **over)
    with pytest.raises(ConfigError, match=rf'{named} is not for a job with \[training\] encoders = "frozen"'):
        JobConfig.load(scene.folder / "hub" / "job.toml")
