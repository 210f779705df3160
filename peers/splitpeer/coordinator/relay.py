"""Keys of secure fusion on their way from site to site (SP-11.18-7): the coordinator passes them on, and holds none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

from splitpeer.errors import DeadlinePassed
from splitproto import partners
from splitproto.errors import CertificateEnded, FusionMismatch, IdentityError, PolicyRefused
from splitproto.identity import Identity
from splitproto.messages import FusionKeys
from splitproto.partners import Keys, Trust
from splitproto.records import Job, KeyOffer


class Relay:
    """Of one run.

    Every site fails that is sent an offer which does not hold. So an offer is judged here as its partners will, and
    its sender is the one who does not join.

    Args:
        run: its id.
        job: with secure fusion.
        trust: reads what offers are checked against, again for each; its partners are the sites of the job. While it
            cannot, what was read before counts.
        known: both public keys by site, of the run so far; those of sites that join are added.

    Raises:
        IdentityError: our own CA or revocation list cannot be read.
    """

    def __init__(self, run: bytes, job: Job, trust: Callable[[], Trust], known: dict[str, Keys]) -> None:
        self._run, self._terms = run, partners.terms_digest(job)
        self._trust, self._known = trust, known
        self._trusted = trust()
        self._offers: dict[str, KeyOffer] = {}
        self._taken = asyncio.Event()
        """Set, and replaced, when a site joins."""

    def check(self, site: str, offer: KeyOffer, now: datetime) -> None:
        """Whether `offer`, heard on a link of `site`, may be passed on.

        Args:
            now: with its time zone.

        Raises:
            FusionMismatch: it proves nothing, or see `take`.
            CertificateEnded: its certificate has ended.
        """
        identity = self._verify(offer, now)
        if identity.site != site:
            raise FusionMismatch(f"{site} sent the fusion key of site {identity.site}")
        self._check_keys(site, Keys.of(offer))

    def take(self, site: str, offer: KeyOffer) -> None:
        """`site` has joined with an offer that was checked.

        Raises:
            FusionMismatch: it had another key in this run, or another site has joined with this one.
        """
        self._check_keys(site, Keys.of(offer))
        self._offers[site], self._known[site] = offer, Keys.of(offer)
        self._taken.set()
        self._taken = asyncio.Event()

    def others(self, site: str) -> FusionKeys:
        """What `site` is sent: SP-11.18-7: "ordered by the names of the sites"."""
        return FusionKeys(tuple(offer for name, offer in sorted(self._offers.items()) if name != site))

    def ended(self, site: str, now: datetime) -> str | None:
        """A partner of `site` that is away since before its certificate ended; None: there is none.

        Whatever else is wrong with an offer by now is not looked at: `site` finds and names it.
        """
        for name, offer in sorted(self._offers.items()):
            if name != site:
                try:
                    self._verify(offer, now)
                except CertificateEnded:
                    return name
                except (FusionMismatch, IdentityError, PolicyRefused):
                    continue
        return None

    async def await_fresh(self, site: str, patience_s: float) -> None:
        """SP-11.18-7: what `site` is sent holds now: partners whose certificates have ended come back first.

        Raises:
            DeadlinePassed: one did not, within `patience_s`.
        """
        name: str | None = None
        try:
            async with asyncio.timeout(patience_s):
                while (name := self.ended(site, datetime.now(UTC))) is not None:
                    await self._taken.wait()
        except TimeoutError:
            raise DeadlinePassed(
                f"site {name}: its certificate ended while it was away, and it did not come back with another in "
                f"{patience_s:g} s"
            ) from None

    def _verify(self, offer: KeyOffer, now: datetime) -> Identity:
        with suppress(IdentityError):
            # A file that is just being replaced must not end the site that joins.
            self._trusted = self._trust()
        return partners.verify(offer, self._run, self._terms, self._trusted, now)

    def _check_keys(self, site: str, shown: Keys) -> None:
        if self._known.get(site, shown) != shown:
            raise FusionMismatch(
                f"{site} has another fusion key than before in this run: it lost its run folder"
            )
        for other, keys in self._known.items():
            if other != site and not set(keys).isdisjoint(shown):
                raise FusionMismatch(f"{site} sent the fusion key of {other} as its own")
