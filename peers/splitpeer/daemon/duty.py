"""A daemon on duty: it holds its state folder, shows what it does, tells systemd, and keeps its audit trail.

One context for all of it. `status.json` is replaced on change at most every half second and every five seconds anyway,
so that a hanging daemon can be distinguished from a waiting one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Self

from splitpeer.daemon.board import BEAT_S, TICK_S, Board
from splitpeer.daemon.happenings import Reporter
from splitpeer.daemon.lock import StateLock, holder
from splitpeer.daemon.sinks.board import BoardSink
from splitpeer.daemon.sinks.systemd import SystemdSink
from splitpeer.daemon.systemd import Notifier
from splitpeer.errors import ConfigError, sayable
from splitpeer.settings.peer import PeerConfig

if TYPE_CHECKING:
    from splitpeer.daemon.witness import Witness


class Duty:
    """The right to use a state folder, and what comes with it.

    Args:
        config: `peer.toml`.
    """

    def __init__(self, config: PeerConfig) -> None:
        self._folder = config.peer.state
        self._lock = StateLock(self._folder)
        self._notifier = Notifier()
        self._held = False
        self.board = Board(config)
        self.report = Reporter(BoardSink(self.board), SystemdSink(self._notifier, self.board))
        """What happens goes to the board and to systemd; a role adds its own sinks."""

    @contextmanager
    def held(self) -> Iterator[Self]:
        """Hold the state folder and show what is reported until the block is left; nested blocks change nothing.

        Raises:
            ConfigError: another splitpeer holds the folder, or it cannot be used.
        """
        if self._held:
            yield self
            return
        self._take()
        self._held = True
        try:
            self.board.open()
        except BaseException:
            self.forsake()
            raise
        cause = ""
        try:
            yield self
        except BaseException as error:
            cause = sayable(error)
            raise
        finally:
            self._notifier.stopping()
            self._notifier.status(self.board.end(cause))
            self.forsake()

    @asynccontextmanager
    async def on_duty(self, witness: Witness | None = None, **fields: Any) -> AsyncIterator[None]:
        """`held`, with a sign of life from the event loop once a tick.

        Args:
            witness: keeps the audit trail meanwhile; `fields` are those of its first line.
        """
        with self.held():
            self._notifier.explain_hangs()
            beating = asyncio.create_task(self._beat())
            try:
                async with AsyncExitStack() as stack:
                    if witness is not None:
                        await stack.enter_async_context(witness.on_duty(**fields))
                    yield
            finally:
                beating.cancel()
                await asyncio.wait((beating,))

    def forsake(self) -> None:
        """Let go of the folder as it is, as the kernel does for a process that died. `held` ends with it."""
        self.board.close()
        self._held = False
        self._lock.release()

    def _take(self) -> None:
        # A process that only looks (`holder`) keeps it for a moment.
        for _ in range(10):
            if self._lock.take():
                return
            time.sleep(0.05)
        held = holder(self._folder)
        who = f" (pid {held.pid})" if held and held.pid else ""
        raise ConfigError(
            f"another splitpeer{who} uses this state folder: {self._folder}: stop it (splitpeer drain), "
            "or give this peer a [peer] state of its own"
        )

    async def _beat(self) -> None:
        """In the event loop, so that what stops the loop stops the signs of life."""
        watchdog = self._notifier.watchdog_s
        tick = min(TICK_S, watchdog) if watchdog else TICK_S
        written = fed = told = time.monotonic()
        self._notifier.alive()
        while True:
            await asyncio.sleep(tick)
            now = time.monotonic()
            if watchdog and now - fed >= watchdog - tick:
                self._notifier.alive()
                fed = now
            if self.board.changed or now - written >= BEAT_S:
                self.board.write()
                written = now
            if now - told >= BEAT_S:
                self._notifier.status(self.board.line())
                told = now
