"""How closely the windows of one patient may lie: as one grid, which shows each place a few times.

A bound of their number or volume would be spent on one place. Here the origins of all windows of a patient, axis by
axis, are the lines of one grid, so a window that is shifted against another by less than the grid's stride is refused,
wherever it lies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from splitpeer.training.windows import stride_of

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Rule:
    """SP-11.17-10."""

    window: Triple
    shape: Callable[[bytes], Triple | None]
    """Key of a patient -> size of the volume, in voxels; None: the site has none, and refuses the window anyway."""
    overlap: float
    """Largest share of a window that a neighbour repeats, on each axis."""


class Tiling:
    """The windows of a run that have left, as lines of a grid for each patient.

    Args:
        rule: None: windows may lie anywhere.
    """

    def __init__(self, rule: Rule | None) -> None:
        self._rule = rule
        self._lines: dict[bytes, tuple[set[int], set[int], set[int]]] = {}

    def add(self, key: bytes, origins: Iterable[Triple]) -> None:
        """These have left."""
        lines = self._lines.setdefault(key, (set(), set(), set()))
        for origin in origins:
            for line, start in zip(lines, origin, strict=True):
                line.add(start)

    def fits(self, key: bytes, origins: Iterable[Triple]) -> bool:
        """Whether these and those that have left are of one grid."""
        if self._rule is None or (shape := self._rule.shape(key)) is None:
            return True
        known = self._lines.get(key, (set(), set(), set()))
        asked = zip(*origins, strict=True)
        return all(
            _is_grid(line.union(starts), size, width, stride_of(size, width, self._rule.overlap))
            for line, starts, size, width in zip(known, asked, shape, self._rule.window, strict=True)
        )


def _is_grid(starts: set[int], size: int, width: int, stride: int) -> bool:
    # SP-11.17-10: where the run's volume ends later than the site's, its last window does, too.
    shown = {start for start in starts if start < size}
    border = {start for start in shown if start >= size - width} if size > width else set()
    lines = sorted(shown - border)
    return len(border) <= 1 and all(after - before >= stride for before, after in itertools.pairwise(lines))
