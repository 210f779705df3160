"""Fixtures of the fault laboratory with real processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.splitpeer.roles.scene import Federation, Nursery, Scene, make_federation

from .process_schedules import Played
from .relays import Wires

PLAYED = pytest.StashKey[list[Played]]()


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return make_federation(tmp_path_factory.mktemp("federation"))


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def scene(federation: Federation, nursery: Nursery, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(federation, tmp_path, nursery)
    yield made
    made.clean_up()


@pytest.fixture
def wires() -> Iterator[Wires]:
    with Wires() as made:
        yield made


@pytest.fixture
def outcomes(request: pytest.FixtureRequest) -> list[Played]:
    """How the schedules of this session went; summed up at its end."""
    return request.config.stash.setdefault(PLAYED, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    played = config.stash.get(PLAYED, [])
    if not played:
        return
    kinds = Counter(kind for one in played for kind in one.happened)
    terminalreporter.section("schedules of real processes")
    ends = Counter(one.outcome for one in played)
    terminalreporter.write_line(
        f"{len(played)} played as they should: {ends['exact']} exact, {ends['refused']} refused as documented; "
        f"{sum(one.rollbacks for one in played)} rollbacks, {sum(len(one.again) for one in played)} restarts by the "
        f"service manager, {sum(one.seconds for one in played):.0f} s"
    )
    terminalreporter.write_line("accidents: " + ", ".join(f"{kind} {n}" for kind, n in kinds.most_common()))
    for one in played:
        for refusal in one.refused:
            terminalreporter.write_line(f"schedule {one.schedule.seed}: {refusal}")
