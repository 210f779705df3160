"""Sets up a federation in a folder as its members would by hand, and starts its daemons.

<folder>/data-<patients>/   the phantom
<folder>/pki/               CA, certificates, salt
<folder>/<site>/            peer.toml, log and state of one daemon; hub/ also job.toml
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from splitpeer.errors import JobFailed
from splitpeer.settings import to_toml
from splitproto import pki

log = logging.getLogger(__name__)

FEDERATION = "brats-demo"
HUB = "hub"
SITES = {f"hospital-{modality}": modality for modality in ("flair", "t1", "t1ce", "t2")}
STOP_S = 20.0


@dataclass(frozen=True)
class DemoJob:
    """The demo's settings; the defaults are what its Dice is quoted for."""

    patients: int = 124
    validation: int = 24
    steps: int = 300
    batch: int = 8
    learning_rate: float = 5e-3
    positive_fraction: float = 0.75
    seed: int = 7
    evaluate_every: int = 0
    device: str = "cpu"

    def toml(self) -> dict[str, Any]:
        """`job.toml` as a dict."""
        return {
            "job": {"name": FEDERATION, "seed": self.seed},
            "sites": SITES,
            "model": {"dimensions": 2, "features": [8, 8, 16, 32, 64, 8]},
            "data": {
                "window": [96, 96],
                "positive_fraction": self.positive_fraction,
                "validation": self.validation,
            },
            "training": {
                "steps": self.steps,
                "batch": self.batch,
                "learning_rate": self.learning_rate,
                "checkpoint_every": 100,
            },
            "evaluation": {"every": self.evaluate_every, "batch": 24},
            "deadlines": {"join_s": 180, "step_s": 60, "reconnect_s": 60},
            "output": {"folder": "results"},
        }


class Federation:
    """The folder of one demonstration."""

    def __init__(self, folder: Path, job: DemoJob) -> None:
        self.folder, self.job = folder, job
        self.data = folder / f"data-{job.patients}"
        self.hub = folder / HUB
        self.results = self.hub / "results"
        self._pki = folder / "pki"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._curious: dict[str, dict[str, Any]] = {}

    def render(self, progress: Callable[[int, int], None]) -> None:
        """Make the patients, or find them there. Raises DataError."""
        from splitpeer.data.phantom import write_phantom

        write_phantom(self.data, self.job.patients, seed=self.job.seed, progress=progress)

    def certify(self) -> None:
        """A CA, certificates and the salt, or those that are there."""
        if not (self._pki / "ca.crt").exists():
            now = datetime.now(UTC)
            pki.create_ca(self._pki, FEDERATION, now=now)
            pki.issue(self._pki, "coordinator", HUB, hosts=["localhost", "127.0.0.1"], now=now)
            for site in SITES:
                pki.issue(self._pki, "client", site, now=now)

    def set_up(self) -> None:
        """Certificates and configuration. Nothing secret is shared but the salt and the CA's certificate."""
        self.certify()
        port = _free_port()
        runtime = {"device": self.job.device, "threads": 1}
        self._write(
            HUB,
            {
                "peer": {"role": "coordinator", "site": HUB, "federation": FEDERATION},
                "network": {"listen": f"tcp://127.0.0.1:{port}"},
                "data": {"labels": f"../{self.data.name}/labels", "convention": "msd"},
                "runtime": runtime,
            },
        )
        (self.hub / "job.toml").write_text(to_toml(self.job.toml()))
        for site, modality in SITES.items():
            self._write(
                site,
                {
                    "peer": {"role": "client", "site": site, "federation": FEDERATION, "modality": modality},
                    "network": {"coordinator": f"tcp://localhost:{port}", "reconnect_s": 120},
                    "data": {"images": f"../{self.data.name}/{modality}"},
                    "policy": {"coordinators": [HUB]},
                    # A fixed seed so that the demonstration repeats; hospitals keep the default, "private".
                    "runtime": runtime | {"initial_weights": self.job.seed},
                },
            )

    def start(self, *, resume: bool = False) -> subprocess.Popen[bytes]:
        """Start all five daemons; returns the coordinator's process, which keeps this terminal."""
        for site, modality in SITES.items():
            self._start(site, "--role", "client", "--modality", modality)
        more = ("--resume",) if resume else ()
        return self._start(HUB, "--role", "coordinator", "--job", str(self.hub / "job.toml"), *more)

    def wait(self) -> None:
        """Wait for the job's end; the coordinator's deadlines bound it.

        Raises:
            JobFailed: with the last line of whoever failed first.
        """
        hub = self._daemons[HUB]
        while hub.poll() is None:
            for site in SITES:
                code = self._daemons[site].poll()
                if code not in (None, 0):
                    # The coordinator waits for a lost site; here it will not come back.
                    self.stop()
                    raise JobFailed(f"{site} ended with exit code {code}: {self.last_line(site)}")
            time.sleep(0.2)
        if hub.returncode != 0:
            self.stop()
            raise JobFailed(f"the coordinator ended with exit code {hub.returncode}")
        self.stop()

    def stop(self) -> None:
        """End what is still running: first kindly, then by force. Only processes started here."""
        for process in self._daemons.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        for process in self._daemons.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def site_of(self, modality: str) -> str:
        """The site that holds a modality."""
        return next(site for site, held in SITES.items() if held == modality)

    def capture(self, site: str) -> Path:
        """What a curious party records."""
        return self.folder / site / "curious.cap"

    def record(self, site: str, **limits: Any) -> None:
        """Have a party record what it legitimately sees; `limits` as in [capture] of its peer.toml."""
        self._curious[site] = limits

    def last_line(self, site: str) -> str:
        """The last line of a site's log."""
        lines = (self.folder / site / "log.txt").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    # --- inside ----------------------------------------------------------------------------------------

    def _write(self, site: str, settings: dict[str, Any]) -> None:
        folder = self.folder / site
        folder.mkdir(parents=True, exist_ok=True)
        names = {"ca": "ca.crt", "certificate": f"{site}.crt", "key": f"{site}.key"}
        settings["tls"] = {key: f"../pki/{name}" for key, name in names.items()}
        settings["data"]["salt"] = "../pki/federation.salt"
        if site in self._curious:
            settings["capture"] = self._curious[site]
        (folder / "peer.toml").write_text(to_toml(settings))

    def _start(self, site: str, *arguments: str) -> subprocess.Popen[bytes]:
        folder = self.folder / site
        command = [
            sys.executable,
            "-m",
            "splitpeer.cli",
            "serve",
            "--config",
            str(folder / "peer.toml"),
            *arguments,
        ]
        if site in self._curious:
            for old in folder.glob("curious*.cap"):
                old.unlink()
            command += ["--curious", str(self.capture(site))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with open(folder / "log.txt", "wb") as site_log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=site_log,
                stderr=None if site == HUB else site_log,
                env=environment,
            )
        self._daemons[site] = process
        return process


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
