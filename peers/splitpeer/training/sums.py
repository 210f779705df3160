"""Secure fusion without the masks: what the coordinator reads is the sum of all sites' integers (SP-11.18).

Masks cancel, so a run with them computes exactly what these functions compute in one process.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from splitpeer.training.split_step import Arrays
from splitproto.errors import SiteFailed
from splitproto.fusion import quantise, summed
from splitproto.records import Fusion

SUM = "sum"
"""The only seat that the decoder has in such a job."""


def over_seats(sent: Mapping[str, Arrays]) -> Arrays:
    """SP-11.18-2: a site's part of the sum: float32, its seats added in their order.

    Args:
        sent: by seat, what leaves its encoder for the whole batch: {"x0": float32 [B, C, *spatial], ...}.

    Raises:
        SiteFailed: a seat has other samples than the first: one patient's values would be added to another's.
    """
    first, *others = sent.values()
    total = {name: np.array(array, np.float32) for name, array in first.items()}
    for arrays in others:
        for name, array in arrays.items():
            if array.shape != total[name].shape:
                raise SiteFailed("the seats of a secure sum have not all samples of a batch")
            total[name] += array
    return total


def fused(sent: Mapping[str, Mapping[str, Arrays]], terms: Fusion) -> Arrays:
    """The sum over all sites as the coordinator reads it, {"x0": float32 [B, C, *spatial], ...}.

    Args:
        sent: by site and seat, all of the same samples.

    Raises:
        TensorError: a value is not finite.
    """
    words = [
        {name: quantise(array, terms)[0] for name, array in over_seats(by_seat).items()}
        for by_seat in sent.values()
    ]
    return summed(words, terms)
