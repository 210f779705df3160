"""Matching: the patients of a run, which site fills which of their seats, and why there may be too few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitpeer.coordinator.labels import LabelsAtSite, RunLabels
from splitpeer.coordinator.record import RunRecord
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.daemon import happenings as h
from splitpeer.data.geometry import Geometry, compare_geometry
from splitpeer.data.sampling import split_patients
from splitpeer.errors import DataError, JobFailed
from splitpeer.federation.files import counted
from splitpeer.federation.overlap import ADVICE, pairwise
from splitpeer.federation.seating import Lists, Seating
from splitpeer.federation.seats import Seats
from splitpeer.settings.job import JobConfig
from splitproto.records import Job


class Matching:
    """Compares what the parties have.

    Args:
        job: as the sites know it.
        settings: `job.toml`.
        seats: of the job.
        labels: of whom there are masks.
        record: of the run.
    """

    def __init__(
        self,
        job: Job,
        settings: JobConfig,
        seats: Seats,
        labels: RunLabels,
        record: RunRecord,
    ) -> None:
        self._job, self._settings, self._seats = job, settings, seats
        self._labels, self._record = labels, record

    def least(self, here: Sequence[RemoteSite]) -> int:
        """Seats that a patient needs: all that the sites that take part fill, unless the job says fewer."""
        filled = {seat for site in here for seat in self._seats.filled[site.name]}
        return self._settings.data.min_seats or len(filled)

    def having(self, sites: Sequence[RemoteSite]) -> dict[str, set[bytes]]:
        """Whom each party has, usable or not."""
        return {"labels": set(self._labels.keys())} | {
            site.name: {*site.patients, *site.unusable} for site in sites
        }

    def few(self, having: Mapping[str, set[bytes]], site: str) -> bool:
        """Whether a site shares so few patients with the labels that something is wrong, as far as `having` tells."""
        least = self._settings.data.min_patients if self._all_of_one() else 1
        return len(having["labels"] & having[site]) < least

    def match(
        self,
        here: Sequence[RemoteSite],
        sites: Sequence[RemoteSite],
        report: h.Reporter,
        lists: Mapping[str, Lists] | None = None,
    ) -> tuple[Seating, list[bytes], list[bytes]]:
        """Seating, training patients, validation patients: of the resumed run, or decided now.

        Args:
            here: the sites that the work at hand counts on.
            sites: all; they must hold their patients from now on.
            report: told the table.
            lists: by site, the seats that it could fill, where none is here to say so; then `here` does not count.

        Raises:
            JobFailed: too few patients, or not on the same grids; or one of the run's is not there any more.
        """
        known = self._labels.usable(report)
        if lists is not None:
            here = ()
        if self._record.patients:
            seating = Seating(self._job, self._seats, self._record.patients)
            self._check_kept(seating, known, here)
        else:
            offered = lists or {site.name: site.lists for site in here}
            least = self.least(here if lists is None else sites)
            seating = Seating.decide(self._job, self._seats, offered, known, least)
        if len(seating.filled) < self._settings.data.min_patients:
            report(self._table(seating, known, here, []))
            raise JobFailed(self._too_few(seating, known, here))
        grids = {
            name: {key: grid for key, grid in has.items() if key in seating.filled}
            for name, has in [("labels", known), *((site.name, site.patients) for site in here)]
        }
        try:
            compare_geometry(grids)
        except DataError as error:
            raise JobFailed(str(error)) from error
        for site in sites:
            fills = seating.of(site.name)
            all_of_them = isinstance(self._labels, LabelsAtSite) and site is self._labels.site
            own = {key: grid for key, grid in grids["labels"].items() if key in fills or all_of_them}
            site.expect(own, fills, len(seating.filled))
        training, held_out = self._split(seating)
        report(self._table(seating, known, here, held_out))
        return seating, training, held_out

    def _split(self, seating: Seating) -> tuple[list[bytes], list[bytes]]:
        """Training and held-out patients. A resumed run keeps its own, whatever masks were deleted since."""
        if self._record.patients:
            held_out = self._record.held_out
            return sorted(seating.filled.keys() - held_out), sorted(held_out)
        data, seed = self._settings.data, self._settings.job.seed
        return split_patients(sorted(seating.filled), data.validation, seed, self._labels.subjects())

    def _check_kept(
        self, seating: Seating, known: Mapping[bytes, Geometry], here: Sequence[RemoteSite]
    ) -> None:
        """Also where a site is absent: the run keeps its patients, but for those that are withdrawn, or will be.

        Raises:
            JobFailed: a site lacks what it had when the run began.
        """
        out = {w.key for w in self._record.withdrawn}.union(
            self._labels.unusable, *(site.unusable for site in here)
        )
        lost = seating.filled.keys() - known.keys()
        for site in here:
            lost |= {key for key, s in seating.of(site.name).items() if not s <= set(site.lists.get(key, ()))}
        if count := len(lost - out):
            raise JobFailed(
                f"{count} of the run's {len(seating.filled)} patients lack an image or a mask that they had: "
                "bring them back, or start with --fresh"
            )

    def _table(
        self,
        seating: Seating,
        known: Mapping[bytes, Geometry],
        here: Sequence[RemoteSite],
        held_out: Sequence[bytes],
    ) -> h.PatientsMatched:
        complete = seating.complete
        return h.PatientsMatched(
            len(seating.filled),
            len(known),
            {site.name: len(site.patients) for site in here},
            len(complete),
            len(held_out),
            len(complete.intersection(held_out)),
            self._seats.names,
            seating.with_seats(),
            seating.counts(),
        )

    def _too_few(self, seating: Seating, known: Mapping[bytes, Geometry], here: Sequence[RemoteSite]) -> str:
        have = [(site.name, site.patients, site.unusable) for site in here]
        counts = ", ".join(
            f"{name} {len(usable)}" + (f" and not usable {counted(bad.values())}" if bad else "")
            for name, usable, bad in [("labels", known, self._labels.unusable), *have]
        )
        found, least, seats = len(seating.filled), self._settings.data.min_patients, self.least(here)
        common = f"in common: {pairwise(self.having(here))}"
        if self._all_of_one():
            return f"{found} patients are at all sites, {least} are needed ({counts}; {common}): {ADVICE}"
        lists = {site.name: site.lists for site in here}
        anyhow = Seating.decide(self._job, self._seats, lists, known, 1).with_seats()
        with_seats = ", ".join(f"{n} of {len(self._seats.names)} seats: {p}" for n, p in anyhow.items())
        who = f"{found} patients have" if found else "no patient has"
        fewer = "; or lower [data] min_seats" if seats > 1 else ""
        return (
            f"{who} {seats} of {len(self._seats.names)} seats, {least} are needed (patients with "
            f"{with_seats or 'any seat: 0'}; {counts}; {common}): {ADVICE}{fewer}"
        )

    def _all_of_one(self) -> bool:
        """Each seat has one site, each site one seat, and all are needed."""
        seats = self._seats
        least = self._settings.data.min_seats or len(seats.names)
        filling = [site for site, filled in seats.filled.items() if filled]
        return least == len(seats.names) == len(filling) and all(
            len(seats.sites(seat)) == 1 for seat in seats.names
        )
