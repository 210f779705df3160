"""A class name means one thing, in a log, a traceback or an import."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "peers" / "splitpeer" / "export" / "scripts"
"""Leaves in bundles and runs where this project is not: there the names of the network's parts are the right ones."""
SOURCES = [
    path
    for package in (ROOT / "splitproto", ROOT / "peers" / "splitpeer")
    for path in package.rglob("*.py")
    if not path.is_relative_to(BUNDLED)
]


def classes(sources: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Name and place of each class, nested ones too.

    A class that has the name of the one that it extends is left out: it is that one, of another kind, such as the
    `Encoder` of a network (models/registry.py finds it by this name).
    """
    for place, text in sources:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                bases = {base.attr for base in node.bases if isinstance(base, ast.Attribute)}
                if node.name not in bases:
                    yield node.name, f"{place}:{node.lineno}"


def doubles(sources: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names of more than one class, and where these are."""
    places = defaultdict(list)
    for name, place in classes(sources):
        places[name].append(place)
    return {name: found for name, found in places.items() if len(found) > 1}


def test_no_class_name_is_used_for_two_things() -> None:
    sources = [(str(path.relative_to(ROOT)), path.read_text()) for path in sorted(SOURCES)]
    assert len(list(classes(sources))) > 500
    assert doubles(sources) == {}


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("class View: ...", "class View: ...", ["View"]),
        ("class View: ...", "def f():\n    class View: ...", ["View"]),
        ("class Encoder: ...", "class Encoder(backbone.Encoder): ...", []),
        ("class Encoder: ...", "class Encoder(backbone.Decoder): ...", ["Encoder"]),
        ("class View: ...", "View = int", []),
    ],
)
def test_what_counts_as_two_things(first: str, second: str, found: list[str]) -> None:
    assert list(doubles([("a.py", first), ("b.py", second)])) == found
