"""Which keys of a secure sum are not needed any more, and that sites hear it (SP-11.18-16, SP-11.18-18)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from splitpeer.coordinator.run import Run
from splitpeer.errors import PeerError
from splitproto.messages import Settled

DAY_S = 86_400.0
MOST_DAYS = 1024
"""Epochs that are passed over at most, as sites refuse to go on by too many; a clock may have been wrong."""


class Settling:
    """Of one run; of one without a sum, it does nothing.

    Args:
        run: the run.
        now: seconds, as `time.time`.
    """

    def __init__(self, run: Run, now: Callable[[], float] = time.time) -> None:
        self._run, self._now = run, now
        # What an earlier process asked is over: each request is asked anew.
        self._used = run.files.record.state != "new"
        self._show()

    async def trained(self) -> None:
        """Training is over, or all of its releases are here. Raises DiskTrouble or ConfigError."""
        record = self._run.files.record
        if self._run.job.fusion is not None and not record.trained:
            await self._settle(record.epoch, trained=True)

    async def begin(self) -> None:
        """A request begins: no key is left to it from one before. Raises DiskTrouble or ConfigError."""
        record = self._run.files.record
        # SP-11.18-19: sites whose keys were too old have gone on by themselves, once in a day at most.
        days = min(MOST_DAYS, max(0, int((self._now() - record.epoch_since) / DAY_S)))
        if self._run.job.fusion is not None and (self._used or days):
            await self._settle(record.epoch + 1 + days, trained=record.trained)
            self._used = False

    def note_asked(self) -> None:
        """Sites are asked for values of the request."""
        self._used = True

    async def end(self) -> None:
        """The request is over. Where that cannot be recorded, the next one tries again."""
        try:
            await self.begin()
        except PeerError:
            return

    async def _settle(self, epoch: int, *, trained: bool) -> None:
        run = self._run

        def noted() -> None:
            run.files.record.settle(epoch, trained=trained, now=self._now())

        await run.on_disk(noted, what="the keys that are settled")
        self._show()
        told = Settled(trained, epoch)
        await asyncio.gather(*(site.tell(told) for site in run.team.sites))

    def _show(self) -> None:
        record = self._run.files.record
        if self._run.job.fusion is not None:
            for site in self._run.team.sites:
                site.settled = Settled(record.trained, record.epoch)
