"""Patients as arrays: which windows, whose, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from splitpeer.audit.cohort import Cohort, cut, most_tumour, shadow
from splitpeer.audit.stand_in_task import StandInTask
from splitpeer.data.volumes import Volumes
from splitpeer.errors import ConfigError, DataError
from splitproto.records import Sample

WINDOW = (32, 32, 1)


def test_the_slice_with_most_tumour_is_found(place: Any) -> None:
    cohort = place.cohort()
    samples = most_tumour(cohort, cohort.keys(), WINDOW)
    assert [s.key for s in samples] == cohort.keys()
    for sample in samples:
        volume = cohort.labels.window(sample.key, (0, 0, 0), (32, 32, 10))[0]
        assert volume[..., sample.origin[2]].sum() == volume.sum(axis=(0, 1), dtype=int).max() > 0


def test_windows_are_cut_alike_from_images_and_masks(place: Any) -> None:
    cohort = place.cohort()
    samples = most_tumour(cohort, cohort.keys()[:3], WINDOW)
    found = cut(cohort, samples, WINDOW)
    assert found.images["t1"].shape == found.images["flair"].shape == (3, 1, 32, 32)
    assert (
        found.masks is not None
        and found.masks.shape == (3, 3, 32, 32)
        and found.masks[:, 0].any(axis=(1, 2)).all()
    )
    assert len(set(found.patients)) == 3 and found.heights == [s.origin[2] for s in samples]


def test_shadow_samples_are_spread_over_patients_and_heights(place: Any) -> None:
    cohort = Cohort.read(place.shadow, ("t1",), salt=b"\1" * 32, convention="msd")
    found = shadow(cohort, WINDOW, 24, seed=1)
    assert len(found.samples) == 24 and len({s.key for s in found.samples}) == 6
    assert len({s.origin[2] for s in found.samples}) > 4
    assert np.array_equal(found.images["t1"], shadow(cohort, WINDOW, 24, seed=1).images["t1"])


def test_truth_of_other_patients_is_refused_in_one_line(place: Any) -> None:
    with pytest.raises(DataError, match="1 of the patients under attack are not in the folder of the truth"):
        cut(place.cohort(), [Sample(bytes(16), (0, 0, 0))], WINDOW)


def test_most_tumour_needs_masks(place: Any) -> None:
    with pytest.raises(ConfigError, match="no masks"):
        most_tumour(Cohort.read(place.data, ("t1",), salt=bytes(32)), [], WINDOW)


def test_a_stand_in_task_is_nested_bands_of_brightness_inside_the_head(place: Any) -> None:
    images = place.cohort().images["t1"]
    masks = StandInTask([images])
    key = images.keys()[0]
    bands, voxels = masks.window(key, (0, 0, 0), (32, 32, 10)), images.window(key, (0, 0, 0), (32, 32, 10))[0]
    assert (bands[0] >= bands[1]).all() and (bands[1] >= bands[2]).all() and not bands[0][voxels == 0].any()
    shares = bands.sum(axis=(1, 2, 3)) / (voxels != 0).sum()
    assert np.allclose(shares, (0.20, 0.08, 0.02), atol=0.01)


def test_a_stand_in_task_is_made_from_whatever_a_patient_has(place: Any) -> None:
    images = place.cohort().images
    every = images["t1"].keys()
    flair, t1 = (SomePatients(images["flair"], every[:5]), SomePatients(images["t1"], every[3:]))
    masks = StandInTask([flair, t1])
    assert masks.keys() == every and masks.subjects().keys() == set(every)
    for key, first in ((every[3], flair), (every[6], t1)):
        bands = masks.window(key, (0, 0, 0), (32, 32, 10))
        assert (bands == StandInTask([first]).window(key, (0, 0, 0), (32, 32, 10))).all() and bands.any()
    with pytest.raises(DataError, match="not in this site's data"):
        masks.geometry(bytes(16))


class SomePatients(Volumes):
    """Some of a modality's patients."""

    def __init__(self, volumes: Volumes, keys: list[bytes]) -> None:
        super().__init__([volumes.case(key) for key in keys], salt=bytes(32))
