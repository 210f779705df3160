"""Which messages a recording keeps: every Nth training step, and batches of chosen patients."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence

from splitpeer.errors import ConfigError
from splitproto.capture import Sampling
from splitproto.messages import (
    Activations,
    Applied,
    Forward,
    Gradients,
    Logits,
    LossGradients,
    Message,
    Prediction,
    Sample,
)

_BATCHES = 4096
"""Batches remembered, so that the answers to a chosen one are chosen too."""

Batch = tuple[str, int, int]


class Chooser:
    """Decides message by message, in the order in which they pass.

    What belongs to no batch is always kept. Evaluation is not thinned out by step, for it happens rarely.

    Raises:
        ConfigError: a key that is not written in hexadecimal digits.
    """

    def __init__(self, sampling: Sampling) -> None:
        if not all(re.fullmatch(r"[0-9a-f]{1,32}", one) for one in sampling.keys):
            raise ConfigError(
                "a patient to record is named by the first hexadecimal digits (0-9, a-f) of its key"
            )
        self._every, self._keys = sampling.every, sampling.keys
        self._chosen: OrderedDict[Batch, bool] = OrderedDict()

    def keeps(self, message: Message) -> bool:
        """Whether `message` is to be recorded."""
        match message:
            case Forward():
                if self._keys:
                    self._remember(message.mode, message.step, message.batch, message.samples)
                batch = (message.mode, message.step, message.batch)
            case Activations():
                batch = (message.mode, message.step, message.batch)
            case Logits():
                if self._keys:
                    self._remember("train", message.step, 0, message.samples)
                batch = ("train", message.step, 0)
            case Prediction():
                return not self._keys or message.sample.key.hex().startswith(self._keys)
            case Gradients() | Applied() | LossGradients():
                batch = ("train", message.step, 0)
            case _:
                return True
        mode, step, _ = batch
        in_turn = mode != "train" or (step - 1) % self._every == 0
        return in_turn and (not self._keys or self._chosen.get(batch, False))

    def _remember(self, mode: str, step: int, number: int, samples: Sequence[Sample]) -> None:
        batch = (mode, step, number)
        self._chosen[batch] = any(sample.key.hex().startswith(self._keys) for sample in samples)
        self._chosen.move_to_end(batch)
        if len(self._chosen) > _BATCHES:
            self._chosen.popitem(last=False)
