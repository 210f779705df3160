"""Inference in a run with frozen encoders: each window of a patient is released once, kept, and never asked for again
(SP-11.19-14). A patient of the run is answered from its feature bank.
"""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from splitpeer.coordinator.frozen.features import Features
from splitpeer.coordinator.frozen.questions import forward_of, terms
from splitpeer.coordinator.inference.requests import InferenceRequest
from splitpeer.coordinator.inference.segmenting import (
    NO_PART,
    Again,
    NoSegmentation,
    PatientSegmenter,
    Sites,
    each,
    locating,
    seats_of_a_site,
    told_lost,
)
from splitpeer.coordinator.remote_site import RemoteSite, Sent
from splitpeer.coordinator.run import Run, finite
from splitpeer.data.sampling import batch_digest
from splitpeer.data.task import Task
from splitpeer.errors import DataError
from splitpeer.federation.inference import Volume, questions, task_on_wire, windows_of
from splitpeer.federation.precision import from_wire
from splitpeer.federation.seating import Parts, Seating
from splitpeer.federation.seats import by_seat
from splitpeer.federation.terms import cut_descriptors, seat_descriptors
from splitpeer.storage.bank import ALL_SITES, Bank, BankEntry, Contents
from splitpeer.training.split_round import THE_SUM
from splitproto.causes import CONSENT
from splitproto.fusion import CHECK
from splitproto.messages import Forward, Missing, Patient, Sample, Segmented
from splitproto.seats import tensor_name
from splitproto.tensors import Array

FOLDER = "inference"
"""Next to the run's bank: a bank for each patient and site that was released for a request."""
CACHE_MIB = 256
UNWILLING = ("refused", NO_PART)
"""Of a site with one of these causes, nothing that it released for another request is used."""


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

    def get(self, release: BankEntry) -> dict[str, np.ndarray]:
        """See `Bank.get`."""
        return self._of[release.site, release.number].get(release)


class BankSegmenter(PatientSegmenter):
    """Segments with a run's bank, and with what sites release of other patients.

    Args:
        run, task, reachable: see `PatientSegmenter`.
        bank: of the run, when it is there.
        key: of the bank; empty: it is not encrypted.
        out: patients that the run is made without.
    """

    def __init__(
        self,
        run: Run,
        task: Task,
        reachable: Callable[[RemoteSite], Awaitable[str]],
        bank: Callable[[], Bank | None],
        key: bytes,
        out: Callable[[], frozenset[bytes]],
    ) -> None:
        super().__init__(run, task, reachable)
        self._bank, self._key, self._out = bank, key, out
        self._next: int | None = None

    async def _attempt(
        self,
        request: InferenceRequest,
        progress: Callable[[int, int], None],
        lost: dict[str, str],
        involved: list[RemoteSite],
    ) -> Segmented:
        run, asked, main = self._run, request.asked, self._bank()
        if main is None:
            raise NoSegmentation("failed", "the run has no feature bank yet")
        banks, ours = [main], asked.key in run.seating.filled
        if ours and asked.key in self._out() | main.dropped:
            raise NoSegmentation("unusable", "the run is made without this patient")
        # Nobody else need be asked of a patient whom the bank holds.
        some = [request.site] if ours else [site.name for site in run.team.sites]
        sites = await self._locate(request, lost, some)
        await self._heed_consent(asked.key, sites, main)
        grid = self._fitting(request, sites)
        if ours:
            seating, missing = run.seating, self._missing(asked.key, run.seating, sites)
            self._check_seats(asked.require, seating.filled[asked.key], missing)
        else:
            seating, missing, banks = await self._released(request, grid, sites, lost, involved, main)
        overlap, batch = run.settings.evaluation.overlap, run.settings.evaluation.batch
        windows = windows_of(asked.key, grid.shape, self._window, overlap, batch)
        features = Features(run.job, Shelf(banks), seating, CACHE_MIB)
        volume, done, total = Volume(grid.shape, self._window), 0, sum(map(len, windows))
        for forward in questions("release", 0, windows, partial(next, count())):
            self._check_cancelled(request)
            progress(done, total)
            probabilities = await run.computed(self._decoded, features, forward, what="a segmentation")
            await run.computed(volume.add, forward.samples, probabilities, what="a segmentation")
            done += len(forward.samples)
        tensors = await run.computed(self._result, volume, asked.want, what="the segmentation")
        model, task = await self._digest(), task_on_wire(self._task)
        seats = run.seating.seats.seats
        return Segmented(asked.request, run.committed, model, seats, missing, grid, task, tensors)

    def _decoded(self, features: Features, forward: Forward) -> np.ndarray:
        half = self._run.half
        activations, _ = features.batch(forward)
        return finite(half.predict(activations, [seat for seat in half.seats if seat not in activations]))

    async def _heed_consent(self, key: bytes, sites: Sites, main: Bank) -> None:
        """SP-11.17-7: nothing is kept of a patient who has withdrawn consent. Raises NoSegmentation."""
        if CONSENT not in sites.causes.values():
            return
        if key in self._run.seating.filled:
            await self._run.on_disk(main.drop, [key], what="the feature bank")
        await self._run.on_disk(self._forget, key, what="what was released of a patient")
        raise NoSegmentation("unusable", "the patient has withdrawn consent")

    # --- patients who are not in the run's bank --------------------------------------------------------------

    async def _released(
        self,
        request: InferenceRequest,
        grid: Patient,
        sites: Sites,
        lost: dict[str, str],
        involved: list[RemoteSite],
        main: Bank,
    ) -> tuple[Seating, tuple[Missing, ...], list[Bank]]:
        """Have all windows of the patient released that were not before, and keep them."""
        run, key = self._run, request.asked.key
        kept = await run.on_disk(self._kept, key, what="what was released of a patient")
        lists = {site.name: {key: seats_of_a_site(site, p)} for site, p in sites.located.items()}
        for name, bank in kept.items():
            if name != ALL_SITES and sites.causes.get(name) not in UNWILLING:
                lists[name] = {
                    key: tuple(by_seat(bank.contents.releases[0].shapes, run.seating.seats.of(name)))
                }
        seating = self._seated(key, lists)
        missing = self._missing(key, seating, sites)
        self._check_seats(request.asked.require, seating.filled.get(key, {}), missing)
        users = [site for site in run.team.sites if site.name in seating.filled[key].values()]
        overlap, batch = run.settings.evaluation.overlap, run.settings.evaluation.batch
        windows = windows_of(key, grid.shape, self._window, overlap, batch)
        together = run.job.fusion is not None
        names = [ALL_SITES] if together else [site.name for site in users]
        for name in names:
            if name not in kept:
                kept[name] = await run.on_disk(
                    self._created, name, key, windows, lists, main, what="what is released of a patient"
                )
        for name in names:
            asked = users if together else [site for site in users if site.name == name]
            await self._collect(request, kept[name], asked, seating, lists, lost, involved)
        return seating, missing, [kept[name] for name in names]

    async def _collect(
        self,
        request: InferenceRequest,
        bank: Bank,
        asked: Sequence[RemoteSite],
        seating: Seating,
        lists: Mapping[str, Mapping[bytes, tuple[str, ...]]],
        lost: dict[str, str],
        involved: list[RemoteSite],
    ) -> None:
        """SP-11.17-5: only what is missing, under the numbers that were chosen before."""
        run = self._run
        missing = await run.on_disk(bank.missing, what="what was released of a patient")
        if not missing:
            return
        involved.extend(asked)
        forwards = [forward_of(one) for one in missing]
        parts = {site: Parts(forwards, partial(seating.part, site.name, lists[site.name])) for site in asked}
        for index, entry in enumerate(missing):
            self._check_cancelled(request)
            answers = await each(
                {site: site.infer(parts[site], index, index + 1, locating(request)) for site in asked}
            )
            arrived = {site: one for site, one in answers.items() if isinstance(one, Sent)}
            if len(arrived) < len(asked):
                told_lost(answers, lost)
                raise Again
            if run.job.fusion is not None:
                arrays, _ = await run.computed(run.at_places, arrived, what="the sum of a release")
                tensors: Mapping[str, Array] = arrays[THE_SUM]
            else:
                (only,) = arrived.values()
                tensors = only.tensors
            kept = {name: tensors[name] for name in entry.shapes}
            await run.on_disk(self._put, bank, entry, kept, what="a release")
            request.windows += len(entry.origins)

    def _put(self, bank: Bank, entry: BankEntry, tensors: Mapping[str, Array]) -> None:
        for array in from_wire(tensors, self._run.job.precision).values():
            if not np.isfinite(array).all():
                raise DataError("a site released activations that are not finite numbers")
        bank.put(entry, tensors)

    # --- files -----------------------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        return self._run.files.checkpoints / FOLDER

    def _kept(self, key: bytes) -> dict[str, Bank]:
        """By site, or `ALL_SITES`, what was released of a patient for requests."""
        found = {}
        for folder in sorted((self._folder / key.hex()).glob("*")):
            bank = Bank.open(folder, self._key)
            if bank is not None and bank.contents.terms == terms(self._run):
                found[bank.contents.releases[0].site] = bank
        return found

    def _forget(self, key: bytes) -> None:
        shutil.rmtree(self._folder / key.hex(), ignore_errors=True)

    def _created(
        self,
        name: str,
        key: bytes,
        windows: Sequence[tuple[Sample, ...]],
        lists: Mapping[str, Mapping[bytes, tuple[str, ...]]],
        main: Bank,
    ) -> Bank:
        """Written before the first question is asked: what a number stands for never changes (SP-11.17-3)."""
        first = self._numbers(main)
        self._next = first + len(windows)
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
        contents = main.contents
        folder = self._folder / key.hex() / ("all" if name == ALL_SITES else name)
        return Bank.create(
            folder,
            Contents(contents.run, contents.terms, contents.precision, contents.weights, releases),
            self._key,
        )

    def _numbers(self, main: Bank) -> int:
        """The first number that no question of this run has had."""
        if self._next is None:
            used = [one.number for one in main.contents.releases]
            for folder in self._folder.glob("*/*"):
                bank = Bank.open(folder, self._key)
                used += [one.number for one in bank.contents.releases] if bank is not None else []
            self._next = max(used, default=-1) + 1
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
