"""A task as a value: from the numbers of a mask to regions, to a network's output, and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from splitpeer.data.labels import regions
from splitpeer.data.task import CONVENTIONS, Region, Task, glioma
from splitpeer.errors import DataError

LIVER = Task({1: "liver", 2: "lesion"}, (Region("organ", (1, 2)), Region("lesion", (2,))))
CLASSES = Task(
    {1: "left", 2: "right", 7: "stone"}, (Region("left", (1,)), Region("right", (2, 7))), exclusive=True
)
CROSSED = Task({1: "a", 2: "b", 3: "both"}, (Region("A", (1, 3)), Region("B", (2, 3))))


@pytest.mark.parametrize("task", [LIVER, CROSSED, *map(glioma, CONVENTIONS)], ids=str)
def test_overlapping_regions_and_back(task: Task) -> None:
    labels = np.random.default_rng(1).choice(task.values, (6, 5, 4)).astype(np.uint8)
    masks = task.masks(labels)
    assert masks.dtype == np.uint8 and masks.shape == (len(task.regions), 6, 5, 4)
    for mask, region in zip(masks, task.regions, strict=True):
        assert np.array_equal(mask.astype(bool), np.isin(labels, region.values))
    back = task.labels(task.decide(np.where(masks, 0.75, 0.25)))
    assert back.dtype == np.uint8 and np.array_equal(back, labels)


def test_classes_and_back() -> None:
    labels = np.random.default_rng(2).choice((0, 1, 2), (6, 5, 4)).astype(np.uint8)
    masks = CLASSES.masks(labels)
    assert CLASSES.channels == 3 and masks.sum(0).max() == 1
    background = 1 - masks.sum(0, keepdims=True)
    probabilities = np.concatenate([background, masks]) * 0.4 + 0.2  # the greatest wins, over a half or not
    assert np.array_equal(CLASSES.labels(CLASSES.decide(probabilities)), labels)


def test_values_of_one_region_alone_come_back_as_the_first() -> None:
    labels = np.array([0, 1, 2, 7])
    assert CLASSES.labels(CLASSES.masks(labels).astype(bool)).tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_glioma_that_is_not_nested_is_written_as_before(name: str) -> None:
    """All eight combinations of WT, TC and ET: the innermost decides."""
    rule = CONVENTIONS[name]
    masks = np.array([[n & 1, n >> 1 & 1, n >> 2 & 1] for n in range(8)], bool).T
    expected = np.zeros(8, np.uint8)
    expected[masks[0]] = rule.edema
    expected[masks[1]] = rule.necrosis
    expected[masks[2]] = rule.enhancing
    assert np.array_equal(glioma(name).labels(masks), expected)


def test_the_order_in_which_regions_are_named_changes_nothing() -> None:
    turned = replace(LIVER, regions=LIVER.regions[::-1])
    masks = np.array([[1, 1, 0], [1, 0, 1]], bool)
    assert LIVER.labels(masks).tolist() == turned.labels(masks[::-1]).tolist() == [2, 1, 2]


def test_wide_values_take_two_octets() -> None:
    task = Task({1000: "thing"}, (Region("thing", (1000,)),))
    assert task.labels(np.ones((1, 2), bool)).dtype == np.uint16
    assert task.labels(np.ones((1, 2), bool)).tolist() == [1000, 1000]


def test_a_value_without_a_name_is_refused() -> None:
    with pytest.raises(
        DataError,
        match=r"label value\(s\) 3 are not in the job's \[task\] \(0 background, 1 liver, 2 lesion\)",
    ):
        regions(np.array([0, 1, 3]), LIVER)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"names": {}}, "a task has values"),
        ({"regions": ()}, "a task has values, and 1 to 32 regions"),
        ({"names": {0: "liver", 2: "lesion"}}, "liver is 0: values are 1 to 65535"),
        ({"names": {1: "liver", 2: "li/ver"}}, "'li/ver' is not a valid name"),
        ({"names": {1: "liver", 2: "liver"}}, "liver names two values"),
        ({"regions": (Region("a", (1,)), Region("a", (2,)))}, "a names two regions"),
        ({"regions": (Region("a b", (1,)),)}, "'a b' is not a valid name"),
        ({"regions": (Region("x" * 25, (1,)),)}, "is not a valid name"),
        ({"regions": (Region("mean", (1,)),)}, "cannot be called mean"),
        ({"regions": (Region("a", ()),)}, "holds no value"),
        ({"regions": (Region("a", (1, 1)),)}, "names a value twice"),
        ({"regions": (Region("a", (1, 5)),)}, "holds 5, which has no name"),
        ({"regions": (Region("a", (1, 2)), Region("b", (2, 1)))}, "regions a and b are the same"),
        ({"exclusive": True}, "lesion is in organ and in lesion, but classes exclude each other"),
    ],
)
def test_what_makes_no_task(change: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        replace(LIVER, **change)
    assert "\n" not in str(caught.value)
