"""Inference in a run with frozen encoders: each window of a patient is released once, kept, and not asked for again
while it is there (SP-11.19-14). A patient of the run is answered from its feature bank.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import count

import numpy as np

from splitpeer.coordinator.frozen.features import Features
from splitpeer.coordinator.frozen.questions import forward_of
from splitpeer.coordinator.frozen.room import RequestRoom
from splitpeer.coordinator.inference.locating import (
    NO_PART,
    Again,
    NoSegmentation,
    Sites,
    check_seats,
    fitting,
    locating,
    seated,
    seats_of_a_site,
    unfilled,
)
from splitpeer.coordinator.inference.requests import InferenceRequest
from splitpeer.coordinator.inference.segmenting import NOT_FINITE, PatientSegmenter, Prepared, told_lost
from splitpeer.coordinator.inference.site import infer
from splitpeer.coordinator.remote_site import RemoteSite, Sent
from splitpeer.coordinator.run import Run, finite
from splitpeer.daemon import happenings as h
from splitpeer.data.geometry import Geometry, differences
from splitpeer.data.sampling import batch_digest
from splitpeer.data.task import Task
from splitpeer.errors import DataError, JobFailed
from splitpeer.federation.inference import questions
from splitpeer.federation.seating import Parts, Seating
from splitpeer.federation.seats import by_seat
from splitpeer.federation.terms import cut_descriptors, seat_descriptors
from splitpeer.logs import handle
from splitpeer.storage.bank import ALL_SITES, Bank, BankEntry, Contents
from splitpeer.storage.request_banks import RequestBanks
from splitpeer.training.forms import activations_form
from splitpeer.training.split_round import THE_SUM
from splitpeer.training.windows import window_origins
from splitproto.causes import CONSENT
from splitproto.fusion import CHECK
from splitproto.messages import Forward, Segmented, Unsegmented
from splitproto.records import Missing, Patient, Sample
from splitproto.seats import tensor_name
from splitproto.tensors import Array

CACHE_MIB = 256
UNWILLING = ("refused", NO_PART)
"""Of a site with one of these causes, nothing that it released for another request is used."""
OTHER_GRID = "what it released for an earlier request lies on another grid, and each window leaves once"


class Shelf:
    """Several banks, read as one."""

    def __init__(self, banks: Sequence[Bank]) -> None:
        first = banks[0].contents
        self._of = {(one.site, one.number): bank for bank in banks for one in bank.contents.releases}
        self.contents = Contents(
            first.run,
            first.terms,
            first.precision,
            first.weights,
            tuple(one for bank in banks for one in bank.contents.releases),
        )

    def windows(self, release: BankEntry, row: int) -> dict[int, dict[str, np.ndarray]]:
        """See `Bank.windows`."""
        return self._of[release.site, release.number].windows(release, row)


class BankSegmenter(PatientSegmenter):
    """Segments with a run's bank, and with what sites release of other patients.

    Args:
        run, task, reachable: see `PatientSegmenter`.
        bank: of the run, when it is there.
        key: of the bank; empty: it is not encrypted.
    """

    def __init__(
        self,
        run: Run,
        task: Task,
        reachable: Callable[[RemoteSite], Awaitable[str]],
        bank: Callable[[], Bank | None],
        key: bytes,
    ) -> None:
        super().__init__(run, task, reachable)
        self._bank = bank
        self._requested = RequestBanks(run.files.checkpoints, key)
        self._room = RequestRoom(run, self._requested, self._report)
        self._next: int | None = None

    async def clear_up(self) -> None:
        """See `PatientSegmenter`."""
        await self._room.clear_old()

    async def segment(
        self, request: InferenceRequest, progress: Callable[[int, int], None]
    ) -> Segmented | Unsegmented:
        """See `PatientSegmenter`."""
        outcome = await super().segment(request, progress)
        await self._room.clear_after(request.asked.key, cancelled=request.cancelled)
        return outcome

    async def _prepared(self, request: InferenceRequest, lost: dict[str, str]) -> Prepared:
        """As for any run; at the end, the bank holds all windows."""
        run, asked, main = self._run, request.asked, self._bank()
        if main is None:
            raise NoSegmentation("failed", "the run has no feature bank yet")
        banks, ours = [main], asked.key in run.seating.filled
        if ours and asked.key in self._exclusion.keys | main.dropped:
            raise _no_more()
        # Nobody else need be asked of a patient whom the bank holds.
        some = [request.site] if ours else [site.name for site in run.team.sites]
        sites = await self._locator.locate(request, lost, some)
        await self._heed_consent(sites)
        grid = fitting(request, sites, self._octets_per_voxel(asked.want))
        self._consent.note_located(sites.grids(), asked.key)
        if ours:
            await self._check_grid(asked.key, sites.grids()[request.site], main, request.site)
            seating, missing = run.seating, unfilled(asked.key, run.seating, sites)
            check_seats(run, asked.require, seating.filled[asked.key], missing)
        else:
            seating, missing, banks = await self._released(request, grid, sites, lost, main)
        features = Features(run.job, Shelf(banks), seating, CACHE_MIB)
        forwards = questions("release", 0, self._windows(asked.key, grid), partial(next, count()))

        async def looked_up(index: int) -> np.ndarray:
            found: np.ndarray = await run.computed(
                self._decoded, features, forwards[index], what="windows of a patient"
            )
            return found

        return Prepared(grid, missing, forwards, looked_up)

    def _decoded(self, features: Features, forward: Forward) -> np.ndarray:
        half = self._run.half
        activations, _ = features.batch(forward)
        return finite(half.predict(activations, [seat for seat in half.seats if seat not in activations]))

    async def _heed_consent(self, sites: Sites) -> None:
        """SP-11.17-7. Raises NoSegmentation."""
        if CONSENT in sites.causes.values():
            await self.heed()
            raise _no_more()

    def _dropped(self) -> frozenset[bytes]:
        main = self._bank()
        return frozenset() if main is None else main.dropped - self._exclusion.keys

    async def _forget(self, news: Mapping[str, frozenset[bytes]]) -> None:
        await self._remove(frozenset().union(*news.values()))
        await super()._forget(news)

    async def _remove(self, patients: Collection[bytes]) -> None:
        """All that any site has released of these, for the run or for requests, is removed for good.

        Raises:
            DiskTrouble, ConfigError: something is left; the next start removes it.
            DataError: an index is damaged.
        """
        gone = await self._run.on_disk(self._removed, patients, what="releases to be removed")
        if gone:
            run, handles = self._run.files.run.hex(), ", ".join(sorted(map(handle, gone)))
            self._report(h.ReleasesRemoved(run, handles))

    def _removed(self, patients: Collection[bytes]) -> frozenset[bytes]:
        gone, main = self._requested.drop(patients), self._bank()
        if main is not None:
            ours = {one.key for one in main.contents.releases}.intersection(patients) - main.dropped
            main.drop(patients)
            gone |= ours
        return gone

    async def _check_grid(self, key: bytes, grid: Geometry, main: Bank, site: str) -> None:
        """Raises NoSegmentation: the image of a patient of the run is not where it was."""
        run = self._run
        try:
            then = await run.on_disk(run.labels.geometry, key, what="the grid of a patient's mask")
        except DataError:
            # The mask is at a site that is away, or has been removed since: the windows are what is known.
            then = grid
        if differences(then, grid) or not self._covers(main, key, grid):
            raise NoSegmentation(
                "misaligned",
                f"the image of the patient at {site} is on another grid than in the run, and only a new run can "
                "see it there: bring the image back to the grid that it had",
            )

    def _covers(self, bank: Bank, key: bytes, grid: Geometry) -> bool:
        """Whether the windows of a patient in a bank are those of a grid."""
        overlap, _ = self._run.settings.windows_of_inference()
        held = {origin for one in bank.contents.releases if one.key == key for origin in one.origins}
        return held == set(window_origins(grid.shape, self._window, overlap))

    # --- patients who are not in the run's bank --------------------------------------------------------------

    async def _released(
        self,
        request: InferenceRequest,
        grid: Patient,
        sites: Sites,
        lost: dict[str, str],
        main: Bank,
    ) -> tuple[Seating, tuple[Missing, ...], list[Bank]]:
        """Have all windows of the patient released that were not before, and keep them."""
        run, key = self._run, request.asked.key
        kept = await run.on_disk(self._requested.of, key, what="what was released of a patient")
        if any(bank.dropped for bank in kept.values()):
            # SP-11.17-4: no site would release these windows again.
            raise _no_more()
        place = sites.grids()[request.site]
        elsewhere = {name for name, bank in kept.items() if not self._fits(bank, key, place)}
        if ALL_SITES in elsewhere:
            raise NoSegmentation(
                "misaligned", f"all sites: {OTHER_GRID}: only a new run can segment the patient"
            )
        lists = {site.name: {key: seats_of_a_site(site, p)} for site, p in sites.located.items()}
        for name in elsewhere:
            # Whichever grid is right: that of one site must not spoil the patient for the others.
            lists.pop(name, None)
            sites.causes[name] = OTHER_GRID
        here = {site.name for site in sites.located}
        for name, bank in kept.items():
            if name == ALL_SITES or name in elsewhere or sites.causes.get(name) in UNWILLING:
                continue
            # Of a site that cannot be asked, what it has released is all there is.
            if name in here or not await run.on_disk(bank.missing, what="what was released of a patient"):
                lists[name] = {
                    key: tuple(by_seat(bank.contents.releases[0].shapes, run.seating.seats.of(name)))
                }
        seating = seated(run, key, lists)
        missing = unfilled(key, seating, sites)
        check_seats(run, request.asked.require, seating.filled.get(key, {}), missing)
        users = [site for site in run.team.sites if site.name in seating.filled[key].values()]
        windows = self._windows(key, grid)
        together = run.job.fusion is not None
        names = [ALL_SITES] if together else [site.name for site in users]
        first = await run.on_disk(self._numbers, main, what="numbers of earlier releases")
        new = {
            name: self._planned(name, key, place, windows, lists, main, first + turn * len(windows))
            for turn, name in enumerate(name for name in names if name not in kept)
        }
        await self._room.make(key, [kept[name] for name in names if name in kept], [*new.values()])
        # Whatever becomes of them, no number is used twice.
        self._next = first + len(new) * len(windows)
        for name, contents in new.items():
            kept[name] = await run.on_disk(
                self._requested.create, name, key, contents, what="what is released of a patient"
            )
        for name in names:
            asked = users if together else [site for site in users if site.name == name]
            await self._collect(request, kept[name], asked, seating, lists, lost)
        return seating, missing, [kept[name] for name in names]

    async def _collect(
        self,
        request: InferenceRequest,
        bank: Bank,
        asked: Sequence[RemoteSite],
        seating: Seating,
        lists: Mapping[str, Mapping[bytes, tuple[str, ...]]],
        lost: dict[str, str],
    ) -> None:
        """SP-11.17-5: only what is missing, under the numbers that were chosen before."""
        run, together = self._run, self._run.job.fusion is not None
        missing = await run.on_disk(bank.missing, what="what was released of a patient")
        if not missing:
            return
        self.settling.note_asked()
        forwards = [forward_of(one) for one in missing]
        parts = {site: Parts(forwards, partial(seating.part, site.name, lists[site.name])) for site in asked}
        for index, entry in enumerate(missing):
            self._check_cancelled(request)
            answers = await self._ask(
                {site: infer(site, parts[site], index, index + 1, locating(request)) for site in asked}
            )
            arrived = {site: one for site, one in answers.items() if isinstance(one, Sent)}
            if len(arrived) < len(asked):
                told_lost(answers, lost)
                raise Again
            if together:
                arrays, _ = await run.computed(run.at_places, arrived, what="the sum of a release")
                tensors: Mapping[str, Array] = arrays[THE_SUM]
            else:
                (only,) = arrived.values()
                tensors = only.tensors
            kept = {name: tensors[name] for name in entry.shapes}
            if not await run.on_disk(self._put, bank, entry, kept, what="a release"):
                if together:
                    raise JobFailed("a sum of what sites released is not finite numbers")
                lost[asked[0].name] = NOT_FINITE
                raise Again
            request.windows += len(entry.origins)

    def _put(self, bank: Bank, entry: BankEntry, tensors: Mapping[str, Array]) -> bool:
        """Whether they are numbers; what are none is not kept."""
        read = activations_form(self._run.job).from_wire(tensors)
        if not all(np.isfinite(array).all() for array in read.values()):
            return False
        bank.put(entry, tensors)
        return True

    # --- files -----------------------------------------------------------------------------------------------

    def _fits(self, bank: Bank, key: bytes, grid: Geometry) -> bool:
        """Whether what a bank holds of a patient was made on this grid."""
        shape, *places = bank.contents.grid or ((),)
        if len(places) != 4:
            return False
        x, y, z = (int(length) for length in shape)
        spacing, directions, origin, stored = places
        there = Geometry((x, y, z), _three(spacing), directions, _three(origin), _three(stored))
        return not differences(there, grid) and self._covers(bank, key, grid)

    def _planned(
        self,
        name: str,
        key: bytes,
        grid: Geometry,
        windows: Sequence[tuple[Sample, ...]],
        lists: Mapping[str, Mapping[bytes, tuple[str, ...]]],
        main: Bank,
        first: int,
    ) -> Contents:
        """Written before the first question is asked: what a number stands for never changes (SP-11.17-3).

        Args:
            first: number of the first question.
        """
        releases = tuple(
            BankEntry(
                name,
                first + number,
                key,
                tuple(sample.origin for sample in some),
                batch_digest(0, some, None),
                self._shapes(name, key, len(some), lists),
            )
            for number, some in enumerate(windows)
        )
        of = main.contents
        where = (grid.shape, grid.spacing, grid.directions, grid.origin, grid.stored)
        return Contents(of.run, of.terms, of.precision, of.weights, releases, where)

    def _numbers(self, main: Bank) -> int:
        """The first number that no question of this run has had."""
        if self._next is None:
            used = max((one.number for one in main.contents.releases), default=-1)
            self._next = max(used, self._requested.last_number()) + 1
        return self._next

    def _shapes(
        self, name: str, key: bytes, samples: int, lists: Mapping[str, Mapping[bytes, tuple[str, ...]]]
    ) -> dict[str, tuple[int, ...]]:
        job, seats = self._run.job, self._run.seating.seats
        if name == ALL_SITES:
            described = seat_descriptors(job, seats.seats, dict.fromkeys(seats.names, samples))
            return {one.name: one.shape for one in described if one.name != CHECK}
        offered = seats.of(name)
        return {
            tensor_name(seat.name, one.name, offered): one.shape
            for seat in offered
            if seat.name in lists[name][key]
            for one in cut_descriptors(job, samples)
        }


def _no_more() -> NoSegmentation:
    """One reason for consent that was withdrawn at whichever site, and for what was deleted by hand (SP-11.19-7)."""
    return NoSegmentation(
        "unusable",
        "this run segments the patient no more, a new run may; the coordinator's log and trail say why",
    )


def _three(numbers: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = numbers
    return x, y, z
