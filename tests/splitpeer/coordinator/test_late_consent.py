"""Withdrawn consent of which a full disk kept the coordinator from removing what it has: it is not forgotten."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest

from splitpeer.coordinator.inference.consent import LateConsent
from splitpeer.coordinator.inference.segmenting import PatientSegmenter
from splitpeer.errors import DiskTrouble
from splitproto.causes import CONSENT

KEY = bytes(16)


async def test_what_could_not_be_removed_is_removed_the_next_time() -> None:
    """A request that meets the full disk ends with an error, and the service goes on."""
    site = SimpleNamespace(name="site-t1", unusable={KEY: CONSENT}, listed={KEY})
    run = SimpleNamespace(
        team=SimpleNamespace(sites=[site]),
        seating=SimpleNamespace(filled={KEY: {}}),
        patients_of=lambda _: {KEY},
    )
    full, removed = [True], list[tuple[str, Collection[bytes]]]()

    async def since_complete(name: str, keys: Collection[bytes]) -> None:
        if full and full.pop():
            raise DiskTrouble("no room", "disk-full")
        removed.append((name, keys))

    segmenter: Any = PatientSegmenter.__new__(PatientSegmenter)
    segmenter._consent = LateConsent(run, SimpleNamespace(since_complete=since_complete))  # type: ignore[arg-type]
    with pytest.raises(DiskTrouble):
        await segmenter.heed()
    for _ in range(2):
        await segmenter.heed()
    assert removed == [("site-t1", frozenset({KEY}))]
    site.unusable.clear()
    await segmenter.heed()
    site.unusable[KEY] = CONSENT
    await segmenter.heed()
    assert len(removed) == 2, "withdrawn once more"
