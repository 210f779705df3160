"""Fixtures of the fault laboratory with real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.splitpeer.roles.scene import Federation, Nursery, Scene, make_federation

from .relays import Wires


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
