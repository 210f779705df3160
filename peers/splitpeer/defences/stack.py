"""Several defences in order, made from their text, applied with the key of the sender."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from splitpeer.defences.base import Defence, Tensors
from splitpeer.defences.kinds import parse_all
from splitpeer.defences.randomness import Draw, Release
from splitpeer.defences.specs import Place, Written, by_place
from splitpeer.errors import ConfigError
from splitpeer.models.cut import level_name


class Stack(nn.Module):
    """Several defences in order, with the key of the peer that applies them.

    Args:
        defences: in the order in which they act.
        key: 32 octets; secret, or the defences' randomness is none.
        first: the number of defences[0], where others have acted before.
    """

    def __init__(self, defences: Sequence[Defence], key: bytes, first: int = 0) -> None:
        super().__init__()
        # The module list is what a checkpoint's names and the optimiser see.
        self.defences = cast("Sequence[Defence]", nn.ModuleList(defences))
        self._key, self._first = key, first

    def __bool__(self) -> bool:
        return len(self.defences) > 0

    def forward(self, tensors: Tensors, release: Release) -> Tensors:
        """What may leave instead of `tensors`.

        Raises:
            ValueError: the release names another number of samples.
        """
        if any(len(tensor) != len(release.samples) for tensor in tensors.values()):
            raise ValueError(
                f"the release names {len(release.samples)} samples, the tensors hold another number"
            )
        for number, defence in enumerate(self.defences, self._first):
            # Numbered: two of the same kind draw independently. Named with all parameters: a site that raises its
            # noise in the middle of a run must not send the same draw at two widths, which gives the content away.
            key = hashlib.sha256(self._key + number.to_bytes(4, "big") + str(defence.spec).encode()).digest()
            tensors = defence(tensors, Draw(key, release, tensors))
        return tensors

    def structure(self, tensors: Tensors) -> Tensors:
        """`tensors` after the structural defences (parts of the network) alone, before any other defence acts."""
        for defence in self.defences:
            if defence.kind.structural:
                tensors = defence.structure(tensors)
        return tensors

    def begin(self, step: int) -> list[nn.Parameter]:
        """See `Defence.begin`."""
        return [parameter for defence in self.defences for parameter in defence.begin(step)]

    def penalty(self, image: Tensor, sent: Tensors) -> Tensor | None:
        """The sum of all penalties, or None."""
        terms = [term for d in self.defences if (term := d.penalty(image, sent)) is not None]
        return sum(terms[1:], terms[0]) if terms else None

    @property
    def specs(self) -> tuple[str, ...]:
        """Each as it is announced, every parameter named."""
        return tuple(str(defence.spec) for defence in self.defences)


def make_stack(
    written: Written,
    *,
    key: bytes,
    channels: Mapping[str, int],
    dimensions: int,
    place: Place = "activations",
    after: Sequence[str] = (),
    strict: bool = True,
) -> Stack:
    """A stack from text: a list, or one string joined by `+`. Empty text is an empty stack.

    Args:
        written: the defences.
        key: see `Stack`.
        channels: of each level that is sent ("x0": 8, ...).
        dimensions: 2 or 3.
        place: what is defended.
        after: what the tensors have been through already (a capture's announced defences): they are not
            applied again, but say which channels carry, and count. Those of images are passed over.
        strict: False: a level that is not sent needs no defence, and is no error.

    Raises:
        ConfigError: see `parse`; a level that is not sent; or a part of the network after a defence.
    """
    earlier: list[Defence] = [
        spec.kind.load()(spec) for spec in parse_all(by_place(after).activations, place)
    ]
    defences: list[Defence] = [spec.kind.load()(spec) for spec in parse_all(written, place)]
    carried = dict(channels)
    for number, defence in enumerate([*earlier, *defences]):
        unsent = [level for level in defence.spec.levels or () if level_name(level) not in channels]
        if unsent and strict:
            raise ConfigError(
                f"{defence.spec}: level {unsent[0]} is not sent; sent are {', '.join(channels)}"
            )
        if number >= len(earlier):
            defence.prepare(carried, dimensions)
        carried = defence.carried(carried)
    return Stack(defences, key, len(earlier))


def defend(stack: Stack, arrays: Mapping[str, np.ndarray], release: Release) -> dict[str, np.ndarray]:
    """What may leave instead of `arrays` (float32 [B, C, *spatial] by level): gradients before the wire, or
    recorded tensors that were sent without this defence. New arrays, float32."""
    tensors = {name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}
    with torch.no_grad():
        return {name: tensor.numpy() for name, tensor in stack(tensors, release).items()}
