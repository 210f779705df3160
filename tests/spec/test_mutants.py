"""An implementation that is wrong in one of these ways fails at least one vector.

Each mutant is our own implementation with one deliberate bug (`mutants.py`); the tests of the vectors run until one of
them notices. A mutant that survives names a vector that is missing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from splitproto.identity import Credentials
from splitproto.states import Side
from tests.spec import test_fusion_vectors, test_peer_vectors, test_vectors
from tests.spec.mutants import MUTANTS, Mutant
from tests.spec.reading import cases as listed_cases
from tests.spec.reading import of_the_peer

USED = ("federation.compute", "federation.terms", "training.optimiser", "data.augment", "data.pseudonym",
        "data.sampling", "data.volumes", "data.layouts", "data.geometry")  # fmt: skip
TESTS = [
    test
    for module in (test_vectors, test_fusion_vectors, test_peer_vectors)
    for name, test in vars(module).items()
    if name.startswith("test_")
]
NOTICED = (Exception, pytest.fail.Exception)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Before the first bug: a module that is imported while one is in place would keep it."""
    for name in USED:
        of_the_peer(name)


def checks(family: str) -> Iterator[tuple[Callable[..., None], list[dict[str, Any]]]]:
    """The tests of a family, or of one of its operations, each with the cases that it takes."""
    for test in TESTS:
        marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
        given = {mark.args[0]: mark.args[1] for mark in marks}
        listed = [case.values[0] for case in listed_cases(*family.split())]
        cases = [getattr(case, "values", (None,))[0] for case in given.get("case", ())]
        if listed[0] in cases:
            others = {name: values for name, values in given.items() if name != "case"}
            more = [dict(zip(others, values, strict=True)) for values in product(*others.values())]
            yield test, [{"case": case, **each} for each in more for case in listed]


def noticed(mutant: Mutant, fixtures: dict[str, Any]) -> bool:
    """Whether a vector fails."""
    found = list(checks(mutant.vectors))
    assert found, f"no test takes the vectors {mutant.vectors}"
    for test, calls in found:
        wanted = [name for name in inspect.signature(test).parameters if name in fixtures]
        for call in calls:
            try:
                test(**call, **{name: fixtures[name] for name in wanted})
            except NOTICED:
                return True
    return False


def test_there_are_enough_and_each_has_a_name() -> None:
    assert len({(mutant.vectors, mutant.name) for mutant in MUTANTS}) == len(MUTANTS) >= 38


@pytest.mark.parametrize("mutant", [pytest.param(m, id=f"{m.vectors}: {m.name}") for m in MUTANTS])
def test_a_vector_notices(
    mutant: Mutant, credentials: dict[Side, Credentials], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant.plant(monkeypatch)
    assert noticed(mutant, {"credentials": credentials, "tmp_path": tmp_path}), "no vector noticed"
