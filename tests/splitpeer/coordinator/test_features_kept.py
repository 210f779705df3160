"""Features that are kept in memory while a decoder learns from a bank, and what goes when consent is withdrawn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from splitpeer.coordinator.frozen.features import Features
from splitpeer.storage.bank import BankEntry
from splitproto.messages import Forward
from splitproto.records import Sample, Seat

STAYS, GOES = b"stays", b"goes"
AT = (0, 0, 0)


class Releases:
    """Two patients, one window each; counts what is read."""

    def __init__(self) -> None:
        releases = [BankEntry("a", n, key, (AT,), b"", {"x0": (1, 2)}) for n, key in enumerate((STAYS, GOES))]
        self.contents: Any = SimpleNamespace(releases=releases)
        self.read: list[bytes] = []

    def windows(self, release: BankEntry, row: int) -> dict[int, dict[str, np.ndarray]]:
        self.read.append(release.key)
        return {row: {"x0": np.ones((1, 2, 2), np.float32)}}


def test_what_was_read_of_a_patient_who_has_withdrawn_leaves_the_memory() -> None:
    seats = (Seat("s", ("t1",)),)
    seating: Any = SimpleNamespace(
        filled={key: {"s": "a"} for key in (STAYS, GOES)},
        seats=SimpleNamespace(names=("s",), of=lambda _: seats),
    )
    job: Any = SimpleNamespace(fusion=None, cut=(), activations=None, precision="f32")
    bank = Releases()
    features = Features(job, bank, seating, cache_mib=1)
    batch = Forward("train", 1, 0, (Sample(STAYS, AT), Sample(GOES, AT)), b"", None)
    for _ in range(2):
        features.batch(batch)
    assert bank.read == [STAYS, GOES]
    features.forget({GOES, b"nobody"})
    features.batch(batch)
    assert bank.read == [STAYS, GOES, GOES]
    features.forget({STAYS, GOES})
    assert not features._cache and features._held == 0
