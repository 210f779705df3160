"""Fixtures of a federation on this machine; `scene.py` has what they return."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from .scene import (
    PATIENTS,
    SEED,
    SHAPE,
    Federation,
    Nursery,
    Scene,
    free_port,
    make_federation,
    write_nifti,
    write_patient,
)
from .served import cast_frozen, cast_joint, finish, take_up


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


@pytest.fixture(scope="session")
def joint_run(tmp_path_factory: pytest.TempPathFactory, federation: Federation, nursery: Nursery) -> Scene:
    """Complete, and serving; see `served.py`."""
    return finish(cast_joint(Scene(federation, tmp_path_factory.mktemp("joint"), nursery)))


@pytest.fixture
def joint(joint_run: Scene, scene: Scene) -> Scene:
    """A copy of it."""
    take_up(joint_run, scene)
    return cast_joint(scene)


@pytest.fixture(scope="session")
def frozen_run(tmp_path_factory: pytest.TempPathFactory, federation: Federation, nursery: Nursery) -> Scene:
    """The same with frozen encoders."""
    return finish(cast_frozen(Scene(federation, tmp_path_factory.mktemp("frozen"), nursery)))


@pytest.fixture
def frozen(frozen_run: Scene, scene: Scene) -> Scene:
    """A copy of it."""
    take_up(frozen_run, scene)
    return cast_frozen(scene)


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Helpers for tests in this folder."""
    return SimpleNamespace(
        nifti=write_nifti,
        patient=write_patient,
        PATIENTS=PATIENTS,
        SHAPE=SHAPE,
        SEED=SEED,
        free_port=free_port,
    )
