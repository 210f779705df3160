"""The parts of a training step, by name: what `timing` in `metrics.jsonl` and `splitpeer trace` count. One table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["load", "compute", "encode", "wire", "wait", "save"]


@dataclass(frozen=True)
class StepPart:
    """Something that takes time."""

    kind: Kind
    """What it is paid for with: it decides the colour."""
    means: str
    """From when to when, at whom."""


PARTS: dict[str, StepPart] = {
    # At the coordinator, in the order of a step.
    "masks": StepPart("load", "coordinator: batches drawn, and masks read and augmented"),
    "activations": StepPart("wait", "coordinator: from the first question to the last site's activations"),
    "decoder": StepPart(
        "compute", "coordinator: fusion, decoder, loss, backward, gradient defences, optimiser"
    ),
    "features": StepPart("load", "coordinator with frozen encoders: activations read from the feature bank"),
    "labels": StepPart("wait", "coordinator: for the loss's gradient, where the labels are at a site"),
    "apply": StepPart("wait", "coordinator: from sending gradients until the last site has applied them"),
    "evaluation": StepPart(
        "compute", "coordinator: between two steps, all of it, waiting for sites included"
    ),
    # At a site, in the order of a step.
    "read": StepPart("load", "site: a batch ahead: images read, defended and augmented"),
    "images": StepPart("wait", "site: for the images of the batch that is due"),
    "encoder": StepPart("compute", "site: encoder and defences, forward"),
    "send": StepPart(
        "wire", "site: activations, until the last octet is encrypted and with the operating system"
    ),
    "gradients": StepPart("wait", "site: for gradients"),
    "loss": StepPart("compute", "site with the labels: the loss and its gradient"),
    "backward": StepPart("compute", "site: backward and optimiser"),
    "batch": StepPart("wait", "site: for work to be announced"),
    # At both.
    "encode": StepPart(
        "encode", "tensors converted for the wire: precision or coding, masks of a secure sum"
    ),
    "decode": StepPart(
        "encode",
        "what arrived, converted to tensors: precision or coding, rows put together, a secure sum unmasked",
    ),
    "checkpoint": StepPart("save", "written to disk, at the coordinator until all sites have done so"),
}
"""Of a thread's time: parts of one thread do not overlap."""

LINK: dict[str, str] = {
    "message": "messages to heads and pieces",
    "encrypt": "pieces to TLS records",
    "decrypt": "records to messages: decrypted, checked, put together",
    "blocked": "an envelope's wait for room in the queue to the operating system",
}
"""Of links, added up over all of them (`splitproto.cost`); it lies within parts such as `send` and `activations`."""
