"""The peers' own processes for `peers.py`: NVFlare's cells, which take orders, and Flower's daemons with one run.

Each starts from the Python of an environment of its own. Logs lie in the folder, and an error quotes their last lines.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import throughput
import tiny
from rows import Found
from working import MIB, WAIT_S

HERE = Path(__file__).parent
FLOWER_S = 300.0
"""Seconds that one run of Flower may take."""


@contextmanager
def processes(
    commands: Mapping[str, Sequence[object]], folder: Path, env: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Programs that run until the end, each with its output in FOLDER/NAME.log, but for a pipe that orders use."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                running[name] = subprocess.Popen(
                    [str(word) for word in command],
                    env=env,
                    cwd=folder,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if name == "server" else log,
                    stderr=log,
                )
        yield running
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


KEEPING = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""What `splitproto.allocator` sets for our processes, as glibc reads it when a program starts."""


def environment(**more: str) -> dict[str, str]:
    """For a peer's process: one thread, freed memory is kept as by our own, and this checkout's modules."""
    paths = os.pathsep.join(map(str, (HERE, HERE.parent / "peers", HERE.parent)))
    return os.environ | KEEPING | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": paths} | more


def versions(python: str, *libraries: str) -> dict[str, str]:
    """Of libraries in an environment. Raises SystemExit: it lacks one, or is none."""
    script = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    try:
        made = subprocess.run(
            [python, "-c", script, *libraries], capture_output=True, text=True, timeout=WAIT_S
        )
    except OSError as error:
        raise SystemExit(f"{python}: {error.strerror}; README.md says how to make this environment") from None
    if made.returncode:
        raise SystemExit(
            f"{python} has not all of {', '.join(libraries)}: README.md says how to install them"
        )
    return dict(zip(libraries, made.stdout.split(), strict=True))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def last_lines(path: Path) -> str:
    return " | ".join(path.read_text(errors="replace").strip().splitlines()[-3:])


class NVFlare:
    """Three processes of nvflare_peer.py. `order` has the one at the coordinator do something."""

    def __init__(self, running: dict[str, subprocess.Popen[bytes]], folder: Path) -> None:
        self._server, self._folder, self._read = running["server"], folder, b""
        self.pids = [process.pid for process in running.values()]

    @classmethod
    @contextmanager
    def started(cls, python: str, folder: Path) -> Iterator[NVFlare]:
        port = free_port()
        names = ("server", *tiny.SITES)
        commands = {name: (python, HERE / "nvflare_peer.py", folder, port, name) for name in names}
        with processes(commands, folder, environment()) as running:
            peer = cls(running, folder)
            peer.answer()
            yield peer

    def order(self, do: str, **what: Any) -> dict[str, Any]:
        if self._server.stdin is None:
            raise RuntimeError("started without a pipe")
        self._server.stdin.write(json.dumps({"do": do, **what}).encode() + b"\n")
        self._server.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Its next line. Raises SystemExit: it ended, or said nothing in time."""
        if self._server.stdout is None:
            raise RuntimeError("started without a pipe")
        pipe, ends = self._server.stdout.fileno(), time.monotonic() + WAIT_S
        while b"\n" not in self._read:
            ready, _, _ = select.select([pipe], [], [], max(0.0, ends - time.monotonic()))
            more = os.read(pipe, MIB) if ready else b""
            if not more:
                raise SystemExit(
                    f"NVFlare's server gave no answer: {last_lines(self._folder / 'server.log')}"
                )
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def cpu(self) -> float:
        return sum(map(throughput.cpu_seconds, self.pids))


APP = """[project]
name = "tiny"
version = "1.0.0"
description = "A small vertical split training"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "flower_peer:server"
clientapp = "flower_peer:client"

[tool.flwr.app.config]
"""


def flower(python: str, folder: Path, kind: str, steps: int) -> Found:
    """Seconds and losses of each step, over Flower's own daemons: a SuperLink and two SuperNodes, TLS at the servers.

    Its simulation would need neither TLS nor processes of the sites' own, so it is no federation to compare with.
    """
    programs, port = Path(python).parent, free_port()
    app, home, out = folder / "app", folder / "home", folder / "steps.json"
    app.mkdir(parents=True)
    home.mkdir()
    shutil.copy(HERE / "flower_peer.py", app)
    (app / "pyproject.toml").write_text(APP + f'kind = "{kind}"\nsteps = {steps}\nout = "{out}"\n')
    ca = folder.parent / "ca.crt"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{ca}"\n'
    )
    pair = (
        "--ssl-certfile",
        ca.parent / "hub.crt",
        "--ssl-keyfile",
        ca.parent / "hub.key",
        "--ssl-ca-certfile",
        ca,
    )
    # Its daemons find their helpers by name, and must neither install anything nor report who uses them.
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    env = environment(PATH=path, FLWR_HOME=str(home), FLWR_TELEMETRY_ENABLED="0")
    link = (programs / "flower-superlink", *pair, "--host", "127.0.0.1", "--port", port)
    commands = {"link": (*link, "--disable-runtime-dependency-installation")}
    with processes(commands, folder, env):
        wait_for(port, folder / "link.log")
        nodes = {
            site: (
                programs / "flower-supernode", "--root-certificates", ca, "--superlink", f"127.0.0.1:{port}", *pair,
                "--host", "127.0.0.1", "--port", free_port(), "--node-config", f"partition-id={number}",
            )
            for number, site in enumerate(tiny.SITES)
        }  # fmt: skip
        with processes(nodes, folder, env):
            begun = subprocess.run(
                [programs / "flwr", "run", app, "here"],
                env=env,
                capture_output=True,
                text=True,
                timeout=FLOWER_S,
            )
            if begun.returncode:
                raise SystemExit(f"flwr run: {' | '.join((begun.stdout + begun.stderr).split())}")
            ends = time.monotonic() + FLOWER_S
            while not (out.exists() and (written := out.read_text()).endswith("}")):
                if time.monotonic() > ends:
                    raise SystemExit(f"no figures from Flower: {last_lines(folder / 'link.log')}")
                time.sleep(0.2)
    done = json.loads(written)
    # The first step waits for the nodes to see the run.
    return {"rates": [1 / one for one in done["seconds"][1:]], "losses": done["losses"]}


def wait_for(port: int, log: Path) -> None:
    """Until something listens. Raises SystemExit."""
    ends = time.monotonic() + WAIT_S
    while time.monotonic() < ends:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit(f"nothing listens: {last_lines(log)}")
