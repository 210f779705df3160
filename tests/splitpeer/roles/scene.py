"""A federation on this machine: real certificates, real NIfTI, real sockets, real processes.

`Scene` writes the peers' files for one test. What needs no process boundary runs as asyncio tasks in this
process (`Scene.together`), over loopback and TLS all the same; what does, runs as forked processes
(`Scene.start`); `Scene.start_python` is the real `python -m splitpeer.cli`, imports and all.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from splitpeer.coordinator.coordinator import Coordinator
from splitpeer.daemon.console import LogView, RunView
from splitpeer.data.layouts import find_images, find_labels
from splitpeer.data.loader import SiteData
from splitpeer.data.pseudonym import load_salt, pseudonym
from splitpeer.data.sampling import Sample, TrainingSchedule, split_patients
from splitpeer.data.task import Task
from splitpeer.data.volumes import Volumes
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import job_on_wire, services
from splitpeer.models import SplitNetwork, build_split_network
from splitpeer.settings.job import JobConfig
from splitpeer.settings.loading import to_toml
from splitpeer.settings.peer import PeerConfig
from splitpeer.site.client import Client
from splitpeer.storage import checkpoint
from splitpeer.training.loss import task_loss
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitproto import pki
from splitproto.negotiation import Offer

from .at_the_cut import at_the_cut

MODALITIES = ("flair", "t1", "t1ce", "t2")
PATIENTS = ("MUELLER_Erika", "SCHMIDT_Hans", "YILMAZ_Ayse", "NGUYEN_Linh", "ROSSI_Carla", "KOWALSKI_Jan")
SHAPE = (45, 38, 34)  # not divisible by 16
SEED = 7
WAIT_S = 90.0
JOINT = Offer(features=services(frozen=False))
"""Of a coordinator that a test plays."""


# --- data ------------------------------------------------------------------------------------------------


def write_nifti(
    path: Path, voxels: np.ndarray, spacing: float = 1.0, axes: str = "RAS", turned: float = 0.0
) -> None:
    """`turned`: by so many degrees about z; the origin stays."""
    affine = np.diag([spacing, spacing, spacing, 1.0])
    c, s = np.cos(np.radians(turned)), np.sin(np.radians(turned))
    affine[:2, :2] = affine[:2, :2] @ [[c, -s], [s, c]]
    if axes == "LPS":
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


def write_patient(root: Path, patient: str, number: int, shape: tuple[int, int, int] = SHAPE) -> None:
    """A ball with a lesion of three nested parts; every contrast shows them differently."""
    source = np.random.default_rng(number)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    centre = np.array([source.uniform(0.35, 0.65) * n for n in shape]).reshape(3, 1, 1, 1)
    away = np.linalg.norm(grid - centre, axis=0)
    head = (
        ((grid - np.array(shape).reshape(3, 1, 1, 1) / 2) / np.array(shape).reshape(3, 1, 1, 1)) ** 2
    ).sum(0) < 0.22
    mask = np.select([away < 3, away < 5, away < 8], [2, 3, 1], 0).astype(np.uint8) * head
    write_nifti(root / "labels" / f"{patient}.nii.gz", mask)
    for index, modality in enumerate(MODALITIES):
        values = 100 + 20 * np.roll([0, 1, 2, 3], index)[mask] + source.normal(0, 8, shape)
        write_nifti(root / modality / f"{patient}.nii.gz", (values * head).astype(np.float32))


@dataclass(frozen=True)
class Federation:
    """Certificates and images, made once."""

    folder: Path

    @property
    def pki(self) -> Path:
        return self.folder / "pki"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def copy(self, folder: Path) -> Federation:
        """The same images, and a separate CA that may be spoilt, with a revocation list."""
        shutil.copytree(self.pki, folder / "pki")
        (folder / "data").symlink_to(self.data)
        pki.write_crl(folder / "pki", now=datetime.now(UTC))
        return Federation(folder)

    def renew(self, site: str, seconds: float) -> None:
        """A new pair for `site`, good for so long, put in place by renaming."""
        role, hosts = ("coordinator", ["127.0.0.1"]) if site == "hub" else ("client", [])
        aside, now = self.folder / "aside", datetime.now(UTC)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name in ("ca.crt", "ca.key"):
            shutil.copy(self.pki / name, aside)
        # X.509 knows whole seconds: neither may the first one be refused nor the last one be lost.
        now, begins = now + timedelta(seconds=1), now - timedelta(seconds=2)
        pki.issue(aside, role, site, hosts=hosts, days=seconds / 86_400, now=now, not_before=begins)
        for ending in ("key", "crt"):
            os.replace(aside / f"{site}.{ending}", self.pki / f"{site}.{ending}")


def make_federation(folder: Path) -> Federation:
    made = Federation(folder)
    now = datetime.now(UTC)
    pki.create_ca(made.pki, "test", now=now)
    pki.issue(made.pki, "coordinator", "hub", hosts=["localhost", "127.0.0.1"], now=now)
    pki.issue(made.pki, "coordinator", "hub-elsewhere", hosts=["hub.example"], now=now)
    pki.issue(made.pki, "coordinator", "other-hub", hosts=["127.0.0.1"], now=now)
    for site in (*(f"site-{m}" for m in MODALITIES), "stranger"):
        pki.issue(made.pki, "client", site, now=now)
    pki.issue(made.pki, "client", "site-late", days=30, now=now - timedelta(days=60))
    pki.issue(made.pki, "client", "site-early", now=now, not_before=now + timedelta(days=2))
    elsewhere = made.folder / "elsewhere"
    pki.create_ca(elsewhere, "test", now=now)
    pki.issue(elsewhere, "client", "site-flair", now=now)
    for number, patient in enumerate(PATIENTS):
        write_patient(made.data, patient, number)
    return made


# --- processes ---------------------------------------------------------------------------------------------


@dataclass
class Daemon:
    """One process, and what it wrote."""

    pid: int
    log: Path
    nursery: Nursery | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def last(self) -> str:
        return self.said.rstrip().rpartition("\n")[2]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def code(self, timeout: float = WAIT_S) -> int:
        """Wait for the end; the exit code."""
        if self.process is not None:
            return self.process.wait(timeout)
        assert self.nursery is not None
        return self.nursery.code(self.pid, timeout)

    def until(self, pattern: str, timeout: float = WAIT_S) -> re.Match[str]:
        """Wait for a line of the log."""
        ends = time.monotonic() + timeout
        while time.monotonic() < ends:
            if found := re.search(pattern, self.said, re.MULTILINE):
                return found
            time.sleep(0.01)
        raise AssertionError(f"no {pattern!r} within {timeout:g} s in:\n{self.said}")


class Nursery:
    """See `nursery.py`."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nursery.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
            start_new_session=True,
        )
        self._codes: dict[int, int] = {}
        self._heard = b""
        self._ready = False

    def _hear(self, timeout: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        ends = time.monotonic() + timeout
        while b"\n" not in self._heard:
            # Read here and not by a file object: what that has buffered, select does not see.
            if not select.select([self._process.stdout], [], [], max(0.0, ends - time.monotonic()))[0]:
                return None
            octets = os.read(self._process.stdout.fileno(), 1 << 16)
            assert octets, "the nursery ended"
            self._heard += octets
        line, _, self._heard = self._heard.partition(b"\n")
        heard: dict[str, Any] = json.loads(line)
        if "code" in heard:
            self._codes[heard["pid"]] = heard["code"]
        return heard

    def start(self, argv: Sequence[str], cwd: Path, log: Path, group: int = 0, **bent: Any) -> Daemon:
        assert self._process.stdin is not None
        while not self._ready:
            heard = self._hear(WAIT_S)
            assert heard is not None, "the imports took too long"
            self._ready = "ready" in heard
        log.touch()
        asked = {"argv": list(argv), "cwd": str(cwd), "log": str(log), "group": group, **bent}
        self._process.stdin.write(json.dumps(asked) + "\n")
        while True:
            heard = self._hear(WAIT_S)
            assert heard is not None
            if "code" not in heard:
                return Daemon(heard["pid"], log, nursery=self)

    def code(self, pid: int, timeout: float) -> int:
        ends = time.monotonic() + timeout
        while pid not in self._codes:
            left = ends - time.monotonic()
            assert left > 0, f"process {pid} still runs after {timeout:g} s"
            # Several lines may have been buffered together: never sleep on select alone.
            self._hear(min(left, 0.05))
        return self._codes[pid]

    def runs(self, pid: int, within: float = 0.03) -> bool:
        """Whether it runs; an end that was told `within` so many seconds counts."""
        self._hear(within)
        return pid not in self._codes

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        # It may still be importing.
        self._process.wait(WAIT_S)
        self._process.stdout.close()


# --- one test's federation ---------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def merged(
    base: dict[str, dict[str, Any]], over: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """`over` wins, key by key. A name with a dot ("absence.per_site_s") is a table inside a section."""
    found = {name: dict(keys) for name, keys in base.items()}
    for name, keys in over.items():
        section, dot, inner = name.partition(".")
        found.setdefault(section, {}).update({inner: dict(keys)} if dot else keys)
    return found


@dataclass
class Ran:
    """What `together` came to: the coordinator's result or exception, and each client's exception or None."""

    result: Any
    error: BaseException | None
    clients: dict[str, BaseException | None]


class Running:
    """Coordinator and clients as tasks of this process."""

    def __init__(self) -> None:
        self.stops: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[Any]] = {}
        self.coordinator: Coordinator | None = None


@dataclass
class Scene:
    """The peers' files for one test, on a port of its own."""

    federation: Federation
    folder: Path
    nursery: Nursery
    port: int = field(default_factory=free_port)
    started: list[Daemon] = field(default_factory=list)
    modalities: tuple[str, ...] = ()
    bent: dict[str, Any] = field(default_factory=dict)
    """What only tests want otherwise in every process: see `nursery.py`."""

    # --- files -----------------------------------------------------------------------------------------

    def client(self, modality: str, site: str = "", **over: Mapping[str, Any]) -> Path:
        """Write a client's peer.toml; the folder it is in. Sections given override the usual ones."""
        site = site or f"site-{modality}"
        here, keys = self.folder / site, self.federation.pki
        usual = {
            "peer": {"role": "client", "site": site, "federation": "test", "modality": modality},
            "tls": {
                "ca": str(keys / "ca.crt"),
                "certificate": str(keys / f"{site}.crt"),
                "key": str(keys / f"{site}.key"),
            },
            "network": {"coordinator": f"tcp://127.0.0.1:{self.port}", "reconnect_s": 20},
            "data": {
                "images": str(self.federation.data / modality),
                "salt": str(self.federation.pki / "federation.salt"),
            },
            "policy": {"coordinators": ["hub"]},
            "runtime": {"initial_weights": SEED},
        }
        here.mkdir(exist_ok=True)
        (here / "peer.toml").write_text(to_toml(merged(usual, over)))
        return here

    def coordinator(self, site: str = "hub", **over: Mapping[str, Any]) -> Path:
        here, keys = self.folder / "hub", self.federation.pki
        usual = {
            "peer": {"role": "coordinator", "site": site, "federation": "test"},
            "tls": {
                "ca": str(keys / "ca.crt"),
                "certificate": str(keys / f"{site}.crt"),
                "key": str(keys / f"{site}.key"),
            },
            "network": {"listen": f"tcp://127.0.0.1:{self.port}"},
            "data": {
                "labels": str(self.federation.data / "labels"),
                "convention": "msd",
                "salt": str(keys / "federation.salt"),
            },
        }
        here.mkdir(exist_ok=True)
        (here / "peer.toml").write_text(to_toml(merged(usual, over)))
        return here

    def job(self, **over: Mapping[str, Any]) -> Path:
        usual = {
            "job": {"name": "try", "seed": SEED},
            "sites": {} if "sites" in over else {f"site-{m}": m for m in self.modalities},
            "model": {"features": [2, 4, 4, 8, 8, 4]},
            "data": {"window": [32, 32], "validation": 2},
            "training": {"steps": 12, "batch": 3, "checkpoint_every": 5},
            "evaluation": {"overlap": 0.25, "batch": 32},
            "deadlines": {"join_s": 60, "step_s": 60, "return_s": 60},
        }
        (self.folder / "hub").mkdir(exist_ok=True)
        path = self.folder / "hub" / "job.toml"
        path.write_text(to_toml(merged(usual, over)))
        return path

    def cast(self, *modalities: str, **job: Mapping[str, Any]) -> Scene:
        """The usual files of a coordinator, its job and one client per modality."""
        self.modalities = modalities
        self.coordinator()
        self.job(**job)
        for modality in modalities:
            self.client(modality)
        return self

    def config(self, who: str) -> PeerConfig:
        return PeerConfig.load(self.folder / who / "peer.toml", environ={})

    @property
    def settings(self) -> JobConfig:
        return JobConfig.load(self.folder / "hub" / "job.toml")

    # --- processes -------------------------------------------------------------------------------------

    def start(self, who: str, *arguments: str, group: int = 0, **bent: Any) -> Daemon:
        """`splitpeer serve` in the folder of `who`, as a process of its own; `bent` as in `self.bent`."""
        daemon = self.nursery.start(
            self._argv(who, arguments), self.folder / who, self._log(who), group, **self.bent, **bent
        )
        self.started.append(daemon)
        return daemon

    def start_python(self, who: str, *arguments: str) -> Daemon:
        """The same, as `python -m splitpeer.cli`."""
        path = self._log(who)
        with path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "splitpeer.cli", *self._argv(who, arguments)],
                cwd=self.folder / who,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        daemon = Daemon(process.pid, path, process=process)
        self.started.append(daemon)
        return daemon

    def start_all(self, *arguments: str) -> tuple[Daemon, dict[str, Daemon]]:
        """(coordinator, {modality: client})."""
        hub = self.start("hub", *arguments)
        return hub, {m: self.start(f"site-{m}") for m in self.modalities}

    def stop(self, hub: Daemon, *clients: Daemon) -> None:
        """Ask everybody to leave; all do so in good order."""
        for daemon in (hub, *clients):
            daemon.signal(signal.SIGTERM)
        for daemon in (hub, *clients):
            assert daemon.code() == 0, daemon.said
            assert "Traceback" not in daemon.said

    def _argv(self, who: str, arguments: Sequence[str]) -> list[str]:
        role = ["--role", "coordinator", "--job", "job.toml"] if who == "hub" else ["--role", "client"]
        return ["serve", *role, *arguments]

    def _log(self, who: str) -> Path:
        """One log per start."""
        return self.folder / f"{who}.{len(self.started)}.log"

    def clean_up(self) -> None:
        for daemon in self.started:
            with suppress(ProcessLookupError):
                os.kill(daemon.pid, signal.SIGKILL)
            if daemon.process is not None:
                daemon.process.wait(10)

    # --- tasks of this process ---------------------------------------------------------------------------

    @asynccontextmanager
    async def running(
        self,
        *,
        resume: bool | None = False,
        view: RunView | None = None,
        only: Sequence[str] | None = None,
        curious: Sequence[str] = (),
    ) -> AsyncIterator[Running]:
        """Coordinator and clients as tasks; those still running at the end are cancelled. Those of `curious` record."""
        on = Running()
        names = ["hub", *(f"site-{m}" for m in self.modalities)] if only is None else list(only)
        for name in names:
            on.stops[name] = asyncio.Event()
            capture = self.capture(name) if name in curious else None
            if name == "hub":
                on.coordinator = Coordinator(
                    self.config("hub"),
                    self.settings,
                    on.stops[name],
                    view or LogView(),
                    resume=resume,
                    curious=capture,
                )
                on.tasks[name] = asyncio.create_task(on.coordinator.run())
            else:
                client = Client(self.config(name), on.stops[name], curious=capture)
                on.tasks[name] = asyncio.create_task(client.run())
        try:
            yield on
        finally:
            for task in on.tasks.values():
                task.cancel()
            await asyncio.gather(*on.tasks.values(), return_exceptions=True)

    async def together(self, **options: Any) -> Ran:
        """Run the job to its end."""
        async with self.running(**options) as on, asyncio.timeout(WAIT_S):
            await asyncio.wait(on.tasks.values())
            errors = {name: task.exception() for name, task in on.tasks.items()}
            hub = errors.pop("hub")
            return Ran(None if hub else on.tasks["hub"].result(), hub, errors)

    # --- results -----------------------------------------------------------------------------------------

    def capture(self, who: str) -> Path:
        """Where a peer of this process records."""
        return self.folder / who / "run.cap"

    @property
    def output(self) -> Path:
        return self.folder / "hub" / "runs" / "try"

    def metrics(self) -> list[dict[str, Any]]:
        path = self.output / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def losses(self) -> list[float]:
        """The loss of every step; what a rollback made void is left out."""
        kept: list[float] = []
        for line in self.metrics():
            if line.get("rollback"):
                kept = kept[: line["step"]]
            elif "loss" in line:
                assert line["step"] == len(kept) + 1
                kept.append(line["loss"])
        return kept

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        """All parties' weights from their checkpoints, named as in a SplitNetwork."""
        found = {}
        for who, prefix in [("hub", "decoder"), *((f"site-{m}", f"encoders.{m}") for m in self.modalities)]:
            (run,) = [path for path in (self.folder / who / "state").iterdir() if [*path.glob("step-*")]]
            tensors, meta, _ = checkpoint.load(run, step)
            assert meta["step"] == step
            for name, tensor in tensors.items():
                if name.startswith("model/"):
                    found[f"{prefix}.{name.removeprefix('model/')}"] = tensor
        return found

    def until_step(self, step: int, timeout: float = WAIT_S) -> None:
        """Wait until `step` is committed."""
        ends = time.monotonic() + timeout
        while not any(line["step"] >= step for line in self.metrics()):
            assert time.monotonic() < ends, f"step {step} was not reached: {[d.last for d in self.started]}"
            time.sleep(0.005)

    # --- the same in one process -----------------------------------------------------------------------------

    def masks(self) -> Volumes:
        config = self.config("hub")
        return Volumes(
            find_labels(config.data.labels, "folder"), salt=load_salt(config.data.salt), labels=self.task()
        )

    def task(self) -> Task:
        return self.settings.task.task(self.config("hub").data.convention)

    def images(self, modality: str) -> Volumes:
        config = self.config(f"site-{modality}")
        cases = find_images(config.data.images, "folder", modality)
        rule = self.settings.task.rule(modality)
        return Volumes(cases, salt=load_salt(config.data.salt), normalisation=rule)

    def patients(self) -> tuple[list[bytes], list[bytes]]:
        settings = self.settings
        return split_patients(self.masks().keys(), settings.data.validation, settings.job.seed)

    def network(self) -> SplitNetwork:
        job = self.settings
        return build_split_network(
            job.model.backbone(),
            seats_of(job).names,
            job.model.fusion,
            self.task().channels,
            exclusive=self.task().exclusive,
            job_seed=SEED,
        )

    def key(self, patient: str) -> bytes:
        """Of a patient, by its name."""
        return pseudonym(load_salt(self.federation.pki / "federation.salt"), patient)

    def whole(
        self,
        withdrawn: Mapping[bytes, int] | None = None,
        *,
        as_travelled: bool = False,
        until: int | None = None,
    ) -> tuple[list[float], SplitNetwork]:
        """Train the whole network in this process: losses, and the network afterwards.

        Args:
            withdrawn: patients that do not take part from a step on.
            as_travelled: with the job's precision or codings at the cut.
            until: the last step that is made; None: the job's.
        """
        torch.set_num_threads(1)
        job, network, masks = self.settings, self.network(), self.masks()
        if as_travelled:
            at_the_cut(network, job_on_wire(job))
        training = job.training
        optimiser = make_optimiser(
            network.parameters(), training.optimiser, training.learning_rate, training.weight_decay
        )
        schedule = make_schedule(optimiser, training.schedule, training.steps)
        window = (*job.data.window, 1)[:3]

        def batches(step: int) -> tuple[list[Sample], int]:
            """As if those who are out had never been there."""
            out = {key for key, first in (withdrawn or {}).items() if first <= step + 1}
            schedule = TrainingSchedule(
                [key for key in self.patients()[0] if key not in out],
                masks,
                window=window,
                batch=training.batch,
                steps=training.steps,
                seed=job.job.seed,
                positive_fraction=job.data.positive_fraction,
            )
            return schedule.batch(step)

        images = {m: SiteData(self.images(m)) for m in seats_of(job).names}
        losses = []
        for step in range(until or training.steps):
            samples, drawn = batches(step)
            seed = drawn if job.data.augment else None
            x = {m: torch.from_numpy(data.batch(samples, window, seed, m)) for m, data in images.items()}
            target = torch.from_numpy(SiteData(masks).batch(samples, window, seed, None))
            loss = task_loss(network(x), target, exclusive=self.task().exclusive)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        return losses, network

    def assert_exact(
        self, withdrawn: Mapping[bytes, int] | None = None, *, as_travelled: bool = False
    ) -> None:
        """Losses and all weights are those of the whole network, bit for bit; see `whole`."""
        losses, network = self.whole(withdrawn, as_travelled=as_travelled)
        assert self.losses() == losses
        split, whole = self.weights(self.settings.training.steps), network.state_dict()
        assert split.keys() == whole.keys()
        assert [name for name in whole if not torch.equal(whole[name], split[name])] == []
