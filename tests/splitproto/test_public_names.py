"""`import splitproto` gathers the public names, and imports what is behind one only when it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import splitproto


def declared() -> dict[str, str]:
    """Name to module, as type checkers read it."""
    tree = ast.parse(Path(splitproto.__file__).read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: f"splitproto.{node.module}"
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_every_public_name_is_what_type_checkers_see() -> None:
    assert sorted(declared()) == sorted(splitproto.__all__)
    for name, module in declared().items():
        assert getattr(splitproto, name) is getattr(import_module(module), name)
    assert set(splitproto.__all__) <= set(dir(splitproto))


def test_other_names_are_missing() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'listen'"):
        splitproto.listen  # noqa: B018
    with pytest.raises(ImportError):
        exec("from splitproto import Pipe")


def test_errors_alone_bring_no_tls_numpy_or_zeromq() -> None:
    program = (
        "import sys, splitproto\nfrom splitproto.errors import SplitprotoError\n"
        "assert splitproto.SplitprotoError is SplitprotoError\n"
        "print(*{'asyncio', 'cryptography', 'msgpack', 'numpy', 'ssl', 'zmq'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.split() == []
