"""All sites of a job, and what happens when one does not return in time: pause, skip or drop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from splitpeer.coordinator.memory import SiteRestarted
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.log import LogSink
from splitpeer.errors import DeadlinePassed, JobFailed, PeerError
from splitpeer.settings.job import Absence
from splitproto import SplitprotoError

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

FREE_RETURNS = 3
"""How often a site may be lost since its last checkpoint and still be readmitted at once; then after growing
pauses."""
LONGEST_PAUSE = 3600.0


class Team:
    """The sites, in the order of their seats (SP-11-35).

    Args:
        sites: all that the job names.
        absence: what to do without one. `pause`: its failure is the job's. `skip`: the current work continues
            without it, and before the next step it is waited for again. `drop`: work continues without it
            until it is back.
        report: told who is back.
    """

    def __init__(self, sites: Sequence[RemoteSite], absence: Absence, report: h.Reporter) -> None:
        self.sites, self._report = tuple(sites), report.to(LogSink(log))
        self._mode, self._least = absence.mode, absence.least_sites
        self._not_before: dict[RemoteSite, float] = {}  # by the event loop's clock

    @property
    def present(self) -> list[RemoteSite]:
        """Those that the work at hand counts on."""
        return [site for site in self.sites if not site.absent]

    @property
    def absent(self) -> list[RemoteSite]:
        """The sites that the run continues without."""
        return [site for site in self.sites if site.absent]

    @property
    def all_needed(self) -> bool:
        """Whether the run ends when one is lost for good."""
        return self._mode == "pause"

    def leave_out(self, site: RemoteSite, cause: str) -> None:
        """Continue without `site`.

        Raises:
            JobFailed: all are needed.
            DeadlinePassed: too few are left.
        """
        if self.all_needed:
            raise JobFailed(cause)
        self._leave_out(site, cause)
        self._check_enough()

    async def ask_all(
        self, verb: Callable[[RemoteSite], Awaitable[Answer]], sites: Sequence[RemoteSite] | None = None
    ) -> dict[RemoteSite, Answer]:
        """Ask all of `sites` (default: those present) at once with `verb`; the answers of those that are still present.

        A restart at one site does not cancel the questions to the others: a message that is half sent would be
        overtaken by the rollback that follows.

        Raises:
            SiteRestarted: at least one did.
            DeadlinePassed, JobFailed: with `pause`, the first failure, which ends the others; else, too few are left.
        """
        tasks = {
            asyncio.ensure_future(_coroutine(verb(site))): site
            for site in (self.present if sites is None else sites)
        }
        try:
            waiting, restarted = set(tasks), False
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in tasks if task in done]:
                    error = task.exception()
                    if isinstance(error, SiteRestarted):
                        restarted = True
                    elif isinstance(error, DeadlinePassed | JobFailed) and not self.all_needed:
                        self._leave_out(tasks[task], str(error))
                    else:
                        task.result()
            self._check_enough()
            if restarted:
                raise next(e for task in tasks if isinstance(e := task.exception(), SiteRestarted))
            return {site: task.result() for task, site in tasks.items() if not site.absent}
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def muster(self, step: int, patients: int) -> None:
        """Before a step: those that were absent and are back catch up with the committed `step`."""
        now = asyncio.get_running_loop().time()
        back = [site for site in self.absent if self._not_before.get(site, now) <= now]
        if self._mode == "skip":
            await asyncio.gather(*(self._wait_returned(site) for site in back))
        await asyncio.gather(*(self._welcome(site, step, patients) for site in back if site.here))

    async def gather(self, seconds: float, waiting_for: Callable[[str], None], *, all_needed: bool) -> None:
        """Wait until all have joined.

        Args:
            seconds: at most this long. waiting_for: called with the missing sites.
            all_needed: else, and unless the mode is `pause`, work may begin without some.

        Raises:
            DeadlinePassed: some are missing.
            JobFailed: one has declined.
        """
        deadline = time.monotonic() + seconds
        while missing := [site for site in self.sites if not site.here and not site.absent]:
            names = ", ".join(f"{site.name} ({site.seat_names})" for site in missing)
            waiting_for(names)
            for site in missing:
                site.show_waiting(deadline - time.monotonic())
            # A site that has joined may leave again while others are waited for.
            if await self._wait_change(missing, deadline - time.monotonic()):
                continue
            if all_needed or self.all_needed:
                why = "".join(f"; {site.name}: {site.refusal}" for site in missing if site.refusal)
                raise DeadlinePassed(
                    f"missing after {seconds:g} s: {names}{why}: start them, or raise join_s"
                )
            for site in missing:
                site.leave_out(f"it did not join within {seconds:g} s")
            self._check_enough()
            return

    async def _wait_change(self, missing: Sequence[RemoteSite], timeout: float) -> bool:
        """Whether one of `missing` joins, or another site leaves, within `timeout` seconds.

        Raises:
            JobFailed: one has declined.
        """
        changes = {
            asyncio.create_task(site.wait_joined() if site in missing else site.wait_gone()): site
            for site in self.present
        }
        try:
            done, _ = await asyncio.wait(changes, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                self._note_joined(changes[task], task)
            return bool(done)
        finally:
            for task in changes:
                task.cancel()
            await asyncio.gather(*changes, return_exceptions=True)

    def _note_joined(self, site: RemoteSite, task: asyncio.Task[None]) -> None:
        """One that declines is absent, where the run can do without it."""
        try:
            task.result()
        except JobFailed as error:
            if self.all_needed:
                raise
            site.leave_out(str(error))
            self._check_enough()

    def note_undone(self, step: int) -> None:
        """All present sites have rolled back to `step`."""
        for site in self.absent:
            site.note_undone(step)

    def _check_enough(self) -> None:
        present = self.present
        if len(present) < self._least:
            missing = "; ".join(f"{site.name} ({site.seat_names}): {site.absence}" for site in self.absent)
            raise DeadlinePassed(f"{len(present)} sites are left, least_sites is {self._least}: {missing}")

    def _leave_out(self, site: RemoteSite, cause: str) -> None:
        """One that is lost again and again does not hold up the others each time."""
        site.leave_out(cause)
        site.losses += 1
        pause = min(2.0 ** (site.losses - FREE_RETURNS), LONGEST_PAUSE) if site.losses > FREE_RETURNS else 0.0
        self._not_before[site] = asyncio.get_running_loop().time() + pause

    async def _wait_returned(self, site: RemoteSite) -> None:
        try:
            await site.wait_returned()
        except (PeerError, SplitprotoError):
            return  # it is absent already, with its cause

    async def _welcome(self, site: RemoteSite, step: int, patients: int) -> None:
        cause = site.absence
        try:
            await site.catch_up(step, patients)
        except (SiteRestarted, PeerError) as error:
            # It may try again; until then it stays what it was.
            first = cause.partition("; on its return: ")[0]
            self._leave_out(site, f"{first}; on its return: {error}" if str(error) not in first else first)
        else:
            self._report(h.SitePresent(site.name, site.seat_names, step))


async def _coroutine(awaitable: Awaitable[Answer]) -> Answer:
    return await awaitable
