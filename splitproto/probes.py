"""What probes carry, by which a coordinator measures a link before it offers a job (SP-11.22)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .constants import MAX_PROBE
from .errors import TensorError
from .tensors import Array, Descriptor

MESSAGES = ("probe", "probed")
FILLING = "octets"
"""The one tensor of a probe, and of its answer."""


def filling(octets: int) -> dict[str, Array]:
    """The tensors of a probe, or of an answer, of so many octets: zeros, as nobody looks at them."""
    return {FILLING: np.zeros(octets, np.uint8)} if octets else {}


def check(message: str, described: Sequence[Descriptor]) -> None:
    """SP-11.22-1, before memory is taken; of any message. Raises TensorError."""
    if message in MESSAGES and not all(
        (d.name, d.dtype, len(d.shape)) == (FILLING, "u8", 1) and d.nbytes <= MAX_PROBE for d in described
    ):
        raise TensorError(f"a {message} carries {FILLING}, at most {MAX_PROBE} of u8, or nothing")
