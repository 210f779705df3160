from __future__ import annotations

import numpy as np
import pytest

from splitpeer.data.labels import regions
from splitpeer.data.task import CONVENTIONS, glioma
from splitpeer.errors import DataError


@pytest.mark.parametrize(
    ("name", "whole", "core", "enhancing"),
    [
        ("msd", {1, 2, 3}, {2, 3}, {3}),
        ("brats", {1, 2, 4}, {1, 4}, {4}),
        ("brats2023", {1, 2, 3}, {1, 3}, {3}),
        ("nnunet", {1, 2, 3}, {2, 3}, {3}),
    ],
)
def test_regions_of_each_convention(name: str, whole: set[int], core: set[int], enhancing: set[int]) -> None:
    values = np.array([[0, *sorted(whole)]])
    out = regions(values, name)
    assert out.dtype == np.uint8 and out.shape == (3, 1, 4)
    for channel, members in enumerate((whole, core, enhancing)):
        assert set(values[out[channel] == 1]) == members
        assert set(np.unique(out[channel])) <= {0, 1}


def test_a_value_outside_the_convention_names_value_convention_and_fix() -> None:
    with pytest.raises(DataError) as caught:
        regions(np.array([0, 1, 4, 7]), "msd")
    line = str(caught.value)
    assert "4, 7 are not in convention 'msd'" in line and "1 edema" in line and "brats2023" in line
    assert "\n" not in line
    with pytest.raises(DataError, match=r"value\(s\) 3 are not"):
        regions(np.array([0, 3]), "brats")
    with pytest.raises(DataError, match=r"0\.5"):
        regions(np.array([0, 0.5]), "msd")


def test_a_convention_is_never_guessed() -> None:
    with pytest.raises(DataError, match="unknown label convention 'auto': name one of msd, brats"):
        regions(np.zeros(3, int), "auto")
    with pytest.raises(TypeError):
        regions(np.zeros(3, int))  # type: ignore[call-arg]


def test_msd_and_brats2023_differ_only_in_meaning() -> None:
    labels = np.array([1, 2, 3])
    assert CONVENTIONS["msd"] != CONVENTIONS["brats2023"]
    assert glioma("msd").values == glioma("brats2023").values
    assert (regions(labels, "msd")[1] != regions(labels, "brats2023")[1]).any()
