"""One conversation with every message in it: it gives the same events wherever its octets are cut or joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import cycle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitproto import envelope
from splitproto.events import Closed, Established, Event, Received
from splitproto.messages import MESSAGES, Activations, Applied
from splitproto.states import TRANSITIONS, Side

from .test_connection import CLIENT, COORDINATOR, Example, MakePair, activations


def plain(event: Event) -> Any:
    """An event as values that compare."""
    if not isinstance(event, Received):
        return event
    told = {f.name: getattr(event.message, f.name) for f in fields(event.message)}  # type: ignore[arg-type]
    tensors = {
        name: (array.shape, array.dtype.str, array.tobytes())
        for name, array in told.pop("tensors", {}).items()
    }
    return type(event.message).__name__, told, tensors, event.octets


def talk(pair: Any, example: Example, exchange: Callable[[], None]) -> dict[Side, list[Any]]:
    """All there is to say, once, with answers."""
    exchange()
    for side, name in (
        (COORDINATOR, "probe"),
        (CLIENT, "probed"),
        (COORDINATOR, "job-offer"),
        (CLIENT, "job-decline"),
        (COORDINATOR, "job-offer"),
        (CLIENT, "job-accept"),
        (CLIENT, "fusion-key"),
        (CLIENT, "inventory"),
        (COORDINATOR, "fusion-keys"),
        (COORDINATOR, "begin"),
        (COORDINATOR, "forward"),
        (CLIENT, "withdraw"),
        (CLIENT, "revoked"),
        (COORDINATOR, "withdrawn"),
        (CLIENT, "activations"),
        (COORDINATOR, "gradients"),
        (CLIENT, "applied"),
        (COORDINATOR, "progress"),
        (COORDINATOR, "advance"),
        (CLIENT, "advanced"),
        (COORDINATOR, "share"),
        (CLIENT, "shared"),
        (COORDINATOR, "average"),
        (CLIENT, "averaged"),
        (COORDINATOR, "logits"),
        (CLIENT, "loss-gradients"),
        (COORDINATOR, "prediction"),
        (COORDINATOR, "conclude"),
        (CLIENT, "scores"),
        (COORDINATOR, "checkpoint"),
        (CLIENT, "unsaved"),
        (COORDINATOR, "checkpoint"),
        (CLIENT, "saved"),
        (COORDINATOR, "rollback"),
        (CLIENT, "rolled-back"),
        (COORDINATOR, "settled"),
        (CLIENT, "segment"),
        (COORDINATOR, "segmenting"),
        (COORDINATOR, "locate"),
        (CLIENT, "located"),
        (CLIENT, "cancel"),
        (COORDINATOR, "segmented"),
        (COORDINATOR, "unsegmented"),
        (CLIENT, "bye"),
        (COORDINATOR, "bye"),
    ):
        pair.of(side).send(example(name))
        exchange()
    return {side: [plain(event) for event in pair.heard[side]] for side in Side}


@pytest.fixture
def whole(make_pair: MakePair, example: Example) -> dict[Side, list[Any]]:
    pair = make_pair()
    return talk(pair, example, pair.exchange)


def test_the_whole_conversation(whole: dict[Side, list[Any]]) -> None:
    """SP-9-3."""
    for side, ours in ((CLIENT, TRANSITIONS[COORDINATOR]), (COORDINATOR, TRANSITIONS[CLIENT])):
        assert isinstance(whole[side][0], Established)
        assert whole[side][-1] == Closed(None)
        heard = {MESSAGES_BY_CLASS[event[0]] for event in whole[side][1:-1]}
        assert heard == {name for row in ours.values() for name in row} - {"hello", "welcome"}


MESSAGES_BY_CLASS = {cls.__name__: name for name, cls in MESSAGES.items()}


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_octet_by_octet_gives_the_same_events(
    size: int, whole: dict[Side, list[Any]], make_pair: MakePair, example: Example, recut: Any
) -> None:
    """Lost boundaries: what one envelope held may come in any number of them."""
    pair = make_pair()
    pair.tamper = recut(size)
    assert talk(pair, example, pair.exchange) == whole


def test_joined_envelopes_give_the_same_events(
    whole: dict[Side, list[Any]], make_pair: MakePair, example: Example
) -> None:
    pair = make_pair()
    numbers = dict.fromkeys(Side, 0)

    def exchange() -> None:
        moved = True
        while moved:
            moved = False
            for side in Side:
                bodies = []
                while (data := pair.of(side).next_envelope(0.0)) is not None:
                    bodies.append(bytes(envelope.decode(data).body))
                for one in Side:
                    pair.heard[one] += pair.of(one).events()
                if bodies:
                    moved = True
                    first = side is CLIENT and not numbers[side]
                    kind = envelope.Kind.OPEN if first else envelope.Kind.DATA
                    joined = envelope.encode(kind, pair.client.link, numbers[side], b"".join(bodies))
                    numbers[side] += 1
                    pair.of(side.other).receive(joined, 0.0)
                    pair.heard[side.other] += pair.of(side.other).events()

    assert talk(pair, example, exchange) == whole


@given(cuts=st.lists(st.integers(1, 400), min_size=1, max_size=30))
@settings(max_examples=15)
def test_any_cutting_gives_the_same_message(cuts: list[int], make_pair: MakePair) -> None:
    pair = make_pair().work()
    sizes = cycle(cuts)
    numbers = {side: pair.of(side)._sequence_out for side in Side}

    def tamper(side: Side, data: bytes) -> list[bytes]:
        body, result = envelope.decode(data).body, []
        while len(body):
            size = next(sizes)
            piece, body = body[:size], body[size:]
            result.append(envelope.encode(envelope.Kind.DATA, pair.client.link, numbers[side], piece))
            numbers[side] += 1
        return result

    pair.tamper = tamper
    pair.client.send(activations(3000))
    pair.client.send(Applied(7))
    pair.exchange()
    assert [type(m) for m in pair.messages(COORDINATOR)] == [Applied, Activations]
    np.testing.assert_array_equal(pair.messages(COORDINATOR)[1].tensors["x"], activations(3000).tensors["x"])
