"""The audit pipeline: what is entered for attacks that run, cannot run, or are interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitpeer.attacks.view import gradient_steps, most_released
from splitpeer.audit.capture_audit import CaptureAudit
from splitpeer.audit.experiment import Order, label_experiment
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal, Rehearsed
from splitpeer.captures.reader import open_capture
from splitpeer.errors import AttackImpossible, DataError
from splitpeer.report.store import load_run
from splitpeer.settings.job import JobConfig
from splitproto.messages import Gradients


def test_describing_an_audit_does_no_work(tmp_path: Path) -> None:
    asked = CaptureAudit(tmp_path / "nowhere.cap")
    with pytest.raises(DataError, match=r"nowhere\.cap"):
        asked.experiment()


def test_an_attack_that_cannot_run_is_entered_with_its_reason(clean: Rehearsed, tmp_path: Path) -> None:
    experiment = CaptureAudit(clean.capture, seat="t1", samples=2).experiment()
    folder = experiment.open_folder(tmp_path)
    done = list(experiment.run([Order("whitebox"), Order("gradient-norm"), Order("pca")], folder))
    assert [outcome.result.attack for outcome in done] == ["pca"]
    entries = load_run(tmp_path).run.entries
    assert [(e.attack, e.status) for e in entries] == [
        ("whitebox", "impossible"), ("gradient-norm", "impossible"), ("pca", "done")]  # fmt: skip
    assert "needs the weights" in folder.refused[0] and "a coordinator recorded" in folder.refused[1]
    assert not folder.complete


def test_an_interruption_keeps_what_was_done_and_says_so(clean: Rehearsed, tmp_path: Path) -> None:
    experiment = CaptureAudit(clean.capture, seat="t1", samples=2).experiment()
    folder = experiment.open_folder(tmp_path)

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    list(experiment.run([Order("pca")], folder))
    with pytest.raises(KeyboardInterrupt):
        list(experiment.run([Order("pca")], folder, progress=stop))
    assert [e.status for e in load_run(tmp_path).run.entries] == ["done", "interrupted"]


def test_naive_forms_stand_next_to_adaptive_ones_only_on_defended_views(
    place: Any, clean: Rehearsed, tmp_path: Path
) -> None:
    experiment = CaptureAudit(clean.capture, seat="t1", samples=2, defence="gaussian:0.5").experiment()
    assert experiment.view.defended

    def forms(**how: Any) -> list[bool]:
        folder = experiment.open_folder(tmp_path)
        return [o.result.adaptive for o in experiment.run([Order("pca")], folder, **how)]

    assert forms() == [True, False]
    assert forms(naive=False) == [True]
    clear = replace(experiment, view=replace(experiment.view, defences=()))
    assert [o.result.adaptive for o in clear.run([Order("pca")], clear.open_folder(tmp_path))] == [True]


def test_a_capture_without_the_contrast_is_no_experiment(clean: Rehearsed, tmp_path: Path) -> None:
    with pytest.raises(AttackImpossible, match="no site of this capture fills t2"):
        CaptureAudit(clean.capture, seat="t2").experiment()


def test_the_site_under_attack_records_all_that_it_was_sent(place: Any, tmp_path: Path) -> None:
    """A defence of fresh noise that is judged from two steps is judged from one release of each window."""
    cohort = place.cohort()
    rehearsal = Rehearsal(JobConfig.load(place.job), cohort, Protection(), tmp_path, seed=3)
    played = rehearsal.play(Recording(seats=("t1",), site_mib=64))

    def steps(path: Path) -> list[int]:
        return gradient_steps(open_capture(path))

    assert steps(played.site_capture("t1")) == [1, 2, 3]
    assert steps(played.site_capture("flair")) == [1, 3]
    assert {r.head.step for r in open_capture(played.capture).records() if isinstance(r.head, Gradients)} == {
        1,
        3,
    }
    every = label_experiment(rehearsal, played, "t1", every=True)
    one = label_experiment(rehearsal, played, "t1", 2)
    ordered = most_released(open_capture(played.site_capture("t1")))
    assert len(ordered) == len(set(ordered)) and {t.sample for t in every.view.targets} <= set(ordered)
    assert sum(len(t.shots) for t in every.view.targets) > len(one.view.targets)
    assert every.judge.truth.outlines[:, 0].reshape(len(every.view.targets), -1).any(axis=1).all()
    assert every.knowledge.own_images.shape == (len(every.view.targets), 1, 32, 32)


def test_few_mebibytes_hold_the_last_steps(place: Any, tmp_path: Path) -> None:
    rehearsal = Rehearsal(JobConfig.load(place.job), place.cohort(), Protection(), tmp_path, seed=3)
    # A step is 3 samples of 4 x (32^2 + 16^2) + 4 x 8^2 + 8 x 4^2 + 8 x 2^2 numbers, twice, of 4 octets: 131 KiB.
    assert rehearsal._further(Recording(site_mib=0)) == 3
    assert rehearsal._further(Recording(site_mib=1)) == 3 - 2**20 // (3 * 8 * 5536)
