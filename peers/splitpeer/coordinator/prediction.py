"""What the decoder says of one patient's windows, whoever asked."""

from __future__ import annotations

import numpy as np

from splitpeer.coordinator.run import Arrived, Run, finite
from splitpeer.training.split_round import gathered


def predicted(run: Run, arrived: Arrived, samples: int, missing: str = "") -> np.ndarray:
    """Probabilities, float32 [B, channels, *spatial], of what arrived of so many windows of one patient.

    Args:
        missing: a seat that is left out; empty: none.

    Raises:
        JobFailed: they are not finite, or the sites' masks do not cancel.
    """
    half = run.half
    arrays, rows = run.at_places(arrived)
    used = {place: array for place, array in arrays.items() if place.seat != missing and rows[place].used}
    # All samples are one patient's, who has a seat or not.
    activations, _ = gathered(used, rows, samples)
    return finite(half.predict(activations, [seat for seat in half.seats if seat not in activations]))
