"""Torch is imported without the garbage collector, which takes its work up again behind it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, sys
from splitpeer.cli.loading import load
rounds = []
gc.callbacks.append(lambda phase, info: rounds.append(phase))
load("torch", "splitpeer.site.client")
assert not rounds, "it looked through what was being imported"
assert "splitpeer.site.client" in sys.modules
assert gc.isenabled()
frozen = gc.get_freeze_count()
assert frozen > 100_000
assert gc.collect() < frozen
loop = []
loop.append(loop)
load("torch")
assert gc.get_freeze_count() <= frozen, "there was nothing to import: what lives now may be garbage one day"
try:
    load("splitpeer.no_such_module")
except ModuleNotFoundError:
    assert gc.isenabled()
gc.disable()
load("splitpeer.replay.redrive")
assert not gc.isenabled(), "somebody else had it off"
print("loaded")
"""


def test_nothing_is_collected_while_modules_are_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100)
    assert done.stdout == "loaded\n", done.stderr
