"""How long another rank waits for orders of the first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from splitpeer.coordinator import ranks
from splitpeer.ranks.halves import FollowingHalf


async def test_a_first_rank_that_reads_every_mask_before_it_begins_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`--verify` reads for hours where there are many; from the first order on, rank 0 tells that it is there."""
    waited = []

    class Half(FollowingHalf):
        steps_done = 0

        def __init__(self) -> None:
            pass

        def follow(self, patience_s: float) -> bool:
            waited.append(patience_s)
            return len(waited) < 3

    for name, made in (("make_half", Half()), ("job_on_wire", None), ("seats_of", None)):
        monkeypatch.setattr(ranks, name, lambda *_, made=made: made)
    settings: Any = SimpleNamespace(
        runtime=SimpleNamespace(threads=1), deadlines=SimpleNamespace(step_s=30.0)
    )
    group: Any = SimpleNamespace(rank=SimpleNamespace(number=1))
    await ranks.follow(group, settings, settings)
    assert waited == [ranks.FIRST_S, ranks.longest(30.0), ranks.longest(30.0)]
