"""What a happening is, and how it reaches those who show it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ClassVar

log = logging.getLogger(__name__)

Scores = dict[str, float | None]
"""Dice by region; None: the region is in no mask."""


class Happening:
    """Each is a frozen dataclass, complete when reported."""

    line: ClassVar[str | None] = None
    """Name of its line in the log, which holds every field; None: none, or one that `sinks.log` puts into words."""
    level: ClassVar[int] = logging.INFO
    """Of `line`."""
    sparing: ClassVar[bool] = False
    """Whether a coordinator can cause it at a site as often as it likes, and `sinks.sparing` limits its rate."""


Sink = Callable[[Happening], None]
"""Must not raise or wait."""


class Reporter:
    """Tells every sink, in their order. One that raises costs neither the run nor the sinks after it."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks
        self._logged: set[tuple[int, type[Exception]]] = set()  # of which sink, by its place

    def __call__(self, happening: Happening) -> None:
        for place, sink in enumerate(self._sinks):
            try:
                sink(happening)
            except Exception as error:
                # Once of each kind: it may fail at every step.
                if (place, type(error)) not in self._logged:
                    self._logged.add((place, type(error)))
                    what = {"sink": type(sink).__name__, "happening": type(happening).__name__}
                    log.exception("sink.failed", extra={"fields": what})

    def to(self, *sinks: Sink) -> Reporter:
        """One that tells these as well."""
        report = Reporter(*self._sinks, *sinks)
        report._logged = self._logged
        return report
