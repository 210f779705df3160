"""The relays do what the schedules say: every statement about faults relies on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from splitproto import AllowList, Credentials, Listener, Session, SplitprotoError, dial
from splitproto.lanes.addresses import parse_address
from tests.splitpeer.roles.scene import Federation

from .relays import Damage, EnvelopeRelay, TcpRelay

SOON = 20.0
CLIENTS, COORDINATORS = (
    AllowList({"client": ["site-t1"]}, "the test"),
    AllowList({"coordinator": ["hub"]}, "the test"),
)


def credentials(federation: Federation, site: str) -> Credentials:
    return Credentials(
        federation.pki / "ca.crt", federation.pki / f"{site}.crt", federation.pki / f"{site}.key"
    )


class Ends:
    """A client and a coordinator with something between them."""

    def __init__(self, federation: Federation, listener: Listener, relay: Any) -> None:
        self.federation, self.listener, self.relay = federation, listener, relay

    async def dial(self) -> Session:
        return await dial(
            f"tcp://127.0.0.1:{self.relay.port}", credentials(self.federation, "site-t1"), COORDINATORS
        )

    async def link(self) -> tuple[Session, Session]:
        async with asyncio.timeout(SOON):
            return await asyncio.gather(self.dial(), self.listener.accept(SOON))

    async def works(self) -> None:
        client, coordinator = await self.link()
        await asyncio.gather(client.close("complete"), coordinator.close("complete"))
        assert client.ended.result() is coordinator.ended.result() is None


@pytest.fixture
async def between(federation: Federation) -> AsyncIterator[Any]:
    @asynccontextmanager
    async def lay(kind: type[TcpRelay] | type[EnvelopeRelay]) -> AsyncIterator[Ends]:
        async with (
            Listener("tcp://127.0.0.1:0", credentials(federation, "hub"), CLIENTS) as listener,
            kind(parse_address(listener.address)[1]) as relay,
        ):
            yield Ends(federation, listener, relay)

    return lay


async def over(session: Session) -> SplitprotoError | None:
    async with asyncio.timeout(SOON):
        return await asyncio.shield(session.ended)


KINDS = pytest.mark.parametrize("kind", [TcpRelay, EnvelopeRelay])


@KINDS
async def test_what_goes_in_comes_out(between, kind) -> None:
    async with between(kind) as ends:
        for _ in range(3):
            await ends.works()


@KINDS
async def test_a_cut_is_noticed_on_both_sides(between, kind) -> None:
    async with between(kind) as ends:
        client, coordinator = await ends.link()
        ends.relay.cut()
        assert (await over(client)).retry
        assert (await over(coordinator)).retry
        await ends.works()


@KINDS
async def test_half_a_cut_is_noticed_by_the_client_only(between, kind) -> None:
    async with between(kind) as ends:
        client, coordinator = await ends.link()
        ends.relay.cut(far_side=False)
        assert (await over(client)).retry
        await asyncio.sleep(0.3)
        assert coordinator.alive
        again, newer = await ends.link()
        assert not await coordinator.answers(1.0), "the half that lives on looks alive, and is not"
        assert await newer.answers(5.0)
        await asyncio.gather(again.close("complete"), newer.close("complete"))


@KINDS
async def test_a_coordinator_that_ends_ends_the_clients_connection(federation, kind) -> None:
    listener = Listener("tcp://127.0.0.1:0", credentials(federation, "hub"), CLIENTS)
    await listener.__aenter__()
    async with kind(parse_address(listener.address)[1]) as relay:
        ends = Ends(federation, listener, relay)
        client, coordinator = await ends.link()
        # The process is gone: nothing is said.
        (lane,) = listener.lanes
        lane._socket.disable_monitor()
        lane._monitor.close()
        lane._reader.close()
        assert (await over(client)).retry
        coordinator.carrier_lost(await over(client))
        with pytest.raises(SplitprotoError) as caught:
            await asyncio.wait_for(ends.dial(), SOON)
        assert caught.value.retry


async def test_a_partition_holds_octets_back(between) -> None:
    async with between(TcpRelay) as ends:
        client, coordinator = await ends.link()
        ends.relay.stall("up")
        pending = asyncio.create_task(client.close("complete"))
        with pytest.raises(SplitprotoError):
            await coordinator.receive(0.4)
        ends.relay.flow()
        assert (await coordinator.receive(SOON)).name == "bye"
        await asyncio.gather(pending, coordinator.close("complete"))


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("damage", ["lose", "twice", "short", "flip", "swap"])
async def test_a_damaged_envelope_ends_the_link_and_the_next_works(between, damage: str, direction) -> None:
    async with between(EnvelopeRelay) as ends:
        client, coordinator = await ends.link()
        ends.relay.arm(Damage(damage, direction))
        for _ in range(3):
            (client if direction == "up" else coordinator).probe()
            await asyncio.sleep(0.05)
        found, told = await over(client), await over(coordinator)
        assert found.retry
        assert told.retry
        assert [done.kind for done in ends.relay.done] == [damage]
        await ends.works()


async def test_a_held_envelope_is_late_and_whole(between) -> None:
    async with between(EnvelopeRelay) as ends:
        client, coordinator = await ends.link()
        ends.relay.arm(Damage("hold", "up", seconds=0.3))
        await asyncio.gather(client.close("complete"), coordinator.close("complete"))
        assert client.ended.result() is coordinator.ended.result() is None
        assert [done.kind for done in ends.relay.done] == ["hold"]
