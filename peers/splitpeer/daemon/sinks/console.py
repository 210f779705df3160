"""Happenings for those who look at a coordinator's terminal."""

from __future__ import annotations

from splitpeer.daemon import happenings as h
from splitpeer.daemon.console import RunView


class ConsoleSink:
    """Tells a view what it can show."""

    def __init__(self, view: RunView) -> None:
        self._view = view

    def __call__(self, happening: h.Happening) -> None:
        match happening:
            case h.SitesAwaited(sites) | h.FarewellDue(sites):
                self._view.waiting(sites)
            case h.RunBegan(steps, here, missing):
                self._view.begin(steps, here, missing)
            case h.StepCommitted(step=step, loss=loss, octets=octets):
                self._view.step(step, loss, octets)
            case h.BankGrew(kept, windows):
                self._view.collecting(kept, windows)
            case h.BatchScored(done, total):
                self._view.evaluating(done, total)
            case h.Evaluated(step=step, dice=dice):
                self._view.evaluated(step, dice)
