"""The audit pipeline: what is entered for attacks that run, cannot run, or are interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitpeer.audit.capture_audit import CaptureAudit
from splitpeer.audit.experiment import Order
from splitpeer.audit.rehearsal import Rehearsed
from splitpeer.errors import AttackImpossible, DataError
from splitpeer.report.store import load_run


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
