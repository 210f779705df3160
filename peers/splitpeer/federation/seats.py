"""Seats: the inputs of the fused network, who fills them, and how their tensors are named. No torch.

A seat is one modality, or several stacked as channels. Where a job says nothing, every modality is a seat of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitproto.records import Seat
from splitproto.seats import by_seat as by_seat
from splitproto.seats import joined as joined
from splitproto.seats import tensor_name as tensor_name

if TYPE_CHECKING:
    from splitpeer.settings.job import JobConfig


@dataclass(frozen=True)
class Seats:
    """All seats of a job, ordered by name, which is the decoder's order.

    Args:
        seats: ordered by name.
        filled: site to the names of the seats that it fills; sites ordered by name.
    """

    seats: tuple[Seat, ...]
    filled: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all seats, in order."""
        return tuple(seat.name for seat in self.seats)

    def of(self, site: str) -> tuple[Seat, ...]:
        """Those that a site fills, in order: what it is offered."""
        return tuple(seat for seat in self.seats if seat.name in self.filled[site])

    def sites(self, seat: str) -> tuple[str, ...]:
        """Who fills a seat, by name."""
        return tuple(site for site, fills in self.filled.items() if seat in fills)

    def receiver(self, site: str, seat: str) -> str:
        """Who gets the gradients of a seat, as the key of their defences names it: no two seats share their noise."""
        return site if len(self.filled[site]) == 1 else f"{site}/{seat}"


def seats_of(job: JobConfig) -> Seats:
    """What `[sites]`, `[seats]` and `[labels]` of a job say, which `JobConfig` has checked."""
    return Seats(
        tuple(Seat(name, modalities) for name, modalities in job.channels().items()),
        {site: job.filled_by(site) for site in sorted(job.taking_part)},
    )
