"""Where a run's masks are: here, or at a site that computes loss and scores with them (SP-11.20).

What only needs to know who has a mask, and on which grid, asks `RunLabels`; the values are at one of the two alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.daemon import happenings as h
from splitpeer.data.geometry import Geometry
from splitpeer.data.volumes import Volumes, not_held
from splitpeer.federation.files import look
from splitproto.records import Unusable


class MasksUnusable(Exception):
    """SP-11.20-8: the site of the labels cannot use masks of these patients."""

    def __init__(self, site: RemoteSite, patients: Sequence[Unusable]) -> None:
        super().__init__(f"{len(patients)} masks at {site.name}")
        self.site, self.patients = site, patients


class RunLabels(Protocol):
    """Of whom there are masks."""

    @property
    def unusable(self) -> Mapping[bytes, str]:
        """Patients whose masks cannot be used, and why, as far as that is told here."""
        ...

    def keys(self) -> list[bytes]:
        """Who has a mask, usable or not."""
        ...

    def geometry(self, key: bytes) -> Geometry:
        """The grid of a mask."""
        ...

    def usable(self, report: h.Reporter) -> dict[bytes, Geometry]:
        """The grids of all that can be used. Raises DataError: none can."""
        ...

    def subjects(self) -> Mapping[bytes, str]:
        """The person behind each key, in whatever way persons are named."""
        ...


class OwnLabels:
    """The coordinator's own.

    Args:
        volumes: the masks.
        unusable: those that are found go there.
    """

    def __init__(self, volumes: Volumes, unusable: dict[bytes, str]) -> None:
        self.volumes, self._unusable = volumes, unusable

    @property
    def unusable(self) -> Mapping[bytes, str]:
        """See `RunLabels`."""
        return self._unusable

    def keys(self) -> list[bytes]:
        """See `RunLabels`."""
        return self.volumes.keys()

    def geometry(self, key: bytes) -> Geometry:
        """See `RunLabels`."""
        return self.volumes.geometry(key)

    def usable(self, report: h.Reporter) -> dict[bytes, Geometry]:
        """See `RunLabels`."""
        # SP-11.13-11.
        return look(self.volumes, self._unusable, report)

    def subjects(self) -> Mapping[bytes, str]:
        """See `RunLabels`."""
        return self.volumes.subjects()


class LabelsAtSite:
    """SP-11.20-3: those that a site listed; it says itself whose it cannot use.

    Args:
        site: holds them.
    """

    def __init__(self, site: RemoteSite) -> None:
        self.site = site

    @property
    def unusable(self) -> Mapping[bytes, str]:
        """See `RunLabels`: the site's own are counted with its other files."""
        return {}

    def keys(self) -> list[bytes]:
        """See `RunLabels`."""
        return sorted(self.site.people)

    def geometry(self, key: bytes) -> Geometry:
        """See `RunLabels`."""
        if key not in self.site.people:
            raise not_held(key)
        return self.site.patients[key]

    def usable(self, report: h.Reporter) -> dict[bytes, Geometry]:
        """See `RunLabels`."""
        return {key: self.site.patients[key] for key in self.keys()}

    def subjects(self) -> Mapping[bytes, str]:
        """See `RunLabels`."""
        return {key: person.hex() for key, person in self.site.people.items()}
