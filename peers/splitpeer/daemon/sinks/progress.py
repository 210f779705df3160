"""Happenings as figures for the sites' logs (`progress` messages), now and then."""

from __future__ import annotations

import math
import time

from splitpeer.daemon import happenings as h
from splitproto.messages import Progress

EVERY_S = 2.0


class ProgressMessages:
    """The message for the sites about an event; the coordinator sends it, as that may have to wait."""

    def __init__(self) -> None:
        self._told = 0.0

    def due(self, happening: h.Happening) -> Progress | None:
        """The message for it; None: it is none of theirs, or too soon after the one before."""
        match happening:
            case h.StepCommitted(step=step, loss=loss):
                if time.monotonic() - self._told < EVERY_S:
                    return None
                values: dict[str, float | None] = {"loss": loss}
            case h.Evaluated(step=step, dice=dice):
                values = {f"dice_{region}": value for region, value in dice.items()}
            case _:
                return None
        self._told = time.monotonic()
        return Progress(step, {k: v for k, v in values.items() if v is not None and math.isfinite(v)})
