"""`import_table.py`, checked on the syntax trees.

Imports are followed: a module that must not know torch must not import one that does. Only `LENT`, the standard
library's files, clocks and threads, is checked in the module alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from .import_table import LENT, PUBLIC, TABLE, Row

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"splitproto": ROOT / "splitproto", "splitpeer": ROOT / "peers" / "splitpeer"}


def modules() -> list[tuple[str, Path]]:
    return [
        (".".join((package, *path.relative_to(folder).with_suffix("").parts)), path)
        for package, folder in SOURCES.items()
        for path in sorted(folder.rglob("*.py"))
    ]


def row_of(module: str, table: dict[str, Row]) -> Row:
    parts = module.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(table[prefix] for prefix in prefixes if prefix in table)


def imports(module: str, tree: ast.Module) -> list[tuple[str, bool, int]]:
    """(imported name, inside a function?, line) of every import; relative ones resolved; typing-only ones left out."""
    found: list[tuple[str, bool, int]] = []

    def walk(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                walk(child, lazy)
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level]
                base = ".".join([*above, base] if base else above)
            found.extend((f"{base}.{alias.name}", lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "import_module",
            "importlib.import_module",
        ):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                found.append((str(argument.value), lazy, node.lineno))
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            walk(child, inside)

    walk(tree, False)
    return found


def within(name: str, forbidden: frozenset[str]) -> bool:
    return any(name == one or name.startswith(one + ".") for one in forbidden)


def violations(module: str, source: str, table: dict[str, Row]) -> list[str]:
    row = row_of(module, table)
    return [
        f"{module}:{line} imports {name}" + (" when it is imported" if within(name, row.at_import) else "")
        for name, lazy, line in imports(module, ast.parse(source))
        if within(name, row.never) or (not lazy and within(name, row.at_import))
    ]


class Graph:
    """Who imports whom, of `sources`: module name to text. A package is its `__init__`."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.imports = {module: imports(module, ast.parse(text)) for module, text in sources.items()}

    def next(self, module: str, *, lazy: bool) -> Iterator[str]:
        """Modules that run when `module` is imported; with `lazy`, also those that its functions import."""
        for name, inside, _ in self.imports[module]:
            if inside and not lazy:
                continue
            target = self._module(name)
            if target is None or target == module or target in PUBLIC:
                continue
            yield target
            # The packages above it run first; those that the importer lies in do so already.
            parts = target.removesuffix(".__init__").split(".")
            for count in range(2, len(parts)):
                package = ".".join(parts[:count])
                if f"{package}.__init__" in self.imports and not module.startswith(f"{package}."):
                    yield f"{package}.__init__"

    def _module(self, name: str) -> str | None:
        while name and name not in self.imports and f"{name}.__init__" not in self.imports:
            name = name.rpartition(".")[0]
        return name if name in self.imports else f"{name}.__init__" if name else None

    def reached(self, module: str, *, lazy: bool) -> dict[str, str]:
        """Every module that runs once `module` is imported and, with `lazy`, its functions: and who imports it."""
        found: dict[str, str] = {}
        waiting = [(target, module) for target in self.next(module, lazy=lazy)]
        while waiting:
            target, by = waiting.pop(0)
            if target not in found and target != module:
                found[target] = by
                waiting += [(further, target) for further in self.next(target, lazy=False)]
        return found

    def violations(self, module: str, table: dict[str, Row]) -> list[str]:
        """What lies behind `module` that its row forbids, with the way there."""
        row = row_of(module, table)
        found = []
        for forbidden, lazy in ((row.never - LENT, True), (row.at_import - LENT, False)):
            reached = self.reached(module, lazy=lazy)
            for target in reached:
                names = [target.removesuffix(".__init__")]
                names += [name for name, inside, _ in self.imports[target] if not inside]
                if bad := next((name for name in names if within(name, forbidden)), None):
                    found.append(f"{' -> '.join(_way(reached, module, target))} knows {bad}")
        return found

    def circles(self) -> list[list[str]]:
        """Modules that need one another to be imported, or that one imports while the other's function runs."""
        behind = {module: set(self.reached(module, lazy=False)) for module in self.imports}
        for module, reached in behind.items():
            for name, inside, _ in self.imports[module]:
                target = self._module(name)
                if inside and target is not None and target not in PUBLIC and module in behind[target]:
                    reached.add(target)
        rings = {
            tuple(sorted({module, *(other for other in behind[module] if module in behind[other])}))
            for module in behind
        }
        return sorted(list(ring) for ring in rings if len(ring) > 1)


def _way(reached: Mapping[str, str], module: str, target: str) -> list[str]:
    way = [target]
    while way[0] != module:
        way.insert(0, reached[way[0]])
    return way


@cache
def graph() -> Graph:
    return Graph({module: path.read_text() for module, path in modules()})


@pytest.mark.parametrize(
    ("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_follow_the_table(module: str, path: Path) -> None:
    assert violations(module, path.read_text(), TABLE) == []


@pytest.mark.parametrize("module", [module for module, _ in modules()])
def test_what_is_imported_follows_the_table_too(module: str) -> None:
    assert graph().violations(module, TABLE) == []


def test_there_is_no_circle() -> None:
    assert graph().circles() == []


def rooms(graph: Graph) -> Graph:
    """The same imports, between packages: each is one node, named as its `__init__` would be."""
    sources: dict[str, list[str]] = {}
    for module in graph.imports:
        room = ".".join(module.split(".")[:2])
        for other in graph.next(module, lazy=False):
            beyond = ".".join(other.split(".")[:2])
            if beyond != room and other not in PUBLIC:
                sources.setdefault(room, []).append(f"import {beyond}")
            sources.setdefault(beyond, [])
    return Graph({room: "\n".join(lines) for room, lines in sources.items()})


def test_there_is_no_circle_of_rooms() -> None:
    """Module by module there may be none, and a room may still not be understood without the one above it."""
    daemon = {name: path.read_text() for name, path in modules() if name.startswith("splitpeer.")}
    assert rooms(Graph(daemon)).circles() == []


def test_a_circle_of_rooms_is_found() -> None:
    house = {
        "splitpeer.storage.durable": "from splitpeer.daemon import descriptors",
        "splitpeer.daemon.descriptors": "",
        "splitpeer.daemon.board": "from splitpeer.storage import durable",
        "splitpeer.data.volumes": "from splitpeer.storage import durable",
    }
    assert Graph(house).circles() == []
    assert rooms(Graph(house)).circles() == [["splitpeer.daemon", "splitpeer.storage"]]


def test_the_root_of_the_daemon_holds_errors_and_logs_alone() -> None:
    root = SOURCES["splitpeer"]
    assert {path.name for path in root.glob("*.py")} == {"__init__.py", "errors.py", "logs.py"}


HOUSE = {
    "splitpeer.settings.peer": "from splitpeer.data import layouts\ndef load():\n    import splitpeer.data.heavy",
    "splitpeer.data.layouts": "import re",
    "splitpeer.data.heavy": "import torch",
    "splitpeer.daemon.board": "import splitpeer.settings.peer\ndef f():\n    import splitpeer.data.heavy",
    "splitpeer.privacy.ledger": "from splitpeer.models.unet import UNet",
    "splitpeer.models.__init__": "from splitpeer.models.unet import UNet",
    "splitpeer.models.unet": "from splitpeer.models.blocks import Block",
    "splitpeer.models.blocks": "import torch",
    "splitpeer.storage.lines": "def write():\n    from splitpeer.storage import reading",
    "splitpeer.storage.reading": "from splitpeer.storage.lines import Lines",
    "splitpeer.preflight.machine": "from splitpeer.models.names import NAMES",
    "splitpeer.models.names": "NAMES = ()",
}
"""A small one, with what may go wrong."""


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("splitpeer.settings.peer", []),
        (
            "splitpeer.daemon.board",
            # A function of its own counts, a function of another's does not.
            ["splitpeer.daemon.board -> splitpeer.data.heavy knows torch"],
        ),
        (
            "splitpeer.privacy.ledger",
            ["splitpeer.privacy.ledger -> splitpeer.models.unet -> splitpeer.models.blocks knows torch"],
        ),
        # A package's __init__ runs before what was asked for.
        (
            "splitpeer.preflight.machine",
            [
                "splitpeer.preflight.machine -> splitpeer.models.__init__ -> splitpeer.models.unet -> "
                "splitpeer.models.blocks knows torch"
            ],
        ),
        ("splitpeer.models.unet", []),
    ],
)
def test_the_rules_about_what_lies_behind_can_fail(module: str, said: list[str]) -> None:
    assert Graph(HOUSE).violations(module, TABLE) == said


def test_a_circle_is_found() -> None:
    assert Graph(HOUSE).circles() == [["splitpeer.storage.lines", "splitpeer.storage.reading"]]


def test_the_walk_finds_the_code() -> None:
    found = [module for module, _ in modules()]
    for needed in (
        "splitproto.connection",
        "splitproto.lanes.zeromq",
        "splitpeer.models.basic_unet",
        "splitpeer.data.nifti",
    ):
        assert needed in found


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("splitproto.connection", "import time", 1),
        ("splitproto.connection", "import asyncio.events", 1),
        ("splitproto.connection", "from .lanes.zeromq import Dealer", 1),
        ("splitproto.connection", "from . import session", 1),
        ("splitproto.connection", "from splitproto import session, codec", 1),
        ("splitproto.connection", "def f():\n    import random", 1),
        ("splitproto.connection", "from pathlib import Path", 1),
        ("splitproto.connection", "import timeit, zlib\nfrom . import codec", 0),
        ("splitproto.new_module", "import socket", 1),
        ("splitproto.identity", "from pathlib import Path", 0),
        ("splitproto.lanes.zeromq", "import torch.nn as nn", 1),
        ("splitproto.lanes.zeromq", "import zmq, asyncio, secrets, socket", 0),
        ("splitproto.lanes.zeromq", "from splitproto.session import Session", 1),
        ("splitproto.lanes.base", "import asyncio", 1),
        ("splitproto.door", "from .lanes.zeromq import ZmqLane", 1),
        ("splitproto.door", "from .lanes.base import Lane", 0),
        ("splitproto.visitors", "import socket", 1),
        ("splitproto.session", "import zmq", 1),
        ("splitproto.session", "from importlib import import_module\nimport_module('torch')", 1),
        ("splitpeer.models.basic_unet", "import torch\nfrom splitproto.tensors import Descriptor", 0),
        ("splitpeer.models.basic_unet", "from splitproto.lanes import zeromq", 1),
        ("splitpeer.data.loader", "from ..site import client", 1),
        ("splitpeer.training.loss", "from splitpeer.cli.main import main", 1),
        ("splitpeer.captures.reader", "def read():\n    import torch", 1),
        ("splitpeer.defences.kinds", "import torch", 1),
        ("splitpeer.defences.image.noise", "import torch", 1),
        ("splitpeer.defences.base", "import torch", 0),
        ("splitpeer.cli.serve", "import torch", 1),
        ("splitpeer.cli.serve", "def run():\n    import torch, monai", 0),
        ("splitpeer.cli.serve", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", 0),
        ("splitpeer.site.client", "from splitproto.dialling import dial\nimport torch", 0),
        ("splitpeer.site.client", "from splitpeer import cli", 1),
    ],
)
def test_the_rules_can_fail(module: str, source: str, count: int) -> None:
    assert len(violations(module, source, TABLE)) == count


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("splitproto", set()),
        *(
            (f"splitpeer.{room}", {"splitpeer"})
            for room in ("settings", "daemon", "preflight", "report", "cli")
        ),
    ],
)
def test_importing_a_light_room_brings_no_torch(room: str, allowed: set[str]) -> None:
    """The same, as an embedding program would notice it; what a library brings is seen here alone."""
    import importlib.util
    import subprocess
    import sys

    if room != "splitproto" and importlib.util.find_spec("torch") is None:
        pytest.skip("the daemon is not installed")
    code = (
        f"import importlib, pkgutil, sys, {room} as room\n"
        "for m in pkgutil.walk_packages(room.__path__, room.__name__ + '.'):\n"
        "    m.name.endswith('__main__') or importlib.import_module(m.name)\n"
        "print(*sorted({'torch', 'monai', 'nibabel', 'splitpeer'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert set(done.stdout.split()) <= allowed
