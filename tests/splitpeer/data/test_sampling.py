from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from splitpeer.data.layouts import Case
from splitpeer.data.sampling import Sample, TrainingSchedule, batch_digest, split_patients
from splitpeer.data.volumes import Volumes
from splitpeer.errors import ConfigError, JobFailed

KEYS = [bytes([n] * 16) for n in range(40)]


def masks(tmp_path: Path, files, shapes: list[tuple[int, int, int]]) -> Volumes:
    cases = []
    for number, shape in enumerate(shapes):
        voxels = np.zeros(shape, np.uint8)
        if number != 2:  # the third patient has no tumour
            voxels[shape[0] // 2, shape[1] // 2, number + 1 : number + 3] = 1 + number % 3
        cases.append(Case(str(number), files.save(tmp_path / f"{number}.nii.gz", voxels)))
    return Volumes(cases, salt=files.SALT, labels="msd")


SHAPES = [(20, 18, 15), (21, 19, 16), (20, 20, 20), (24, 10, 12)]


def schedule(volumes: Volumes, **changes) -> TrainingSchedule:
    settings = {"window": (16, 16, 1), "batch": 3, "steps": 40, "seed": 5, **changes}
    return TrainingSchedule(volumes.keys(), volumes, **settings)


@pytest.mark.parametrize("window", [(16, 16, 1), (8, 8, 8)])
def test_any_batch_can_be_asked_for_first(tmp_path: Path, files, window) -> None:
    volumes = masks(tmp_path, files, SHAPES)
    whole = [schedule(volumes, window=window).batch(step) for step in range(40)]
    resumed = schedule(volumes, window=window)
    assert [resumed.batch(step) for step in reversed(range(40))] == whole[::-1]
    shuffled = TrainingSchedule(volumes.keys()[::-1], volumes, window=window, batch=3, steps=40, seed=5)
    assert shuffled.batch(17) == whole[17]
    other = schedule(volumes, window=window, seed=6)
    assert [other.batch(step) for step in range(40)] != whole
    assert len({seed for _, seed in whole}) == 40 and all(0 <= seed < 2**63 for _, seed in whole)


def test_slices_are_centred_and_inside(tmp_path: Path, files) -> None:
    volumes = masks(tmp_path, files, SHAPES)
    plan = schedule(volumes, positive_fraction=0.0)
    seen: dict[bytes, set[int]] = {key: set() for key in sorted(volumes.keys())}
    for step in range(len(plan)):
        for sample in plan.batch(step)[0]:
            shape = volumes.geometry(sample.key).shape
            assert sample.origin[:2] == ((shape[0] - 16) // 2, (shape[1] - 16) // 2)
            assert 0 <= sample.origin[2] < shape[2]
            seen[sample.key].add(sample.origin[2])
    assert all(len(slices) > 5 for slices in seen.values())


@pytest.mark.parametrize("window", [(16, 16, 1), (8, 8, 8), (4, 4, 32), (64, 64, 64)])
def test_positive_samples_hold_tumour(tmp_path: Path, files, window) -> None:
    volumes = masks(tmp_path, files, SHAPES)
    plan = schedule(volumes, window=window, positive_fraction=1.0)
    origins = set()
    for step in range(len(plan)):
        for sample in plan.batch(step)[0]:
            origins.add(sample.origin)
            has_tumour = volumes.window(sample.key, (0, 0, 0), (64, 64, 64)).any()
            assert volumes.window(sample.key, sample.origin, window).any() == has_tumour
    assert len(origins) > 8 or window == (64, 64, 64)  # not always the same place


def test_the_positive_fraction_is_kept(tmp_path: Path, files) -> None:
    volumes = masks(tmp_path, files, [(8, 8, 200)] * 2)
    for fraction in (0.0, 0.3, 0.8):
        plan = schedule(volumes, window=(8, 8, 1), batch=10, steps=100, positive_fraction=fraction)
        tumour = [s.origin[2] <= 4 for step in range(100) for s in plan.batch(step)[0]]
        assert abs(np.mean(tumour) - fraction) < 0.06


def test_patches_stay_inside_or_centre_what_is_too_small(tmp_path: Path, files) -> None:
    volumes = masks(tmp_path, files, SHAPES)
    plan = schedule(volumes, window=(16, 16, 8))
    for step in range(len(plan)):
        for sample in plan.batch(step)[0]:
            for start, size, n in zip(
                sample.origin, plan.window, volumes.geometry(sample.key).shape, strict=True
            ):
                assert 0 <= start <= n - size if n >= size else start == (n - size) // 2


def test_each_patient_comes_once_in_a_round(tmp_path: Path, files) -> None:
    volumes = masks(tmp_path, files, SHAPES)
    plan = schedule(volumes, batch=3, steps=40)
    order = [sample.key for step in range(40) for sample in plan.batch(step)[0]]
    rounds = [tuple(order[n : n + 4]) for n in range(0, 120, 4)]
    assert all(sorted(one) == volumes.keys() for one in rounds) and len(set(rounds)) > 5


def test_extents_keep_the_rest_where_the_head_is(tmp_path: Path, files) -> None:
    volumes = masks(tmp_path, files, SHAPES)
    extents = dict.fromkeys(volumes.keys(), ((4, 9), (4, 9), (6, 8)))
    plan = schedule(volumes, positive_fraction=0.0, extents=extents)
    found = Counter(s.origin[2] for step in range(40) for s in plan.batch(step)[0])
    assert set(found) == {6, 7}
    plan = schedule(volumes, window=(2, 2, 2), positive_fraction=0.0, extents=extents)
    for step in range(40):
        for sample in plan.batch(step)[0]:
            assert all(
                lo - 1 <= o < hi for o, (lo, hi) in zip(sample.origin, extents[sample.key], strict=True)
            )


def test_settings_that_cannot_be(tmp_path: Path, files) -> None:
    volumes = masks(tmp_path, files, SHAPES[:1])
    for change in (
        {"batch": 0},
        {"window": (0, 4, 4)},
        {"positive_fraction": 1.5},
        {"steps": -1},
        {"seed": -1},
    ):
        with pytest.raises(ConfigError, match="make sizes positive"):
            schedule(volumes, **change)
    with pytest.raises(ConfigError, match=r"no patient to train on: .* enough of the job's seats"):
        TrainingSchedule([], volumes, window=(4, 4, 1), batch=1, steps=1, seed=0)
    with pytest.raises(JobFailed, match="step 40 is outside this job's 40 steps"):
        schedule(volumes).batch(40)


def test_splits_are_of_patients_and_independent_of_order() -> None:
    train, held = split_patients(KEYS, 0.2, 3)
    assert len(held) == 8 and sorted(train + held) == KEYS and not set(train) & set(held)
    assert split_patients(KEYS[::-1] + KEYS[:5], 0.2, 3) == (train, held)
    assert split_patients(KEYS, 8, 3) == (train, held)
    assert split_patients(KEYS, 0.2, 4) != (train, held)
    assert split_patients(KEYS, 0, 3) == (KEYS, [])
    for validation in (1.0, 40, -1):
        with pytest.raises(ConfigError, match="leaves none to train on"):
            split_patients(KEYS, validation, 3)


def test_time_points_of_one_person_are_never_split() -> None:
    persons = {key: f"person {n // 4}" for n, key in enumerate(KEYS)}
    for seed in range(10):
        train, held = split_patients(KEYS, 0.3, seed, persons)
        assert not {persons[k] for k in train} & {persons[k] for k in held}
        assert len(held) == 12


def test_the_digest_commits_to_order_places_step_and_seed() -> None:
    """SP-11.6-1: the two hexadecimal values come from `printf ... | sha256sum`."""
    one, two = Sample(b"A" * 16, (-8, 0, 80)), Sample(b"B" * 16, (1, 2, 3))
    digest = batch_digest(7, [one, two], 42)
    assert digest.hex() == "fae3d296b066502f28e2a27357deb1b66d1a53b99e674ea5901459601ed3f35f"
    assert (
        batch_digest(0, [], None).hex() == "45ad57b85338b969a095439b2341069217330b98159de462b4fe1ae55a0e81e1"
    )
    assert (
        len(
            {
                digest,
                batch_digest(8, [one, two], 42),
                batch_digest(7, [two, one], 42),
                batch_digest(7, [one, two], 43),
                batch_digest(7, [one, two], None),
                batch_digest(7, [one, Sample(two.key, (1, 2, 4))], 42),
                batch_digest(7, [one], 42),
            }
        )
        == 7
    )


def test_the_first_steps_draw_complete_patients_only(tmp_path: Path, files) -> None:
    volumes = masks(tmp_path, files, SHAPES)
    complete = volumes.keys()[:2]
    plan = schedule(volumes, complete=complete, complete_first=10)
    drawn = [[sample.key for sample in plan.batch(step)[0]] for step in range(40)]
    first = [key for batch in drawn[:10] for key in batch]
    assert Counter(first) == dict.fromkeys(complete, 15), "each once per round"
    later = [key for batch in drawn[10:] for key in batch]
    assert all(sorted(later[n : n + 4]) == sorted(volumes.keys()) for n in range(0, 88, 4)), "rounds over all"
    resumed = schedule(volumes, complete=complete, complete_first=10)
    assert [resumed.batch(n) for n in (30, 9, 10, 0)] == [plan.batch(n) for n in (30, 9, 10, 0)]
    assert [schedule(volumes).batch(n) for n in range(40)] == [
        schedule(volumes, complete=complete, complete_first=0).batch(n) for n in range(40)
    ]


def test_complete_first_needs_complete_patients(tmp_path: Path, files) -> None:
    volumes = masks(tmp_path, files, SHAPES)
    with pytest.raises(ConfigError, match="no patient to train on is complete"):
        schedule(volumes, complete=[], complete_first=1)
    plan = schedule(volumes, complete=volumes.keys()[:1], complete_first=2)
    plan.withdraw(volumes.keys()[:1])
    with pytest.raises(JobFailed, match="smaller \\[data\\] complete_first"):
        plan.batch(0)
    assert {sample.key for sample in plan.batch(2)[0]} <= set(volumes.keys()[1:])
