"""One training step among all parties: in one process, or with a network in between.

The coordinator of a run, and of a rehearsal, calls `fused_step`, as its sites make their part themselves; `split_round`
is the whole step with all halves at hand, as the centralised baselines make it.

Each seat of the network is filled, sample by sample, by a site that has its images. Rows of a seat are put together
for the decoder and taken apart again for the sites; zeros where no site has a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import Stack, defend
from splitpeer.training.forms import Forms
from splitpeer.training.split_step import Arrays, ClientHalf, CoordinatorHalf
from splitpeer.training.sums import SUM, fused
from splitproto.records import Fusion, Sample

Given = TypeVar("Given")
Made = TypeVar("Made")


class Place(NamedTuple):
    """A site at a seat."""

    site: str
    seat: str


THE_SUM = Place("", SUM)
"""All sites at the only seat of a secure sum."""


@dataclass(frozen=True)
class Rows:
    """Which samples of a batch a site sends for a seat."""

    samples: tuple[int, ...]
    """Their places in the batch, ascending; one for each row of the site's tensors."""
    ignored: frozenset[int] = frozenset()
    """Those of them that another site fills: sent, and not used."""

    @property
    def used(self) -> tuple[int, ...]:
        """The samples that this site fills."""
        return tuple(sample for sample in self.samples if sample not in self.ignored)


@dataclass(frozen=True)
class Parties:
    """All halves of one network."""

    coordinator: CoordinatorHalf
    sites: Mapping[Place, ClientHalf]
    """The encoder of each site at each seat."""
    gradient_defences: Mapping[Place, Stack] = field(default_factory=dict)
    """What the label holder does to the gradients that a site is sent for a seat; missing: nothing."""
    threads: int = 1
    """How many encoders compute at once, each on one thread of its own: for narrow networks that is faster than
    several threads to an encoder, and what comes out is what one thread computes."""

    def each(self, make: Callable[[Given], Made], items: Iterable[Given]) -> list[Made]:
        """`make` of every item, in order; the first error is raised when all are done."""
        items = list(items)
        if min(self.threads, len(items)) < 2:
            return [make(item) for item in items]
        with ThreadPoolExecutor(self.threads, "encoder", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(make, items))


def split_round(
    parties: Parties,
    images: Mapping[Place, np.ndarray],
    target: np.ndarray,
    release: Release,
    *,
    rows: Mapping[Place, Rows] | None = None,
    left_out: Collection[str] = (),
    terms: Fusion | None = None,
    forms: Forms | None = None,
) -> float:
    """Make one step; returns the loss.

    Args:
        images: float32 [rows, channels, *spatial], of the sites that have samples of the batch; the others count on.
        target: [B, regions, *spatial], zeros and ones.
        release: what is released; defences draw from it.
        rows: which samples `images` are; missing: the whole batch, in order.
        left_out: seats that the step is made without (SP-11-37).
        terms: of the secure sum in which the sites' values are fused (SP-11.18), all of whose sites take part.
        forms: how values travel between encoders and decoder; None: exactly.

    Raises:
        JobFailed: a loss or gradient is not finite (SP-11-10).
        PolicyRefused: see `ClientHalf.backward`.
    """
    rows = rows or {}
    taking = {place.site for place in images if place.seat not in left_out}
    # A participating site computes the seats that are left out too, as ordered.
    asked = [place for place in parties.sites if place in images and place.site in taking]

    def forward(place: Place) -> Arrays:
        made = parties.sites[place].forward(images[place], _of_rows(release, rows.get(place)))
        return made if forms is None else forms.activations.read(made)

    arrived = dict(zip(asked, parties.each(forward, asked), strict=True))
    if terms is not None:
        arrived = {THE_SUM: fused(_by_site(arrived), terms)}
    used = {place: arrays for place, arrays in arrived.items() if place.seat not in left_out}
    loss, gradients = fused_step(
        parties.coordinator, used, target, release, parties.gradient_defences, rows=rows
    )
    if terms is not None:
        # SP-11.18-2: "the same octets for all sites"; a seat's part of the sum has the sum's own gradient.
        gradients = dict.fromkeys(parties.sites, gradients[THE_SUM])
    taught = {place.site for place in gradients}

    def backward(place: Place) -> None:
        half = parties.sites[place]
        if place in gradients:
            back = gradients[place]
            half.backward(back if forms is None else forms.gradients.read(back))
            return
        if place.site in taught:
            # As at a site (SP-11-10): a seat that is left out keeps the average it took.
            half.discard()
        half.advance(release.step)

    parties.each(backward, parties.sites)
    return loss


def fused_step(
    half: CoordinatorHalf,
    arrived: Mapping[Place, Arrays],
    target: np.ndarray,
    release: Release,
    gradient_defences: Mapping[Place, Stack],
    *,
    rows: Mapping[Place, Rows] | None = None,
) -> tuple[float, dict[Place, Arrays]]:
    """The coordinator's part: the loss, and what each site is sent for each seat at which it took part.

    Args:
        arrived: activations {"x0": float32 [rows, C, *spatial], ...}.
        target: [B, regions, *spatial], zeros and ones.
        release: of the whole batch.
        gradient_defences: what is done to gradients; missing: nothing.
        rows: which samples each has sent; missing: the whole batch, in order.

    Raises:
        JobFailed: the loss or its gradient is not finite (SP-11-10); the decoder is unchanged.
    """
    taken = _TakenStep.of(arrived, rows, len(target))
    if not taken.places:
        # No site that is present has a sample of this batch, so nothing is learned from it.
        half.advance(release.step)
        return math.nan, {}
    loss, by_seat = half.step(taken.seats, target, taken.absent(half), taken.have)
    return loss, taken.handed_back(by_seat, release, gradient_defences, target)


class StepWithoutLabels:
    """The coordinator's part where somebody else has the labels: the same step, in the middle of which the loss's
    gradient by the logits comes from there (SP-11.20-6).

    Args:
        half, arrived, gradient_defences, rows: as in `fused_step`; a defence that needs the target has none.
        release: of the whole batch.

    Raises:
        JobFailed: the logits are not finite.
    """

    def __init__(
        self,
        half: CoordinatorHalf,
        arrived: Mapping[Place, Arrays],
        release: Release,
        gradient_defences: Mapping[Place, Stack],
        *,
        rows: Mapping[Place, Rows] | None = None,
    ) -> None:
        self._half, self._release, self._stacks = half, release, gradient_defences
        self._taken = _TakenStep.of(arrived, rows, len(release.samples))
        self.logits: np.ndarray | None = None
        """float32 [B, channels, *spatial]; None: no site that is present has a sample of this batch."""
        if self._taken.places:
            self.logits = half.decode(self._taken.seats, self._taken.absent(half), self._taken.have)

    def end(self, gradient: np.ndarray | None) -> dict[Place, Arrays]:
        """What each site is sent for each seat at which it took part.

        Args:
            gradient: of the loss, float32 of the shape of the logits; None: where there are none.

        Raises:
            JobFailed: a gradient is not finite (SP-11-10); the decoder is unchanged.
        """
        if gradient is None:
            self._half.advance(self._release.step)
            return {}
        return self._taken.handed_back(self._half.apply(gradient), self._release, self._stacks, None)


@dataclass(frozen=True)
class _TakenStep:
    """What a batch's step is made of."""

    places: Sequence[Place]
    """Sites at seats of which something is used."""
    filled: Mapping[Place, Rows]
    seats: dict[str, Arrays]
    have: dict[str, np.ndarray]
    batch: int

    @classmethod
    def of(cls, arrived: Mapping[Place, Arrays], rows: Mapping[Place, Rows] | None, batch: int) -> _TakenStep:
        whole = Rows(tuple(range(batch)))
        filled = {place: (rows or {}).get(place, whole) for place in arrived}
        taken = {place: arrays for place, arrays in arrived.items() if filled[place].used}
        seats, have = gathered(taken, filled, batch)
        return cls(tuple(taken), filled, seats, have, batch)

    def absent(self, half: CoordinatorHalf) -> list[str]:
        return [seat for seat in half.seats if seat not in self.seats]

    def handed_back(
        self,
        by_seat: Mapping[str, Arrays],
        release: Release,
        defences: Mapping[Place, Stack],
        target: np.ndarray | None,
    ) -> dict[Place, Arrays]:
        gradients = {}
        for place in self.places:
            rows = self.filled[place]
            gradients[place] = handed_back(by_seat[place.seat], rows, self.batch)
            # The decoder has learned from the true ones; what leaves is defended, for each site and seat on its own.
            if stack := defences.get(place):
                own = None if target is None else target[list(rows.samples)]
                gradients[place] = defend(
                    stack, gradients[place], replace(_of_rows(release, rows), target=own)
                )
        return gradients


def gathered(
    arrived: Mapping[Place, Arrays], rows: Mapping[Place, Rows], batch: int
) -> tuple[dict[str, Arrays], dict[str, np.ndarray]]:
    """Rows of a seat put together: {seat: {"x0": float32 [B, C, *spatial], ...}}, zeros where no site has it.

    Returns:
        Also, of seats that only some samples have, which do: bool [B]. What one site sent for a whole batch is not
        copied.
    """
    seats: dict[str, Arrays] = {}
    have: dict[str, np.ndarray] = {}
    for place, arrays in arrived.items():
        of = rows[place]
        if of.used == tuple(range(batch)):
            seats[place.seat] = arrays
            continue
        together = seats.setdefault(
            place.seat, {name: np.zeros((batch, *a.shape[1:]), np.float32) for name, a in arrays.items()}
        )
        held = have.setdefault(place.seat, np.zeros(batch, bool))
        used, mine = list(of.used), [i for i, sample in enumerate(of.samples) if sample not in of.ignored]
        for name, array in arrays.items():
            together[name][used] = array[mine]
        held[used] = True
    return seats, {seat: held for seat, held in have.items() if not held.all()}


def handed_back(gradients: Arrays, rows: Rows, batch: int) -> Arrays:
    """A site's rows of a seat's gradients [B, C, *spatial]; zeros for those that another site fills."""
    if rows.used == tuple(range(batch)):
        return gradients
    own = {name: array[list(rows.samples)] for name, array in gradients.items()}
    for array in own.values():
        array[[sample in rows.ignored for sample in rows.samples]] = 0
    return own


def _by_site(arrived: Mapping[Place, Arrays]) -> dict[str, dict[str, Arrays]]:
    sites: dict[str, dict[str, Arrays]] = {}
    for place, arrays in arrived.items():
        sites.setdefault(place.site, {})[place.seat] = arrays
    return sites


def _of_rows(release: Release, rows: Rows | None) -> Release:
    if rows is None or len(rows.samples) == len(release.samples):
        return release
    return replace(release, samples=_chosen(release.samples, rows.samples))


def _chosen(samples: Sequence[Sample], places: Sequence[int]) -> tuple[Sample, ...]:
    return tuple(samples[place] for place in places)
