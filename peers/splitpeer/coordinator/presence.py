"""Whether a site is connected: its standing, the link over which it has joined, and the wait for the next
one. The table is in `standing.py`; this module moves a site in it, and reports that.
"""

from __future__ import annotations

import asyncio
import logging

from splitpeer.coordinator.site_link import SiteLink
from splitpeer.coordinator.standing import Change, Standing, after
from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.log import LogSink
from splitpeer.errors import DeadlinePassed, JobFailed
from splitproto import SplitprotoError
from splitproto.clock import patiently
from splitproto.errors import DeadlineExceeded

log = logging.getLogger(__name__)


class Presence:
    """The standing of one site.

    Args:
        name: as in its certificate.
        seat_names: of those that it fills, in words.
        patience_s: how long it may be away, in seconds.
        report: called with its standing, and what it is waited for.
    """

    def __init__(self, name: str, seat_names: str, patience_s: float, report: h.Reporter) -> None:
        self.name, self.seat_names = name, seat_names
        self.standing = Standing.AWAITED
        self.link: SiteLink | None = None
        """Over which it joined last."""
        self.absence = ""
        """Why the run continues without it; empty where it does not."""
        self.refusal = ""
        """Why it did not join when it dialled last; empty: it did, or has not dialled."""
        self._patience_s, self._report = patience_s, report.to(LogSink(log))
        self._failure: JobFailed | None = None
        self._decided = asyncio.Event()  # it has joined, or is lost: there is no need to wait for it
        self._watching: asyncio.Task[None] | None = None
        self._tell_standing()

    # --- queries ---------------------------------------------------------------------------------------

    @property
    def here(self) -> bool:
        """It has joined, and its link is alive."""
        return self.standing.linked and self.link is not None and self.link.alive

    @property
    def absent(self) -> bool:
        """Whether the run continues without it, connected again or not."""
        return self.standing.out

    # --- commands --------------------------------------------------------------------------------------

    def note_dialled(self) -> None:
        """A link of it is offered the job."""
        self._move(Change.DIALLED)

    def note_turned_away(self) -> None:
        """No link of it is joining any more."""
        self._move(Change.TURNED_AWAY)

    def note_refused(self, cause: str) -> None:
        """It dialled and did not join: it stays away, and is waited for as before."""
        if cause != self.refusal:
            self._report(h.SiteRefused(self.name, self.seat_names, cause))
        self.refusal = cause

    def note_declined(self, error: JobFailed) -> None:
        """It does not want the job."""
        self._failure = error
        self._move(Change.DECLINED)

    def take(self, link: SiteLink) -> None:
        """The site has joined over `link`."""
        self.link, self.refusal, self._failure = link, "", None
        self._move(Change.JOINED)
        self.stop_waiting()
        self._watching = asyncio.create_task(self._watch(link))

    def lose(
        self, link: SiteLink, cause: str, waiting_for: str = "", patience_s: float | None = None
    ) -> None:
        """A question found `link` broken: the site is awaited on another, if it has none yet."""
        self._report(h.SiteLost(self.name, cause, waiting_for, patience_s))
        if link is self.link and self.standing.linked:
            self._move(Change.LINK_ENDED)

    def fail(self, error: SplitprotoError) -> JobFailed:
        """The site failed in a way that a new link does not repair; returns the error to raise."""
        self._failure = JobFailed(f"site {self.name}: {error}")
        self._move(Change.FAILED)
        return self._failure

    def leave_out(self, cause: str) -> None:
        """From now on the run continues without this site, which may dial and join again."""
        self.absence = cause
        self._move(Change.LEFT_OUT)
        self.stop_waiting()
        self._report(h.SiteAbsent(self.name, self.seat_names, cause))
        # It may be in the middle of anything: on a new link, both know where they are.
        if self.link is not None and self.link.alive:
            self.link.session.fail(
                DeadlineExceeded("the run continues without this site; dial again to join")
            )

    def start_catching_up(self) -> None:
        """It is about to be brought to the committed step.

        Raises:
            DeadlinePassed: it has gone again.
        """
        if not self.here:
            raise self._lost_again()
        self._move(Change.CATCHES_UP)

    def end_catching_up(self) -> None:
        """It is where the others are: the run counts on it again."""
        self.absence = ""
        self._move(Change.CAUGHT_UP)

    def let_go(self) -> SiteLink | None:
        """Give up the link, for a last word on it; None: there is none."""
        link, self.link = self.link, None
        if self.standing.linked:
            self._move(Change.LINK_ENDED)
        return link

    def show_waiting(self, what: str, seconds: float) -> None:
        """It is waited for, `seconds` more at most."""
        self._report(h.SiteAwaited(self.name, what, max(0.0, seconds)))

    def stop_waiting(self) -> None:
        """It is not waited for any more."""
        self._report(h.SiteNotAwaited(self.name))

    # --- waits -----------------------------------------------------------------------------------------

    async def wait_joined(self) -> None:
        """Wait until the site has joined; raises JobFailed if it declined."""
        self._note_end_if_dead()
        await self._decided.wait()
        if self.standing is Standing.LOST and self._failure is not None:
            raise self._failure

    async def wait_gone(self) -> None:
        """Wait until the site is not here."""
        if self.link is not None:
            await asyncio.wait((self.link.session.ended,))

    async def wait_link(self, what: str) -> SiteLink:
        """Wait until the site is here, at most as long as it may be away.

        Args:
            what: it is waited for, in words.

        Raises:
            DeadlinePassed: it did not come back in time, or was let go meanwhile.
            JobFailed: it has failed for good.
        """
        self._check_failed()
        if not self.here:
            self._note_end_if_dead()
            self.show_waiting("to come back", self._patience_s)
            joined = asyncio.ensure_future(self._decided.wait())
            try:
                if not await patiently((joined,), self._patience_s):
                    raise DeadlinePassed(
                        f"site {self.name} ({self.seat_names}) did not come back within {self._patience_s:g} s; "
                        f"waiting for: {what}{f'; when it dialled: {self.refusal}' if self.refusal else ''}"
                    )
            finally:
                joined.cancel()
            self._check_failed()
        if self.link is None:
            # The run ends meanwhile: `let_go` came before the waiting task ran again.
            raise DeadlinePassed(f"site {self.name} ({self.seat_names}) was let go; waiting for: {what}")
        return self.link

    async def wait_link_unless_absent(self, what: str) -> SiteLink:
        """As `wait_link`; but the others wait while a site catches up, so one that is lost again is not waited for."""
        self._check_failed()
        if self.absent and not self.here:
            raise self._lost_again()
        return await self.wait_link(what)

    # --- inside ----------------------------------------------------------------------------------------

    def _tell_standing(self) -> None:
        self._report(h.SiteStands(self.name, self.seat_names, self.standing.value))

    def _move(self, change: Change) -> None:
        self.standing = after(self.standing, change)
        self._tell_standing()
        if self.standing.linked or self.standing is Standing.LOST:
            self._decided.set()
        else:
            self._decided.clear()

    async def _watch(self, link: SiteLink) -> None:
        """Answer a bye at once, and notice a link that ends, also while nothing is asked of the site."""
        await asyncio.wait((link.session.leaving,))
        if (bye := link.session.farewell) is not None:
            await link.session.close(bye.reason)
        self._note_end(link)

    def _note_end_if_dead(self) -> None:
        """A link may be over before `_watch` has run."""
        if self.link is not None and not self.link.alive:
            self._note_end(self.link)

    def _note_end(self, link: SiteLink) -> None:
        """`link` is over; nothing, where that is known."""
        if link is not self.link or not self.standing.linked:
            return
        self._move(Change.LINK_ENDED)
        bye = link.session.farewell
        if bye is None:
            self._report(h.SiteLost(self.name, str(link.session.ended.result())))
        elif bye.reason != "rotate":
            self._report(h.SiteLeft(self.name, bye.text))

    def _check_failed(self) -> None:
        """Raises JobFailed where only the site itself can mend it, and join again."""
        if self._failure is not None:
            raise self._failure
        ended = self.link.session.ended if self.link is not None else None
        if ended is not None and ended.done() and (error := ended.result()) is not None and not error.retry:
            # A site may give up between two questions, such as when its privacy budget is spent.
            raise self.fail(error) from error

    def _lost_again(self) -> DeadlinePassed:
        return DeadlinePassed(f"site {self.name} ({self.seat_names}) was lost again before it had caught up")
