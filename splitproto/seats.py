"""Seats in messages (SP-11.8-5): whose tensors are called what, and which samples their rows are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from .messages import Inventory
from .records import Sample, Seat

Tensor = TypeVar("Tensor")


def tensor_name(seat: str, level: str, seats: Sequence[Seat]) -> str:
    """SP-11.8-5: of a level, at a site that fills `seats`."""
    return level if len(seats) == 1 else f"{seat}/{level}"


def by_seat(tensors: Mapping[str, Tensor], seats: Sequence[Seat]) -> dict[str, dict[str, Tensor]]:
    """Tensors of one message, by seat and level; a seat that sends nothing is left out (SP-11.8-5).

    Raises:
        KeyError: a name of none of `seats`.
    """
    if len(seats) == 1:
        return {seats[0].name: dict(tensors)} if tensors else {}
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        seat, _, level = name.rpartition("/")
        if seat not in {one.name for one in seats}:
            raise KeyError(name)
        found.setdefault(seat, {})[level] = tensor
    return found


def joined(parts: Mapping[str, Mapping[str, Tensor]], seats: Sequence[Seat]) -> dict[str, Tensor]:
    """The opposite of `by_seat`: in the order of `seats`."""
    return {
        tensor_name(seat.name, level, seats): tensor
        for seat in seats
        for level, tensor in parts.get(seat.name, {}).items()
    }


class Listed:
    """What one site says it fills: its seats, and patient by patient which of them.

    Args:
        seats: as the site was offered them.
    """

    def __init__(self, seats: Sequence[Seat]) -> None:
        self.seats = tuple(seats)
        self._of: dict[bytes, tuple[int, ...]] = {}

    def hear(self, inventory: Inventory) -> None:
        """Take its list, or a piece of it."""
        for patient in inventory.patients:
            if patient.seats is None:
                self._of.pop(patient.key, None)
            else:
                self._of[patient.key] = patient.seats

    def rows(self, samples: Sequence[Sample]) -> dict[str, tuple[int, ...]]:
        """By seat, the numbers of the samples whose patients fill it; a seat without any is left out.

        A patient that was never listed counts as one that fills all: a recording may begin behind the list.
        """
        found = {
            seat.name: tuple(
                row for row, sample in enumerate(samples) if number in self._of.get(sample.key, (number,))
            )
            for number, seat in enumerate(self.seats)
        }
        return {seat: rows for seat, rows in found.items() if rows}
