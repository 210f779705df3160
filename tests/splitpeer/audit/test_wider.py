"""Wider views of a rehearsal: neighbouring slices, a site that helps, and who was trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitpeer.attacks.catalogue import make_attack
from splitpeer.audit.capture_audit import CaptureAudit
from splitpeer.audit.cohort import Cohort, cut, most_tumour, shadow
from splitpeer.audit.experiment import Experiment, Order, image_experiment
from splitpeer.audit.judge import drawn_from, make_judge
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal, Rehearsed
from splitpeer.audit.wider import (
    REFERENCE_STEPS,
    colluding_experiment,
    helpers,
    members_and_others,
    membership_experiment,
    membership_order,
    neighbour_experiment,
    recorded_around,
    recorded_of,
    shadow_beside,
    slices_around,
)
from splitpeer.captures.reader import open_capture
from splitpeer.report.build import write_report
from splitpeer.report.store import load_run
from splitpeer.settings.job import JobConfig

from .conftest import MODALITIES, SALT, Place

Scene = tuple[Rehearsal, Rehearsed, Experiment, Cohort]


@pytest.fixture(scope="module")
def scene(place: Place) -> Scene:
    cohort = place.cohort()
    strangers = Cohort.read(place.shadow, MODALITIES, salt=SALT[::-1] + b"s", convention="msd")
    rehearsal = Rehearsal(JobConfig.load(place.job), cohort, Protection(), place.folder / "wider", seed=3)
    targets = most_tumour(cohort, rehearsal.validation, rehearsal.window)
    people = members_and_others(cohort, rehearsal.training, rehearsal.validation, rehearsal.window, 9)
    further = tuple(dict.fromkeys((*slices_around(cohort, targets), *people)))
    played = rehearsal.play(Recording(targets=tuple(targets), further=further))
    others = shadow(strangers, rehearsal.window, 18)
    judge = make_judge(("t1",), cut(cohort, targets, rehearsal.window), others, tumour=False)
    return rehearsal, played, image_experiment(rehearsal, played, "t1", judge, others), strangers


def run(experiment: Experiment, attack: str, folder: Path, **settings: Any) -> Any:
    made = experiment.open_folder(folder)
    found = list(experiment.run([Order(attack, settings)], made))
    assert not made.refused, made.refused
    return found[0], load_run(folder).run.entries[0]


def test_slices_next_to_the_targets_are_read(scene: Scene, tmp_path: Path) -> None:
    rehearsal, played, experiment, strangers = scene
    samples = experiment.judge.others.samples
    beside = shadow_beside(strangers, samples, rehearsal.window, experiment.view.seat)
    around = recorded_around(experiment.view, open_capture(played.capture))
    wider = neighbour_experiment(experiment, around, beside)
    assert sorted(beside) == [-1, 0, 1] and wider.view.parts == 3
    outcome, entry = run(wider, "inverse", tmp_path, steps=2, width=4)
    assert outcome.scores["ssim"].mean is not None and entry.title.endswith("neighbouring slices")


def test_a_collusion_has_the_floor_of_what_the_helper_holds(scene: Scene, tmp_path: Path) -> None:
    _, _, experiment, _ = scene
    assert [seat.name for seat in helpers(experiment)] == ["flair"]
    wider = colluding_experiment(experiment, helpers(experiment)[0])
    outcome, entry = run(wider, "inverse", tmp_path, steps=2, width=4)
    assert outcome.scores["ssim"].floors[drawn_from(("flair",))] is not None
    assert entry.title.endswith("with flair in clear")
    assert not any("work together" in line for line in load_run(tmp_path).run.not_tested)
    alone, _ = run(experiment, "pca", tmp_path / "alone")
    assert drawn_from(("flair",)) not in alone.scores["ssim"].floors
    assert any("work together" in line for line in load_run(tmp_path / "alone").run.not_tested)


def test_a_capture_is_attacked_with_neighbours_and_with_a_site_that_helps(scene: Scene, place: Place) -> None:
    played = scene[1]
    asked = CaptureAudit(
        played.capture, seat="t1", samples=3, truth=place.data, salt=place.salt, convention="msd", shadow_images=12,
        knows=(f"weights={played.weights('t1')}", f"shadow={place.shadow}"), finder_steps=1,
    )  # fmt: skip
    near = replace(asked, neighbours=1).experiment()
    assert (
        near.view.reads == "neighbouring slices" and near.knowledge.shadow[near.view.seat.name].shape[1] == 3
    )
    both = replace(asked, helpers=("flair",)).experiment()
    assert both.view.clear == ("flair",) and both.knowledge.shadow[both.view.seat.name].shape[1] == 2


def test_reference_encoders_learn_as_the_job_does(place: Place) -> None:
    job = JobConfig.load(place.job)
    long = job.model_copy(update={
        "training": job.training.model_copy(update={"steps": 5000, "batch": 7}),
        "data": job.data.model_copy(update={"augment": False}),
    })  # fmt: skip
    assert membership_order(job).settings == {
        "steps": 3, "batch": 3, "rate": 5e-3, "poses": "any",
    }  # fmt: skip
    assert membership_order(long).settings["steps"] == REFERENCE_STEPS
    assert (membership_order(long).settings["batch"], membership_order(long).settings["poses"]) == (
        7,
        "upright",
    )
    assert make_attack("membership", **membership_order(long).settings).settings()["poses"] == "upright"


def test_who_was_trained_on_is_judged_and_reported(scene: Scene, tmp_path: Path) -> None:
    rehearsal, played, experiment, _ = scene
    people = members_and_others(
        rehearsal.cohort, rehearsal.training, rehearsal.validation, rehearsal.window, 9
    )
    released = recorded_of(experiment.view, open_capture(played.capture), people)
    wider = membership_experiment(
        experiment, released, rehearsal.cohort, rehearsal.training, rehearsal.window
    )
    assert len(wider.view.targets) == 2 * len(rehearsal.validation)
    outcome, entry = run(wider, "membership", tmp_path)
    assert outcome.scores["member_auc"].floors == {"guessing": 0.5} and entry.goal == "member"
    assert outcome.scores["member_tpr"].patients == len(people)
    assert "the patients' labels" in entry.assumptions
    write_report([tmp_path], tmp_path / "report.html")
    assert "false alarms" in (tmp_path / "report.html").read_text()
