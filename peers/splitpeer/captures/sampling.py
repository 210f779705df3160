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
)
from splitproto.records import Sample

LOGITS = "logits"
"""What is asked of the site of the labels in a training step, beside the modes."""
_BATCHES = 4096
"""Batches remembered, so that the answers to a chosen one are chosen too."""

Batch = tuple[str, str, int, int]
"""Of a peer: a mode, a step, a number."""


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

    def keeps(self, peer: str, message: Message) -> bool:
        """Whether `message`, to or from `peer`, is to be recorded."""
        samples: Sequence[Sample] | None = None
        # Sites have different parts of a batch, and the site of the labels has logits besides its own part.
        match message:
            case Forward():
                batch, samples = (peer, message.mode, message.step, message.batch), message.samples
            case Activations():
                batch = (peer, message.mode, message.step, message.batch)
            case Logits():
                batch, samples = (peer, LOGITS, message.step, 0), message.samples
            case Prediction():
                return not self._keys or message.sample.key.hex().startswith(self._keys)
            case LossGradients():
                batch = (peer, LOGITS, message.step, 0)
            case Gradients() | Applied():
                batch = (peer, "train", message.step, 0)
            case _:
                return True
        if self._keys and samples is not None:
            self._remember(batch, samples)
        _, mode, step, _ = batch
        in_turn = mode not in ("train", LOGITS) or (step - 1) % self._every == 0
        return in_turn and (not self._keys or self._chosen.get(batch, False))

    def _remember(self, batch: Batch, samples: Sequence[Sample]) -> None:
        self._chosen[batch] = any(sample.key.hex().startswith(self._keys) for sample in samples)
        self._chosen.move_to_end(batch)
        if len(self._chosen) > _BATCHES:
            self._chosen.popitem(last=False)
