"""Real `splitpeer` processes without paying for the imports of torch and others each time.

Run as a script, by `scene.py`. It imports what the roles need, once, and then forks a process per
line of its standard input, `{"argv": [...], "cwd": "...", "log": "..."}`, which runs the command line as the
console script would: own pid, own process group, own signals, own exit code. It answers `{"pid": n}`, and
later `{"pid": n, "code": n}`. When its standard input ends, it kills what is still running.

A line may also hold settings for tests only: `pace` multiplies heartbeats and the silence that ends a
link, `run` is the run's id (noise is drawn from it), `clock` a file in `cwd` with seconds to add to
the wall clock of everything but OpenSSL, `environ` variables of the process.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import threading
import time
from datetime import datetime, tzinfo
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import splitpeer.cli.serve
import splitpeer.coordinator.coordinator
import splitpeer.coordinator.record
import splitpeer.site.client
import splitproto.vigil
from splitpeer.cli import main
from splitproto import Timing

LATER = ("nibabel", "numpy.random", "scipy.ndimage", "scipy.spatial", "splitpeer.report.charts")
"""What a coordinator imports when it has trained."""


def bend(asked: dict[str, Any]) -> None:
    """What only tests want otherwise, in the child."""
    os.environ.update(asked.get("environ", {}))
    if pace := asked.get("pace"):
        was = Timing()
        usual = {was.heartbeat, was.silence, was.handshake}
        # The defaults of a dataclass are those of its __init__.
        Timing.__init__.__defaults__ = tuple(
            value * pace if value in usual and isinstance(value, float) else value
            for value in Timing.__init__.__defaults__
        )
    if run := asked.get("run"):
        splitpeer.coordinator.record.secrets = SimpleNamespace(token_bytes=lambda _: bytes.fromhex(run))
    if clock := asked.get("clock"):
        real, offset = time.time, Path(asked["cwd"], clock)
        time.time = lambda: real() + float(offset.read_text())

        class Bent(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:
                return datetime.fromtimestamp(time.time(), tz)

        splitproto.vigil.datetime = Bent


def become(argv: list[str], cwd: str, log: str) -> None:
    """In the child: a process as a shell would have started it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open("/dev/null", "rb") as nothing, open(log, "ab") as written:
        os.dup2(nothing.fileno(), 0)
        os.dup2(written.fileno(), 1)
        os.dup2(written.fileno(), 2)
    os.chdir(cwd)
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main(argv)


def reap(running: set[int]) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            running.remove(pid)
            print(json.dumps({"pid": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)


def serve() -> None:
    for module in LATER:
        import_module(module)
    if threading.active_count() != 1 or len(os.listdir("/proc/self/task")) != 1:
        raise SystemExit("threads were started by an import: this process must not fork")
    # What the children share, they shall not copy: collecting garbage would write to every object of torch.
    gc.collect()
    gc.freeze()
    running: set[int] = set()
    print(json.dumps({"ready": True}), flush=True)
    while True:
        if select.select([sys.stdin], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            if not line:
                break
            asked = json.loads(line)
            pid = os.fork()
            if pid == 0:
                bend(asked)
                become(asked["argv"], asked["cwd"], asked["log"])
            # Here and not in the child, so that the group is there when the next one joins it.
            os.setpgid(pid, asked["group"] or pid)
            running.add(pid)
            print(json.dumps({"pid": pid}), flush=True)
        reap(running)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
