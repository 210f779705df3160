"""The log of refusals: bounded whatever strangers do, and they never hide a hospital's line."""

from __future__ import annotations

import ipaddress
import logging
from typing import Any

import pytest

from splitpeer.daemon import happenings as h
from splitpeer.daemon import refusals
from splitpeer.daemon.refusals import LINES_A_SECOND, LINES_AT_ONCE, REMEMBERED, Refusals
from splitpeer.daemon.sinks import log as log_sink
from splitpeer.daemon.sinks.budgets import LIMITS
from splitpeer.daemon.sinks.trail import TrailSink
from splitproto.errors import (
    CarrierVersionError,
    DeadlineExceeded,
    EnvelopeError,
    NotAuthorised,
    SecureChannelError,
    SplitprotoError,
    TooManyLinks,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is logged."""
    written: list[dict[str, Any]] = []

    def event(log: logging.Logger, name: str, level: int, **values: Any) -> None:
        written.append(values)

    monkeypatch.setattr(log_sink, "event", event)
    return written


STRANGERS: list[SplitprotoError] = [
    EnvelopeError("these bytes are not splitproto"),
    CarrierVersionError("the peer uses carrier version 7"),
    SecureChannelError("not TLS"),
    DeadlineExceeded("no TLS within 10 s"),
    TooManyLinks("too many"),
]


@pytest.mark.parametrize(
    "address",
    [
        lambda n: str(ipaddress.IPv4Address(0x0A000000 + n)),
        lambda n: str(ipaddress.IPv6Address((0x20010DB8 << 96) + (n << 64))),
        lambda n: str(ipaddress.IPv6Address((0x20010DB8 << 96) + n)),
        lambda n: "10.0.0.1",
    ],
    ids=["IPv4 addresses", "IPv6 networks", "addresses of one /64", "one address"],
)
def test_a_flood_costs_a_bounded_number_of_lines(address: Any, lines: list[dict[str, Any]]) -> None:
    """1,200 addresses and more than a table remembers, for 6 seconds: 294,289 lines before."""
    clock = Clock()
    refused = Refusals(h.Reporter(), clock)
    for n in range(20_000):
        clock.now = 100.0 + n * 6 / 20_000
        refused(address(n % 1200), STRANGERS[n % len(STRANGERS)])
    assert 1 <= len(lines) <= LINES_AT_ONCE + 6 * LINES_A_SECOND
    assert len(refused._last) <= REMEMBERED
    clock.now += 60
    refused(address(0), STRANGERS[0])
    assert sum(1 + line.get("not_shown", 0) for line in lines) == 20_001, "what is left out is counted"


def test_more_sources_than_are_remembered_forget_the_oldest_only(lines: list[dict[str, Any]]) -> None:
    clock = Clock()
    refused = Refusals(h.Reporter(), clock)
    refused._budgets = [refusals.Bucket(1e9, 1e9, clock.now)] * 2
    for n in range(REMEMBERED + 1):
        refused(f"10.0.{n >> 8}.{n & 255}", STRANGERS[0])
    assert len(lines) == REMEMBERED + 1
    for n in range(2, REMEMBERED + 1):
        refused(f"10.0.{n >> 8}.{n & 255}", STRANGERS[0])
    assert len(lines) == REMEMBERED + 1, "all but the oldest are still known"


def test_addresses_of_one_ipv6_network_are_one_source(lines: list[dict[str, Any]]) -> None:
    refused = Refusals(h.Reporter(), Clock())
    for n in range(20):
        refused(f"2001:db8::{n:x}", STRANGERS[0])
    refused("2001:db8:0:1::1", STRANGERS[0])
    assert [line["source"] for line in lines] == ["2001:db8::0", "2001:db8:0:1::1"]
    refused("::ffff:10.0.0.1", STRANGERS[0])
    refused("10.0.0.1", STRANGERS[0])
    assert len(lines) == 3, "the same machine, over both protocols"


def test_a_stranger_cannot_make_each_line_new_by_its_text(lines: list[dict[str, Any]]) -> None:
    refused = Refusals(h.Reporter(), Clock())
    for n in range(100):
        refused("10.0.0.1", CarrierVersionError(f"the peer uses carrier version {n}"))
        refused("10.0.0.1", SecureChannelError(f"a certificate of CN={n}"))
    assert len(lines) == 2


def test_a_flood_does_not_hide_a_hospital(lines: list[dict[str, Any]]) -> None:
    clock = Clock()
    refused = Refusals(h.Reporter(), clock)
    for n in range(5000):
        refused(f"10.1.{n >> 8}.{n & 255}", STRANGERS[n % 5])
    refused("10.9.9.9", NotAuthorised("client 'charite' is not on our allow-list"))
    refused("10.9.9.9", NotAuthorised("client 'ukm' is not on our allow-list"))
    assert ["allow-list" in line["cause"] for line in lines[-2:]] == [True, True]


def test_the_trail_is_told_a_bounded_number_of_times(lines: list[dict[str, Any]]) -> None:
    clock, noted = Clock(), []
    refused = Refusals(h.Reporter(TrailSink(lambda name, **values: noted.append(values))), clock)
    for _ in range(LIMITS[h.LinkRefused].noted + 500):
        clock.now += 2.0
        refused("10.0.0.1", STRANGERS[0])
    assert len(lines) == LIMITS[h.LinkRefused].noted + 500
    assert len(noted) == LIMITS[h.LinkRefused].noted
    assert noted[-1]["and_more"]
