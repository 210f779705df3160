"""The encoders of all seats that a site fills, as one: one count of steps, one state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from splitpeer.defences.activation.dp import DPGaussian, mechanism
from splitpeer.defences.network import Defended
from splitpeer.defences.randomness import Release
from splitpeer.errors import DataError
from splitpeer.models.narrow import Narrow
from splitpeer.training.split_step import Arrays, ClientHalf, State


class Encoders:
    """The encoders of one run.

    Args:
        halves: by seat, in the order of the offer; none at a site that holds masks only, which counts steps.
    """

    def __init__(self, halves: Mapping[str, ClientHalf]) -> None:
        self.halves = dict(halves)
        self._counted = 0

    @property
    def steps_done(self) -> int:
        """Steps applied or counted so far, which is the same at all seats."""
        return self._first.steps_done if self._first is not None else self._counted

    @property
    def averaged(self) -> bool:
        """Whether a seat's next step is to be made from an average."""
        return any(half.averaged for half in self.halves.values())

    @property
    def defences(self) -> tuple[str, ...]:
        """What is done to activations before they leave, the same at all seats."""
        network = self._first.network if self._first is not None else None
        return network.stack.specs if isinstance(network, Defended) else ()

    @property
    def mechanism(self) -> DPGaussian | None:
        """The defence whose guarantee counts, the same at all seats."""
        network = self._first.network if self._first is not None else None
        return mechanism(network.stack.defences) if isinstance(network, Defended) else None

    def forward(self, images: Mapping[str, np.ndarray], releases: Mapping[str, Release]) -> dict[str, Arrays]:
        """Images [B, channels, *spatial] by seat to what leaves; the step then is pending at these only."""
        for seat, half in self.halves.items():
            if seat not in images:
                half.discard()
        return {seat: self.halves[seat].forward(x, releases[seat]) for seat, x in images.items()}

    def evaluate(
        self, images: Mapping[str, np.ndarray], releases: Mapping[str, Release]
    ) -> dict[str, Arrays]:
        """As `forward`, without a graph; a pending step stays pending (SP-11-17)."""
        return {seat: self.halves[seat].evaluate(x, releases[seat]) for seat, x in images.items()}

    def backward(self, gradients: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """End the step at all seats: those without gradients sat it out and count on (SP-11-10).

        Raises:
            JobFailed, PolicyRefused: see `ClientHalf.backward`; all encoders are unchanged, and nothing is pending.
        """
        step = self.steps_done + 1
        try:
            for seat, arrived in gradients.items():
                self.halves[seat].accumulate(arrived)
        except Exception:
            for half in self.halves.values():
                half.discard()
            raise
        for seat, half in self.halves.items():
            if seat in gradients:
                half.finish()
            else:
                half.discard()
                half.advance(step)

    def advance(self, step: int) -> None:
        """Count on to `step` at all seats; a pending step is forgotten."""
        self._counted = step
        for half in self.halves.values():
            half.advance(step)

    def state(self) -> State:
        """As `ClientHalf.state`; where there are several seats, names begin with `SEAT/`."""
        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {"step": self._counted}
        for seat, half in self.halves.items():
            mine, meta = half.state()
            tensors |= {self._prefix(seat) + name: tensor for name, tensor in mine.items()}
        return tensors, meta

    def digest(self) -> bytes:
        """SHA-256 of all weights: seat, name, dtype, shape and octets of each, in order of seats and names."""
        found = hashlib.sha256()
        for seat, half in self.halves.items():
            for name, tensor in sorted(half.network.state_dict().items()):
                array = tensor.detach().cpu().numpy()
                found.update(f"{seat} {name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
        return found.digest()

    def identities(self) -> frozenset[str]:
        """SHA-256 of each encoder's own weights, in hexadecimal, whatever a job adds to it (narrow levels, defences)
        and calls it."""
        return frozenset(_identity(half.network) for half in self.halves.values())

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Go back to a `state()`. Raises DataError: it is of other encoders; nothing is changed then."""
        parts = {seat: self._part(seat, tensors) for seat in self.halves}
        if sum(map(len, parts.values())) < len(tensors):
            raise DataError("checkpoint does not fit these seats; take one made with the job's own settings")
        for seat, part in parts.items():
            self.halves[seat].check(part)
        for seat, part in parts.items():
            self.halves[seat].load(part, meta)
        self._counted = int(meta["step"])

    @property
    def _first(self) -> ClientHalf | None:
        return next(iter(self.halves.values()), None)

    def _prefix(self, seat: str) -> str:
        return f"{seat}/" if len(self.halves) > 1 else ""

    def _part(self, seat: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        prefix = self._prefix(seat)
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _identity(network: nn.Module) -> str:
    encoder = network.encoder if isinstance(network, Defended) else network
    own = encoder.encoder if isinstance(encoder, Narrow) else encoder
    found = hashlib.sha256()
    for _, tensor in sorted(own.state_dict().items()):
        array = tensor.detach().cpu().numpy()
        found.update(f"{array.dtype} {array.shape}\n".encode() + array.tobytes())
    return found.hexdigest()
