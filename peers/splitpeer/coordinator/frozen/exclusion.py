"""Patients who leave a run with frozen encoders: nothing of them stays in the feature bank (SP-11.17-7)."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from splitpeer.coordinator.exclusion import Exclusion, UnusableBySite
from splitpeer.coordinator.run import Run
from splitpeer.federation.batches import TrainingStream
from splitpeer.storage.bank import Bank
from splitproto.causes import CONSENT
from splitproto.records import Unusable


class BankExclusion(Exclusion):
    """Leaves patients out of a run, and out of its bank."""

    bank: Bank | None = None
    """None: there is none yet."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        # Sites are collected from side by side, and a withdrawal is noted once.
        self._listing = asyncio.Lock()

    async def drop(self, unusable: UnusableBySite, stream: TrainingStream | None = None) -> None:
        """Continue without these; nothing that was asked is void. What was released of whom a site withdrew is removed,
        for good; where it was consent, also if the run fails for it.

        Raises:
            JobFailed: too many from one site, or too few are left.
            DataError: too many masks of the coordinator's own.
            DiskTrouble, ConfigError: something cannot be removed or recorded.
        """
        agreed_no_more = {one.key for of in unusable.values() for one in of if one.cause == CONSENT}
        try:
            await self._withdrawn(unusable)
            await self._done_without(stream)
        finally:
            await self._remove(agreed_no_more)

    async def heed(self) -> None:
        """What a process left undone that ended in between, and whom somebody has dropped from the bank since.

        Raises:
            JobFailed: too few patients are left.
            DiskTrouble, ConfigError: something cannot be removed or recorded.
        """
        dropped = self.bank.dropped - self.keys if self.bank is not None else frozenset[bytes]()
        dropped &= self._run.seating.filled.keys()
        if dropped:
            await self._accepted("", tuple(Unusable(key, CONSENT) for key in sorted(dropped)))
            await self._done_without(None)
        await self._remove(())
        self.note(None)

    async def listed(self, stream: TrainingStream | None = None) -> bool:
        """Whom sites listed as withdrawn when they joined, or name since: no site is asked about them any more.

        Returns:
            Whether there is anybody new.

        Raises:
            As `drop`.
        """
        async with self._listing:
            if not (found := self.revoked()):
                return False
            await self.drop(found, stream)
            return True

    async def _remove(self, more: Collection[bytes]) -> None:
        """The releases of `more`, and of whom sites have withdrawn. Masks of our own that turn out to be bad are no
        reason to ask sites for everything again."""
        if self.bank is not None and (gone := self.withdrawn_by_sites.union(more)):
            await self._run.on_disk(self.bank.drop, gone, what="releases to be removed")
