"""Seating: for every patient of a run which site fills which seat, and what follows for each batch.

It is decided once, when the run begins, and kept in its record: the first site by name that has a patient's seat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

from splitpeer.data.sampling import batch_digest
from splitpeer.federation.seats import Seats
from splitpeer.federation.terms import seat_descriptors
from splitpeer.training.split_round import Rows
from splitproto.messages import Forward
from splitproto.records import Job
from splitproto.tensors import Descriptor

Filled = Mapping[bytes, Mapping[str, str]]
"""Patient to seat to the site that fills it."""
Lists = Mapping[bytes, Collection[str]]
"""Patient to the seats that a site says it can fill."""


@dataclass(frozen=True)
class Part:
    """What one site does for one batch."""

    forward: Forward
    """With its own samples only."""
    rows: Mapping[str, Rows]
    """By seat, the samples that it sends; a seat without any is left out."""
    expected: tuple[Descriptor, ...]
    """Its tensors: names, shapes and dtypes."""

    def seats(self, left_out: Collection[str] = ()) -> frozenset[str]:
        """At which something that it sends is used, but for those `left_out`."""
        return frozenset(seat for seat, rows in self.rows.items() if rows.used and seat not in left_out)


class Seating:
    """Which site fills which seat of which patient in one run.

    Args:
        job: as the sites know it.
        seats: all of the job.
        filled: every patient of the run.
    """

    def __init__(self, job: Job, seats: Seats, filled: Filled) -> None:
        self.seats, self.filled = seats, filled
        self._job = job

    @classmethod
    def decide(
        cls, job: Job, seats: Seats, lists: Mapping[str, Lists], keys: Collection[bytes], least: int
    ) -> Seating:
        """For each of `keys`, the first site by name that lists a seat fills it.

        Args:
            lists: by site.
            least: patients with fewer seats are not in the run.
        """
        found: dict[bytes, dict[str, str]] = {}
        for key in sorted(keys):
            having = {
                seat: [site for site in seats.sites(seat) if seat in lists.get(site, {}).get(key, ())]
                for seat in seats.names
            }
            found[key] = {seat: sites[0] for seat, sites in having.items() if sites}
        return cls(job, seats, {key: filled for key, filled in found.items() if len(filled) >= least})

    # --- patients --------------------------------------------------------------------------------------

    @property
    def complete(self) -> frozenset[bytes]:
        """Patients with every seat."""
        return frozenset(key for key, filled in self.filled.items() if len(filled) == len(self.seats.names))

    def of(self, site: str) -> dict[bytes, frozenset[str]]:
        """The patients for which a site fills a seat, and which seats."""
        own = {
            key: frozenset(seat for seat, who in filled.items() if who == site)
            for key, filled in self.filled.items()
        }
        return {key: seats for key, seats in own.items() if seats}

    def seats_of(self, key: bytes, sites: Collection[str]) -> list[str]:
        """The seats of a patient that `sites` fill, in order."""
        return [seat for seat in self.seats.names if self.filled[key].get(seat) in sites]

    def fillers(self, seat: str) -> frozenset[str]:
        """Sites that fill a seat of some patient."""
        return frozenset(filled[seat] for filled in self.filled.values() if seat in filled)

    # --- the table: counts only ------------------------------------------------------------------------

    def counts(self) -> dict[str, dict[str, int]]:
        """By site and seat, how many patients the site fills."""
        own = Counter((site, seat) for filled in self.filled.values() for seat, site in filled.items())
        return {
            site: {seat: own[site, seat] for seat in seats}
            for site, seats in sorted(self.seats.filled.items())
        }

    def count(self, site: str, seat: str, patients: Collection[bytes]) -> int:
        """How many of these a site fills at a seat."""
        return sum(self.filled[key].get(seat) == site for key in patients)

    def with_seats(self) -> dict[int, int]:
        """How many patients have so many seats, most first."""
        return dict(sorted(Counter(map(len, self.filled.values())).items(), reverse=True))

    # --- batches ---------------------------------------------------------------------------------------

    def part(self, site: str, lists: Lists, forward: Forward) -> Part | None:
        """A site's part of a batch; None: it fills none of its samples.

        Args:
            lists: of the site, as it said last.
        """
        own = [place for place, sample in enumerate(forward.samples) if self._fills(site, sample.key)]
        if not own:
            return None
        rows: dict[str, Rows] = {}
        for seat in self.seats.of(site):
            keys = {place: forward.samples[place].key for place in own}
            mine = {place for place, key in keys.items() if self.filled[key].get(seat.name) == site}
            # Also what another site fills, if it is listed here: SP-11.8-5.
            sent = tuple(p for p, key in keys.items() if p in mine or seat.name in lists.get(key, ()))
            if sent:
                rows[seat.name] = Rows(sent, frozenset(sent) - mine)
        counts = {seat: len(of.samples) for seat, of in rows.items()}
        return Part(self._cut(forward, own), rows, seat_descriptors(self._job, self.seats.of(site), counts))

    def _fills(self, site: str, key: bytes) -> bool:
        return site in self.filled[key].values()

    def _cut(self, forward: Forward, places: Sequence[int]) -> Forward:
        """A batch's samples at these places; the batch itself where these are all."""
        if len(places) == len(forward.samples):
            return forward
        samples = tuple(forward.samples[place] for place in places)
        digest = batch_digest(forward.step, samples, forward.seed, places)
        return replace(forward, samples=samples, digest=digest, places=tuple(places))


class Parts(Sequence[Part]):
    """A site's parts of batches, made when asked for: what it lists may change with its links.

    Args:
        batches: in their order.
        cut: gives the site's part.

    Raises:
        LookupError: when a batch is asked for of which the site fills nothing.
    """

    def __init__(self, batches: Sequence[Forward], cut: Callable[[Forward], Part | None]) -> None:
        self._batches, self._cut = batches, cut

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Part: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Part]: ...
    def __getitem__(self, index: int | slice) -> Part | Sequence[Part]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if (part := self._cut(self._batches[index])) is None:
            raise LookupError(f"batch {index} holds no sample of the site")
        return part
