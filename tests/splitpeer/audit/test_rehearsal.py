"""What a rehearsal leaves, and how it ends where it cannot be played; that it is the wire: tests/splitpeer/roles."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from splitpeer.audit.cohort import Cohort, most_tumour
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal
from splitpeer.errors import DataError
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


def test_a_file_that_cannot_be_read_ends_it_and_is_named(place: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(place.data, data)
    for path in (data / "t1").iterdir():
        path.write_bytes(path.read_bytes()[:-200])
    cohort = Cohort.read(data, MODALITIES, salt=SALT, convention="msd")
    with pytest.raises(DataError, match=r"t1/patient-\d\.nii\.gz"):
        rehearsal(place, tmp_path / "played", cohort).play(Recording())
