"""TLS 1.3 through memory: refusals, alerts, damage and shutdowns, with real handshakes."""

from __future__ import annotations

import gc
import ssl
import weakref
from dataclasses import dataclass
from typing import Any

import pytest

from splitproto.channel import RECORD, Channel
from splitproto.constants import MAX_ENVELOPE_BODY, MAX_HANDSHAKE_BYTES
from splitproto.errors import ChannelTruncated, SecureChannelError
from splitproto.identity import Credentials, Identity


@dataclass
class Two:
    client: Channel
    server: Channel

    def flight(self, sender: Channel, receiver: Channel) -> int:
        """Carry what waits; the number of octets."""
        moved = 0
        while octets := sender.drain():
            receiver.feed(memoryview(octets))
            moved += len(octets)
        return moved

    def shake(self) -> Two:
        self.client.handshake()
        self.flight(self.client, self.server)
        assert not self.server.handshake()
        self.flight(self.server, self.client)
        assert self.client.handshake()
        self.flight(self.client, self.server)
        assert self.server.handshake()
        return self


@pytest.fixture
def two(federation: Any) -> Two:
    server = federation.credentials("hub").server_context()
    client = federation.credentials("charite").client_context()
    return Two(
        Channel(client, server_side=False, hostname="localhost"),
        Channel(server, server_side=True),
    )


def read_all(channel: Channel) -> bytes:
    result, buffer = b"", memoryview(bytearray(RECORD))
    while count := channel.read_into(buffer):
        result += buffer[:count]
    return result


def test_octets_arrive_whatever_the_cutting(two: Two) -> None:
    two.shake()
    assert two.flight(two.server, two.client) == 0, "session tickets would carry the client's chain"
    text = bytes(range(256)) * 400
    two.client.write(text)
    ciphertext = two.client.drain()
    heard = b""
    for start in range(0, len(ciphertext), 777):
        two.server.feed(memoryview(ciphertext)[start : start + 777])
        heard += read_all(two.server)
    assert heard == text
    assert two.client.description.startswith("TLSv1.3 TLS_AES_256_GCM")
    assert Identity.from_certificate(two.client.peer_certificate).site == "hub"
    assert Identity.from_certificate(two.server.peer_certificate).site == "charite"


def test_the_handshake_octet_by_octet(two: Two) -> None:
    two.client.handshake()
    for _ in range(3):
        for sender, receiver in ((two.client, two.server), (two.server, two.client)):
            for octet in sender.drain():
                receiver.feed(memoryview(bytes((octet,))))
                receiver.handshake()
    assert two.client.secure and two.server.secure


def test_nothing_is_written_for_nothing(two: Two) -> None:
    two.shake()
    two.client.write(b"")
    assert two.client.drain() == b""
    assert (two.client.records_out, two.client.bytes_out) == (0, 0)


def test_records_are_counted_as_they_go_out(two: Two) -> None:
    two.shake()
    two.client.write(bytes(RECORD + 1))
    two.client.write(b"x")
    records, octets = 0, memoryview(two.client.drain())
    while len(octets):
        records += 1
        octets = octets[5 + int.from_bytes(octets[3:5], "big") :]
    assert (two.client.records_out, two.client.bytes_out) == (records, RECORD + 2) == (3, RECORD + 2)


def test_one_read_takes_all_records_that_fit(two: Two) -> None:
    two.shake()
    text = bytes(range(256)) * 256
    two.client.write(text)
    two.server.feed(memoryview(two.client.drain()))
    buffer = memoryview(bytearray(len(text)))
    assert two.server.read_into(buffer[:40_000]) == 40_000
    assert two.server.read_into(buffer[40_000:]) == len(text) - 40_000
    assert buffer == text and two.server.read_into(buffer) == 0


def test_what_came_before_a_damaged_record_is_read_first(two: Two) -> None:
    two.shake()
    two.client.write(bytes(RECORD) + b"more")
    octets = bytearray(two.client.drain())
    octets[-1] ^= 1
    two.server.feed(memoryview(octets))
    buffer = memoryview(bytearray(3 * RECORD))
    assert two.server.read_into(buffer) == RECORD
    for _ in range(2):
        with pytest.raises(SecureChannelError):
            two.server.read_into(buffer)
    assert two.server.drain(), "an alert"


def test_a_channel_with_a_damaged_record_is_in_no_cycle(two: Two) -> None:
    """Otherwise a link's TLS state, and a half received tensor, stay until a full garbage collection."""
    two.shake()
    two.client.write(b"more")
    octets = bytearray(two.client.drain())
    octets[-1] ^= 1
    two.server.feed(memoryview(octets))
    with pytest.raises(SecureChannelError):
        two.server.read_into(memoryview(bytearray(RECORD)))
    left = weakref.ref(two.server)
    gc.disable()
    try:
        del two.server
        assert left() is None
    finally:
        gc.enable()


def test_what_leads_comes_before_the_ciphertext(two: Two) -> None:
    two.shake()
    two.client.lead(b"head")
    two.client.write(b"x")
    octets = two.client.drain()
    two.server.feed(memoryview(octets[4:]))
    assert octets[:4] == b"head" and read_all(two.server) == b"x"


def test_drain_gives_at_most_one_envelope(two: Two) -> None:
    two.shake()
    for _ in range(5):
        two.client.write(bytes(256 * 1024))
    assert len(two.client.drain()) == MAX_ENVELOPE_BODY
    assert 0 < len(two.client.drain()) < MAX_ENVELOPE_BODY


def test_the_client_is_done_before_the_server_refuses_its_certificate(
    two: Two, federation: Any, outsider: Credentials
) -> None:
    for who, why in ((federation.credentials("late"), "expired"), (outsider, "CA")):
        pair = Two(Channel(who.client_context(), server_side=False, hostname="localhost"), two.server)
        pair.client.handshake()
        pair.flight(pair.client, pair.server)
        pair.server.handshake()
        pair.flight(pair.server, pair.client)
        assert pair.client.handshake() and pair.client.secure
        pair.flight(pair.client, pair.server)
        with pytest.raises(SecureChannelError, match=why):
            pair.server.handshake()
        # The alert waits although the call raised; without it the client would wait for ever.
        assert pair.flight(pair.server, pair.client) > 0
        with pytest.raises(SecureChannelError, match="certificate"):
            read_all(pair.client)
        two.server = Channel(federation.credentials("hub").server_context(), server_side=True)


def test_the_client_that_refuses_the_name_tells_the_server(two: Two, federation: Any) -> None:
    context = federation.credentials("charite").client_context()
    pair = Two(Channel(context, server_side=False, hostname="elsewhere.example"), two.server)
    pair.client.handshake()
    pair.flight(pair.client, pair.server)
    pair.server.handshake()
    pair.flight(pair.server, pair.client)
    with pytest.raises(SecureChannelError, match=r"does not name the host.*elsewhere\.example"):
        pair.client.handshake()
    assert pair.flight(pair.client, pair.server) > 0
    with pytest.raises(SecureChannelError, match="refuses our certificate"):
        pair.server.handshake()


def test_a_peer_that_speaks_only_tls_1_2_is_refused_and_told(two: Two, federation: Any) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    credentials = federation.credentials("charite")
    context.load_cert_chain(credentials.certificate, credentials.key)
    context.load_verify_locations(credentials.ca)
    old = Channel(context, server_side=False, hostname="localhost")
    old.handshake()
    pair = Two(old, two.server)
    pair.flight(old, two.server)
    with pytest.raises(SecureChannelError, match=r"does not speak TLS 1\.3"):
        two.server.handshake()
    assert pair.flight(two.server, old) > 0
    with pytest.raises(SecureChannelError, match="TLS"):
        old.handshake()


def test_a_server_that_speaks_only_tls_1_2_is_refused(two: Two, federation: Any) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    credentials = federation.credentials("hub")
    context.load_cert_chain(credentials.certificate, credentials.key)
    pair = Two(two.client, Channel(context, server_side=True))
    pair.client.handshake()
    pair.flight(pair.client, pair.server)
    with pytest.raises(SecureChannelError):
        pair.server.handshake()
    pair.flight(pair.server, pair.client)
    with pytest.raises(SecureChannelError, match=r"does not speak TLS 1\.3"):
        pair.client.handshake()


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\x16\x03\x01\xff\xff" + bytes(100), b"\x80" * 40]
)
def test_garbage_is_refused_in_words(two: Two, garbage: bytes) -> None:
    two.server.feed(memoryview(garbage))
    with pytest.raises(SecureChannelError) as caught:
        two.server.handshake()
    assert "dialling peer" in str(caught.value) and "\n" not in str(caught.value)


def test_handshake_octets_are_bounded(two: Two) -> None:
    two.server.feed(memoryview(bytes(MAX_HANDSHAKE_BYTES)))
    with pytest.raises(SecureChannelError, match="too many octets"):
        two.server.feed(memoryview(b"x"))


@pytest.mark.parametrize("damage", ["lost", "repeated", "reordered", "flipped"])
def test_one_damaged_record_ends_the_session_on_both_sides(two: Two, damage: str) -> None:
    two.shake()
    records = []
    for word in (b"one", b"two", b"three"):
        two.client.write(word)
        records.append(two.client.drain())
    arriving = {
        "lost": [records[0], records[2]],
        "repeated": [records[0], records[0], records[1]],
        "reordered": [records[1], records[0], records[2]],
        "flipped": [records[0], records[1][:-1] + bytes((records[1][-1] ^ 1,)), records[2]],
    }[damage]
    good = {"lost": 1, "repeated": 1, "reordered": 0, "flipped": 1}[damage]
    for record in arriving[:good]:
        two.server.feed(memoryview(record))
        assert read_all(two.server) == b"one"
    two.server.feed(memoryview(arriving[good]))
    with pytest.raises(SecureChannelError, match="lost or altered"):
        read_all(two.server)
    # No resynchronising: what follows is not read either.
    two.server.feed(memoryview(records[good]))
    with pytest.raises((SecureChannelError, ChannelTruncated)):
        read_all(two.server)
    assert two.flight(two.server, two.client) > 0
    with pytest.raises(SecureChannelError, match="lost or received altered bytes"):
        read_all(two.client)


def test_close_notify_both_ways(two: Two) -> None:
    two.shake()
    two.client.write(b"last words")
    two.client.close()
    two.client.close()
    two.flight(two.client, two.server)
    assert not two.server.peer_closed
    assert read_all(two.server) == b"last words"
    assert two.server.peer_closed
    # The other direction stays open until its own close_notify.
    two.server.write(b"answer")
    two.server.close()
    two.flight(two.server, two.client)
    assert read_all(two.client) == b"answer"
    assert two.client.peer_closed and two.client.shut and two.server.shut


def test_a_cut_is_not_a_close(two: Two) -> None:
    two.shake()
    two.client.write(b"last words")
    octets = two.client.drain()
    two.server.feed(memoryview(octets)[:-1])
    assert read_all(two.server) == b""
    assert not two.server.peer_closed


def test_nothing_follows_close_notify(two: Two) -> None:
    two.shake()
    two.client.close()
    with pytest.raises(SecureChannelError):
        two.client.write(b"more")


def test_close_before_the_handshake_says_nothing(two: Two) -> None:
    two.server.close()
    assert two.server.drain() == b"" and not two.server.shut
    assert two.client.description == "no TLS yet" and two.client.peer_certificate == b""


@pytest.mark.parametrize("who", ["outsider", "late"])
def test_a_refused_certificate_is_described_in_our_own_log_alone(
    two: Two, federation: Any, outsider: Credentials, who: str
) -> None:
    theirs = outsider if who == "outsider" else federation.credentials(who)
    two.client = Channel(theirs.client_context(), server_side=False, hostname="localhost")
    with pytest.raises(SecureChannelError) as caught:
        two.shake()
    site = theirs.identity
    assert f"it names '{site.uri}', issued by 'CN=splitproto CA,O=test', serial {site.serial}" in str(
        caught.value
    )
    assert site.uri not in caught.value.reason, "the reason may be sent to the peer"


def test_a_listener_that_is_refused_is_described_too(two: Two, outsider: Credentials) -> None:
    two.server = Channel(outsider.server_context(), server_side=True)
    two.client.handshake()
    two.flight(two.client, two.server)
    two.server.handshake()
    two.flight(two.server, two.client)
    with pytest.raises(
        SecureChannelError, match=r"it names 'spiffe://test/splitproto/client/charite', issued by"
    ):
        two.client.handshake()
