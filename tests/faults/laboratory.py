"""A federation in one process and no real time: real clients and a real coordinator on machines that fail.

Real: roles, sessions, TLS, certificates, networks, NIfTI files, checkpoints on disk. Replaced: time (`virtual`), what
lies below ZeroMQ (`memory`), what writes to disks (`disk`), threads (their work happens at once, after a drawn
delay), entropy (drawn from the seed).
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import Context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from splitpeer.coordinator import coordinator
from splitpeer.daemon import board as status
from splitpeer.daemon import clerk
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.site import announced, client
from splitpeer.storage import checkpoint
from splitproto.lanes import zeromq

from .disk import Disks, wipe
from .federation import HUB, Setting, toml_of
from .machines import Node
from .memory import Network, zmq_of
from .stand_ins import (
    Blind,
    Clock,
    InlineExecutor,
    InlinePen,
    InlinePrefetcher,
    Moment,
    bad_files_of,
    compute_class,
    moments_of,
    patched_modules,
    story_of_logs,
)
from .virtual import Life, VirtualLoop, bury


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
            (self.folder / name / "peer.toml").write_text(
                toml_of(self.setting.sections(self.federation, name))
            )
        (self.folder / HUB / "job.toml").write_text(toml_of(self.setting.job_sections))

    def make(self, name: str, stop: asyncio.Event) -> Any:
        """What `splitpeer serve` makes."""
        config = PeerConfig.load(self.folder / name / "peer.toml", environ={})
        if name != HUB:
            return client.Client(config, stop)
        job = JobConfig.load(self.folder / HUB / "job.toml")
        return coordinator.Coordinator(config, job, stop, Blind(), resume=None)

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
            put(client, "Compute", compute_class(client.Compute))
            put(coordinator, "Compute", compute_class(coordinator.Compute))
            put(announced, "Prefetcher", InlinePrefetcher)
            put(clerk, "ThreadPoolExecutor", InlineExecutor)
            put(status, "_Pen", InlinePen)
            clock = Clock(self.loop)
            stand_ins = {"time": clock, "secrets": self._secrets(), "random": self.random}
            for module in patched_modules():
                for name, stand_in in stand_ins.items():
                    if getattr(module, name, None) is sys.modules[name]:
                        real = stand_in if name != "secrets" else self._secrets(module.__name__)
                        put(module, name, real)
            stack.enter_context(moments_of(self))
            stack.enter_context(bad_files_of(self))
            stack.enter_context(self.disks.installed())
            stack.enter_context(story_of_logs(self))
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
