"""The cost model against what can be counted by hand."""

from __future__ import annotations

from dataclasses import replace

import cost_model
import pytest

ONE = cost_model.Job(2, (32, 32), 1, sites=1, settings=(("features", (2, 2, 4, 4, 8, 2)),))
VALUES = 2 * 32**2 + 2 * 16**2 + 4 * 8**2 + 4 * 4**2 + 8 * 2**2


def test_octets_are_those_of_the_cut_for_each_site_and_sample() -> None:
    assert cost_model.values(ONE) == VALUES
    each = cost_model.octets(ONE)
    assert each == pytest.approx(4 * VALUES, rel=0.05)
    assert each > 4 * VALUES
    assert cost_model.octets(replace(ONE, batch=3, sites=2, codec="bf16")) == pytest.approx(3 * each)
    # Each level of a sample fills whole blocks of 64 here, but for the last one.
    coded = {"int8": 64 + 2, "int4": 32 + 2}
    for codec, block in coded.items():
        assert cost_model.octets(replace(ONE, codec=codec)) / each == pytest.approx(block / 256, rel=0.01)


def test_flops_grow_with_the_batch_and_only_the_decoder_sees_more_sites() -> None:
    encoder, decoder = cost_model.flops(ONE)
    assert cost_model.flops(replace(ONE, batch=2)) == (2 * encoder, 2 * decoder)
    more = cost_model.flops(replace(ONE, sites=2))
    assert more[0] == encoder
    assert more[1] > decoder


def test_both_directions_and_one_round_trip_add_up() -> None:
    assert cost_model.seconds(0.2, 1.25e6, 1e8, 0.05) == pytest.approx(0.2 + 0.05 + 0.2)
