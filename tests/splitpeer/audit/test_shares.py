"""A rank that waits for the first one to prepare a sweep can be interrupted, as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.splitpeer.roles.scene import free_port

from .test_audit_command import SWEEP

SOON_S = 5.0
"""Far less than a wait (an hour); a busy machine may need more than a second."""
PREPARES = """
import sys, time
import splitpeer.audit.sweep as sweep
from splitpeer.cli import main

def prepare(*_):
    print("preparing", flush=True)
    time.sleep(120)

sweep.prepare = prepare
main(sys.argv[1:])
"""
"""A first rank that prepares for longer than the test takes."""


@pytest.fixture
def ranks(place: Any, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], ...]]:
    """Both, once they have met: the first prepares, the other waits for it."""
    plan = tmp_path / "sweep.toml"
    plan.write_text(SWEEP.format(data=place.data, shadow=place.shadow, strength=1))
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    sweep = ["audit", "--sweep", plan, "--job", place.job, "--out"]
    started = [
        subprocess.Popen(
            [sys.executable, *command, *sweep, tmp_path / n],
            env={**os.environ, **shared, "RANK": n, "LOCAL_RANK": n},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n, command in (("0", ("-c", PREPARES)), ("1", ("-m", "splitpeer.cli")))
    ]
    try:
        assert started[0].stdout is not None
        assert started[0].stdout.readline() == "preparing\n"
        # The other has agreed to the same sweep; what it does next is to wait.
        time.sleep(0.5)
        yield tuple(started)
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                process.kill()
            process.communicate(timeout=10)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_rank_that_waits_for_the_first_is_interrupted_at_once(
    ranks: tuple[subprocess.Popen[str], ...], number: int, code: int
) -> None:
    _, waiting = ranks
    assert waiting.poll() is None
    began = time.monotonic()
    waiting.send_signal(number)
    _, said = waiting.communicate(timeout=30)
    assert time.monotonic() - began < SOON_S
    assert waiting.returncode == code, said
    assert said.strip() == ("splitpeer: interrupted" if number == signal.SIGINT else "")
