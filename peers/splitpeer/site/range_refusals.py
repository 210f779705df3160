"""How often a site has said that its values do not suit the range of a sum (SP-11.18-15): a journal in [peer] state.

    {"run": "<hex>", "range": 4.0}

Each such refusal tells the coordinator something of this site's values alone, and nothing of it is in a sum: offers
with one range after the other would measure them. So refusals are counted over all runs, each on the medium before it
leaves, and after a few of them no sum is joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splitpeer.errors import DataError
from splitpeer.storage.journal import Journal
from splitproto.errors import PolicyRefused

NAME = "range-refusals.jsonl"
_MOST_MIB = 1


class RangeRefusals:
    """Of one site.

    Args:
        state: its state folder.
        most: so many, and no sum is joined ([policy] max_range_refusals).

    Raises:
        DataError: the journal cannot be read.
    """

    def __init__(self, state: Path, most: int) -> None:
        self._most = most
        self._journal = Journal(
            state / NAME, _MOST_MIB, "so nobody knows what refusals have told: no sum is joined"
        )
        self.count = 0
        """Refusals so far."""
        self._journal.read(self._take)

    def check(self) -> None:
        """Before values are looked at. Raises PolicyRefused: there were enough."""
        if self.count >= self._most:
            raise PolicyRefused(
                f"this site has refused the range of {self.count} sums and takes part in no other: each refusal "
                "tells of its values (policy max_range_refusals)"
            )

    def note(self, run: bytes, most: float) -> None:
        """A range is about to be refused; durable when this returns. Raises DataError: it cannot be written down."""
        self._journal.add(run=run.hex(), range=most)
        self.count += 1

    def _take(self, said: Mapping[str, Any]) -> None:
        bytes.fromhex(said["run"])
        self.count += 1


def refused_in(state: Path) -> int:
    """How many the state folder holds; 0 where the journal cannot be read, which a run says. Never raises DataError."""
    try:
        return RangeRefusals(state, 1).count
    except DataError:
        return 0
