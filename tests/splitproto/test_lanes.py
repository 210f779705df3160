"""Lanes: the one in memory, and several at one door, which has one policy for all of them."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from splitproto import Credentials, Door, Session, Timing, admission, constants, dial, envelope, pki
from splitproto.envelope import Kind, ResetReason
from splitproto.errors import (
    BindFailed,
    IdentityError,
    LinkLost,
    NotAuthorised,
    RemoteError,
    SplitprotoError,
    TooManyLinks,
)
from splitproto.lanes import tcp
from splitproto.lanes.base import Attempt, Dialled, Lane
from splitproto.lanes.memory import QUEUE, MemoryEnd, MemoryLane
from splitproto.lanes.zeromq import Dealer, ZmqLane
from splitproto.messages import Activations
from splitproto.visitors import MAX_FAULTS
from tests.splitproto.links import CLIENTS, COORDINATORS, SOON, over, part, quiet, work

SOURCE = "127.0.0.1"
"""Where strangers seem to come from, on every lane."""
CAP = constants.MAX_HALF_OPEN_PER_SOURCE
Example = Callable[[str], Any]


class House:
    """A door above lanes."""

    def __init__(self, federation: Any, door: Door, refused: list[SplitprotoError]) -> None:
        self.federation, self.door, self.refused = federation, door, refused

    async def dial(self, way: str | MemoryLane, site: str = "charite", **options: Any) -> Session:
        return await dial(way, self.federation.credentials(site), COORDINATORS, **options)

    async def link(
        self, way: str | MemoryLane, site: str = "charite", **options: Any
    ) -> tuple[Session, Session]:
        return await asyncio.gather(self.dial(way, site, **options), self.door.accept(SOON))


@asynccontextmanager
async def house_of(federation: Any, *lanes: Lane, **options: Any) -> AsyncIterator[House]:
    refused: list[SplitprotoError] = []
    door = Door(
        lanes,
        federation.credentials("hub"),
        CLIENTS,
        refused=lambda source, error: refused.append(error),
        **options,
    )
    async with door:
        yield House(federation, door, refused)
    assert not door._links
    await quiet()


def zmq_lane() -> ZmqLane:
    return ZmqLane("tcp://127.0.0.1:0")


class Stranger:
    """The dialling end of a lane, in the hands of somebody without a certificate."""

    def __init__(self, lane: Lane) -> None:
        self.heard: list[envelope.Envelope] = []
        self.lost: SplitprotoError | None = None
        self.end: Dialled = MemoryEnd(lane) if isinstance(lane, MemoryLane) else Dealer(lane.address)
        self.end.start(self)

    def arrived(self, data: bytes | memoryview) -> None:
        self.heard.append(envelope.decode(bytes(data)))

    def carrier_lost(self, error: SplitprotoError) -> None:
        self.lost = error

    async def opens(self, number: int, body: bytes = b"") -> None:
        message = envelope.encode(Kind.OPEN, number.to_bytes(2, "big") * 8, 0, body)
        async with asyncio.timeout(SOON):
            while not self.end.try_send(message):  # noqa: ASYNC110 (a carrier has no event)
                await asyncio.sleep(0.01)

    @property
    def told(self) -> list[tuple[int, int]]:
        """Number of the link and reason of each RESET."""
        return [
            (int.from_bytes(one.link[:2], "big"), envelope.decode_reset(one.body).reason)
            for one in self.heard
            if one.kind is Kind.RESET
        ]


async def turns(count: int = 20) -> None:
    """Let the loop work."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():  # noqa: ASYNC110 (nobody would set an event)
            await asyncio.sleep(0.01)


# --- the lane in memory ------------------------------------------------------------------------------------


async def test_tensors_travel_over_memory_under_tls(federation: Any, example: Example) -> None:
    lane = MemoryLane()
    async with house_of(federation, lane) as house:
        client, coordinator = await house.link(lane)
        assert client.tls.startswith("TLSv1.3")
        assert (client.peer.site, coordinator.peer.site) == ("hub", "charite")
        assert client.binding == coordinator.binding
        await work(client, coordinator, example)
        sent = np.arange(3 << 20, dtype=np.uint8)
        await asyncio.gather(
            client.send(Activations("train", 1, 0, bytes(32), {"x": sent})),
            taken := asyncio.ensure_future(coordinator.receive(SOON)),
        )
        assert np.array_equal(taken.result().tensors["x"], sent)  # type: ignore[attr-defined]
        await part(client, coordinator)
        assert client.ended.result() is coordinator.ended.result() is None
        assert house.refused == []


async def test_nobody_listens_in_memory(federation: Any) -> None:
    with pytest.raises(LinkLost, match="nothing listens at memory:localhost") as caught:
        await dial(MemoryLane(), federation.credentials("charite"), COORDINATORS)
    assert caught.value.retry
    await quiet()


async def test_the_certificate_must_name_the_lanes_host(federation: Any) -> None:
    lane = MemoryLane("elsewhere.example")
    async with house_of(federation, lane) as house:
        with pytest.raises(SplitprotoError, match=r"elsewhere\.example"):
            await house.dial(lane)


async def test_a_site_that_is_not_allowed_is_refused_in_memory(federation: Any) -> None:
    lane = MemoryLane()
    async with house_of(federation, lane) as house:
        with pytest.raises(SplitprotoError, match="allow-list"):
            await house.dial(lane, "stranger")
        assert [type(error) for error in house.refused] == [NotAuthorised]


async def test_one_lane_has_one_listener_at_a_time(federation: Any) -> None:
    lane = MemoryLane()
    async with house_of(federation, lane) as house:
        with pytest.raises(BindFailed, match="another listener is at memory"):
            async with house_of(federation, lane):
                raise AssertionError("not reached")
        await part(*await house.link(lane))
    async with house_of(federation, lane) as house:
        await part(*await house.link(lane))


@pytest.mark.parametrize("side", ["client", "coordinator"])
async def test_a_line_in_memory_that_breaks(federation: Any, side: str) -> None:
    lane = MemoryLane()
    async with house_of(federation, lane) as house:
        client, coordinator = await house.link(lane)
        (link,) = house.door._links.values()
        if side == "client":
            client._carrier.close()
            client.carrier_lost(LinkLost("its process was killed"))
        else:
            assert link.visitor is not None
            link.visitor.hang_up()
        for session in (client, coordinator):
            assert isinstance(await over(session), LinkLost)


async def test_a_full_pipe_makes_the_sender_wait(federation: Any) -> None:
    lane = MemoryLane()
    async with house_of(federation, lane) as house:
        stranger = Stranger(lane)
        assert [stranger.end.try_send(b"x") for _ in range(QUEUE + 1)] == [True] * QUEUE + [False]
        await turns()
        assert len(house.refused) == MAX_FAULTS, "then no more work is done for it"
        assert stranger.lost is not None
        with pytest.raises(LinkLost):
            stranger.end.try_send(b"x")


# --- several lanes at one door ------------------------------------------------------------------------------


def pairs() -> list[Callable[[], tuple[Lane, Lane]]]:
    return [lambda: (zmq_lane(), MemoryLane(source=SOURCE)), lambda: (zmq_lane(), zmq_lane())]


def way(lane: Lane) -> str | MemoryLane:
    return lane if isinstance(lane, MemoryLane) else lane.address


TWO = pytest.mark.parametrize("two", pairs(), ids=["zeromq and memory", "two ports"])


@TWO
async def test_both_lanes_lead_to_the_same_door(two: Any, federation: Any) -> None:
    one, other = two()
    async with house_of(federation, one, other) as house:
        assert house.door.address == one.address
        first = await house.link(way(one))
        second = await house.link(way(other), "ukm")
        assert [session.peer.site for _, session in (first, second)] == ["charite", "ukm"]
        await part(*first, *second)


@TWO
async def test_if_one_lane_cannot_listen_none_does(two: Any, federation: Any) -> None:
    one, _ = two()
    taken = zmq_lane()
    async with house_of(federation, taken):
        with pytest.raises(BindFailed, match="in use"):
            async with house_of(federation, one, ZmqLane(taken.address)):
                raise AssertionError("not reached")
        with pytest.raises(LinkLost):
            await dial(way(one), federation.credentials("charite"), COORDINATORS)
    await quiet()


@TWO
async def test_leaving_says_bye_on_all_lanes(two: Any, federation: Any) -> None:
    one, other = two()
    async with house_of(federation, one, other) as house:
        first, _ = await house.link(way(one))
        second, _ = await house.link(way(other), "ukm")
        leaving = [asyncio.ensure_future(session.receive(SOON)) for session in (first, second)]
        for session, bye in zip((first, second), leaving, strict=True):
            bye.add_done_callback(lambda _, session=session: asyncio.ensure_future(session.close("drain")))
    for session, bye in zip((first, second), leaving, strict=True):
        assert (await bye).name == "bye"
        assert await over(session) is None


@TWO
async def test_half_open_links_of_all_lanes_share_a_cap(two: Any, federation: Any) -> None:
    one, other = two()
    async with house_of(federation, one, other) as house:
        first, second = Stranger(one), Stranger(other)
        for number in range(1, 1 + CAP):
            await (first if number <= CAP // 2 else second).opens(number)
            # Memory is faster than TCP, and the order decides which is the oldest.
            await until(lambda number=number: len(house.door._links) == number)
        assert not first.told and not house.refused
        await second.opens(100)
        await until(lambda: first.told)
        # The oldest goes, also when the newest came by another lane.
        assert first.told == [(1, ResetReason.BUSY)] and not second.told
        assert len(house.door._links) == CAP
        await until(lambda: house.refused)
        assert [type(error) for error in house.refused] == [TooManyLinks]
        await part(*await house.link(way(other)))
        first.end.close()
        second.end.close()


@TWO
async def test_connections_of_all_lanes_share_a_cap(two: Any, federation: Any) -> None:
    one, other = two()
    async with house_of(federation, one, other) as house:
        strangers = []
        for number in range(CAP + 1):
            strangers.append(Stranger(one if number < CAP // 2 else other))
            await until(lambda: len(house.door._visitors.strangers) == min(len(strangers), CAP))
        await until(lambda: strangers[0].lost)
        await asyncio.sleep(0.1)
        assert [stranger.lost is None for stranger in strangers] == [False] + [True] * CAP
        assert "the oldest is closed" in str(house.refused[0])
        for stranger in strangers:
            stranger.end.close()
        await until(lambda: not house.door._visitors.strangers)


@TWO
async def test_handshakes_on_all_lanes_share_a_budget(
    two: Any, federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "HANDSHAKE_RATE", 0)  # what is spent does not come back
    one, other = two()
    async with house_of(federation, one, other) as house:
        first, second = Stranger(one), Stranger(other)
        body = bytes(constants.MAX_HANDSHAKE_BYTES - admission.OPEN_COST - constants.ENVELOPE_HEADER)
        for number in range(1, 1 + admission.HANDSHAKE_BURST // constants.MAX_HANDSHAKE_BYTES):
            await first.opens(number, body)
            await until(lambda: len(house.refused) == number)  # noqa: B023
        assert not any(isinstance(error, TooManyLinks) for error in house.refused)
        await second.opens(100, body)
        await until(lambda: second.told)
        assert second.told == [(100, ResetReason.BUSY)]
        assert "more handshakes than" in str(house.refused[-1])
        first.end.close()
        second.end.close()


@TWO
async def test_a_revoked_certificate_ends_the_links_of_all_lanes(two: Any, tmp_path: Path) -> None:
    one, other = two()
    now = datetime.now(UTC)
    pki.create_ca(tmp_path, "test", now=now)
    pki.write_crl(tmp_path, now=now)
    pki.issue(tmp_path, "coordinator", "hub", hosts=["localhost", "127.0.0.1"], now=now)
    pki.issue(tmp_path, "client", "charite", hosts=[], now=now)
    live = SimpleNamespace(
        credentials=lambda site: Credentials(
            tmp_path / "ca.crt", tmp_path / f"{site}.crt", tmp_path / f"{site}.key", tmp_path / "ca.crl"
        )
    )
    async with house_of(live, one, other, timing=Timing(recheck=0.1)) as house:
        links = [await house.link(way(lane)) for lane in (one, other)]
        pki.revoke(tmp_path, "charite", now=datetime.now(UTC))
        for client, coordinator in links:
            assert isinstance(await over(coordinator), IdentityError)
            assert isinstance(await over(client), RemoteError)


async def test_a_dead_connection_of_one_lane_costs_the_other_nothing(federation: Any) -> None:
    one, other = zmq_lane(), MemoryLane()
    async with house_of(federation, one, other) as house:
        first, at_door = await house.link(one.address)
        second = await house.link(other)
        carrier: Any = first._carrier
        carrier._socket.disable_monitor()
        carrier._monitor.close()
        carrier._reader.close(linger_ms=0)
        assert isinstance(await over(at_door), LinkLost)
        first.carrier_lost(LinkLost("its process was killed"))
        assert await second[0].answers(SOON) and await second[1].answers(SOON)
        await part(*second)


@pytest.mark.parametrize("place", [0, 1])
async def test_a_lane_that_cannot_leave_keeps_no_other_open(federation: Any, place: int) -> None:
    lanes = [zmq_lane(), zmq_lane()]
    broken = lanes[place]
    leave = broken.leave

    def fails() -> None:
        leave()
        raise OSError("no")

    broken.leave = fails  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no"):
        async with house_of(federation, *lanes):
            pass
    assert all(lane._socket.closed for lane in lanes)


async def test_a_link_that_is_over_before_it_is_admitted_is_not_handed_out(federation: Any) -> None:
    async with house_of(federation, lane := MemoryLane()) as house:

        async def established() -> None: ...

        link: Any = SimpleNamespace(key=(lane, b"route", b"link"), admitted=False)
        await house.door._admit(link, SimpleNamespace(established=established))  # type: ignore[arg-type]
        assert not link.admitted and not house.door._ready


class LateLane(MemoryLane):
    """Does not know at first by which connection messages come, or mistakes it for another."""

    late = 0
    """Messages for which that holds."""
    taken_for: Any = None

    def _deliver(self, end: MemoryEnd, data: bytes) -> None:
        its = end.visitor
        if self.late:
            self.late, end.visitor = self.late - 1, self.taken_for
        super()._deliver(end, data)
        end.visitor = its


@pytest.mark.parametrize("mistaken", [False, True])
@pytest.mark.parametrize("late", [1, 100], ids=["before admission", "after"])
async def test_a_connection_that_is_known_late_has_its_link(
    mistaken: bool, late: int, federation: Any
) -> None:
    lane = LateLane()
    async with house_of(federation, lane) as house:
        other: Any = Stranger(lane).end
        lane.late, lane.taken_for = late, other.visitor if mistaken else None
        client, coordinator = await house.link(lane)
        lane.late = 0
        assert await client.answers(SOON)
        visitors, end = house.door._visitors, client._carrier
        assert isinstance(end, MemoryEnd) and end.visitor is not None
        assert visitors.strangers == [other.visitor]
        assert (end.visitor.links, other.visitor.links) == (1, 0)
        visitors.look(asyncio.get_running_loop().time() + 1000)
        assert other.visitor.ended and await client.answers(SOON)
        await part(client, coordinator)
        assert end.visitor.links == 0


async def test_a_lane_that_fails_after_it_has_bound_keeps_no_socket(monkeypatch: Any) -> None:
    def full(number: int) -> None:
        raise OSError("too many open files")

    monkeypatch.setattr("splitproto.lanes.zeromq.Port", full)
    lane = zmq_lane()
    with pytest.raises(OSError, match="too many"):
        await lane.listen(SimpleNamespace())  # type: ignore[arg-type]
    assert lane._socket.closed and lane._monitor.socket.closed


# --- a lane of another kind --------------------------------------------------------------------------------


class Courier:
    """A destination as somebody else may write one: it knows its own ways there, and what to say of them."""

    host = "localhost"

    def __init__(self, *lanes: MemoryLane) -> None:
        self.lanes, self.tried = lanes, list[str]()

    async def attempts(self, timeout: float) -> list[Attempt]:
        return [Attempt(f"courier:{number}", partial(self.open, number)) for number in range(len(self.lanes))]

    def open(self, number: int) -> MemoryEnd:
        self.tried.append(f"courier:{number}")
        return MemoryEnd(self.lanes[number])

    async def diagnose(self, error: SplitprotoError) -> SplitprotoError:
        return LinkLost(f"no courier found anybody ({error.name})")


async def test_a_destination_of_another_kind_is_dialled_in_its_own_ways(federation: Any) -> None:
    lane = MemoryLane()
    courier = Courier(MemoryLane(), lane, MemoryLane())
    async with house_of(federation, lane) as house:
        here, there = await asyncio.gather(
            dial(courier, federation.credentials("charite"), COORDINATORS), house.door.accept(SOON)
        )
        assert courier.tried == ["courier:0", "courier:1"]
        assert here.address == "courier:1" and there.peer.site == "charite"
        await part(here, there)


@pytest.mark.parametrize("ways", [0, 2])
async def test_a_destination_says_what_is_wrong_with_it(federation: Any, ways: int) -> None:
    said = "no courier found anybody" if ways else "localhost has no address"
    with pytest.raises(LinkLost, match=said):
        await dial(
            Courier(*[MemoryLane() for _ in range(ways)]), federation.credentials("charite"), COORDINATORS
        )


async def test_who_is_refused_is_not_tried_elsewhere(federation: Any) -> None:
    """What came back was an answer, if not the wanted one."""
    lane = MemoryLane()
    courier = Courier(lane, lane)
    async with house_of(federation, lane):
        with pytest.raises(SplitprotoError):
            await dial(courier, federation.credentials("hub"), COORDINATORS)
    assert courier.tried == ["courier:0"]


def test_a_port_that_finds_one_descriptor_alone_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real = os.open
    monkeypatch.setattr(tcp.os, "open", lambda *how: opened.append(real(*how)) or opened[-1])

    def none_left(number: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(tcp.os, "dup", none_left)
    with pytest.raises(OSError, match="too many"):
        tcp.Port(7443)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_what_comes_by_a_descriptor_that_was_taken_over_is_not_its_former_visitors() -> None:
    """A stranger is gone, and a site has its number: its first message may be read before the monitor's report."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ports = tcp.Port(server.getsockname()[1])
        try:
            with (
                socket.create_connection(server.getsockname()),
                socket.create_connection(server.getsockname()),
            ):
                stranger, _ = server.accept()
                number = stranger.fileno()
                former = ports.came(number, 0.0)
                former.refused = True
                assert ports.spoke(number, 1) is former
                site, _ = server.accept()
                stranger.close()
                os.dup2(site.fileno(), number)
                try:
                    assert ports.spoke(number, 1) is None
                    came = ports.came(number, 0.0)
                    assert ports.spoke(number, 1) is came is not former
                finally:
                    os.close(number)
                    site.close()
        finally:
            ports.close()
