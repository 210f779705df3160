"""The envelope, whose octets no version may change."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitproto import envelope
from splitproto.constants import ENVELOPE_HEADER, MAX_ENVELOPE_BODY, MAX_RESET_TEXT
from splitproto.envelope import NO_LINK, Kind, Reset, ResetReason
from splitproto.errors import CarrierVersionError, EnvelopeError

LINK = bytes(range(16))


def raw(
    magic: bytes = b"SPLT",
    version: int = 1,
    kind: int = 2,
    zero: int = 0,
    link: bytes = LINK,
    number: int = 0,
) -> bytes:
    return struct.pack(">4sBBH16sQ", magic, version, kind, zero, link, number)


def test_octet_by_octet() -> None:
    octets = envelope.encode(Kind.DATA, LINK, 0x0102030405060708, b"body")
    assert octets.hex(" ", -4) == (
        "53504c54 01020000 00010203 04050607 08090a0b 0c0d0e0f 01020304 05060708 626f6479"
    )
    assert len(octets) == ENVELOPE_HEADER + 4


@given(
    st.sampled_from([Kind.OPEN, Kind.DATA]),
    st.binary(min_size=16, max_size=16).filter(any),
    st.integers(0, (1 << 64) - 1),
    st.binary(max_size=100),
)
def test_every_envelope_survives(kind: Kind, link: bytes, number: int, body: bytes) -> None:
    octets = envelope.encode(kind, link, number, body)
    back = envelope.decode(octets)
    assert (back.kind, back.link, back.sequence, bytes(back.body)) == (kind, link, number, body)
    assert envelope.link_of(octets) == link


@given(st.binary(max_size=80) | st.binary(max_size=80).map(lambda tail: raw()[:6] + tail))
def test_any_octets_raise_nothing_but_the_documented_errors(data: bytes) -> None:
    try:
        arrived = envelope.decode(data)
        if arrived.kind is Kind.RESET:
            assert envelope.decode_reset(arrived.body).text.isprintable()
    except (EnvelopeError, CarrierVersionError):
        pass
    assert len(envelope.link_of(data)) == 16


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: hub.example:5555\r\n\r\n", id="HTTP"),
        pytest.param(raw()[:-1], id="one octet short"),
        pytest.param(raw(magic=b"SPLX"), id="other magic"),
        pytest.param(raw(kind=0), id="kind 0"),
        pytest.param(raw(kind=4), id="kind 4"),
        pytest.param(raw(zero=1), id="reserved"),
        pytest.param(raw(link=NO_LINK), id="no link id"),
        pytest.param(raw() + bytes(MAX_ENVELOPE_BODY + 1), id="body too long"),
        pytest.param(raw(kind=3) + bytes(MAX_ENVELOPE_BODY + 1), id="RESET too long"),
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(EnvelopeError):
        envelope.decode(data)


def test_the_longest_body() -> None:
    assert len(envelope.decode(envelope.encode(Kind.DATA, LINK, 0, bytes(MAX_ENVELOPE_BODY))).body) == 1 << 20
    with pytest.raises(EnvelopeError):
        envelope.encode(Kind.DATA, LINK, 0, bytes(MAX_ENVELOPE_BODY + 1))


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version_is_named_whatever_follows(version: int) -> None:
    for kind in (0, 1, 2, 9):
        with pytest.raises(CarrierVersionError, match=f"version {version}"):
            envelope.decode(raw(version=version, kind=kind, zero=7))


@pytest.mark.parametrize("version", [0, 1, 2, 255])
def test_a_reset_of_any_version_is_readable(version: int) -> None:
    body = bytes((2, 2, 2, 3)) + b"please update"
    arrived = envelope.decode(raw(version=version, kind=3) + body)
    assert arrived.kind is Kind.RESET
    assert envelope.decode_reset(arrived.body) == Reset(ResetReason.CARRIER_VERSION, (2, 3), "please update")


def test_reset_survives_and_its_text_is_bounded() -> None:
    arrived = envelope.decode(envelope.encode_reset(LINK, ResetReason.BUSY, "ä" * 300))
    reset = envelope.decode_reset(arrived.body)
    assert (arrived.link, arrived.sequence, reset.reason, reset.versions) == (LINK, 0, ResetReason.BUSY, (1,))
    assert reset.text == "ä" * (MAX_RESET_TEXT // 2)


def test_a_reset_of_unknown_reason_is_kept_as_a_number() -> None:
    assert envelope.decode_reset(memoryview(bytes((77, 0)))).reason == 77


@pytest.mark.parametrize(
    "body",
    [b"", b"\1", b"\1\2\1", bytes((1, 0)) + bytes(MAX_RESET_TEXT + 1)],
    ids=["", "short", "cut", "long"],
)
def test_malformed_resets(body: bytes) -> None:
    with pytest.raises(EnvelopeError):
        envelope.decode_reset(memoryview(body))


def test_reset_text_from_a_stranger_is_one_printable_line() -> None:
    reset = envelope.decode_reset(memoryview(bytes((1, 0)) + b"a\nb\x1b[31m\xff"))
    assert reset.text.isprintable()
