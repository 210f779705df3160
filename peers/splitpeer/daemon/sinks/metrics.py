"""Happenings as rows of `metrics.jsonl`."""

from __future__ import annotations

import math
from typing import Any, Protocol

from splitpeer.daemon import happenings as h


class RunRows(Protocol):
    """The files of a run, where they are written."""

    opened: bool
    """From here on they are of this run."""

    def metric(self, **values: Any) -> None:
        """One row."""


class MetricsSink:
    """Adds a row for what a curve is drawn from, or has to be read with."""

    def __init__(self, rows: RunRows) -> None:
        self._rows = rows

    def __call__(self, happening: h.Happening) -> None:
        if self._rows.opened and (values := row(happening)):
            self._rows.metric(**values)


def row(happening: h.Happening) -> dict[str, Any]:
    """Its values; empty: no row."""
    match happening:
        case h.StepCommitted(step, loss, without, absent, seconds, waited, computed, _, timing, turns):
            return {
                "step": step,
                "loss": loss if math.isfinite(loss) else None,
                **({"without": list(without)} if without else {}),
                # The others of `without` were left out by seat dropout, or no patient of the batch has them.
                **({"absent": list(absent)} if absent else {}),
                "seconds": seconds,
                "waited": waited,
                "computed": computed,
                **({"turns": True} if turns else {}),
                **({"timing": timing.row()} if timing is not None else {}),
            }
        case h.StepTimed(step, seconds, timing):
            return {"step": step, "seconds": seconds, "timing": timing.row()}
        case h.Evaluated(step, volumes, dice, made_from, missing, hd95, volume_ml, seconds):
            return {
                "step": step,
                "volumes": volumes,
                "dice": dice,
                "made_from": list(made_from),
                **({"missing": missing} if missing else {}),
                **({"hd95": hd95} if hd95 else {}),
                **({"volume_ml": volume_ml} if volume_ml else {}),
                "seconds": seconds,
            }
        case h.RunRolledBack(step=step, cause=cause):
            return {"step": step, "rollback": True, "cause": cause}
        case h.WithdrawnInAll(step, patients, more=True):
            return {"step": step, "withdrawn": patients}
    return {}
