"""Sets up a federation in a folder as its members would by hand, and starts its daemons.

<folder>/data-<patients>/   the phantom
<folder>/pki/               CA, certificates, salt
<folder>/<site>/            peer.toml, log and state of one daemon; hub/ also job.toml

A daemon that dies is started again, as under a service manager: `kill -9` is part of the demonstration.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from splitpeer.demo.supervisor import AGAIN, Supervisor, cause
from splitpeer.errors import JobFailed
from splitpeer.settings.loading import to_toml
from splitpeer.storage import durable, reading
from splitproto import pki

FEDERATION = "brats-demo"
HUB = "hub"
SITES = {f"hospital-{modality}": modality for modality in ("flair", "t1", "t1ce", "t2")}
SEAT = "t1"
"""The seat whose hospital records the gradients that it is sent."""
ATTACKED = 4
"""How many of the patients held out are attacked; the coordinator records their evaluation."""
STRANGERS = 24
"""Phantom patients of another seed: the adversary's own similar images."""
TIMED_OUT = 3
MAX_STATUS = 1 << 20
"""Bytes of a daemon's status.json."""
FIRST_S = 2.0
"""How much later than its sites the coordinator may end and still have its result count."""


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
    evaluations: int = 6
    """Along the run, the last one of all patients held out, the others of `sample`."""
    sample: int = 6
    seat_dropout: float = 0.0
    missing: bool = False
    """Score once more without each seat."""
    device: str = "cpu"
    threads: int = 1
    """The coordinator's; each site has one. Results depend on it in their last bits."""

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
                "checkpoint_every": 25,
                "seat_dropout": self.seat_dropout,
            },
            "evaluation": {
                "every": max(1, self.steps // self.evaluations),
                "sample": self.sample,
                "batch": 24,
                "missing": self.missing,
            },
            "deadlines": {"join_s": 180, "step_s": 60, "return_s": 60},
            "output": {"folder": "results"},
        }

    def policy(self, site: str) -> dict[str, Any]:
        """[policy] of a site, where it is not the default."""
        return {"coordinators": [HUB]}

    def weights(self, site: str) -> str | None:
        """File of a site's first weights, as its peer.toml names it; None: they are drawn."""
        return None


class Federation:
    """The folder of one demonstration, and its daemons.

    All run on this machine. A subclass may place each elsewhere: `listens`, `dials`, `inside`.

    Args:
        tell: called with one line when a daemon died and is restarted.
    """

    listens, dials = "127.0.0.1", "localhost"
    """Where the coordinator listens, and by which name or address the hospitals know it."""

    def __init__(self, folder: Path, job: DemoJob, tell: Callable[[str], None] = lambda line: None) -> None:
        self.folder, self.job = folder, job
        self.data = folder / f"data-{job.patients}"
        self.strangers = folder / "strangers"
        self.hub = folder / HUB
        self.results = self.hub / "results"
        self._pki = folder / "pki"
        self.salt = self._pki / "federation.salt"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._supervisor = Supervisor(environment, tell, self._again)
        self._curious: dict[str, dict[str, Any]] = {}
        self.steps_with_hospitals: int | None = None
        """Steps that had been made when the last hospital's process ended; None: one ran as long as the coordinator."""
        self.alone_s = 0.0
        """How long the coordinator's process ran after that."""

    def render(self, progress: Callable[[int, int], None]) -> None:
        """Make the patients, or find them there. Raises DataError."""
        from splitpeer.data.phantom.cohort import write_phantom

        write_phantom(self.data, self.job.patients, seed=self.job.seed, progress=progress)

    def certify(self) -> None:
        """A CA, certificates and the salt, or those that are there."""
        if not (self._pki / "ca.crt").exists():
            now = datetime.now(UTC)
            pki.create_ca(self._pki, FEDERATION, now=now)
            # The order of the patients is that of their keys: with a salt of its own no demonstration would repeat.
            salt = hashlib.sha256(f"{FEDERATION} {self.job.seed}".encode()).hexdigest()
            durable.replace(self.salt, f"{salt}\n".encode())
            pki.issue(self._pki, "coordinator", HUB, hosts=[self.dials, self.listens], now=now)
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
                "network": {"listen": f"tcp://{self.listens}:{port}"},
                "data": {"labels": f"../{self.data.name}/labels", "convention": "msd"},
                "runtime": runtime | {"threads": self.job.threads},
            },
        )
        _write(self.hub / "job.toml", to_toml(self.job.toml()))
        for site, modality in SITES.items():
            weights = self.job.weights(site)
            self._write(
                site,
                ({"model": {"weights": weights}} if weights else {})
                | {
                    "peer": {"role": "client", "site": site, "federation": FEDERATION, "modality": modality},
                    "network": {"coordinator": f"tcp://{self.dials}:{port}", "reconnect_s": 120},
                    "data": {"images": f"../{self.data.name}/{modality}"},
                    "policy": self.job.policy(site),
                    # A fixed seed so that the demonstration repeats; a hospital with weights of its own needs none.
                    "runtime": runtime | ({} if weights else {"initial_weights": self.job.seed}),
                },
            )

    def start(self) -> dict[str, int]:
        """Start all five daemons; returns their pids. The coordinator keeps this terminal."""
        self.start_clients()
        # The folder may hold a run that was interrupted; a restarted coordinator resumes its own.
        self._start(HUB, ("--role", "coordinator", "--job", str(self.hub / "job.toml")), ("--fresh",))
        return self.pids()

    def start_clients(self) -> None:
        """Start the four hospitals' daemons."""
        for site, modality in SITES.items():
            self._start(site, ("--role", "client", "--modality", modality))

    def inside(self, site: str) -> list[str]:
        """What precedes the command of a party's daemon; it must become the daemon, with the same pid."""
        return []

    def pids(self) -> dict[str, int]:
        """Process ids of the running daemons, by site."""
        return self._supervisor.pids()

    def wait(self, alone: Callable[[], None] | None = None) -> None:
        """Wait for the job's end; the coordinator's deadlines bound it. Who dies meanwhile is started again.

        Args:
            alone: called once the coordinator's process is the only one that is left.

        Raises:
            JobFailed: a daemon stays down, with the last line of its log.
        """
        left = 0.0
        try:
            while (code := self._supervisor.ended(HUB)) is None:
                self._supervisor.tend()
                if self.steps_with_hospitals is None and not any(site in self.pids() for site in SITES):
                    self.steps_with_hospitals, left = self.steps(), time.monotonic()
                    if alone is not None:
                        alone()
                for site in SITES:
                    if self._supervisor.ended(site) not in (None, 0):
                        raise JobFailed(self._why(site))
                time.sleep(0.1)
            if code != 0:
                raise JobFailed(f"the coordinator {cause(code)}")
            self.alone_s = time.monotonic() - left if self.steps_with_hospitals is not None else 0.0
        finally:
            self.stop()

    def run(self) -> None:
        """Start all five, wait for the job's end, and stop who is left. Raises JobFailed, see `wait`."""
        self.start()
        try:
            self.wait()
        finally:
            self.stop()

    def stop(self) -> None:
        """End what is still running: first with SIGTERM, then by force. Only processes started here."""
        self._supervisor.stop()

    def site_of(self, seat: str) -> str:
        """The site that fills a seat."""
        return next(site for site, held in SITES.items() if held == seat)

    def capture(self, site: str) -> Path:
        """What a curious party records."""
        return self.folder / site / "curious.cap"

    def record(self, site: str, **limits: Any) -> None:
        """Have a party record what it legitimately sees; `limits` as in [capture] of its peer.toml."""
        self._curious[site] = limits

    def recorded_keys(self) -> list[str]:
        """Pseudonyms, in hexadecimal, of a few patients that the job will hold out. Raises DataError."""
        from splitpeer.data.layouts import find_labels
        from splitpeer.data.pseudonym import load_salt, pseudonym
        from splitpeer.data.sampling import split_patients

        salt = load_salt(self.salt)
        keys = [pseudonym(salt, case.patient) for case in find_labels(self.data / "labels", "folder")]
        _, held_out = split_patients(keys, self.job.validation, self.job.seed)
        return [key.hex() for key in held_out[:ATTACKED]]

    def sent_bytes(self) -> int:
        """Octets that the hospitals' processes have sent, all four, from the first to the last, by their own count."""
        boards = (self.folder / site / "state" / "status.json" for site in SITES)
        return sum(int(reading.document(path, MAX_STATUS)["work"]["octets_out"]) for path in boards)

    def steps(self) -> int:
        """Steps that the coordinator has made."""
        try:
            # A line may be half written, and evaluations have lines too.
            return (self.results / "metrics.jsonl").read_text().count('"loss"')
        except FileNotFoundError:
            return 0

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
        _write(folder / "peer.toml", to_toml(settings))

    def _again(self, name: str, code: int) -> bool:
        # A coordinator that waits for a stopped site would wait for ever.
        if name == HUB and code == TIMED_OUT and 0 in map(self._supervisor.ended, SITES):
            return False
        return code < 0 or code in AGAIN

    def _why(self, site: str) -> str:
        """The coordinator, if it ended as well, knows the cause: sites only learn that it ended."""
        hub, ends = None, time.monotonic() + FIRST_S
        while (hub := self._supervisor.ended(HUB)) is None and time.monotonic() < ends:
            self._supervisor.tend()
            time.sleep(0.1)
        if hub:
            return f"the coordinator {cause(hub)}"
        return f"{site} {cause(self._supervisor.ended(site) or 0)}: {self.last_line(site)}"

    def _start(self, site: str, arguments: Sequence[str], first: Sequence[str] = ()) -> None:
        """`first`: arguments of the first start alone."""
        folder = self.folder / site
        command = [
            *self.inside(site),
            sys.executable,
            "-m",
            "splitpeer.cli",
            "serve",
            "--config",
            str(folder / "peer.toml"),
        ]
        command += arguments
        if site in self._curious:
            for old in folder.glob("curious*.cap"):
                old.unlink()
            command += ["--curious", str(self.capture(site))]
        self._supervisor.start(site, [*command, *first], command, folder / "log.txt", terminal=site == HUB)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _write(path: Path, text: str) -> None:
    durable.replace(path, text.encode(), mode=0o666, sync=False)
