"""A capture made up message by message, through the writer that recorders use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from splitpeer.captures.parts import PartWriter
from splitpeer.captures.reader import Capture, open_capture
from splitpeer.data.sampling import batch_digest
from splitproto.capture import Header, Party, Sampling
from splitproto.messages import Activations, Forward, Gradients, Inventory, Message
from splitproto.records import Job, Patient, Sample, Seat
from tests.cuts import unet

WIDTHS = (2, 2, 4, 4, 4, 2)
JOB = Job(
    name="taped", dimensions=2, **unet(WIDTHS), levels=(0, 4), precision="f32", window=(16, 16), spacing=(),
    augment=False, batch=2, steps=9, optimiser="adam", learning_rate=1e-3, weight_decay=0.0, schedule="constant",
    seconds_per_step=30.0,
)  # fmt: skip
COMMON: dict[str, Any] = {
    "federation": "test", "agent": "tape", "created": 0.0, "run": bytes(16), "job": JOB, "sampling": Sampling(),
}  # fmt: skip
SEATS = (Seat("t1", ("t1",)),)
Said = tuple[str, str, Message]
"""Peer, direction, message."""


def coordinators(*parties: Party, **more: Any) -> Header:
    """The header of a coordinator who met these."""
    return replace(Header(role="coordinator", site="hub", **COMMON), peers=parties, **more)


def sites(**more: Any) -> Header:
    """The header of a site."""
    fields: dict[str, Any] = {"peers": (Party("hub"),), "seats": SEATS, **more}
    return replace(Header(role="client", site="north", **COMMON), **fields)


def tape(path: Path, header: Header, said: Iterable[Said]) -> Capture:
    """Write a capture and open it."""
    writer = PartWriter(path, 0, None, header, None)
    for number, (peer, direction, message) in enumerate(said):
        writer.append(writer.packed(message, float(number), peer, direction))
    writer.end("closed", "")
    return open_capture(path)


def samples(*numbers: int) -> tuple[Sample, ...]:
    """One slice of patient `number` each."""
    return tuple(Sample(bytes([number]) * 16, (0, 0, number)) for number in numbers)


def order(step: int, of: tuple[Sample, ...], mode: str = "train", batch: int = 0) -> Forward:
    """An order without augmentation."""
    return Forward(mode, step, batch, of, batch_digest(step, of, None))


def levels(count: int, value: float) -> dict[str, np.ndarray]:
    """What a site sends of `count` samples: sample i is `value` + i / 10 everywhere."""
    rows = value + np.arange(count, dtype=np.float32) / 10
    return {
        f"x{level}": np.broadcast_to(
            rows.reshape(-1, 1, 1, 1), (count, WIDTHS[level], 16 >> level, 16 >> level)
        ).copy()
        for level in (0, 4)
    }


def answer(to: Forward, value: float) -> Activations:
    """What a site with one seat sends to an order."""
    return Activations(to.mode, to.step, to.batch, to.digest, levels(len(to.samples), value))


def answers(to: Forward, seats: dict[str, tuple[int, float]]) -> Activations:
    """What a site with several seats sends: of each, so many rows from a value on."""
    tensors = {
        f"{s}/{name}": array for s, (n, value) in seats.items() for name, array in levels(n, value).items()
    }
    return Activations(to.mode, to.step, to.batch, to.digest, tensors)


def lists(*patients: tuple[int, tuple[int, ...] | None]) -> Inventory:
    """Patients by number, each with the seats that the site fills (None: all)."""
    grid: dict[str, Any] = {
        "shape": (16, 16, 9), "spacing": (1.0,) * 3, "directions": (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0),
        "origin": (0.0,) * 3, "stored": (1.0,) * 3,
    }  # fmt: skip
    return Inventory(
        tuple(Patient(bytes([n]) * 16, **grid, seats=seats) for n, seats in patients), True, bytes(8)
    )


def graded(to: Forward, value: float) -> Gradients:
    """What comes back."""
    return Gradients(to.step, levels(len(to.samples), value))
