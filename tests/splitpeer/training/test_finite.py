"""NaN and infinity are found wherever they are, and large finite values are not taken for them."""

from __future__ import annotations

import math

import pytest
import torch

from splitpeer.training.finite import all_finite

LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 4999, 9999])
def test_one_bad_value_is_found(bad: float, place: int) -> None:
    values = torch.randn(100, 100)
    assert all_finite(values)
    values.view(-1)[place] = bad
    assert not all_finite(values)


def test_infinities_that_cancel_are_found() -> None:
    assert not all_finite(torch.tensor([math.inf, -math.inf]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_values_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    assert all_finite(torch.full((8,), torch.finfo(dtype).max, dtype=dtype))


def test_nothing_is_finite() -> None:
    assert all_finite(torch.empty(0))
