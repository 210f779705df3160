"""Schedules of accidents with real processes; `tox -e faults` plays a hundred."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.splitpeer.roles.scene import Federation, Nursery, Scene

from .process_schedules import VARIANTS, Player, Reference, draw, judge, refer, telling

CI = (1, 7, 9)
"""A killed site and a full disk, a killed coordinator, links that are cut at every step."""
SEEDS = range(int(os.environ["FAULTS_PROCESS"])) if os.environ.get("FAULTS_PROCESS") else CI


@pytest.fixture(scope="session")
def undisturbed(
    federation: Federation, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Reference]:
    """What each variant comes to when nothing befalls it."""
    known: dict[str, Reference] = {}

    def of(variant: str) -> Reference:
        if variant not in known:
            scene = Scene(federation, tmp_path_factory.mktemp("undisturbed"), nursery)
            try:
                known[variant] = refer(scene, VARIANTS[variant])
            finally:
                scene.clean_up()
        return known[variant]

    return of


@pytest.mark.timeout(500)
@pytest.mark.parametrize("seed", SEEDS)
def test_schedule(seed: int, scene, wires, undisturbed, outcomes) -> None:
    schedule = draw(seed)
    reference = undisturbed(schedule.variant)
    with Player(schedule, scene, wires) as player:
        try:
            played = player.play()
            judge(played, scene, reference)
        except AssertionError as error:
            pytest.fail(f"{error}\n{telling(schedule, scene)}", pytrace=False)
    outcomes.append(played)
