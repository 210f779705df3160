"""The last word: each site is told that its part in the run is over, on the link that it has or on its next one.

A site may leave a link, for a new one, just when it would be told; so only what it is known to have heard counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from splitpeer.coordinator.record import RunRecord
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.work import COLLECTED
from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.log import LogSink
from splitpeer.errors import JobFailed
from splitproto import Session

log = logging.getLogger(__name__)

COMPLETE = "the job is done"
FAREWELL_S = 20.0
"""How long a site between two links may take to come back and learn that the job is complete: longer than the longest
pause of a client that dials."""


class Farewell:
    """Tells sites that they are done; the run's record says who knows.

    Args:
        sites: all of the job.
        record: of the run.
        report: told who was not here.
    """

    def __init__(self, sites: Sequence[RemoteSite], record: RunRecord, report: h.Reporter) -> None:
        self._sites, self._record, self._report = sites, record, report.to(LogSink(log))
        self._settled = {site.name: asyncio.Event() for site in sites}

    async def tell(self, site: RemoteSite, text: str) -> None:
        """Say it on the present link of `site`. Where that is ending already, its next one is due."""
        if await site.dismiss(text):
            self.note(site.name)

    async def turn_away(self, session: Session) -> None:
        """SP-11.17-8: a site that dials when all that it had to give is here hears it in place of an offer."""
        if await session.close("complete", COLLECTED, run=self._record.run):
            self.note(session.peer.site)

    def note(self, site: str) -> None:
        """`site` knows."""
        self._record.note_told([site])
        self._settled[site].set()

    async def wait(self, seconds: float) -> None:
        """Tell all that the run is complete, those between two links as they come back.

        Args:
            seconds: at most, for sites on which the run counted.
        """
        untold = [site for site in self._sites if site.name not in self._record.told]
        # SP-11-43: an absent one is told if it is here, and not waited for.
        due: dict[asyncio.Task[Any], str] = {
            asyncio.create_task(self._settled[site.name].wait()): site.name
            for site in untold
            if site.here or not site.absent
        }
        telling: list[asyncio.Task[Any]] = [asyncio.create_task(self._until_told(site)) for site in untold]
        try:
            late = (await asyncio.wait(due, timeout=seconds))[1] if due else ()
            for name in sorted(due[task] for task in late):
                self._report(h.SiteLost(name, "it was not here for the bye"))
            for task in telling:
                if task.done():
                    task.result()
        finally:
            for task in (*due, *telling):
                task.cancel()
            await asyncio.gather(*due, *telling, return_exceptions=True)

    async def _until_told(self, site: RemoteSite) -> None:
        while site.name not in self._record.told:
            try:
                await site.wait_joined()
            except JobFailed:
                self._settled[site.name].set()  # it has given up: it does not come back for this
                return
            await self.tell(site, COMPLETE)
