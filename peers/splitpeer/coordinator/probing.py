"""Sites' links before any job is offered: held until all are here, and measured, all at once (SP-11.22).

They share the coordinator's line when they train as well, so each direction is measured on all links at the same time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress

from splitpeer.coordinator.choosing import LinkRate
from splitpeer.coordinator.holder import Holding
from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.log import LogSink
from splitpeer.errors import DeadlinePassed
from splitproto import Session, SplitprotoError
from splitproto.constants import MAX_PROBE
from splitproto.errors import LocalError, SchemaMismatch, Superseded, UnexpectedMessage
from splitproto.messages import Bye, Message, Probe, Probed
from splitproto.probes import filling

log = logging.getLogger(__name__)

FIRST = 1 << 18
"""Octets of a first probe: on a slow link it is enough."""
SLOW_S = 0.5
"""A first probe that takes longer is not followed by a large one."""
HEADS = 64
"""Octets that a body is longer than its values, at most."""
LEAST_S = 1e-6
"""Taken for a transfer that took no longer than a round trip."""


class ProbedLink:
    """One link, and what its probes have shown.

    Args:
        session: in state `ready`.
        answer_s: how long an answer may take.
    """

    def __init__(self, session: Session, answer_s: float) -> None:
        self.session, self._answer_s, self._number = session, answer_s, 0
        self.failed = False
        self._round_trip = float("inf")
        self._rates = {"up": 0.0, "down": 0.0}
        self._slow = {"up": False, "down": False}

    @property
    def rate(self) -> LinkRate:
        """What was measured."""
        return LinkRate(self._round_trip, **self._rates)

    async def round_trip(self) -> None:
        """A probe of nothing."""
        if not self.failed:
            self._round_trip = min(self._round_trip, await self._ask(0, 0))

    async def carry(self, way: str, octets: int) -> None:
        """Send so many octets "down" to the site, or have them come "up"; nothing, where fewer took long."""
        if self.failed or self._slow[way]:
            return
        agreed = self.session.agreement
        limit = agreed.send_limit if way == "down" else agreed.receive_limit
        octets = max(1, min(octets, limit - HEADS))
        seconds = await self._ask(octets if way == "down" else 0, octets if way == "up" else 0)
        over = max(seconds - self._round_trip, LEAST_S)
        self._rates[way], self._slow[way] = octets / over, over > SLOW_S

    async def _ask(self, there: int, back: int) -> float:
        """Seconds from a probe to its answer; a link on which there is none has failed."""
        self._number += 1
        began = time.perf_counter()
        try:
            await self.session.send(Probe(self._number, back, filling(there)), self._answer_s)
            answer = await self.session.receive(self._answer_s, f"an answer to probe {self._number}")
            if isinstance(answer, Bye):
                self.failed = True  # its holder answers the bye
            else:
                self._check(answer, back)
        except SplitprotoError as error:
            self.failed = True
            if isinstance(error, LocalError):
                self.session.fail(error)
        return time.perf_counter() - began

    def _check(self, answer: Message, octets: int) -> None:
        """SP-11.22-2. Raises UnexpectedMessage, SchemaMismatch."""
        if not isinstance(answer, Probed) or answer.number != self._number:
            raise UnexpectedMessage(f"something else where the answer to probe {self._number} was due")
        if sum(array.nbytes for array in answer.tensors.values()) != octets:
            raise SchemaMismatch(f"probe {self._number} was answered with another number of octets")


class Probing:
    """Holds the links of all sites until each has been measured.

    Args:
        sites: names of all.
        answer_s: how long a site may take for one answer.
        report: told who is waited for, and who has gone.
    """

    def __init__(self, sites: Sequence[str], answer_s: float, report: h.Reporter) -> None:
        self._sites, self._answer_s, self._report = tuple(sites), answer_s, report.to(LogSink(log))
        self._everywhere = report
        self._held: dict[str, Session] = {}
        self._changed, self._over = asyncio.Event(), asyncio.Event()

    async def hold(self, site: str, session: Session) -> bool:
        """Keep a link until all are measured; whether a job can be offered on it then."""
        if self._over.is_set():
            return True
        if not await self._makes_room(site, session):
            return False
        self._held[site] = session
        self._changed.set()
        # Set already, where all were measured while an older link was asked.
        over = asyncio.ensure_future(self._over.wait())
        try:
            # Cancelled where the coordinator ends: the link stays listed, and `say_bye` says why.
            await asyncio.wait((over, session.leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            over.cancel()
        if self._held.get(site) is session:
            del self._held[site]
        if not session.leaving.done():
            return True
        if (bye := session.farewell) is not None:
            await session.close(bye.reason)
            self._report(h.SiteLeft(site, bye.text))
        elif isinstance(error := session.ended.result(), SplitprotoError):
            self._report(h.SiteLost(site, str(error)))
        return False

    async def measure(self, join_s: float) -> dict[str, LinkRate]:
        """Wait for all sites, at most `join_s` seconds, and measure every link; the rates by site.

        Raises:
            DeadlinePassed: some sites did not come, or their links did not carry the probes.
        """
        deadline = time.monotonic() + join_s
        rates: dict[str, LinkRate] = {}
        while missing := [site for site in self._sites if site not in rates]:
            self._report(h.PhaseBegan("gathering"))
            if not await self._all_here(missing, deadline):
                away = [site for site in missing if site not in self._held] or missing
                raise DeadlinePassed(
                    f"not measured after {join_s:g} s: the links of {', '.join(away)}: start them, or raise join_s"
                )
            self._report(h.PhaseBegan("measuring"))
            links = {site: ProbedLink(self._held[site], self._answer_s) for site in missing}
            await self._probe(list(links.values()))
            rates |= {site: link.rate for site, link in links.items() if not link.failed}
            for site, link in links.items():
                if link.failed and self._held.get(site) is link.session:
                    # Its holder is told as soon as the link's end is heard; here it does not count any more.
                    del self._held[site]
        return {site: rates[site] for site in self._sites}

    def release(self) -> None:
        """Offer the job to the sites whose links are held."""
        self._over.set()

    async def say_bye(self, reason: str, text: str) -> None:
        """End the links that are held."""
        held, self._held = self._held, {}
        await asyncio.gather(*(session.close(reason, text) for session in held.values()))

    # --- inside ----------------------------------------------------------------------------------------

    async def _makes_room(self, site: str, session: Session) -> bool:
        """Whether the link of `site` that is held, if any, does not answer any more; if it does, `session` ends.

        SP-11.14-4: a daemon that was started twice, or a copied key, does not cost the site the place that it has.
        """
        second = Holding(site, self._everywhere)
        try:
            await second.take(session, b"", lambda: self._alive(site))
        except Superseded as error:
            session.fail(error)
            second.note_second(session, self._held.get(site), str(error))
            return False
        return True

    def _alive(self, site: str) -> Session | None:
        """The link of `site` that is held and that it does not leave."""
        older = self._held.get(site)
        return None if older is None or older.leaving.done() else older

    async def _probe(self, links: Sequence[ProbedLink]) -> None:
        # Twice: the first answer of a process may be late.
        for _ in range(2):
            await asyncio.gather(*(link.round_trip() for link in links))
        for way in ("down", "up"):
            for octets in (FIRST, MAX_PROBE):
                await asyncio.gather(*(link.carry(way, octets) for link in links))

    async def _all_here(self, sites: Sequence[str], deadline: float) -> bool:
        """Whether all of `sites` have a link before the deadline."""
        left = deadline - time.monotonic()
        while left > 0 and (away := [site for site in sites if site not in self._held]):
            self._report(h.SitesAwaited(", ".join(away)))
            for site in away:
                self._report(h.SiteAwaited(site, "to dial", left))
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()
            for site in away:
                self._report(h.SiteNotAwaited(site))
            left = deadline - time.monotonic()
        return left > 0
