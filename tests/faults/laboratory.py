"""A federation in one process and no real time: real clients and a real coordinator on machines that fail.

Real: roles, sessions, TLS, certificates, networks, NIfTI files, checkpoints on disk. Replaced: time (`virtual`), what
lies below ZeroMQ (`memory`), what writes to disks (`disk`), threads (what they do happens at once, a drawn moment
later), entropy (drawn from the seed).
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import nibabel as nib
import numpy as np
import torch

from splitpeer.coordinator import coordinator
from splitpeer.daemon import board as status
from splitpeer.daemon import clerk
from splitpeer.daemon.console import RunView
from splitpeer.data import volumes
from splitpeer.errors import DataError
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.site import announced, client
from splitpeer.storage import checkpoint
from splitproto import pki
from splitproto.lanes import zeromq
from splitproto.messages import Message
from splitproto.session import Session

from .disk import Disks, wipe
from .memory import Network, zmq_of
from .virtual import LIFE, Dead, Life, VirtualLoop, bury

MODALITIES = ("flair", "t1", "t2")
PATIENTS = ("MUELLER_Erika", "SCHMIDT_Hans", "YILMAZ_Ayse", "NGUYEN_Linh")
SHAPE = (20, 18, 5)
PORT = 7443
SEED = 7
HUB = "hub"
MANAGER_S, NOT_AGAIN, HUB_NOT_AGAIN, TIRED = 30.0, (2, 4), (1, 2, 4), 20
"""RestartSec and RestartPreventExitStatus of the units in examples/lan; no machine is started more often than this."""
Sections = dict[str, dict[str, Any]]
Told = Literal["send", "sent", "got"]


# --- files -------------------------------------------------------------------------------------------------


def make_federation(folder: Path) -> None:
    """Certificates and images, once for all schedules."""
    now = datetime.now(UTC)
    pki.create_ca(folder / "pki", "test", now=now)
    # Patients' keys decide who trains and who is held out: a replay must have the same.
    (folder / "pki" / "federation.salt").write_text("5a" * 32)
    pki.issue(folder / "pki", "coordinator", HUB, hosts=["127.0.0.1"], now=now)
    for modality in MODALITIES:
        pki.issue(folder / "pki", "client", site_of(modality), now=now)
    for number, patient in enumerate(PATIENTS):
        source = np.random.default_rng(number)
        mask = np.zeros(SHAPE, np.uint8)
        x, y = source.integers(3, 9, 2)
        mask[x : x + 8, y : y + 7, 1:4] = 1
        mask[x + 2 : x + 6, y + 1 : y + 5, 1:4] = 2
        mask[x + 3 : x + 5, y + 2 : y + 4, 2] = 3
        _write(folder / "data" / "labels" / f"{patient}.nii.gz", mask)
        for index, modality in enumerate(MODALITIES):
            values = 100 + 20 * np.roll([0, 1, 2, 3], index)[mask] + source.normal(0, 8, SHAPE)
            _write(folder / "data" / modality / f"{patient}.nii.gz", values.astype(np.float32))


def _write(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


def site_of(modality: str) -> str:
    """The site that holds it."""
    return f"site-{modality}"


@dataclass(frozen=True)
class Setting:
    """What is trained, and how patient everybody is."""

    name: str
    modalities: tuple[str, ...] = ("flair", "t1")
    job: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Sections of job.toml that differ."""
    peer: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Sections of the clients' peer.toml that differ."""
    pace: float = 1.0
    """How many times longer everything takes that is computed, read or written."""

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(site_of(modality) for modality in self.modalities)

    def sections(self, federation: Path, who: str) -> Sections:
        """A peer's `peer.toml`."""
        keys = federation / "pki"
        made: Sections = {
            "peer": {"site": who, "federation": "test"},
            "tls": {"ca": f"{keys}/ca.crt", "certificate": f"{keys}/{who}.crt", "key": f"{keys}/{who}.key"},
            "data": {"salt": f"{keys}/federation.salt"},
        }
        if who == HUB:
            made["peer"] |= {"role": "coordinator"}
            made["network"] = {"listen": f"tcp://127.0.0.1:{PORT}"}
            made["data"] |= {"labels": f"{federation}/data/labels", "convention": "msd"}
            made["runtime"] = {"initial_weights": SEED}
            return made
        modality = who.removeprefix("site-")
        made["peer"] |= {"role": "client", "modality": modality}
        made["network"] = {"coordinator": f"tcp://127.0.0.1:{PORT}", "reconnect_s": 600}
        made["data"] |= {"images": f"{federation}/data/{modality}"}
        made["policy"] = {"coordinators": [HUB]}
        made["runtime"] = {"initial_weights": SEED}
        return _merged(made, self.peer)

    @property
    def job_sections(self) -> Sections:
        """`job.toml`."""
        made: Sections = {
            "job": {"name": "try", "seed": SEED},
            "sites": {site_of(modality): modality for modality in self.modalities},
            "model": {"features": [2, 2, 2, 2, 2, 2], "levels": [0, 4]},
            "data": {"window": [16, 32], "validation": 1},
            "training": {"steps": 10, "batch": 2, "checkpoint_every": 3, "ahead": 3},
            "evaluation": {"overlap": 0.0, "batch": 4},
            "deadlines": {"join_s": 300, "step_s": 30, "return_s": 300},
        }
        return _merged(made, self.job)

    @property
    def goes_on(self) -> bool:
        """Whether steps are made without a site that is away."""
        return self.job_sections.get("absence", {}).get("mode", "pause") != "pause"

    @property
    def patience(self) -> float:
        """Seconds that the coordinator waits for a site."""
        return float(self.job_sections["deadlines"]["return_s"])

    @property
    def steps(self) -> int:
        return int(self.job_sections["training"]["steps"])


def _merged(base: Sections, over: Mapping[str, Mapping[str, Any]]) -> Sections:
    return {name: {**base.get(name, {}), **over.get(name, {})} for name in {**base, **over}}


def _toml(sections: Sections) -> str:
    lines = []
    for name, keys in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"


# --- machines ----------------------------------------------------------------------------------------------


class Node:
    """One party's machine: a process at a time, and a supervisor that starts it again."""

    def __init__(self, lab: Laboratory, name: str) -> None:
        self.lab, self.name = lab, name
        self.life: Life | None = None
        self.stop: asyncio.Event | None = None
        self.starts = 0
        self.error: BaseException | None = None
        """How it ended for good."""
        self.done = False
        """It ended for good."""
        self.gave_up: list[BaseException] = []
        """What it ended with before its service manager started it again."""
        self.left_alone = False
        """It had failed when the run was over: its service manager need not start it again."""
        self.asked_to_stop = False

    def start(self) -> None:
        """A new process on the same folders."""
        if self.done or self.life is not None:
            return
        lab = self.lab
        self.starts += 1
        self.asked_to_stop = False
        self.life = Life(self.name)
        lab.network.powered(self.name)
        lab.tell(f"{self.name} starts")
        life, context = self.life, self.life.context
        task = lab.loop.create_task(self._main(), context=context)
        lab.keep.append(task)
        task.add_done_callback(lambda task: self._ended(life, task), context=Context())

    async def _main(self) -> Any:
        self.stop = asyncio.Event()
        me = asyncio.current_task()
        try:
            peer = await asyncio.to_thread(self.lab.make, self.name, self.stop)
            return await peer.run()
        finally:
            # As asyncio.run does it.
            others = [t for t in asyncio.all_tasks() if t is not me and getattr(t, "life", None) is self.life]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    def _ended(self, life: Life, task: asyncio.Task[Any]) -> None:
        if not life.alive:
            return
        lab = self.lab
        life.alive = False
        lab.network.ended(life, power=False)
        lab.disks.release(life)
        self.life = None
        error = task.exception() if not task.cancelled() else asyncio.CancelledError()
        finished = error is None and not self.asked_to_stop
        if error is None and self.name == HUB:
            finished = task.result().complete
        if error is None and not finished:
            lab.tell(f"{self.name} has left, as it was asked to")
            lab.later(lab.draw(0.1, 5.0), self.start)
            return
        self.done, self.error = True, error
        code = (
            f"exit {getattr(error, 'exit_code', 5)}: {type(error).__name__}: {error}" if error else "exit 0"
        )
        lab.tell(f"{self.name} ends: {code}")
        if (
            error is not None
            and lab.manager
            and getattr(error, "exit_code", 5) not in NOT_AGAIN
            and self.starts < TIRED
        ):
            self.done = False
            self.gave_up.append(error)
            lab.later(MANAGER_S, self._once_more)
            return
        lab.check()

    def _once_more(self) -> None:
        """The service manager starts what failed, unless nothing is left to do."""
        if self.lab.nodes[HUB].done:
            self.done = self.left_alone = True
            self.lab.check()
        else:
            self.start()

    def kill(self, back_s: float, *, power: bool = False) -> None:
        """SIGKILL, or the machine loses power; it starts again after `back_s`."""
        life = self.life
        if life is None or self.done:
            return
        self.lab.tell(f"{self.name} {'loses power' if power else 'is killed'}, back in {back_s:.2f} s")
        life.alive = False
        life.held.clear()
        self.life = None
        self.lab.network.ended(life, power=power)
        self.lab.disks.release(life)
        if power:
            self.lab.disks.power_lost(self.name)
        self.lab.later(back_s, self.start)

    def hold(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after so long."""
        life = self.life
        if life is None or life.stopped:
            return
        self.lab.tell(f"{self.name} is stopped for {seconds:.2f} s")
        life.stopped = True
        self.lab.network.stopped(life)

        def go_on() -> None:
            if life.alive:
                self.lab.tell(f"{self.name} goes on")
                self.lab.loop.resume(life)
                self.lab.network.resumed(life, seconds)

        self.lab.later(seconds, go_on)

    def drain(self) -> None:
        """SIGTERM; the service manager starts it again."""
        if self.life is not None and self.stop is not None:
            self.lab.tell(f"{self.name} is asked to stop")
            self.asked_to_stop = True
            self.lab.loop.call_soon(self.stop.set, context=self.life.context.copy())


@dataclass
class Moment:
    """Something that the application says or hears."""

    who: str
    peer: str
    told: Told
    message: str
    step: int | None
    at: float

    @property
    def key(self) -> tuple[str, str, str, str, int | None]:
        return self.who, self.peer, self.told, self.message, self.step


class Laboratory:
    """One schedule's world.

    Args:
        federation: from `make_federation`.
        folder: of this schedule; removed at the end.
        setting: what is trained.
        seed: of latencies, delays and entropy.
        run: which run id is drawn first.
        manager: start what failed again, as the systemd units in examples/lan do.
        limit: virtual seconds after which somebody must have hung.
    """

    def __init__(
        self,
        federation: Path,
        folder: Path,
        setting: Setting,
        seed: int,
        *,
        run: int = 0,
        manager: bool = False,
        limit: float = 4 * 3600.0,
    ) -> None:
        self.federation, self.folder, self.setting, self.manager = federation, folder, setting, manager
        self.random = random.Random(f"laboratory {seed}")
        self.loop = VirtualLoop(limit)
        self.loop.cost = self._cost
        self.story: list[tuple[float, str]] = []
        self.network = Network(self.loop, seed, self.tell)
        self.disks = Disks(folder, seed, self._dies, self.tell)
        self.nodes = {name: Node(self, name) for name in (HUB, *setting.sites)}
        self.watchers: list[Callable[[Moment], None]] = []
        """Told every moment, while it happens."""
        self.moments: list[Moment] = []
        self.struck: list[str] = []
        """Kinds of accidents that happened."""
        self.keep: list[Any] = []
        self.slow_disk: dict[str, float] = {}
        self.bad_files: set[tuple[str, str]] = set()
        """Whose file of which patient cannot be read now."""
        self._runs = run
        self._over: asyncio.Future[None] = self.loop.create_future()
        self._tokens = random.Random(f"tokens {seed}")
        self._write_files()

    # --- the story ---------------------------------------------------------------------------------------

    def tell(self, what: str) -> None:
        """A line of the story."""
        self.story.append((self.loop.now, what.replace(str(self.folder), "")))

    def text(self) -> str:
        return "\n".join(f"{at:10.4f} {what}" for at, what in self.story)

    # --- time and chance ---------------------------------------------------------------------------------

    def later(self, seconds: float, call: Callable[[], object]) -> None:
        """Of the laboratory itself."""
        self.loop.call_at(self.loop.now + seconds, call, context=Context())

    def draw(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def _cost(self, life: Life | None, function: Any) -> float:
        return self.setting.pace * self.random.uniform(0.001, 0.02) + self.slow_disk.get(
            life.name if life else "", 0.0
        )

    def _dies(self, life: Life, power: bool) -> None:
        self.nodes[life.name].kill(self.draw(0.1, 10.0), power=power)

    # --- peers -------------------------------------------------------------------------------------------

    def _write_files(self) -> None:
        for name in self.nodes:
            (self.folder / name).mkdir(parents=True)
            (self.folder / name / "peer.toml").write_text(_toml(self.setting.sections(self.federation, name)))
        (self.folder / HUB / "job.toml").write_text(_toml(self.setting.job_sections))

    def make(self, name: str, stop: asyncio.Event) -> Any:
        """What `splitpeer serve` makes."""
        config = PeerConfig.load(self.folder / name / "peer.toml", environ={})
        if name != HUB:
            return client.Client(config, stop)
        job = JobConfig.load(self.folder / HUB / "job.toml")
        return coordinator.Coordinator(config, job, stop, _Blind(), resume=None)

    # --- running -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Start all machines, wait until all have ended for good.

        Raises:
            Hang: they do not.
        """
        with self._installed():
            try:
                self.loop.run_until_complete(self._play())
            finally:
                for node in self.nodes.values():
                    if node.life is not None:
                        node.life.alive = False

    async def _play(self) -> None:
        for node in self.nodes.values():
            self.later(self.draw(0.0, 1.0), node.start)
        await self._over

    def check(self) -> None:
        """Whether all have ended."""
        if not self._over.done() and all(node.done for node in self.nodes.values()):
            self._over.set_result(None)

    def close(self) -> None:
        """Take everything down. Nobody says or writes anything any more."""
        with self._installed(), mock.patch.object(sys, "unraisablehook"), warnings.catch_warnings():
            # Of coroutines whose task had not begun.
            warnings.simplefilter("ignore", RuntimeWarning)
            bury(self.loop)
            self.keep.clear()
        wipe(self.folder)

    @contextmanager
    def _installed(self) -> Iterator[None]:
        """The laboratory in place of clocks, sockets, threads, disks and entropy."""
        with ExitStack() as stack:
            put = lambda *what: stack.enter_context(mock.patch.object(*what))  # noqa: E731
            put(zeromq, "zmq", zmq_of(self.network))
            put(client, "Compute", _compute_class(client.Compute))
            put(coordinator, "Compute", _compute_class(coordinator.Compute))
            put(announced, "Prefetcher", InlinePrefetcher)
            put(clerk, "ThreadPoolExecutor", InlineExecutor)
            put(status, "_Pen", InlinePen)
            clock = _Clock(self.loop)
            stand_ins = {"time": clock, "secrets": self._secrets(), "random": self.random}
            for module in _modules():
                for name, stand_in in stand_ins.items():
                    if getattr(module, name, None) is sys.modules[name]:
                        real = stand_in if name != "secrets" else self._secrets(module.__name__)
                        put(module, name, real)
            stack.enter_context(_moments(self))
            stack.enter_context(_bad_files(self))
            stack.enter_context(self.disks.installed())
            stack.enter_context(_logging(self))
            yield

    def _secrets(self, module: str = "") -> Any:
        def token_bytes(count: int) -> bytes:
            if module.endswith((".run", ".record")):
                # Which run it is goes into the noise of defences, so it must be known.
                self._runs += 1
                return run_id(self._runs - 1)
            return self._tokens.randbytes(count)

        return SimpleNamespace(
            token_bytes=token_bytes,
            token_hex=lambda count: token_bytes(count).hex(),
            randbits=self._tokens.getrandbits,
        )

    # --- results -----------------------------------------------------------------------------------------

    @property
    def output(self) -> Path:
        return self.folder / HUB / "runs" / "try"

    def metrics(self) -> list[dict[str, Any]]:
        path = self.output / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def result(self) -> dict[str, Any]:
        """`result.json`."""
        found: dict[str, Any] = json.loads((self.output / "result.json").read_text())
        return found

    def weights(self, step: int) -> dict[str, dict[str, torch.Tensor]]:
        """Of every party, from its checkpoint of `step`: model and optimiser."""
        run = self.result["run"]
        return {
            name: checkpoint.load(self.folder / name / "state" / f"try-{run}", step)[0] for name in self.nodes
        }


def run_id(number: int) -> bytes:
    """Of the run that is drawn as the `number`-th."""
    return random.Random(f"run {number}").randbytes(16)


# --- stand-ins ---------------------------------------------------------------------------------------------


class _Blind(RunView):
    """Sees nothing."""

    def _nothing(self, *_: Any) -> None:
        return

    waiting = begin = step = evaluating = evaluated = close = _nothing


class _Clock:
    """`time` as the roles use it."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._epoch = time.time()

    def monotonic(self) -> float:
        return 1000.0 + self._loop.time()

    def time(self) -> float:
        return self._epoch + self._loop.time()

    def __getattr__(self, name: str) -> Any:
        assert name not in ("sleep", "perf_counter"), name
        return getattr(time, name)


def _compute_class(real: type) -> type:
    if "_asked" not in real.__init__.__code__.co_names:
        return real  # it goes through run_in_executor

    class InlineCompute(real):  # type: ignore[misc]
        def __init__(self, threads: int) -> None:
            loop = asyncio.get_running_loop() if _in_loop() else None
            self._hangs = ""
            self._asked = _Lane(loop, self)

        def close(self) -> None:
            self._asked.closed = True

    return InlineCompute


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class _Lane:
    """The queue of a thread that computes."""

    def __init__(self, loop: VirtualLoop | None, owner: object) -> None:
        self._loop, self._owner = loop, owner
        self.closed = False

    def put(self, work: Callable[[], None] | None) -> None:
        if work is None or self.closed:
            return
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.lane(self).put(work, work)


class InlinePrefetcher:
    """Reads when it is asked for the result."""

    def __init__(self, make: Callable[[Any], Any], *, depth: int = 2, pending: int = 1024) -> None:
        self._make = make
        self._asked: list[Any] = []

    def submit(self, asked: Any, timeout: float) -> None:
        self._asked.append(asked)

    def get(self, timeout: float) -> Any:
        return self._make(self._asked.pop(0))

    def close(self, timeout: float = 0.0) -> None:
        self._asked.clear()


class InlineExecutor:
    """Does it at once."""

    def __init__(self, *_: Any) -> None:
        return

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        function(*args)

    def shutdown(self) -> None:
        return


class InlinePen:
    """Nobody looks at the status."""

    def __init__(self, path: Path) -> None:
        return

    def write(self, text: bytes) -> None:
        return

    def close(self, timeout: float) -> None:
        return


def _modules() -> list[Any]:
    return [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith(
            ("splitpeer.site.", "splitpeer.coordinator.", "splitpeer.federation.", "splitproto.")
        )
        or name
        in (
            "splitpeer.daemon.board",
            "splitpeer.daemon.clerk",
            "splitpeer.daemon.console",
            "splitpeer.daemon.duty",
            "splitpeer.daemon.witness",
            "splitpeer.daemon.refusals",
            "splitpeer.daemon.sinks.board",
            "splitpeer.daemon.sinks.budgets",
            "splitpeer.daemon.sinks.progress",
            "splitpeer.daemon.sinks.sparing",
        )
    ]


@contextmanager
def _moments(lab: Laboratory) -> Iterator[None]:
    """Every message of the application, at both ends."""
    real_send, real_receive = Session.send, Session.receive

    def note(session: Session, told: Told, message: Message) -> None:
        life = LIFE.get()
        assert life is not None
        step = getattr(message, "step", None)
        moment = Moment(life.name, session.peer.site, told, message.name, step, lab.loop.now)
        lab.moments.append(moment)
        if told != "sent":
            arrow = "->" if told == "send" else "<-"
            lab.tell(f"{life.name} {arrow} {moment.peer}: {message.name} {'' if step is None else step}")
        for watcher in lab.watchers:
            watcher(moment)
        if not life.alive:
            raise Dead

    async def send(self: Session, message: Message, *args: Any, **options: Any) -> None:
        note(self, "send", message)
        await real_send(self, message, *args, **options)
        note(self, "sent", message)

    async def receive(self: Session, *args: Any, **options: Any) -> Message:
        message = await real_receive(self, *args, **options)
        note(self, "got", message)
        return message

    with mock.patch.object(Session, "send", send), mock.patch.object(Session, "receive", receive):
        yield


@contextmanager
def _bad_files(lab: Laboratory) -> Iterator[None]:
    """Files of `lab.bad_files` are truncated: whoever holds one reads it to its end, and in vain."""
    volume = volumes.Volumes._volume

    def check(case: Any) -> None:
        life = LIFE.get()
        if life is not None and (life.name, case.patient) in lab.bad_files:
            raise DataError(f"{case.path}: truncated or corrupt (by the laboratory)", "truncated")

    def guarded(self: Any, key: bytes) -> np.ndarray:
        # Also what is in the cache: most schedules are over before a cache is full.
        with volumes._blaming(key):
            check(self.case(key))
        return volume(self, key)

    def read_header(case: Any, *args: Any) -> Any:
        check(case)
        return header(case, *args)

    header = volumes.read_header
    with (
        mock.patch.object(volumes.Volumes, "_volume", guarded),
        mock.patch.object(volumes, "read_header", read_header),
    ):
        yield


class _Story(logging.Handler):
    def __init__(self, lab: Laboratory) -> None:
        super().__init__()
        self._lab = lab

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "fields", {})
        life = LIFE.get()
        if life is not None and not life.alive:
            return
        shown = " ".join(f"{name}={_short(value)}" for name, value in fields.items() if name not in _VARYING)
        mark = "" if record.levelno < logging.WARNING else " (warning)"
        self._lab.tell(
            f"    {life or 'laboratory'} logs {record.getMessage()} {shown}{mark}".replace(
                str(self._lab.folder), ""
            )
        )


_VARYING = ("digest", "tls")


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@contextmanager
def _logging(lab: Laboratory) -> Iterator[None]:
    handler = _Story(lab)
    loggers = [logging.getLogger(name) for name in ("splitpeer", "splitproto")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
