"""Schedules of accidents in memory; `tox -e faults` plays a thousand.

FAULTS says how many, FAULTS_FIRST which is the first: shards of one number of schedules can run side by side.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .verdict import Bench, Outcome, summary

FIRST = int(os.environ.get("FAULTS_FIRST", "0"))
COUNT = int(os.environ.get("FAULTS") or 0)
CI = (*range(8), 137, 177, 298, 708, 17, 19, 28, 53)
"""The first few, some that once found a defect, and some of several sites at a seat."""
SEEDS = range(FIRST, FIRST + COUNT) if COUNT else CI


class Summary:
    """What the schedules of a session came to, at its end."""

    def __init__(self) -> None:
        self.played: list[Outcome] = []

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.played:
            terminalreporter.section("schedules in memory")
            for line in summary(self.played):
                terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def played(request: pytest.FixtureRequest) -> list[Outcome]:
    made = Summary()
    request.config.pluginmanager.register(made)
    return made.played


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_schedule(seed: int, bench: Bench, played: list[Outcome]) -> None:
    outcome = bench.run(seed)
    if outcome.problem:
        pytest.fail(outcome.explain(), pytrace=False)
    # A thousand of them would fill the memory.
    outcome.story = ""
    played.append(outcome)


def test_a_schedule_is_the_same_each_time(bench: Bench) -> None:
    """Or a failure could not be looked into."""
    first, second = (bench.run(3) for _ in range(2))
    assert first.struck
    assert first.story == second.story
