"""Who is not let in: peers that are not listed, and strangers at the listener's port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import zmq
import zmq.asyncio

from splitproto import Listener, constants, dial, envelope
from splitproto.connection import Timing
from splitproto.envelope import NO_LINK, Kind, ResetReason
from splitproto.errors import (
    DeadlineExceeded,
    NotAuthorised,
    RemoteError,
    SecureChannelError,
    SplitprotoError,
    TooManyLinks,
)
from splitproto.identity import AllowList, Credentials
from splitproto.lanes.addresses import parse_address
from splitproto.messages import Applied, Progress
from tests.splitproto.links import (
    CLIENTS,
    COORDINATORS,
    SOON,
    Example,
    Hub,
    answer,
    hub_of,
    over,
    part,
    quiet,
    raw,
    work,
)

# --- refusals ----------------------------------------------------------------------------------------------


async def test_a_client_that_is_not_listed_reads_why_and_so_do_we(hub: Hub) -> None:
    with pytest.raises(RemoteError, match="'stranger' is not on our allow-list") as caught:
        await hub.dial("stranger")
    assert caught.value.code == NotAuthorised.code and not caught.value.retry
    await quiet()
    (error,) = hub.refused
    assert isinstance(error, NotAuthorised)
    await hub.works()


async def test_a_coordinator_that_is_not_listed_reads_why_and_so_do_we(hub: Hub) -> None:
    with pytest.raises(NotAuthorised, match="'hub' is not on our allow-list"):
        await hub.dial(allow=AllowList({"coordinator": {"other"}}, "peer.toml"))
    await quiet()
    (error,) = hub.refused
    assert isinstance(error, RemoteError) and error.code == NotAuthorised.code
    await hub.works()


@pytest.mark.parametrize("who", ["expired", "another CA"])
async def test_tls_done_is_not_admission(who: str, hub: Hub, federation: Any, outsider: Credentials) -> None:
    with pytest.raises(SecureChannelError, match="our certificate"):
        await hub.dial(federation.credentials("late") if who == "expired" else outsider)
    await quiet()
    (error,) = hub.refused
    assert isinstance(error, SecureChannelError)
    with pytest.raises(DeadlineExceeded):
        await hub.listener.accept(0.01)
    await hub.works()


@pytest.fixture
async def wide(federation: Any) -> AsyncIterator[Hub]:
    """Listens on every address of this machine."""
    async with hub_of(federation, "tcp://0.0.0.0:0", timing=Timing(handshake=1.0)) as hub:
        hub.listener.lanes[0]._address = hub.address.replace("0.0.0.0", "127.0.0.1")
        yield hub
    await quiet()


async def test_a_name_that_the_certificate_lacks_is_told_to_the_coordinator(
    wide: Hub, federation: Any
) -> None:
    with pytest.raises(
        SecureChannelError, match=r"does not name the address that we dialled \(127\.0\.0\.2\)"
    ):
        await dial(
            wide.address.replace("127.0.0.1", "127.0.0.2"), federation.credentials("charite"), COORDINATORS
        )
    await quiet()
    (error,) = wide.refused
    assert "refuses our certificate" in str(error)


# --- strangers at the listener's port ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "reason", "words"),
    [
        ([b"GET / HTTP/1.1"], ResetReason.MALFORMED, "not splitproto"),
        ([b""], ResetReason.MALFORMED, "not splitproto"),
        ([b"SPLT" + bytes(28)], ResetReason.CARRIER_VERSION, "carrier version 0"),
        ([b"SPLT\x02\x01" + bytes(26)], ResetReason.CARRIER_VERSION, "carrier version 2"),
        ([b"SPLT\x01\x01" + bytes(26)], ResetReason.MALFORMED, "no link id"),
        ([b"SPLT\x01\x02\0\0" + b"x" * 16 + bytes(8)], ResetReason.UNKNOWN_LINK, ""),
        ([b"SPLT\x01\x01\0\0" + b"x" * 16 + bytes(8), b""], ResetReason.MALFORMED, "several parts"),
        ([b"", b"hello"], ResetReason.MALFORMED, "several parts"),
    ],
    ids=["garbage", "empty", "version 0", "version 2", "no link", "unknown link", "multipart", "REQ"],
)
async def test_a_plain_zeromq_peer_reads_why_and_others_are_served(
    parts: list[bytes], reason: ResetReason, words: str, hub: Hub
) -> None:
    client, coordinator = await hub.link()
    async with raw(hub) as stranger:
        await stranger.send_multipart(parts)
        reset = await answer(stranger)
        assert (reset.reason, reset.versions) == (reason, (1,)) and words in reset.text
        # Whatever it goes on saying.
        for _ in range(50):
            await stranger.send_multipart(parts)
    assert client.alive and coordinator.alive
    await hub.works()
    await part(client, coordinator)


async def test_an_oversize_message_ends_its_connection_only(hub: Hub) -> None:
    client, coordinator = await hub.link()
    async with raw(hub) as stranger:
        monitor = stranger.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        await stranger.send(bytes(envelope.ENVELOPE_HEADER + constants.MAX_ENVELOPE_BODY + 1))
        await asyncio.wait_for(monitor.recv_multipart(), SOON)
        stranger.disable_monitor()
        monitor.close()
    assert client.alive and coordinator.alive
    await hub.works()
    await part(client, coordinator)


ZMTP = b"\xff" + bytes(8) + b"\x7f\x03\x00"


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: hub\r\nUser-Agent: scanner and some more octets\r\n\r\n", id="HTTP"
        ),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2, id="TLS"),
        pytest.param(bytes(range(255, -1, -1)) * 40, id="garbage"),
        pytest.param(ZMTP + b"CURVE".ljust(20, b"\0") + bytes(32), id="another ZMTP mechanism"),
        pytest.param(b"", id="nothing"),
    ],
)
async def test_raw_tcp_garbage_does_not_stop_the_listener(octets: bytes, hub: Hub) -> None:
    client, coordinator = await hub.link()
    reader, writer = await asyncio.open_connection(*parse_address(hub.address))
    writer.write(octets)
    await writer.drain()
    await hub.works()
    if octets.startswith(ZMTP) or not octets:
        # libzmq says so itself, or lets it wait for a second. (The others pass for the ZMTP of 2010.)
        while await asyncio.wait_for(reader.read(100), SOON):
            pass
    if octets.startswith(ZMTP):
        assert any("not ZeroMQ" in str(error) for error in hub.refused)
    assert client.alive and coordinator.alive
    writer.close()
    await part(client, coordinator)


async def test_a_stranger_cannot_fill_the_listener_from_one_source(hub: Hub) -> None:
    """The oldest is dropped, so that the next one, perhaps an honest peer behind the same address, has its turn."""
    async with raw(hub) as stranger:
        for n in range(constants.MAX_HALF_OPEN_PER_SOURCE + 3):
            await stranger.send(envelope.encode(Kind.OPEN, bytes([n + 1]) * 16, 0))
        for _ in range(3):
            assert (await answer(stranger)).reason is ResetReason.BUSY
        left = [link[0] for _, _, link in hub.listener._links]
        assert left == list(range(4, constants.MAX_HALF_OPEN_PER_SOURCE + 4))
        await hub.works()


async def test_strangers_cannot_fill_the_listener_from_many_sources(wide: Hub) -> None:
    port = parse_address(wide.address)[1]
    each = constants.MAX_HALF_OPEN // 8
    for source in range(10, 18):
        async with raw(wide, address=f"tcp://127.0.0.{source}:0;127.0.0.1:{port}") as stranger:
            for n in range(each):
                await stranger.send(envelope.encode(Kind.OPEN, bytes((source, n)) * 8, 0))
            # Answered after all before it: they have been seen.
            await stranger.send(b"are you there?")
            assert (await answer(stranger)).reason is ResetReason.MALFORMED
    assert len(wide.listener._links) == constants.MAX_HALF_OPEN
    await wide.works()
    # The handshake deadline makes room again, without any traffic.
    ends = [link.session.ended for link in wide.listener._links.values() if link.session]
    await asyncio.wait_for(asyncio.gather(*ends), SOON)
    await wide.works()
    assert len(wide.listener._links) <= 1


async def test_the_handshake_deadline_ends_a_half_open_link(federation: Any) -> None:
    async with hub_of(federation, timing=Timing(handshake=0.2)) as hub:
        async with raw(hub) as stranger:
            await stranger.send(envelope.encode(Kind.OPEN, b"x" * 16, 0))
            await stranger.send(b"are you there?")
            await answer(stranger)
            (link,) = hub.listener._links.values()
            assert isinstance(await over(link.session), DeadlineExceeded)  # type: ignore[arg-type]
        await hub.works()
        assert any(isinstance(error, DeadlineExceeded) for error in hub.refused)


async def test_a_stranger_with_the_same_routing_id_gets_nothing_and_gives_nothing(hub: Hub) -> None:
    async with raw(hub, routing_id=b"charite") as first, raw(hub, routing_id=b"charite") as second:
        await first.send(b"garbage")
        await answer(first)
        await second.send(b"garbage")
        await first.send(b"garbage")
        await answer(first)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(second.recv(), 0.3)
    await hub.works()


async def test_a_stranger_cannot_receive_inject_or_reset_another_ones_session(
    hub: Hub, example: Example
) -> None:
    """It knows the link id and the routing id, which are not secret, and claims both."""
    client, coordinator = await hub.link()
    await work(client, coordinator, example)
    (key,) = hub.listener._links
    _, route, link = key
    number = coordinator._connection._sequence_in
    async with raw(hub, routing_id=route) as impostor, raw(hub) as stranger:
        await impostor.send(envelope.encode(Kind.DATA, link, number, b"x" * 50))
        await impostor.send(envelope.encode_reset(link, ResetReason.UNKNOWN_LINK, ""))
        await stranger.send(envelope.encode(Kind.DATA, link, number, b"x" * 50))
        assert (await answer(stranger)).reason is ResetReason.UNKNOWN_LINK
        await stranger.send(envelope.encode_reset(link, ResetReason.UNKNOWN_LINK, ""))
        await stranger.send(envelope.encode_reset(NO_LINK, ResetReason.UNKNOWN_LINK, ""))
        await stranger.send(envelope.encode(Kind.OPEN, link, 0, b""))
        for octets in (b"", b"\x16\x03\x01"):
            await impostor.send(envelope.encode(Kind.DATA, link, number + 1, octets))
        await coordinator.send(Progress(1, {"loss": 1.0}))
        await client.send(Applied(1))
        assert (await client.receive(SOON)).name == "progress"
        assert (await coordinator.receive(SOON)).name == "applied"
        await coordinator.send(Progress(2, {}))
        for socket in (impostor, stranger):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(socket.recv(), 0.2)
        assert client.alive and coordinator.alive
    await client.receive(SOON)
    await part(client, coordinator)


async def test_a_refused_callback_that_fails_does_not_stop_the_listener(federation: Any) -> None:
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))

    def refused(source: str, error: SplitprotoError) -> None:
        raise RuntimeError("a defect of the application")

    async with hub_of(federation, refused=refused) as hub, raw(hub) as stranger:
        for _ in range(3):
            await stranger.send(b"garbage")
        await hub.works()
    assert failures, "the defect is not hidden either"


async def test_a_listener_whose_files_are_gone_answers_busy(
    federation: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ca.crt", "hub.crt", "hub.key"):
        (tmp_path / name).write_bytes((federation.folder / name).read_bytes())
        (tmp_path / name).chmod(0o600)
    own = Credentials(tmp_path / "ca.crt", tmp_path / "hub.crt", tmp_path / "hub.key")
    refused: list[SplitprotoError] = []
    async with Listener(
        "tcp://127.0.0.1:0", own, CLIENTS, refused=lambda source, error: refused.append(error)
    ) as listener:
        (tmp_path / "hub.crt").rename(tmp_path / "away")
        with pytest.raises(TooManyLinks, match="cannot use its certificate") as caught:
            await dial(listener.address, federation.credentials("charite"), COORDINATORS)
        assert str(tmp_path) not in str(caught.value)
        assert str(tmp_path) in str(refused[0])
        (tmp_path / "away").rename(tmp_path / "hub.crt")
        hub = Hub(federation, listener, refused)
        await hub.works()
