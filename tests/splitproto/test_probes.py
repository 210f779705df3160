"""Probes between two peers (SP-11.22): what they carry, and what is refused before memory is taken."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from splitproto import codec, messages
from splitproto.constants import MAX_PROBE, MAX_PROBES
from splitproto.errors import CodecError, LocalError, TensorError, UnexpectedMessage
from splitproto.messages import JobOffer, Message, Probe, Probed
from splitproto.negotiation import FEATURES, Offer
from splitproto.probes import filling
from splitproto.states import Side, State

from .test_connection import ended, inject, raw

MakePair = Callable[..., Any]


def test_octets_go_there_and_back_and_a_job_can_still_be_offered(
    make_pair: MakePair, example: Callable[[str], Message]
) -> None:
    """SP-11.22-1."""
    pair = make_pair().establish()
    for number, (there, back) in enumerate(((0, 0), (MAX_PROBE, 0), (0, MAX_PROBE), (1, 1)), start=1):
        pair.coordinator.send(Probe(number, back, filling(there)))
        pair.exchange()
        (probe,) = pair.messages(Side.CLIENT)
        assert (probe.number, probe.answer) == (number, back)
        assert sum(array.nbytes for array in probe.tensors.values()) == there
        pair.client.send(Probed(number, filling(probe.answer)))
        pair.exchange()
        (probed,) = pair.messages(Side.COORDINATOR)
        assert probed.number == number and sum(a.nbytes for a in probed.tensors.values()) == back
        for side in Side:
            pair.of(side).release(pair.take(side)[0].octets)
        assert set(pair.client.conversation.states.values()) == {State.READY}
    pair.coordinator.send(example("job-offer"))
    pair.exchange()
    assert isinstance(pair.messages(Side.CLIENT)[0], JobOffer)


@pytest.mark.parametrize(
    ("fields", "tensors", "error"),
    [({"number": 1, "answer": 0}, [["octets", "u8", [MAX_PROBE + 1]]], TensorError),
     ({"number": 1, "answer": 0}, [["octets", "u8", [1 << 30]]], TensorError),
     ({"number": 1, "answer": 0}, [["octets", "f32", [MAX_PROBE // 4]]], TensorError),
     ({"number": 1, "answer": 0}, [["octets", "u8", [8]], ["more", "u8", [8]]], TensorError),
     ({"number": 1, "answer": MAX_PROBE + 1}, [], CodecError),
     ({"number": MAX_PROBES + 1, "answer": 0}, [], CodecError)],
)  # fmt: skip
def test_a_site_refuses_other_probes_before_memory_is_taken(
    make_pair: MakePair, fields: dict[str, int], tensors: list[Any], error: type[LocalError]
) -> None:
    pair = make_pair().establish()
    head = codec.encode({"type": "probe", **fields, "tensors": tensors})
    tracemalloc.start()
    try:
        inject(pair, Side.COORDINATOR, raw(1, 102, head, flags=0 if tensors else 1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    ended(pair, Side.CLIENT, error)
    assert peak < 2 << 20


@pytest.mark.parametrize(
    ("octets", "error"), [(1 << 30, TensorError), (MAX_PROBE, UnexpectedMessage)], ids=["too-long", "unasked"]
)
def test_a_coordinator_refuses_an_answer_before_memory_is_taken(
    make_pair: MakePair, octets: int, error: type[LocalError]
) -> None:
    pair = make_pair().establish()
    head = codec.encode({"type": "probed", "number": 1, "tensors": [["octets", "u8", [octets]]]})
    tracemalloc.start()
    try:
        inject(pair, Side.CLIENT, raw(1, 101, head))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    ended(pair, Side.COORDINATOR, error)
    assert peak < 2 << 20


def test_a_peer_does_not_send_what_the_other_would_refuse() -> None:
    for message in (
        Probe(1, 0, {"octets": np.zeros(MAX_PROBE + 1, np.uint8)}),
        Probed(1, {"octets": np.zeros((2, 2), np.uint8)}),
        Probed(1, {"x0": np.zeros(2, np.uint8)}),
    ):
        with pytest.raises(TensorError, match="at most 4194304"):
            messages.encode(message)


def test_a_peer_without_the_feature_is_not_probed(make_pair: MakePair) -> None:
    former = Offer(features=tuple(name for name in FEATURES if name != "probe"))
    pair = make_pair(client_offer=former).establish()
    with pytest.raises(UnexpectedMessage, match="probe, which was not agreed"):
        pair.coordinator.send(Probe(1, 0))
