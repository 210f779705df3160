"""Who is told that the run is complete, when links end at that moment: real sessions in memory, in a forced order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splitpeer.coordinator.coordinator import Coordinator
from splitpeer.coordinator.farewell import COMPLETE, Farewell
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.site_link import SiteLink
from splitpeer.coordinator.work import COLLECTED
from splitpeer.daemon import happenings as h
from splitpeer.errors import JobFailed
from splitproto import AllowList, Door, Session, dial, pki
from splitproto.errors import LinkLost
from splitproto.identity import Credentials
from splitproto.lanes.memory import MemoryLane
from splitproto.messages import Bye

SOON = 20.0
SITES = ("ukm", "charite")
CLIENTS, HUB = AllowList({"client": SITES}, "job"), AllowList({"coordinator": {"hub"}}, "peer.toml")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, now = tmp_path_factory.mktemp("pki"), datetime.now(UTC)
    pki.create_ca(folder, "test", now=now)
    pki.issue(folder, "coordinator", "hub", hosts=["localhost"], now=now)
    for site in SITES:
        pki.issue(folder, "client", site, now=now)
    return folder


class Site(RemoteSite):
    """It joins as soon as it dials."""

    def __init__(self, name: str, report: h.Reporter) -> None:
        seat = SimpleNamespace(name="t1")
        offer = SimpleNamespace(
            seats=(seat,), masks=None, job=SimpleNamespace(seconds_per_step=5.0), run=bytes(16)
        )
        witness = SimpleNamespace(listen=lambda session: None)
        super().__init__(name, offer, SOON, witness, report, b"")  # type: ignore[arg-type]

    async def _join(self, link: SiteLink) -> None:
        link.holder_known = True
        self._presence.take(link)


class Record:
    """Who knows."""

    run = bytes(range(16))

    def __init__(self) -> None:
        self.told: tuple[str, ...] = ()

    def note_told(self, told: list[str]) -> None:
        self.told = (*self.told, *told)


class Gate:
    """Keeps what a session sends until it is opened: time in which its peer has not heard it."""

    def __init__(self, session: Session) -> None:
        self._carrier, self.kept = session._carrier, list[bytes]()
        session._carrier = self  # type: ignore[assignment]

    def try_send(self, data: bytes) -> bool:
        self.kept.append(data)
        return True

    def close(self) -> None:
        self._carrier.close()

    def open(self, session: Session) -> None:
        session._carrier = self._carrier
        for data in self.kept:
            assert self._carrier.try_send(data)


class Stage:
    """A coordinator's end of a job, and sites that dial."""

    def __init__(self, keys: Path, lane: MemoryLane, door: Door) -> None:
        self.keys, self.lane, self.door = keys, lane, door
        self.happened: list[h.Happening] = []
        report = h.Reporter(self.happened.append)
        self.sites = {name: Site(name, report) for name in SITES}
        self.record = Record()
        self.farewell = Farewell([*self.sites.values()], self.record, report)  # type: ignore[arg-type]

    async def link(self, site: str) -> tuple[Session, Session]:
        """The site's and the coordinator's side of a link on which nothing was said."""
        files = (self.keys / name for name in ("ca.crt", f"{site}.crt", f"{site}.key"))
        return await asyncio.gather(dial(self.lane, Credentials(*files), HUB), self.door.accept(SOON))

    async def join(self, site: str) -> tuple[Session, Session]:
        client, session = await self.link(site)
        assert await self.sites[site].offer_job(session)
        return client, session

    @property
    def late(self) -> list[str]:
        return [one.site for one in self.happened if isinstance(one, h.SiteLost)]


@asynccontextmanager
async def stage_of(keys: Path) -> AsyncIterator[Stage]:
    lane = MemoryLane()
    credentials = Credentials(keys / "ca.crt", keys / "hub.crt", keys / "hub.key")
    async with Door([lane], credentials, CLIENTS) as door:
        yield Stage(keys, lane, door)


@pytest.fixture
async def stage(keys: Path) -> AsyncIterator[Stage]:
    async with stage_of(keys) as made:
        yield made


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():  # noqa: ASYNC110 (nobody would set an event)
            await asyncio.sleep(0)


async def hears(client: Session, text: str = COMPLETE, run: bytes | None = None) -> None:
    """The site hears that it is done, and leaves."""
    assert await client.receive(SOON) == Bye("complete", text, run)
    await client.close("complete")


async def test_a_site_that_changes_its_link_just_then_is_told_on_the_next(stage: Stage) -> None:
    """SP-11-43: `rotate` was answered, and the link is not over yet: `complete` cannot be said on it any more."""
    (here, _), (worn, session) = await stage.join("ukm"), await stage.join("charite")
    gate = Gate(session)
    leaving = asyncio.create_task(worn.close("rotate", timeout=SOON))
    await until(lambda: gate.kept)
    assert stage.sites["charite"].here
    saying = asyncio.create_task(stage.farewell.wait(SOON))
    await hears(here)
    await until(lambda: not stage.sites["charite"].here)
    gate.open(session)
    await leaving
    assert worn.farewell == Bye("rotate", "")
    assert not saying.done() and "charite" not in stage.record.told
    again, _ = await stage.join("charite")
    await hears(again)
    await saying
    assert sorted(stage.record.told) == sorted(SITES)


async def test_a_bye_that_crosses_is_known_to_have_arrived(stage: Stage) -> None:
    """SP-11-43: both ends closed the link in good order, so nobody is waited for."""
    (one, _), (other, session) = await stage.join("ukm"), await stage.join("charite")
    gate = Gate(session)
    saying = asyncio.create_task(stage.farewell.wait(SOON))
    await until(lambda: gate.kept)
    leaving = asyncio.create_task(other.close("rotate", timeout=SOON))
    await session.leaving
    gate.open(session)
    await asyncio.gather(leaving, hears(one))
    await saying
    assert other.farewell == Bye("complete", COMPLETE)
    assert sorted(stage.record.told) == sorted(SITES) and stage.late == []


async def test_a_site_whose_link_breaks_before_it_has_answered_is_waited_for(stage: Stage) -> None:
    stage.sites["ukm"].leave_out("it is away")
    client, session = await stage.join("charite")
    Gate(session)
    saying = asyncio.create_task(stage.farewell.wait(SOON))
    await until(lambda: not stage.sites["charite"].here)
    client.carrier_lost(LinkLost("cut"))
    session.carrier_lost(LinkLost("cut"))
    again, _ = await stage.join("charite")
    await hears(again)
    await saying
    assert stage.record.told == ("charite",)


async def test_one_that_does_not_come_back_is_waited_for_so_long_and_no_longer(stage: Stage) -> None:
    await stage.farewell.wait(0.01)
    assert (stage.record.told, stage.late) == ((), [*sorted(SITES)])


async def test_nobody_waits_for_who_is_absent_or_has_given_up(stage: Stage) -> None:
    """SP-11-43."""
    stage.sites["ukm"].leave_out("it is away")
    stage.sites["charite"]._presence.note_declined(JobFailed("no"))
    async with asyncio.timeout(SOON):
        await stage.farewell.wait(1e6)
    assert stage.record.told == ()


async def test_an_absent_one_is_told_if_it_comes_while_others_are_waited_for(stage: Stage) -> None:
    stage.sites["ukm"].leave_out("it is away")
    saying = asyncio.create_task(stage.farewell.wait(1e6))
    for site in SITES:
        await hears((await stage.join(site))[0])
    async with asyncio.timeout(SOON):
        await saying
    assert stage.record.told == SITES


async def test_one_that_is_turned_away_meanwhile_is_not_waited_for(stage: Stage) -> None:
    """SP-11.17-8: after its last release a site hears it in place of an offer."""
    stage.sites["ukm"].leave_out("it is away")
    saying = asyncio.create_task(stage.farewell.wait(1e6))
    client, session = await stage.link("charite")
    await asyncio.gather(stage.farewell.turn_away(session), hears(client, COLLECTED, stage.record.run))
    async with asyncio.timeout(SOON):
        await saying
    assert stage.record.told == ("charite",)


async def test_a_site_that_joins_as_the_last_release_arrives_is_let_go_at_once(stage: Stage) -> None:
    """SP-11.17-8: it began to join while there was something to ask, and nobody would speak on that link for weeks."""
    client, session = await stage.link("charite")
    hub = SimpleNamespace(
        _work=SimpleNamespace(needs_sites=False),
        _farewell=stage.farewell,
        _probing=None,
        sites=stage.sites.values(),
    )
    await asyncio.gather(
        Coordinator._join(hub, session),  # type: ignore[arg-type]
        hears(client, COLLECTED),
    )
    assert stage.record.told == ("charite",)
