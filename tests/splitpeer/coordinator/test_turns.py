"""Gradients to one site after the other: whose turn it is, how long at most, and which way is chosen."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence

import pytest

from splitpeer.coordinator import turns as module
from splitpeer.coordinator.turns import AGAIN, TRIALS, Exchanges, Turns
from splitpeer.daemon import happenings as h

SITES = ("a", "b", "c")
LONG, SHORT = 20.0, 0.2


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Sending:
    """Three sites that are sent to in turns."""

    def __init__(self, most_s: float) -> None:
        self.turns = Turns(SITES, most_s)
        self.begun: list[str] = []
        self.pass_on: dict[str, Callable[[], None]] = {}
        self.leave = {site: asyncio.Event() for site in SITES}
        self.tasks = {site: asyncio.create_task(self._one(site)) for site in reversed(SITES)}

    async def _one(self, site: str) -> None:
        async with self.turns.of(site) as self.pass_on[site]:
            self.begun.append(site)
            await self.leave[site].wait()

    async def end(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def test_each_site_waits_for_half_of_what_the_one_before_it_gets() -> None:
    sending = Sending(LONG)
    await settle()
    assert sending.begun == ["a"]
    sending.pass_on["a"]()
    await settle()
    assert sending.begun == ["a", "b"]
    sending.pass_on["a"]()
    await settle()
    assert sending.begun == ["a", "b"], "told twice"
    sending.leave["b"].set()
    await settle()
    assert sending.begun == ["a", "b", "c"], "it was done without saying when it had half"
    await sending.end()


async def test_one_that_fails_or_is_cancelled_passes_on() -> None:
    sending = Sending(LONG)
    await settle()
    sending.tasks["b"].cancel()
    await settle()
    assert sending.begun == ["a"], "those before it are still to come"
    sending.tasks["a"].cancel()
    await settle()
    assert sending.begun == ["a", "c"]
    await sending.end()


async def test_a_site_that_says_nothing_holds_up_all_others_once() -> None:
    """Not each of them for so long."""
    loop = asyncio.get_running_loop()
    began, sending = loop.time(), Sending(SHORT)
    while len(sending.begun) < len(SITES):
        assert loop.time() < began + LONG
        await asyncio.sleep(0.01)
    assert SHORT <= loop.time() - began < 1.9 * SHORT
    await sending.end()


# --- which way --------------------------------------------------------------------------------------------


class Told:
    def __init__(self) -> None:
        self.order: list[h.TurnsChosen] = []

    def __call__(self, happening: h.Happening) -> None:
        if isinstance(happening, h.TurnsChosen):
            self.order.append(happening)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def exchanges(told: Told) -> Exchanges:
    return Exchanges("auto", LONG, h.Reporter(told))


def make(exchanges: Exchanges, count: int, at_once: float, in_turns: float) -> str:
    """So many exchanges that take so long, as letters: O at once, T in turns."""
    ways = ""
    for _ in range(count):
        turns = exchanges.next()
        ways += "T" if turns else "O"
        exchanges.note(turns, in_turns if turns else at_once)
    return ways


@pytest.mark.parametrize(("in_turns", "kept"), [(1.7, "T"), (8.0, "O"), (2.4, "O")])
def test_both_ways_are_tried_and_the_faster_one_is_kept(
    exchanges: Exchanges, told: Told, in_turns: float, kept: str
) -> None:
    """As good as the other is not faster."""
    assert make(exchanges, 2 * TRIALS, 2.5, in_turns) == "OT" * TRIALS
    assert make(exchanges, 40, 2.5, in_turns) == 40 * kept
    assert [(one.at_once_s, one.in_turns_s) for one in told.order] == [(2.5, in_turns)]
    assert told.order[0].sent == {"T": "to one site after the other", "O": "to all sites at once"}[kept]


def test_now_and_then_the_other_way_is_tried(exchanges: Exchanges) -> None:
    make(exchanges, 2 * TRIALS, 1.0, 3.0)
    ways = make(exchanges, 10 * AGAIN, 1.0, 3.0)
    assert 8 <= ways.count("T") <= 10 and "TT" not in ways


def test_when_a_link_changes_both_are_tried_anew(exchanges: Exchanges, told: Told) -> None:
    make(exchanges, 2 * AGAIN, 1.0, 3.0)
    exchanges.note(False, 9.0)
    assert make(exchanges, 5, 1.0, 3.0) == 5 * "O", "one that is late is no change"
    # The coordinator's line is the narrowest now, and then the sites' lines are.
    ways = make(exchanges, 30, 2.5, 1.7)
    assert ways.startswith("OO") and "OTOT" in ways and ways.endswith(10 * "T"), ways
    assert make(exchanges, 2 * AGAIN, 2.5, 6.0).endswith(10 * "O")
    at_once, in_turns = "to all sites at once", "to one site after the other"
    assert [one.sent for one in told.order] == [at_once, in_turns, at_once]


def test_turns_once_taken_up_are_kept_while_they_are_faster(exchanges: Exchanges, told: Told) -> None:
    """Else a run near the limit changes again and again."""
    make(exchanges, 2 * TRIALS, 2.5, 1.7)
    assert make(exchanges, 3 * AGAIN, 2.5, 2.4).count("O") <= 3
    assert len(told.order) == 1


@pytest.mark.parametrize(("noise", "lines"), [(0.1, 1), (0.4, 20)])
def test_noise_costs_few_exchanges_the_slower_way(
    exchanges: Exchanges, told: Told, noise: float, lines: int
) -> None:
    """Exchanges on a line that others use: lognormal."""
    dice = random.Random(7)
    count, slower = 4000, 0
    for _ in range(count):
        turns = exchanges.next()
        slower += turns
        exchanges.note(turns, (4.6 if turns else 2.5) * dice.lognormvariate(0, noise))
    assert slower < 0.07 * count
    assert len(told.order) <= lines


def test_with_other_sites_both_are_tried_anew(exchanges: Exchanges, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = with_sites(exchanges, monkeypatch, 2 * AGAIN, lambda step: SITES if step < 150 else SITES[:2])
    first, later = 2 * TRIALS, 150 - 1
    assert ways[:first] == "OT" * TRIALS and ways[later + 1 : later + 11].count("T") >= TRIALS - 1


def test_a_site_that_comes_and_goes_does_not_keep_the_others_in_trials(
    exchanges: Exchanges, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = with_sites(exchanges, monkeypatch, 4 * AGAIN, lambda step: SITES if step % 6 else SITES[:2])
    assert TRIALS <= ways.count("T") <= 4 * (TRIALS + 1)


def with_sites(
    exchanges: Exchanges, monkeypatch: pytest.MonkeyPatch, steps: int, present: Callable[[int], Sequence[str]]
) -> str:
    """Ways of so many steps with these sites; an exchange takes a second either way."""
    clock = stepped(monkeypatch)

    async def run() -> str:
        ways = ""
        for step in range(1, steps + 1):
            ways += "T" if exchanges.begin(step, present(step), present(step)) else "O"
            next(clock)
            exchanges.end(step + 1)
        return ways

    return asyncio.run(run())


def stepped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A clock that goes on by a second each time."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    while True:
        now[0] += 1.0
        yield


@pytest.mark.parametrize(("setting", "way"), [("always", "T"), ("never", "O")])
def test_a_setting_decides(told: Told, setting: str, way: str) -> None:
    exchanges = Exchanges(setting, LONG, h.Reporter(told))  # type: ignore[arg-type]
    assert make(exchanges, 30, 1.0, 2.0) == 30 * way and told.order == []


async def test_a_turn_lasts_no_longer_than_an_exchange_at_once(exchanges: Exchanges) -> None:
    assert exchanges.most_s == LONG
    for seconds in (9.0, 1.0, 2.0):
        exchanges.note(False, seconds)
    assert exchanges.most_s == 1.0, "the others may have been outages"
    for _ in range(TRIALS):
        exchanges.note(False, 3.0)
    assert exchanges.most_s == 3.0
    for _ in range(TRIALS):
        exchanges.note(False, 5 * LONG)
    assert exchanges.most_s == LONG


async def test_without_exchanges_at_once_a_turn_lasts_no_longer_than_one_in_turns(told: Told) -> None:
    exchanges = Exchanges("always", LONG, h.Reporter(told))
    make(exchanges, 20, 9.0, 2.0)
    assert exchanges.most_s == 2.0


async def test_what_lies_between_does_not_count(exchanges: Exchanges) -> None:
    for lost in (exchanges.none, lambda: exchanges.end(9), lambda: exchanges.begin(2, "a", SITES)):
        exchanges.begin(1, SITES, SITES)
        lost()
        exchanges.end(2)
    exchanges.begin(1, SITES, SITES)
    exchanges.end(3)
    assert exchanges.most_s == LONG, "nothing was noted"
    exchanges.begin(3, SITES, SITES)
    exchanges.end(4)
    assert exchanges.most_s < LONG


async def test_one_site_has_no_turns(told: Told) -> None:
    exchanges = Exchanges("always", LONG, h.Reporter(told))
    assert exchanges.begin(1, SITES[:1], SITES) is None and not exchanges.in_turns
    assert exchanges.begin(2, SITES, SITES) is not None and exchanges.in_turns
