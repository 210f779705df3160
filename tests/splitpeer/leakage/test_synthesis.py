"""A contrast that follows from another is drawn from it; one that does not, is not."""

from __future__ import annotations

import numpy as np
import pytest

from splitpeer.leakage.synthesis import Synthesiser


def pairs(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A known contrast, and one that is its negative."""
    source = np.random.default_rng(seed)
    known = np.repeat(np.repeat(source.standard_normal((count, 1, 8, 8)), 4, 2), 4, 3).astype(np.float32)
    return known, -known


def test_a_contrast_is_drawn_from_another_of_the_same_patient() -> None:
    known, wanted = pairs(16, 1)
    new, truth = pairs(4, 2)
    learned = Synthesiser.train(known, wanted, steps=25)
    assert np.corrcoef(learned(new).ravel(), truth.ravel())[0, 1] > 0.8
    again = [Synthesiser.train(known, wanted, steps=1)(new) for _ in range(2)]
    assert np.array_equal(*again)
    with pytest.raises(ValueError, match="do not fit"):
        Synthesiser.train(known[:3], wanted)
