"""Keys of secure fusion on their way from site to site (SP-11.18-7): the coordinator passes them on, and holds none."""

from __future__ import annotations

from splitproto import partners
from splitproto.errors import FusionMismatch
from splitproto.identity import Identity
from splitproto.messages import FusionKeys, Job, KeyOffer


class Relay:
    """Of one run.

    Args:
        run: its id.
        job: with secure fusion.
    """

    def __init__(self, run: bytes, job: Job) -> None:
        self._run, self._terms = run, partners.terms_digest(job)
        self._offers: dict[str, KeyOffer] = {}

    def check(self, site: str, offer: KeyOffer) -> None:
        """Whether `offer`, heard on a link of `site`, may be passed on.

        Raises:
            FusionMismatch: it is another site's, is not signed by it for this run, or has another key than before.
        """
        try:
            identity = Identity.from_certificate(offer.chain[0])
        except Exception:
            raise FusionMismatch(f"the certificate with the fusion key of {site} cannot be read") from None
        if identity.site != site:
            raise FusionMismatch(f"{site} sent the fusion key of site {identity.site}")
        partners.check_signature(offer, identity, self._run, self._terms)
        before = self._offers.get(site)
        if before is not None and before.public != offer.public:
            raise FusionMismatch(
                f"{site} has another fusion key than before in this run: it lost its run folder"
            )

    def take(self, site: str, offer: KeyOffer) -> None:
        """`site` has joined with it."""
        self._offers[site] = offer

    def others(self, site: str) -> FusionKeys:
        """What `site` is sent: SP-11.18-7: "ordered by the names of the sites"."""
        return FusionKeys(tuple(offer for name, offer in sorted(self._offers.items()) if name != site))
