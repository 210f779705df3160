"""Which keys of a secure sum are not needed any more, and that sites hear it (SP-11.18-16, SP-11.18-18)."""

from __future__ import annotations

import asyncio

from splitpeer.coordinator.run import Run
from splitpeer.errors import PeerError
from splitproto.messages import Settled


class Settling:
    """Of one run; of one without a sum, it does nothing.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
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
        if self._run.job.fusion is not None and self._used:
            await self._settle(record.epoch + 1, trained=record.trained)
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
            run.files.record.settle(epoch, trained=trained)

        await run.on_disk(noted, what="the keys that are settled")
        self._show()
        told = Settled(trained, epoch)
        await asyncio.gather(*(site.tell(told) for site in run.team.sites))

    def _show(self) -> None:
        record = self._run.files.record
        if self._run.job.fusion is not None:
            for site in self._run.team.sites:
                site.settled = Settled(record.trained, record.epoch)
