"""Of the emulated network, what needs neither root nor a clock; and the limits that a step is compared with."""

from __future__ import annotations

import struct
from unittest.mock import Mock

import emulated
import links
import pytest


def packet(payload: int, segment: int = 0) -> bytes:
    """As a tun device hands it over: 20 octets of IP, 32 of TCP."""
    head = struct.pack("=BBHHHH", 1, int(bool(segment)), 52, segment, 20, 16)
    return head + bytes([0x45]) + bytes(19) + bytes(12) + bytes([0x80]) + bytes(19) + bytes(payload)


@pytest.mark.parametrize(
    ("payload", "segment", "octets"),
    [(0, 0, 52), (100, 0, 152), (1000, 1000, 1052), (2500, 1000, 2500 + 3 * 52)],
)
def test_a_packet_counts_as_what_a_network_card_makes_of_it(payload: int, segment: int, octets: int) -> None:
    assert emulated._octets(packet(payload, segment)) == octets


def test_the_switch_queues_for_a_downlink_and_drops_what_finds_it_full() -> None:
    network, hub = emulated.Network(["hub"]), emulated.Machine("hub", "10.83.0.1", Mock(), -1)
    network.link = emulated.Link(rate=8e6, round_trip_s=0.04, buffer_s=0.002)
    for number in range(5):  # 1000 octets take 1 ms
        network._at_switch.append(emulated._Packet(1.0, number, hub, 1000, b""))
    network._switch(1.0)
    assert [round(one.at, 6) for one in network._arriving] == [1.011, 1.012, 1.013]
    assert hub.dropped == 2000


def test_the_limits_of_a_step_are_the_slower_of_two_and_the_sum_of_all() -> None:
    found = {
        "whole": [0.15],
        "loopback": [0.2],
        "octets": [{"up": 1.25e6, "down": 2.5e6}],
        "links": {
            "slow": {"rate": 1e8, "round_trip_s": 0.05},
            "slower": {"rate": 1e7, "round_trip_s": 0.05},
        },
    }
    assert links._limits(found, "slow") == pytest.approx((0.2, 0.2 + 0.05 + 0.3))
    found["links"]["fast"] = {"rate": 1e9, "round_trip_s": 0.05}
    assert links._limits(found, "fast") == pytest.approx((0.15, 0.2 + 0.05 + 0.03))
    assert links._limits(found, "slower") == pytest.approx((2.0, 0.2 + 0.05 + 3.0))
