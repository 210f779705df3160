"""One spelling for each host, and texts that are not addresses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitproto.errors import AddressError
from splitproto.hosts import host_name, without_zone
from splitproto.lanes.addresses import format_address, parse_address


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Hub.Example.ORG", "hub.example.org"),
        ("hub.example.org.", "hub.example.org"),
        ("münchen.example", "xn--mnchen-3ya.example"),
        ("MÜNCHEN.example.", "xn--mnchen-3ya.example"),
        ("xn--mnchen-3ya.example", "xn--mnchen-3ya.example"),
        ("192.0.2.7", "192.0.2.7"),
        ("2001:DB8::0001", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
    ],
)
def test_one_spelling(text: str, name: str) -> None:
    assert host_name(text) == name
    assert host_name(name) == name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("straße.example", "two ASCII forms"),
        ("a..b", "neither a DNS name nor an IP address"),
        (".", "neither a DNS name nor an IP address"),
        ("256.1.1.1", "neither a DNS name"),
        ("-a.example", "neither a DNS name"),
        ("x" * 64 + ".example", "neither a DNS name nor an IP address"),
        (".".join(["abcdefgh"] * 40), "neither a DNS name"),
        ("hub example", "neither a DNS name"),
        ("*", "neither a DNS name"),
    ],
)
def test_what_names_no_host(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        host_name(text)


def test_the_zone_is_this_machines_own() -> None:
    assert without_zone("fe80::1%eth0") == "fe80::1"
    assert without_zone("hub.example") == "hub.example"
    assert parse_address("tcp://[fe80::1%25eth0]:7443") == ("fe80::1%eth0", 7443)


@given(st.text(max_size=80))
def test_any_text_is_an_address_or_an_address_error(text: str) -> None:
    for address in (text, f"tcp://{text}:7443", f"tcp://[{text}]:7443"):
        try:
            host, port = parse_address(address)
        except AddressError:
            continue
        assert host.isascii()
        assert 0 <= port < 2**16
        if "%" not in host:
            assert parse_address(format_address(host, port)) == (host, port)
