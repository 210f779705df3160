"""Who may import whom, as data: `test_import_rules.py` enforces it, `docs/diagrams.py` writes it into the docs.

A row is a package or a module; the longest row that is a prefix of a module's name applies to it. A name forbids itself
and all below it, also inside functions unless the row says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAVY = frozenset({"torch", "monai"})
SCANS = frozenset({"SimpleITK", "highdicom", "pydicom"})
LIBRARY = HEAVY | {"nibabel", "nilearn", "splitpeer"}
LANES = frozenset(
    {f"splitproto.lanes.{name}" for name in ("memory", "tcp", "tcp_dial", "zeromq", "zeromq_reader")}
)
ENDS = frozenset({"splitproto.door", "splitproto.listening", "splitproto.dialling"})
SHELLS = LANES | ENDS | {"splitproto.session", "splitproto.vigil"}
CORE = LIBRARY | SHELLS | {"zmq", "asyncio", "time", "random", "secrets", "socket", "threading", "select"}
FILES = frozenset({"pathlib", "os", "io", "tempfile", "shutil"})
SOCKETS = SHELLS | {"zmq", "asyncio", "socket"}
ROLES = frozenset({"splitpeer.site", "splitpeer.coordinator", "splitpeer.replay"})
UPPER = ROLES | {"splitpeer.cli", "splitpeer.federation"}
JUDGES = frozenset({"splitpeer.audit", "splitpeer.report"})

GROUPS: dict[str, frozenset[str]] = {
    "core": CORE, "sockets": SOCKETS, "shells": SHELLS, "library": LIBRARY, "lanes": LANES, "ends": ENDS,
    "scans": SCANS, "files": FILES, "upper": UPPER, "roles": ROLES, "judges": JUDGES, "heavy": HEAVY,
}  # fmt: skip
"""By the names that the docs use; a group comes before those it may hold."""

LENT = FILES | {"time", "random", "secrets", "socket", "threading", "select", "zmq"}
"""Forbidden in the module itself only: a module that may read no file may still call one that does."""
PUBLIC = frozenset({"splitproto.__init__", "splitpeer.__init__"})
"""Every import of a module below runs these; they have rows of their own, and are not followed."""


@dataclass(frozen=True)
class Row:
    never: frozenset[str]
    """Not even inside a function."""
    at_import: frozenset[str] = frozenset()
    """Only inside functions, so that importing the module is cheap."""
    why: str = ""


_END = LIBRARY | LANES | ENDS | {"zmq"}
_CREDENTIALS = Row(CORE, why="credentials are files; nothing else in the core reads any")
_LIGHT = Row(SHELLS, HEAVY, why="every command reads these")
_LOW = Row(SOCKETS | UPPER)

TABLE: dict[str, Row] = {
    "splitproto": Row(CORE | FILES, why="input, output, clocks and chance belong to the caller"),
    "splitproto.identity": _CREDENTIALS,
    "splitproto.recheck": _CREDENTIALS,
    "splitproto.secretfile": _CREDENTIALS,
    "splitproto.recognise": _CREDENTIALS,
    "splitproto.newfile": Row(LIBRARY | SOCKETS),
    "splitproto.pki": Row(LIBRARY | SOCKETS),
    "splitproto.clock": Row(LIBRARY | SHELLS | {"zmq"}),
    "splitproto.session": Row(_END | {"splitproto.vigil"}),
    "splitproto.vigil": Row(_END),
    "splitproto.lanes.memory": Row(
        LIBRARY | SHELLS | {"zmq", "socket"}, why="a lane knows neither links nor other lanes"
    ),
    "splitproto.lanes.zeromq": Row(LIBRARY | ENDS | {"splitproto.session", "splitproto.lanes.memory"}),
    "splitproto.lanes.tcp_dial": Row(
        LIBRARY | ENDS | {"splitproto.session", "splitproto.lanes.memory", "zmq"}
    ),
    "splitproto.lanes.zeromq_reader": Row(LIBRARY | SHELLS),
    "splitproto.lanes.tcp": Row(LIBRARY | SHELLS | {"zmq", "asyncio", "time"}),
    "splitproto.door": Row(
        LIBRARY | LANES | {"zmq", "socket", "splitproto.listening", "splitproto.dialling"},
        why="one admission policy for every kind of lane",
    ),
    "splitproto.listening": Row(LIBRARY | {"splitproto.dialling"}),
    "splitproto.dialling": Row(
        LIBRARY | {"zmq", "socket", "splitproto.door", "splitproto.listening", "splitproto.lanes.memory"},
        why="a lane knows how its listeners are reached",
    ),
    "splitproto.__init__": Row(LIBRARY, why="only gathers the public names"),
    "splitpeer": Row(frozenset()),
    **dict.fromkeys(
        ("splitpeer.__init__", "splitpeer.errors", "splitpeer.logs", "splitpeer.settings"), _LIGHT
    ),
    **dict.fromkeys(
        (
            f"splitpeer.{name}"
            for name in ("storage", "models", "data", "training", "pretraining", "defences")
        ),
        _LOW,
    ),
    **dict.fromkeys(
        ("splitpeer.dicom", "splitpeer.prepare"),
        Row(SOCKETS | UPPER | HEAVY, why="images are prepared at the hospital alone, and without a model"),
    ),
    **dict.fromkeys(
        (f"splitpeer.prepare.{name}" for name in ("__init__", "record", "back", "bounds", "templates")),
        Row(
            SOCKETS | UPPER | HEAVY | SCANS,
            why="masks go back, and settings are read, without these libraries",
        ),
    ),
    "splitpeer.dicom.rules": Row(
        SOCKETS | UPPER | HEAVY | SCANS, why="settings are read without these libraries"
    ),
    **dict.fromkeys(
        (
            f"splitpeer.defences.{name}"
            for name in ("__init__", "specs", "kinds", "randomness", "key", "image")
        ),
        Row(SOCKETS | UPPER | HEAVY, why="settings are checked, and images defended, without torch"),
    ),
    "splitpeer.attacks": Row(
        SOCKETS | UPPER | JUDGES | {"splitpeer.leakage", "splitpeer.captures"},
        why="an attack sees a view and what it is granted: no live peer, no truth, no scores",
    ),
    "splitpeer.leakage": Row(SOCKETS | UPPER | JUDGES),
    "splitpeer.report": Row(SOCKETS | UPPER | HEAVY | {"splitpeer.audit", "splitpeer.attacks.base"}),
    "splitpeer.results": Row(
        SOCKETS | UPPER, HEAVY, why="a mask becomes files at a hospital without a model, and sends nothing"
    ),
    "splitpeer.audit": Row(
        SOCKETS | {"splitpeer.cli", "splitpeer.coordinator", "splitpeer.replay", "splitpeer.site.client"},
        why="a rehearsal plays sites as they are, without links",
    ),
    "splitpeer.privacy": Row(SOCKETS | UPPER | HEAVY, why="`splitpeer status` shows the ledger"),
    "splitpeer.privacy.dfil": _LOW,
    "splitpeer.preflight": Row(
        HEAVY | {"splitpeer.cli", "splitproto.vigil"} | LANES | ENDS, why="commands that only check settings"
    ),
    "splitpeer.captures": Row(
        SOCKETS | UPPER | HEAVY, why="hospital software may read and write captures without a model"
    ),
    "splitpeer.captures.redefend": Row(SOCKETS | UPPER, why="runs defences as a live site does"),
    "splitpeer.timeline": Row(
        SOCKETS | UPPER | HEAVY, why="a daemon records with it, and its files are drawn without a model"
    ),
    "splitpeer.daemon": Row(
        HEAVY | SHELLS | UPPER, why="watching a daemon needs no torch, and cannot touch a link"
    ),
    "splitpeer.ranks": Row(SOCKETS | UPPER, why="the step of several ranks knows no site"),
    "splitpeer.ranks.torchrun": Row(SOCKETS | UPPER | HEAVY, why="read before torch is imported"),
    "splitpeer.federation": Row(
        SHELLS | ROLES | {"splitpeer.cli"}, why="what both ends share knows neither end"
    ),
    "splitpeer.site": Row(frozenset({"splitpeer.cli", "splitpeer.coordinator"})),
    "splitpeer.coordinator": Row(frozenset({"splitpeer.cli", "splitpeer.site"})),
    "splitpeer.replay": Row(frozenset({"splitpeer.cli"})),
    "splitpeer.export": Row(SOCKETS | {"splitpeer.cli", "splitpeer.replay"}),
    "splitpeer.export.scripts": Row(
        SOCKETS | {"splitpeer", "splitproto"}, why="runs where a bundle is, without this project"
    ),
    "splitpeer.cli": Row(frozenset(), HEAVY, why="`--help` is quick"),
}
