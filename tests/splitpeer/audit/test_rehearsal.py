"""What a rehearsal leaves, and how it ends where it cannot be played; that it is the wire: tests/splitpeer/roles."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitpeer.attacks.view import coordinator_view
from splitpeer.audit.capture_audit import CaptureAudit
from splitpeer.audit.cohort import Cohort, most_tumour
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal
from splitpeer.captures.reader import open_capture
from splitpeer.errors import AttackImpossible, DataError
from splitpeer.settings.job import JobConfig
from splitpeer.storage import checkpoint
from tests.splitpeer.audit.conftest import MODALITIES, SALT


def rehearsal(place: Any, folder: Path, cohort: Cohort) -> Rehearsal:
    return Rehearsal(JobConfig.load(place.job), cohort, Protection(), folder, seed=3)


def test_weights_of_all_steps_that_are_asked_for_stay_and_old_ones_go(place: Any, tmp_path: Path) -> None:
    cohort = place.cohort()
    for also in ((1, 2), ()):
        playing = rehearsal(place, tmp_path / "played", cohort)
        targets = most_tumour(cohort, playing.validation, playing.window)
        played = playing.play(Recording(targets=tuple(targets), also_after=also))
        steps = (0, *also, 3)
        for party in ("t1", "coordinator"):
            paths = [played.weights(party, step) for step in steps]
            assert sorted(paths[0].parent.glob("*.safetensors")) == paths
            assert [checkpoint.read(path)[1]["step"] for path in paths] == list(steps)
            assert played.weights(party) == paths[-1]


@pytest.mark.parametrize(
    ("defence", "posed"), [("quantise:2", True), ("gaussian:1,kept=true", True), ("gaussian:1", False)]
)
def test_a_site_that_repeats_itself_is_asked_in_other_poses(
    place: Any, tmp_path: Path, defence: str, posed: bool
) -> None:
    """By the real site, in a training step that is ordered again and again; the training is what it was without."""
    cohort, job = place.cohort(), JobConfig.load(place.job)
    plays = {}
    for poses in (0, 3):
        playing = Rehearsal(job, cohort, Protection((defence,)), tmp_path / str(poses), seed=3)
        targets = most_tumour(cohort, playing.validation, playing.window)
        plays[poses] = playing.play(Recording(targets=tuple(targets), poses=poses))
    assert plays[3].posed is posed and not plays[0].posed
    assert plays[3].losses == plays[0].losses
    if not posed:
        return
    view = coordinator_view(open_capture(plays[3].capture), "t1", weights=2, choose=lambda _: targets)
    assert [target.sample for target in view.targets] == targets
    for target in view.targets:
        assert [shot.seed for shot in target.shots] == [None, 1, 2, 3]
        x0 = [shot.activations["x0"] for shot in target.shots]
        assert not any(np.array_equal(x0[0], other) for other in x0[1:])
    # An evaluation is the view of before: the last step's weights, one pose.
    usual = coordinator_view(open_capture(plays[3].capture), "t1", choose=lambda _: targets)
    assert {shot.step for target in usual.targets for shot in target.shots} == {3}
    # `splitpeer attack` finds the poses by the weights that it is granted, and without them takes the last ones.
    asked = partial(
        CaptureAudit, plays[3].capture, seat="t1", truth=place.data, salt=place.salt, convention="msd"
    )
    posed_view = asked(knows=(f"weights={plays[3].weights('t1', 2)}",)).experiment().view
    held = {target.sample: [shot.seed for shot in target.shots] for target in posed_view.targets}
    assert held == {target: [None, 1, 2, 3] for target in targets}
    assert {len(target.shots) for target in asked().experiment().view.targets} == {1}
    with pytest.raises(AttackImpossible, match="weights of step 7"):
        coordinator_view(open_capture(plays[3].capture), "t1", weights=7)


def test_a_file_that_cannot_be_read_ends_it_and_is_named(place: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(place.data, data)
    for path in (data / "t1").iterdir():
        path.write_bytes(path.read_bytes()[:-200])
    cohort = Cohort.read(data, MODALITIES, salt=SALT, convention="msd")
    with pytest.raises(DataError, match=r"t1/patient-\d\.nii\.gz"):
        rehearsal(place, tmp_path / "played", cohort).play(Recording())
