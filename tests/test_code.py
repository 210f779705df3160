"""Rules for the code itself: short functions, and a docstring for all that others may call."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import splitpeer
import splitproto

ROOT = Path(__file__).parents[1]
LONGEST = 60
"""Lines of a function, from `def` to its end."""


def functions() -> Iterator[tuple[str, int]]:
    """Path, name and lines of every function. (The generators in spec/ are lists of cases and not looked at.)"""
    for folder in ("splitproto", "peers", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    name = f"{path.relative_to(ROOT)}: {node.name}"
                    yield name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_functions_are_short() -> None:
    long = {name: lines for name, lines in functions() if lines > LONGEST}
    assert long == {}


def modules() -> Iterator[ModuleType]:
    for package in (splitproto, splitpeer):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                yield importlib.import_module(found.name)


def methods(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Public methods and properties of the public classes that `module` defines."""
    for name, kind in vars(module).items():
        if inspect.isclass(kind) and kind.__module__ == module.__name__ and not name.startswith("_"):
            for member, value in vars(kind).items():
                written = inspect.isroutine(value) or isinstance(value, property | classmethod | staticmethod)
                if written and not member.startswith("_"):
                    yield f"{module.__name__}.{name}.{member}", getattr(kind, member)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_method_has_a_docstring_or_takes_the_one_of_its_base_class() -> None:
    """ruff sees to functions, classes and modules; it cannot see what is inherited."""
    assert [
        name for module in modules() for name, value in methods(module) if not inspect.getdoc(value)
    ] == []
