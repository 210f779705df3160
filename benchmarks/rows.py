"""Rows of RESULTS.md: a figure beside its target."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Found = dict[str, Any]
"""What a program prints with `--json`."""


@dataclass(frozen=True)
class Line:
    """A row of a table."""

    what: str
    target: str
    found: str
    met: bool | None
    """None: there is no target."""

    def __str__(self) -> str:
        verdict = {True: "yes", False: "**no**", None: ""}[self.met]
        return f"| {self.what} | {self.target} | {self.found} | {verdict} |"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (lowest-highest)."""
    median, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{median} ({low}-{high})"


def rounded(values: Sequence[float]) -> str:
    """`spread` with as many digits as its median needs."""
    return spread(values, 0 if statistics.median(values) >= 10 else 2)


def at_most(what: str, values: Sequence[float], target: float, unit: str = "", digits: int = 2) -> Line:
    """A row whose target is an upper bound on the median."""
    met = statistics.median(values) <= target
    return Line(what, f"<= {target:g}{unit}", spread(values, digits) + unit, met)


def at_least(what: str, values: Sequence[float], target: float, unit: str = "", digits: int = 2) -> Line:
    """A row whose target is an lower bound on the median."""
    met = statistics.median(values) >= target
    return Line(what, f">= {target:g}{unit}", spread(values, digits) + unit, met)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours by theirs, for each round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]
