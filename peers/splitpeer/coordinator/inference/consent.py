"""Consent that is withdrawn while a run is served: what the coordinator keeps of the patient goes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from splitpeer.coordinator.exclusion import Exclusion
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.run import Run
from splitproto.causes import CONSENT

log = logging.getLogger(__name__)


class LateConsent:
    """What the sites of one run say of it (SP-11.17-7): on joining, asked about a patient, or of themselves.

    Args:
        run: the run.
        exclusion: of its patients.
    """

    def __init__(self, run: Run, exclusion: Exclusion) -> None:
        self._run, self._exclusion = run, exclusion
        self._said: dict[str, set[bytes]] = {}
        self._located: dict[str, set[bytes]] = {}
        self._strangers: set[str] = set()
        """Sites that have named patients of other sites."""
        self._heeded: dict[str, frozenset[bytes]] = {}
        self._reported: dict[str, frozenset[bytes]] = {}

    def note(self, site: str, key: bytes) -> None:
        """A site was asked about a patient, and says so."""
        self._said.setdefault(site, set()).add(key)

    def note_located(self, sites: Iterable[str], key: bytes) -> None:
        """These have images of a patient that fit together: from now on they may withdraw this patient's consent."""
        for site in sites:
            self._located.setdefault(site, set()).add(key)

    def news(self, dropped: frozenset[bytes]) -> Mapping[str, frozenset[bytes]]:
        """By site (empty: nobody's word), who has withdrawn and is not `done` with.

        Args:
            dropped: patients whom people have dropped here.
        """
        gone = {"": dropped}
        for site in self._run.team.sites:
            listed = {key for key, cause in site.unusable.items() if cause == CONSENT}
            gone[site.name] = self._own(site, listed | self._said.get(site.name, set()))
        new = {site: keys - self._heeded.get(site, frozenset()) for site, keys in gone.items()}
        self._reported = gone
        return {site: keys for site, keys in new.items() if keys}

    def done(self) -> None:
        """Nothing is kept any more of those whom `news` named last."""
        self._heeded = self._reported

    async def heed(self, news: Mapping[str, frozenset[bytes]]) -> None:
        """Patients of the run among these are out of it, and so are their predictions.

        Raises:
            DiskTrouble, ConfigError: something cannot be removed or recorded.
        """
        for site, keys in news.items():
            if not keys.isdisjoint(self._run.seating.filled):
                await self._exclusion.since_complete(site, keys)

    def _own(self, site: RemoteSite, gone: set[bytes]) -> frozenset[bytes]:
        """SP-11.13-12: "of a key that is no patient's of the site, it takes no notice"."""
        own = {*self._run.patients_of(site), *site.listed, *self._located.get(site.name, ())}
        if not gone <= own and site.name not in self._strangers:
            self._strangers.add(site.name)
            log.warning(
                "%s says that patients who are not its own have withdrawn consent: this is ignored",
                site.name,
            )
        return frozenset(gone & own)
