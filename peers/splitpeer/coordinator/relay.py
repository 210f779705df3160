"""Keys of secure fusion on their way from site to site (SP-11.18-7): the coordinator passes them on, and holds none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime

from splitproto import partners
from splitproto.errors import FusionMismatch, IdentityError
from splitproto.messages import FusionKeys, Job, KeyOffer
from splitproto.partners import Trust


class Relay:
    """Of one run.

    Every site fails that is sent an offer which does not hold. So an offer is judged here as its partners will, and
    whoever sent it is the one who does not join.

    Args:
        run: its id.
        job: with secure fusion.
        trust: reads what offers are checked against, again for each; its partners are the sites of the job. While it
            cannot, what was read before counts.
        known: public keys by site, of the run so far; those of sites that join are added.

    Raises:
        IdentityError: our own CA or revocation list cannot be read.
    """

    def __init__(self, run: bytes, job: Job, trust: Callable[[], Trust], known: dict[str, bytes]) -> None:
        self._run, self._terms = run, partners.terms_digest(job)
        self._trust, self._known = trust, known
        self._trusted = trust()
        self._offers: dict[str, KeyOffer] = {}

    def check(self, site: str, offer: KeyOffer, now: datetime) -> None:
        """Whether `offer`, heard on a link of `site`, may be passed on.

        Args:
            now: with its time zone.

        Raises:
            FusionMismatch: it proves nothing, or see `take`.
        """
        with suppress(IdentityError):
            # A file that is just being replaced must not end the site that joins.
            self._trusted = self._trust()
        identity = partners.verify(offer, self._run, self._terms, self._trusted, now)
        if identity.site != site:
            raise FusionMismatch(f"{site} sent the fusion key of site {identity.site}")
        self._check_key(site, offer.public)

    def take(self, site: str, offer: KeyOffer) -> None:
        """`site` has joined with an offer that was checked.

        Raises:
            FusionMismatch: it had another key in this run, or another site has joined with this one.
        """
        self._check_key(site, offer.public)
        self._offers[site], self._known[site] = offer, offer.public

    def others(self, site: str) -> FusionKeys:
        """What `site` is sent: SP-11.18-7: "ordered by the names of the sites"."""
        return FusionKeys(tuple(offer for name, offer in sorted(self._offers.items()) if name != site))

    def _check_key(self, site: str, public: bytes) -> None:
        if self._known.get(site, public) != public:
            raise FusionMismatch(
                f"{site} has another fusion key than before in this run: it lost its run folder"
            )
        for other, key in self._known.items():
            if other != site and key == public:
                raise FusionMismatch(f"{site} sent the fusion key of {other} as its own")
