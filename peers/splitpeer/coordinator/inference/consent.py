"""Consent that is withdrawn while a run is served: what the coordinator keeps of the patient goes."""

from __future__ import annotations

from collections.abc import Mapping

from splitpeer.coordinator.exclusion import Exclusion
from splitpeer.coordinator.run import Run
from splitproto.causes import CONSENT


class LateConsent:
    """What the sites of one run say of it (SP-11.17-7): on joining, asked about a patient, or of themselves.

    Args:
        run: the run.
        exclusion: of its patients.
    """

    def __init__(self, run: Run, exclusion: Exclusion) -> None:
        self._run, self._exclusion = run, exclusion
        self._said: dict[str, set[bytes]] = {}
        self._heeded: dict[str, frozenset[bytes]] = {}

    def note(self, site: str, key: bytes) -> None:
        """A site was asked about a patient, and says so."""
        self._said.setdefault(site, set()).add(key)

    def news(self, dropped: frozenset[bytes]) -> Mapping[str, frozenset[bytes]]:
        """By site (empty: nobody's word), who has withdrawn since this was asked last.

        Args:
            dropped: patients whom people have dropped here.
        """
        gone = {"": dropped}
        for site in self._run.team.sites:
            listed = {key for key, cause in site.unusable.items() if cause == CONSENT}
            gone[site.name] = frozenset(listed | self._said.get(site.name, set()))
        new = {site: keys - self._heeded.get(site, frozenset()) for site, keys in gone.items()}
        self._heeded = gone
        return {site: keys for site, keys in new.items() if keys}

    async def heed(self, news: Mapping[str, frozenset[bytes]]) -> None:
        """Patients of the run among these are out of it, and so are their predictions.

        Raises:
            DiskTrouble, ConfigError: something cannot be removed or recorded.
        """
        for site, keys in news.items():
            if not keys.isdisjoint(self._run.seating.filled):
                await self._exclusion.since_complete(site, keys)
