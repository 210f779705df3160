"""Gradients as they arrive at a site: only those of what it sent are any use (SP-11-10, SP-11.18-2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from splitpeer.federation.seats import by_seat
from splitpeer.training.forms import WireForm
from splitproto.errors import SchemaMismatch
from splitproto.fusion import CHECK
from splitproto.messages import Activations, Gradients
from splitproto.records import Seat
from splitproto.tensors import DTYPES


def by_seat_arrived(
    gradients: Gradients, sent: Activations, seats: Sequence[Seat], form: WireForm, *, summed: bool
) -> dict[str, dict[str, np.ndarray]]:
    """Gradients by seat, as they travelled.

    Args:
        sent: the activations of their step.
        seats: of this site.
        form: of gradients.
        summed: whether a sum over sites was made of them.

    Raises:
        SchemaMismatch: not the tensors that were sent.
    """
    if not summed:
        return by_seat(_as_sent(gradients, sent, form), seats)
    # SP-11.18-2: the gradient by the sum is that by each of its parts.
    shapes = {name: array.shape for name, array in sent.tensors.items() if name != CHECK}
    if {name: array.shape for name, array in gradients.tensors.items()} != shapes or any(
        array.dtype != np.float32 for array in gradients.tensors.values()
    ):
        raise SchemaMismatch(f"the gradients of step {gradients.step} do not have the shapes of the sum")
    return {seat.name: dict(gradients.tensors) for seat in seats}


def _as_sent(gradients: Gradients, sent: Activations, form: WireForm) -> Mapping[str, np.ndarray]:
    """SP-11-10: the gradients' tensors, which are those of some levels that were sent. Raises SchemaMismatch."""
    due = {name: form.described(name, len(array)) for name, array in sent.tensors.items()}
    of = {name: (one.shape, DTYPES[one.dtype]) for name, one in due.items()}
    if not gradients.tensors or any(
        of.get(name) != (array.shape, array.dtype) for name, array in gradients.tensors.items()
    ):
        raise SchemaMismatch(
            f"the gradients of step {gradients.step} do not have the shapes of the activations"
        )
    return gradients.tensors
