"""SP-11.13 in the laboratory: files go bad at drawn moments, alone and together with other accidents.

The run must be that of its own history, drawn with and without these patients, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .verdict import Bench

COUNT = int(os.environ.get("FAULTS_SPOILT") or 12)
FIRST = int(os.environ.get("FAULTS_FIRST", "0"))
SEEDS = range(FIRST, FIRST + COUNT)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@pytest.mark.parametrize("others", [False, True], ids=["alone", "with-others"])
@pytest.mark.parametrize("seed", SEEDS)
def test_files_that_go_bad(seed: int, others: bool, bench: Bench) -> None:
    outcome = bench.run_spoilt(seed, others=others)
    if outcome.problem:
        pytest.fail(outcome.explain(), pytrace=False)


def test_the_schedules_do_withdraw(bench: Bench) -> None:
    """Or they would show nothing."""
    played = [bench.run_spoilt(seed, others=False) for seed in SEEDS]
    assert sum(one.withdrawals > 0 and one.complete for one in played) >= len(played) // 2
