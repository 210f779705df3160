"""Who may import whom: the table of docs/architecture.md as data, checked on the syntax trees.

Rows are packages or modules (the longest prefix that fits a module is its row). A name forbids itself and all
below it; imports inside functions count unless a row says otherwise.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"splitproto": ROOT / "splitproto", "splitpeer": ROOT / "peers" / "splitpeer"}

HEAVY = frozenset({"torch", "monai"})
LANES = frozenset({f"splitproto.lanes.{name}" for name in ("memory", "tcp", "zeromq", "zeromq_reader")})
ENDS = frozenset({"splitproto.door", "splitproto.listening", "splitproto.dialling"})
SHELLS = LANES | ENDS | {"splitproto.session", "splitproto.vigil"}
ROLES = frozenset({"splitpeer.site", "splitpeer.coordinator", "splitpeer.replay"})
UPPER = ROLES | {"splitpeer.cli", "splitpeer.federation"}
JUDGES = frozenset({"splitpeer.audit", "splitpeer.report"})
LIBRARY = HEAVY | {"nibabel", "nilearn", "splitpeer"}
"""What hospital software that embeds splitproto must not need."""
CORE = LIBRARY | SHELLS | {"zmq", "asyncio", "time", "random", "secrets", "socket", "threading", "select"}
"""Input, output, clocks and chance are the owner's."""
NO_FILES = frozenset({"pathlib", "os", "io", "tempfile", "shutil"})
SOCKETS = SHELLS | {"zmq", "asyncio", "socket"}


@dataclass(frozen=True)
class Row:
    never: frozenset[str]
    """Not even inside a function."""
    at_import: frozenset[str] = frozenset()
    """Only inside functions, so that importing the module is cheap."""


TABLE: dict[str, Row] = {
    "splitproto": Row(CORE | NO_FILES),
    # Credentials are files: these read them, nothing else in the core reads any.
    "splitproto.identity": Row(CORE),
    "splitproto.recheck": Row(CORE),
    "splitproto.secretfile": Row(CORE),
    "splitproto.recognise": Row(CORE),
    "splitproto.newfile": Row(LIBRARY | SHELLS | {"zmq", "asyncio", "socket"}),
    "splitproto.pki": Row(LIBRARY | SHELLS | {"zmq", "asyncio", "socket"}),
    "splitproto.clock": Row(LIBRARY | SHELLS | {"zmq"}),
    "splitproto.session": Row(LIBRARY | LANES | ENDS | {"zmq", "splitproto.vigil"}),
    "splitproto.vigil": Row(LIBRARY | LANES | ENDS | {"zmq"}),
    # A lane knows neither links nor sessions, and no other lane.
    "splitproto.lanes.memory": Row(LIBRARY | (SHELLS - {"splitproto.lanes.memory"}) | {"zmq", "socket"}),
    "splitproto.lanes.zeromq": Row(LIBRARY | ENDS | {"splitproto.session", "splitproto.lanes.memory"}),
    "splitproto.lanes.zeromq_reader": Row(LIBRARY | SHELLS),
    # Descriptors and sockets, but neither a clock nor ZeroMQ.
    "splitproto.lanes.tcp": Row(LIBRARY | SHELLS | {"zmq", "asyncio", "time"}),
    # One policy for all lanes: it cannot know which there are.
    "splitproto.door": Row(
        LIBRARY | LANES | {"zmq", "socket", "splitproto.listening", "splitproto.dialling"}
    ),
    "splitproto.listening": Row(LIBRARY | {"splitproto.dialling"}),
    "splitproto.dialling": Row(LIBRARY | {"zmq", "splitproto.door", "splitproto.listening"}),
    # The package itself only gathers the public names.
    "splitproto.__init__": Row(LIBRARY),
    "splitpeer": Row(frozenset()),
    # Every command reads these, so they bring no torch.
    **dict.fromkeys(
        ("splitpeer.__init__", "splitpeer.errors", "splitpeer.logs", "splitpeer.settings"),
        Row(SHELLS, HEAVY),
    ),
    "splitpeer.storage": Row(SOCKETS | UPPER),
    "splitpeer.models": Row(SOCKETS | UPPER),
    "splitpeer.data": Row(SOCKETS | UPPER),
    "splitpeer.training": Row(SOCKETS | UPPER),
    "splitpeer.defences": Row(SOCKETS | UPPER),
    # An attack sees a view of a capture and what it is granted: no live peer, no truth, no scores.
    "splitpeer.attacks": Row(SOCKETS | UPPER | JUDGES | {"splitpeer.leakage", "splitpeer.captures"}),
    "splitpeer.leakage": Row(SOCKETS | UPPER | JUDGES),
    "splitpeer.report": Row(SOCKETS | UPPER | HEAVY | {"splitpeer.audit", "splitpeer.attacks.base"}),
    # It borrows from the federation what needs no socket: the order of batches, evaluation, terms.
    "splitpeer.audit": Row(SOCKETS | ROLES | {"splitpeer.cli"}),
    # The ledger and its figures serve a status line too.
    "splitpeer.privacy": Row(SOCKETS | UPPER | HEAVY),
    "splitpeer.privacy.dfil": Row(SOCKETS | UPPER),
    # Every command that only checks settings reads it.
    "splitpeer.preflight": Row(HEAVY | {"splitpeer.cli", "splitproto.vigil"} | LANES | ENDS),
    # Captures are read and written without a model, so that hospital software may do so too.
    "splitpeer.captures": Row(SOCKETS | UPPER | HEAVY),
    # Whoever only looks at a daemon waits for no torch, and cannot touch a link.
    "splitpeer.daemon": Row(HEAVY | SHELLS | UPPER),
    # What both ends share knows neither end.
    "splitpeer.federation": Row(SHELLS | ROLES | {"splitpeer.cli"}),
    "splitpeer.site": Row(frozenset({"splitpeer.cli", "splitpeer.coordinator"})),
    "splitpeer.coordinator": Row(frozenset({"splitpeer.cli", "splitpeer.site"})),
    "splitpeer.replay": Row(frozenset({"splitpeer.cli"})),
    "splitpeer.cli": Row(frozenset(), HEAVY),
}


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


@pytest.mark.parametrize(
    ("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_follow_the_table(module: str, path: Path) -> None:
    assert violations(module, path.read_text(), TABLE) == []


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
        ("splitpeer.cli.serve", "import torch", 1),
        ("splitpeer.cli.serve", "def run():\n    import torch, monai", 0),
        ("splitpeer.cli.serve", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", 0),
        ("splitpeer.site.client", "from splitproto.dialling import dial\nimport torch", 0),
        ("splitpeer.site.client", "from splitpeer import cli", 1),
    ],
)
def test_the_rules_can_fail(module: str, source: str, count: int) -> None:
    assert len(violations(module, source, TABLE)) == count


def test_importing_the_library_brings_no_torch() -> None:
    """The same, as an embedding program would notice it."""
    import subprocess
    import sys

    code = (
        "import sys, splitproto; print(sorted({'torch', 'monai', 'nibabel', 'splitpeer'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
