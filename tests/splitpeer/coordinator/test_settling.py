"""Epochs of a service's keys: one for each request, and as many more as days have passed (SP-11.18-18, SP-11.18-19)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from splitpeer.coordinator.settling import DAY_S, MOST_DAYS, Settling
from splitproto.fusion import MOST_EPOCHS
from splitproto.messages import Settled


class Site:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.settled: Settled | None = None
        self.heard: list[Settled] = []

    async def tell(self, told: Settled) -> None:
        self.heard.append(told)


class Place:
    """A run of two sites, its record, and a clock."""

    def __init__(self) -> None:
        self.now = 5e8
        self.record = SimpleNamespace(state="new", trained=False, epoch=1, epoch_since=self.now)
        self.record.settle = self._settle
        self.sites = [Site(), Site()]
        self.open()

    def open(self) -> None:
        """As a new process does."""
        run: Any = SimpleNamespace(
            files=SimpleNamespace(record=self.record), job=SimpleNamespace(fusion=object()),
            team=SimpleNamespace(sites=self.sites), on_disk=self._on_disk,
        )  # fmt: skip
        self.settling = Settling(run, lambda: self.now)

    def _settle(self, epoch: int, *, trained: bool, now: float) -> None:
        if epoch != self.record.epoch:
            self.record.epoch_since = now
        self.record.epoch, self.record.trained = epoch, trained

    async def _on_disk(self, work: Callable[[], None], *, what: str) -> None:
        work()

    async def request(self) -> int:
        """The epoch in which one is made."""
        await self.settling.begin()
        made = int(self.record.epoch)
        assert all(site.settled == Settled(self.record.trained, made) for site in self.sites)
        self.settling.note_asked()
        await self.settling.end()
        return made


@pytest.fixture
def place() -> Place:
    return Place()


async def test_each_request_has_its_own(place: Place) -> None:
    assert [await place.request() for _ in range(3)] == [1, 2, 3]
    place.record.state = "serving"
    place.open()
    assert await place.request() == 5  # what the earlier process asked is over
    await place.settling.trained()
    assert place.sites[0].heard[-1] == Settled(True, 6)


@pytest.mark.parametrize("days", [1, 30, 31, 200])
async def test_no_site_is_ahead_of_it_however_long_nobody_asks(place: Place, days: int) -> None:
    """A site goes on by itself once in `max_key_days`, of a day at least."""
    assert await place.request() == 1
    place.now += days * DAY_S + 60
    assert await place.request() == 2 + 1 + days
    # The time of an epoch that goes on is that of its begin.
    place.now += 0.9 * DAY_S
    await place.settling.trained()
    place.now += 0.2 * DAY_S
    assert await place.request() == 4 + days + 2


async def test_a_wrong_clock_does_not_pass_over_more_epochs_than_sites_allow(place: Place) -> None:
    place.now = 1.8e9
    assert await place.request() == 2 + MOST_DAYS
    assert MOST_DAYS + 1 < MOST_EPOCHS
    place.now = 1.0
    assert await place.request() == 3 + MOST_DAYS
