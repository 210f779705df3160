"""One thread that computes, so that heartbeats continue during a long step."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

from splitpeer.defences import key as defence_keys
from splitpeer.errors import ConfigError, DeadlinePassed
from splitpeer.settings.peer import PeerConfig
from splitproto.clock import patiently

Returned = TypeVar("Returned")


def pick_device(name: str) -> str:
    """`auto` to a GPU if there is one.

    Raises:
        ConfigError: a GPU is named and this machine has none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f'[runtime] device = "{name}": no CUDA device on this machine; use "cpu" or "auto"')
    return name


def defence_key(config: PeerConfig) -> bytes:
    """The 32 octets that this peer's defences draw from: of its state folder, or of its seed if it has one.

    Raises:
        ConfigError: see `splitpeer.defences.key.load_or_make`.
    """
    seed = config.runtime.initial_weights
    if seed != "private":
        return defence_keys.from_seed(int(seed), config.peer.site)
    return defence_keys.load_or_make(config.peer.state)


COMPUTE_S = 600.0
"""Default deadline of a computation."""
CLOSE_S = 5.0
"""How long closing waits for what still runs."""


class Compute:
    """Runs functions one after the other in a thread of its own."""

    def __init__(self, threads: int, name: str = "compute") -> None:
        # Also for the caller's thread: results depend on the thread count, so it is fixed everywhere.
        torch.set_num_threads(threads)
        self._threads = threads
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon: a disk that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._hangs = ""
        self._thread.start()

    def beside(self, name: str) -> Compute:
        """Another thread, called `name`, that computes alike."""
        return Compute(self._threads, name)

    async def run(
        self, function: Callable[..., Returned], *args: Any, what: str = "", timeout: float = COMPUTE_S
    ) -> Returned:
        """The result of `function(*args)`.

        Args:
            what: named in the error when the time is over.
            timeout: seconds to wait at most; what runs then is left to itself.

        Raises:
            DeadlinePassed: the time is over: a disk or a device hangs.
        """
        if self._hangs:
            # Whatever closes things after that must not wait as long again.
            raise DeadlinePassed(f"still waiting for {self._hangs}: a disk or a device hangs")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Returned] = loop.create_future()

        def settle(result: Returned | None, error: BaseException | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)  # type: ignore[arg-type]

        def work() -> None:
            if answer.cancelled():
                return
            result, error = None, None
            try:
                result = function(*args)
            except BaseException as raised:
                error = raised
            # The loop may be closed by now; then nothing waits.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, result, error)

        self._asked.put(work)
        try:
            if await patiently((answer,), timeout):
                return answer.result()
        except asyncio.CancelledError:
            answer.cancel()
            raise
        answer.cancel()
        self._hangs = what or function.__name__
        raise DeadlinePassed(f"waited {timeout:g} s for {self._hangs}: a disk or a device hangs")

    def close(self) -> None:
        """No more work; what still runs is waited for a little."""
        self._asked.put(None)
        self._thread.join(CLOSE_S)

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        while (work := self._asked.get()) is not None:
            work()
