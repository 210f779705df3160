"""Batches from the bank: released windows looked up, posed if the job augments, put together for the decoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np

from splitpeer.data.augment import Augmentation, derive, posed
from splitpeer.errors import JobFailed
from splitpeer.federation.seating import Seating
from splitpeer.federation.seats import by_seat
from splitpeer.storage.bank import ALL_SITES, BankEntry, Contents, Window
from splitpeer.training.forms import activations_form
from splitpeer.training.split_step import Arrays
from splitpeer.training.sums import SUM
from splitproto.messages import Forward
from splitproto.records import Job, Sample


class Releases(Protocol):
    """What is read of a bank, or of several."""

    @property
    def contents(self) -> Contents:
        """What there is."""

    def windows(self, release: BankEntry, row: int) -> dict[int, dict[str, np.ndarray]]:
        """See `Bank.windows`."""


class Features:
    """The features of one run.

    Args:
        job: its terms.
        bank: complete.
        seating: which site fills which seat of whom.
        cache_mib: memory for windows that were read, MiB.
    """

    def __init__(self, job: Job, bank: Releases, seating: Seating, cache_mib: int) -> None:
        self._form, self._bank, self._seating = activations_form(job), bank, seating
        self._where: dict[tuple[str, Window], tuple[BankEntry, int]] = {
            (one.site, (one.key, origin)): (one, row)
            for one in bank.contents.releases
            for row, origin in enumerate(one.origins)
        }
        self._cache: OrderedDict[tuple[str, int, int], dict[str, dict[str, np.ndarray]]] = OrderedDict()
        self._held, self._most = 0, cache_mib << 20
        self._summed = job.fusion is not None
        self._square = all(level.stride[0] == level.stride[1] for level in job.cut)

    def pose(self, seed: int | None, place: int) -> Augmentation:
        """SP-11.7-1: flips and quarter turns of sample `place` of a batch; none without a seed.

        No turns where a level is coarser along one axis than along the other: turned, it would have another shape.
        """
        if seed is None:
            return Augmentation((False, False, False), 0)
        drawn = derive(seed, place, None)
        return drawn if self._square else Augmentation(drawn.flips, 0)

    def batch(
        self, forward: Forward, without: Collection[str] = ()
    ) -> tuple[dict[str, Arrays], dict[str, np.ndarray]]:
        """{seat: {"x0": float32 [B, C, *spatial], ...}}, zeros where a patient lacks the seat.

        Args:
            without: seats that are left out.

        Returns:
            Also, of seats that only some samples have, which do: bool [B].

        Raises:
            DataError: a release is torn or altered.
            JobFailed: a window is not in the bank.
        """
        seats: dict[str, Arrays] = {}
        have: dict[str, np.ndarray] = {}
        for seat in (SUM,) if self._summed else self._seating.seats.names:
            if seat in without:
                continue
            rows = [self._row(seat, sample, forward.seed, at) for at, sample in enumerate(forward.samples)]
            shown = next((row for row in rows if row is not None), None)
            if shown is None:
                continue
            seats[seat] = {
                name: np.stack([np.zeros_like(like) if row is None else row[name] for row in rows])
                for name, like in shown.items()
            }
            held = np.array([row is not None for row in rows])
            if not held.all():
                have[seat] = held
        return seats, have

    def forget(self, patients: Collection[bytes]) -> None:
        """SP-11.17-7: nothing of these stays in memory either; it is not asked for any more."""
        theirs = {(one.site, one.number) for one in self._bank.contents.releases if one.key in patients}
        for name in [name for name in self._cache if name[:2] in theirs]:
            self._held -= _octets(self._cache.pop(name))

    def seats(self, forward: Forward) -> frozenset[str]:
        """Seats that some sample of a batch has."""
        filled = self._seating.filled
        return frozenset(seat for sample in forward.samples for seat in filled[sample.key])

    def _row(
        self, seat: str, sample: Sample, seed: int | None, place: int
    ) -> Mapping[str, np.ndarray] | None:
        site = ALL_SITES if self._summed else self._seating.filled[sample.key].get(seat)
        if site is None:
            return None
        found = self._where.get((site, (sample.key, sample.origin)))
        if found is None:
            raise JobFailed(
                "a window is not in the feature bank: the masks have another grid than when it was made"
            )
        release, row = found
        plan = self.pose(seed, place)
        return {name: posed(array, plan) for name, array in self._window(release, row)[seat].items()}

    def _window(self, release: BankEntry, row: int) -> dict[str, dict[str, np.ndarray]]:
        """By seat and level, float32 without the first axis; those used last are kept in memory."""
        name = (release.site, release.number, row)
        if (held := self._cache.pop(name, None)) is None:
            read = self._bank.windows(release, row)
            # Last, so that it is the one that stays.
            for other in sorted(read, key=lambda one: one == row):
                held = self._keep((*name[:2], other), self._read(read[other]))
        else:
            self._cache[name] = held
        assert held is not None  # noqa: S101  (the window asked for is among those read)
        return held

    def _read(self, window: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One window as it was released, float32."""
        alone = {name: array[None] for name, array in window.items()}
        return {name: array[0] for name, array in self._form.from_wire(alone).items()}

    def _keep(
        self, name: tuple[str, int, int], tensors: dict[str, np.ndarray]
    ) -> dict[str, dict[str, np.ndarray]]:
        offered = self._seating.seats.of
        held = {SUM: tensors} if self._summed else by_seat(tensors, offered(name[0]))
        if (before := self._cache.pop(name, None)) is not None:
            self._held -= _octets(before)
        self._cache[name] = held
        self._held += _octets(held)
        while len(self._cache) > 1 and self._held > self._most:
            _, oldest = self._cache.popitem(last=False)
            self._held -= _octets(oldest)
        return held


def _octets(held: Mapping[str, Mapping[str, np.ndarray]]) -> int:
    return sum(array.nbytes for levels in held.values() for array in levels.values())
