"""The sans-IO connection: frames, limits, credit and order."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitproto import codec, envelope, framing, messages
from splitproto.constants import ENVELOPE_FILL, MAX_FRAME_PAYLOAD, MAX_STREAMS
from splitproto.errors import (
    FlowControlError,
    FrameError,
    LinkLost,
    LocalError,
    MessageTooLarge,
    RemoteError,
    TensorError,
    UnexpectedMessage,
)
from splitproto.events import Closed, Established, Received
from splitproto.framing import END, FrameType
from splitproto.messages import MESSAGES, Activations, Applied, Bye, Gradients, Message
from splitproto.negotiation import Offer
from splitproto.states import TRANSITIONS, Side, State
from splitproto.tensors import DTYPES

CLIENT, COORDINATOR = Side.CLIENT, Side.COORDINATOR
DIGEST = bytes(32)
Example = Callable[[str], Message]
MakePair = Callable[..., Any]


def activations(octets: int, step: int = 1) -> Activations:
    return Activations("train", step, 0, DIGEST, {"x": np.arange(octets, dtype=np.uint8)})


def raw(kind: int, stream: int, payload: bytes = b"", *, flags: int = 0, length: int | None = None) -> bytes:
    return struct.pack(">BBHII", kind, flags, 0, stream, len(payload) if length is None else length) + payload


def head_of(*tensors: list[Any], name: str = "activations") -> bytes:
    """The head of a message that announces `tensors`."""
    value: dict[str, Any] = {"type": name, "step": 1}
    if name == "activations":
        value |= {"mode": "train", "batch": 0, "digest": DIGEST}
    return codec.encode({**value, "tensors": list(tensors)})


def inject(pair: Any, side: Side, *frames: bytes) -> None:
    """`side` misbehaves: it sends these octets inside TLS."""
    pair.of(side)._channel.write(b"".join(frames))
    pair.exchange()


def ended(pair: Any, finder: Side, error: type[LocalError]) -> None:
    """`finder` found `error`, and the other side reads its code."""
    found, told = pair.closed(finder), pair.closed(finder.other)
    assert type(found.error) is error, found
    assert isinstance(told.error, RemoteError) and told.error.code == error.code
    assert told.error.reason == found.error.reason


# --- tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_tensors_of_every_dtype_arrive_bit_by_bit(dtype: str, make_pair: MakePair) -> None:
    pair = make_pair().work()
    bits = np.random.default_rng(0).integers(0, 256, 3 * 5 * 8, np.uint8).view(DTYPES[dtype])
    sent = {"a": bits.reshape(3, -1), "b": bits[:1].copy(), "one.more_x": bits.reshape(1, 3, 1, -1)}
    pair.coordinator.send(Gradients(3, sent))
    pair.exchange()
    (event,) = pair.take(CLIENT)
    got: Mapping[str, Any] = event.message.tensors
    assert list(got) == list(sent)
    for name, array in got.items():
        assert array.dtype == DTYPES[dtype] and array.shape == sent[name].shape
        assert array.tobytes() == sent[name].tobytes()
        assert array.flags.c_contiguous and array.flags.writeable and array.flags.aligned
    assert event.octets == sum(array.nbytes + 2 for array in sent.values())


def test_tensors_of_many_frames_arrive_whole(make_pair: MakePair) -> None:
    pair = make_pair().work()
    rng = np.random.default_rng(1)
    sizes = (1, MAX_FRAME_PAYLOAD, MAX_FRAME_PAYLOAD - 5, 3, 700_000, 16_384, 65_536, 255, 256)
    sent = {f"x{n}": rng.integers(0, 256, size, np.uint8) for n, size in enumerate(sizes)}
    pair.client.send(Activations("evaluate", 4, 9, DIGEST, sent))
    pair.exchange()
    (got,) = pair.messages(COORDINATOR)
    for name, array in sent.items():
        np.testing.assert_array_equal(got.tensors[name], array)


def test_a_message_of_no_tensors_needs_no_body(make_pair: MakePair) -> None:
    pair = make_pair().work()
    pair.client.send(Activations("train", 1, 0, DIGEST, {}))
    pair.exchange()
    (event,) = pair.take(COORDINATOR)
    assert event.message.tensors == {} and event.octets == 0


# --- order -----------------------------------------------------------------------------------------------


def test_control_messages_and_pings_overtake_a_large_tensor(make_pair: MakePair) -> None:
    pair = make_pair().work()
    pair.client.send(activations(4 << 20))
    for _ in range(3):
        pair.coordinator.receive(pair.client.next_envelope(0.0), 0.0)
    pair.client.send(Applied(5))
    pair.client.ping(0.0)
    pair.coordinator.receive(pair.client.next_envelope(0.0), 0.0)
    (event,) = pair.coordinator.events()
    assert event.message == Applied(5)
    assert pair.client._bodies, "the tensor is still on its way"
    pong = pair.coordinator.next_envelope(0.0)
    assert pong is not None and len(pong) < 100, "the PING was answered at once"
    pair.client.receive(pong, 0.0)
    pair.exchange()
    assert [type(m) for m in pair.messages(COORDINATOR)] == [Activations]


@pytest.mark.parametrize("octets", [100, 4 << 20])
def test_a_ping_follows_the_first_half_of_the_tensors(octets: int, make_pair: MakePair) -> None:
    """SP-7-12: so its PONG says that they have arrived."""
    pair, number = make_pair().work(), 1 << 63
    pair.client.send(activations(octets), halfway=number)
    while pair.client.answered < number:
        data = pair.client.next_envelope(0.0)
        assert data is not None, "the PING was left out"
        left = [one.left for one in pair.coordinator._streams.values()]
        assert not left or 2 * left[0] > octets - 2 * ENVELOPE_FILL, "it came late"
        pair.coordinator.receive(data, 0.0)
        while (back := pair.coordinator.next_envelope(0.0)) is not None:
            pair.client.receive(back, 0.0)
    assert all(2 * one.left <= one.octets for one in pair.coordinator._streams.values()), "it came early"
    assert bool(pair.coordinator._streams) == (octets > 100)
    pair.exchange()
    assert [type(m) for m in pair.messages(COORDINATOR)] == [Activations]


@pytest.mark.parametrize("reason", ["complete", "rotate"])
def test_a_bye_never_overtakes_tensors(reason: str, make_pair: MakePair) -> None:
    pair = make_pair().work()
    pair.client.send(activations(1 << 20))
    pair.client.send(activations(10, step=2))
    pair.client.send(Bye(reason, ""))
    pair.client.ping(0.0)
    pair.exchange()
    assert [type(m) for m in pair.messages(COORDINATOR)] == [Activations, Activations, Bye]
    pair.coordinator.send(Bye(reason, ""))
    pair.exchange()
    assert pair.closed(CLIENT) == pair.closed(COORDINATOR) == Closed(None)


def test_sent_is_called_when_the_last_octet_is_encrypted(make_pair: MakePair) -> None:
    octets = 1_500_000
    pair = make_pair(coordinator_offer=Offer(max_message=octets + 100_000)).work()
    called: list[str] = []
    for name in ("first", "second"):
        pair.client.send(activations(octets), sent=lambda name=name: called.append(name))
    pair.client.send(Applied(1), sent=lambda: called.append("small"))
    assert called == ["small"]
    sizes = []
    while called == ["small"]:
        sizes.append(len(pair.client.next_envelope(0.0) or b""))
        assert sizes[-1]
    assert called == ["small", "first"]
    assert len(sizes) > 2 and sum(sizes[:-1]) < octets < sum(sizes)
    for _ in range(5):
        assert pair.client.next_envelope(0.0) is None
    assert called == ["small", "first"], "there is no credit for the second"


def test_the_array_may_change_after_sent(make_pair: MakePair) -> None:
    pair = make_pair().work()
    array = np.ones(300_000, np.uint8)
    pair.client.send(Activations("train", 1, 0, DIGEST, {"x": array}), sent=lambda: array.fill(0))
    pair.exchange()
    assert pair.messages(COORDINATOR)[0].tensors["x"].all()


# --- credit ----------------------------------------------------------------------------------------------


def test_credit_is_never_exceeded_and_comes_back_with_release(make_pair: MakePair) -> None:
    pair = make_pair(coordinator_offer=Offer(max_message=10_000)).work()
    for step in range(1, 8):
        pair.client.send(activations(4_000, step=step))
    heard: list[Received] = []
    for wanted in (2, 1, 1, 1, 1, 1):
        pair.exchange()
        events = pair.take(COORDINATOR)
        assert len(events) == wanted
        heard += events
        assert sum(event.octets for event in heard) <= 10_000
        pair.coordinator.release(heard.pop(0).octets)
    assert [event.message.step for event in heard] == [7]  # type: ignore[attr-defined]
    assert pair.closed(CLIENT) is None


def test_release_of_nothing_sends_nothing(make_pair: MakePair) -> None:
    pair = make_pair().work()
    pair.coordinator.release(0)
    assert pair.coordinator.next_envelope(0.0) is None


def test_a_body_beyond_credit_is_a_flow_control_error(make_pair: MakePair) -> None:
    pair = make_pair(coordinator_offer=Offer(max_message=10_000)).work()
    pair.client._credit = 1 << 40
    pair.client.send(activations(6_000))
    pair.client.send(activations(6_000))
    pair.exchange()
    ended(pair, COORDINATOR, FlowControlError)


@pytest.mark.parametrize("number", [1, 1 << 30, (1 << 64) - 1])
def test_more_credit_than_was_taken_is_a_flow_control_error(number: int, make_pair: MakePair) -> None:
    pair = make_pair().work()
    inject(pair, COORDINATOR, framing.encode_number(FrameType.CREDIT, number))
    ended(pair, CLIENT, FlowControlError)


def test_a_message_beyond_the_peers_limit_is_refused_here_and_the_link_lives(make_pair: MakePair) -> None:
    pair = make_pair(coordinator_offer=Offer(max_message=10_000)).work()
    before = dict(pair.client.conversation.states)
    with pytest.raises(MessageTooLarge, match="10000"):
        pair.client.send(activations(10_001))
    assert pair.client.conversation.states == before
    pair.client.send(activations(10_000 - 3))
    pair.exchange()
    assert len(pair.messages(COORDINATOR)) == 1


@pytest.mark.parametrize(
    "broken", [{"x y": np.zeros(1)}, {"x": np.zeros(0)}, {"x": np.zeros(1, np.complex64)}]
)
def test_a_message_the_wire_does_not_carry_is_refused_here_and_the_link_lives(
    broken: dict[str, Any], make_pair: MakePair
) -> None:
    pair = make_pair().work()
    with pytest.raises(TensorError):
        pair.client.send(Activations("train", 1, 0, DIGEST, broken))
    pair.client.send(Applied(1))
    pair.exchange()
    assert len(pair.messages(COORDINATOR)) == 1


# --- frames that break the rules ---------------------------------------------------------------------------

GOOD = head_of(["x", "u8", [10]])
BODY = b"\xc4\x0a" + bytes(10)
EMPTY = head_of()
APPLIED = codec.encode({"type": "applied", "step": 1})


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param([raw(9, 101, b"x")], id="unknown type"),
        pytest.param([raw(1, 101, APPLIED, flags=3)], id="unknown flag"),
        pytest.param([raw(1, 101, length=MAX_FRAME_PAYLOAD + 1)], id="frame beyond the limit"),
        pytest.param([raw(1, 102, APPLIED, flags=END)], id="the other side's parity"),
        pytest.param([raw(1, 101, APPLIED, flags=END)] * 2, id="stream used twice"),
        pytest.param(
            [raw(1, 103, APPLIED, flags=END), raw(1, 101, APPLIED, flags=END)], id="stream going back"
        ),
        pytest.param([raw(1, 1, APPLIED, flags=END)], id="stream of the hello"),
        pytest.param([raw(2, 101, BODY, flags=END)], id="BODY without HEAD"),
        pytest.param([raw(1, 101, APPLIED, flags=END), raw(2, 101, b"x", flags=END)], id="BODY after END"),
        pytest.param([raw(1, 101, APPLIED)], id="no END on a HEAD without tensors"),
        pytest.param([raw(1, 101, EMPTY)], id="no END on a HEAD with an empty list of tensors"),
        pytest.param([raw(1, 101, GOOD, flags=END)], id="END on a HEAD with tensors"),
        pytest.param([raw(1, 101, GOOD), raw(2, 101, BODY)], id="no END on the last BODY"),
        pytest.param([raw(1, 101, GOOD), raw(2, 101, BODY[:5], flags=END)], id="END too early"),
        pytest.param([raw(1, 101, GOOD), raw(2, 101, BODY + b"x", flags=END)], id="BODY too long"),
        pytest.param([raw(1, 101, GOOD), raw(2, 101, b"")], id="empty BODY"),
        pytest.param([raw(1, 101, GOOD), raw(2, 103, BODY, flags=END)], id="BODY of another stream"),
        pytest.param(
            [raw(1, 101, GOOD), raw(2, 101, b"\xc4\x09" + BODY[2:], flags=END)], id="other bin length"
        ),
        pytest.param(
            [raw(1, 101, GOOD), raw(2, 101, b"\xc5\x00" + BODY[2:], flags=END)], id="other bin family"
        ),
        pytest.param(
            [raw(1, 101, GOOD), raw(2, 101, b"\xc4"), raw(2, 101, b"\x0b")], id="bin head in pieces"
        ),
        pytest.param([raw(4, 1, bytes(8))], id="PING on a stream"),
        pytest.param([raw(3, 0, bytes(7))], id="CREDIT of 7 octets"),
    ],
)
def test_broken_frames_end_the_link_on_both_sides(frames: list[bytes], make_pair: MakePair) -> None:
    pair = make_pair().work()
    inject(pair, CLIENT, *frames)
    ended(pair, COORDINATOR, FrameError)
    for side in Side:
        assert not any(isinstance(m, Activations) for m in pair.messages(side))


def test_the_same_frames_unbroken_are_a_message(make_pair: MakePair) -> None:
    pair = make_pair().work()
    inject(pair, CLIENT, raw(1, 101, GOOD), *(raw(2, 101, BODY[n : n + 1], flags=n == 11) for n in range(12)))
    inject(pair, CLIENT, raw(1, 103, EMPTY, flags=END), raw(1, 1001, APPLIED, flags=END))
    assert [type(m) for m in pair.messages(COORDINATOR)] == [Activations, Activations, Applied]


@pytest.mark.parametrize(
    ("head", "error"),
    [
        (b"\xc1", "codec"),
        (codec.encode({"type": "applied"}), "codec"),
        (codec.encode({"type": "applied", "step": 1, "more": 1}), "codec"),
        (codec.encode({"type": "nonsense"}), "codec"),
        (head_of(["x", "f31", [1]]), "tensor"),
        (head_of(["x", "u8", [1]], ["x", "u8", [1]]), "tensor"),
        (head_of(["x", "u8", [1 << 33]]), "tensor"),
    ],
)
def test_broken_heads_end_the_link_on_both_sides(head: bytes, error: str, make_pair: MakePair) -> None:
    pair = make_pair().work()
    inject(pair, CLIENT, raw(1, 101, head, flags=END))
    assert pair.closed(COORDINATOR).error.name == error
    assert pair.closed(CLIENT).error.name == error


@pytest.mark.parametrize(
    ("announced", "error"),
    [
        ([["x", "u8", [(1 << 32) - 1]]], MessageTooLarge),
        ([[f"x{n}", "u8", [1 << 24]] for n in range(256)], MessageTooLarge),
        ([["x", "f64", [1 << 16, 1 << 16, 1 << 16]]], TensorError),
    ],
    ids=["one of 4 GiB", "256 of 16 MiB", "2^51 octets"],
)
def test_sizes_are_checked_before_memory_is_taken(
    announced: list[Any], error: type[LocalError], make_pair: MakePair
) -> None:
    pair = make_pair().work()
    tracemalloc.start()
    try:
        inject(pair, CLIENT, raw(1, 101, head_of(*announced)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    ended(pair, COORDINATOR, error)
    assert peak < 4 << 20


def test_the_state_is_checked_before_memory_is_taken(make_pair: MakePair) -> None:
    """SP-9-1: a peer with a link but no job cannot make us hold its gigabyte."""
    pair = make_pair().establish()
    tracemalloc.start()
    try:
        inject(pair, CLIENT, raw(1, 101, head_of(["x", "u8", [200 << 20]])))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    ended(pair, COORDINATOR, UnexpectedMessage)
    assert peak < 4 << 20


def test_seventeen_half_received_messages_are_one_too_many(make_pair: MakePair) -> None:
    pair = make_pair().work()
    heads = [raw(1, 101 + 2 * n, GOOD) for n in range(MAX_STREAMS + 1)]
    inject(pair, CLIENT, *heads[:-1])
    assert pair.closed(COORDINATOR) is None
    inject(pair, CLIENT, heads[-1])
    ended(pair, COORDINATOR, FrameError)


def test_sixteen_interleaved_messages_are_all_received(make_pair: MakePair) -> None:
    pair = make_pair().work()
    streams = [101 + 2 * n for n in range(MAX_STREAMS)]
    inject(pair, CLIENT, *(raw(1, stream, GOOD) for stream in streams))
    for n in range(12):
        inject(pair, CLIENT, *(raw(2, stream, BODY[n : n + 1], flags=n == 11) for stream in streams))
    assert len(pair.messages(COORDINATOR)) == MAX_STREAMS


@pytest.mark.parametrize(
    "frame",
    [
        framing.encode_number(FrameType.PING, 1),
        framing.encode_number(FrameType.CREDIT, 1),
        raw(1, 1, GOOD),
        raw(1, 1, APPLIED, flags=END),
    ],
    ids=["PING", "CREDIT", "tensors", "a message"],
)
def test_nothing_is_taken_before_hello(frame: bytes, make_pair: MakePair) -> None:
    pair = make_pair()
    pair.coordinator.receive(pair.client.next_envelope(0.0), 0.0)
    pair.client.receive(pair.coordinator.next_envelope(0.0), 0.0)
    pair.client._control.clear()  # the hello
    inject(pair, CLIENT, frame)
    found = pair.closed(COORDINATOR)
    assert isinstance(found.error, FrameError | UnexpectedMessage)
    assert pair.closed(CLIENT).error.code == found.error.code
    assert not any(isinstance(event, Established) for side in Side for event in pair.heard[side])


# --- states ----------------------------------------------------------------------------------------------


def test_every_message_in_every_state_is_sent_or_refused_as_the_tables_say(
    make_pair: MakePair, example: Example
) -> None:
    pair = make_pair().work()
    for side in Side:
        connection = pair.of(side)
        for state in State:
            for name in MESSAGES:
                connection.conversation.states = dict.fromkeys(Side, state)
                connection.conversation.unanswered = 1
                allowed = name in TRANSITIONS[side][state] or (name == "error" and state is not State.ERROR)
                if allowed:
                    connection.send(example(name))
                else:
                    with pytest.raises(UnexpectedMessage):
                        connection.send(example(name))
                connection._control.clear()
                connection._bodies.clear()
                connection._finishing = False


@pytest.mark.parametrize("state", list(State), ids=lambda state: state.value)
@pytest.mark.parametrize("side", list(Side), ids=lambda side: side.value)
def test_every_message_in_every_state_is_taken_or_ends_the_link_as_the_tables_say(
    side: Side, state: State, make_pair: MakePair, example: Example
) -> None:
    """SP-9-1: `side` sends whatever it likes; the other side, in `state`, judges."""
    pair = None
    for name in MESSAGES:
        if name in ("hello", "welcome", "error"):
            continue
        if pair is None:
            pair = make_pair().work()
            stream = 1001 if side is CLIENT else 1002
        judge = pair.of(side.other)
        judge.conversation.states = dict.fromkeys(Side, state)
        judge.conversation.unanswered = 1
        head, segments = messages.encode(example(name))
        body = b"".join(segments)
        frames = [raw(1, stream, head, flags=0 if body else END)]
        frames += [raw(2, stream, body, flags=END)] if body else []
        stream += 2
        inject(pair, side, *frames)
        if name in TRANSITIONS[side][state]:
            assert [m.name for m in pair.messages(side.other)] == [name]
            assert pair.closed(side.other) is None
            pair.take(side.other)
            judge._finishing = False
        else:
            assert isinstance(pair.closed(side.other).error, UnexpectedMessage), name
            assert not pair.messages(side.other)
            pair = None


def test_what_crosses_our_bye_is_dropped_and_its_credit_returned(
    make_pair: MakePair, example: Example
) -> None:
    """SP-9-2."""
    pair = make_pair(client_offer=Offer(max_message=10_000)).work()
    pair.client.send(Bye("drain", ""))
    for _ in range(4):
        pair.coordinator.send(Gradients(1, {"x": np.zeros(6_000, np.uint8)}))
    pair.coordinator.send(example("forward"))
    pair.coordinator.send(Bye("drain", ""))
    pair.exchange()
    assert [type(m) for m in pair.messages(CLIENT)] == [Bye]
    assert pair.closed(CLIENT) == pair.closed(COORDINATOR) == Closed(None)


# --- fuzz ------------------------------------------------------------------------------------------------


@given(data=st.binary(max_size=300), stage=st.sampled_from(["start", "work"]), side=st.sampled_from(Side))
@settings(max_examples=40)
def test_any_envelope_ends_the_link_or_is_ignored_but_never_raises(
    data: bytes, stage: str, side: Side, make_pair: MakePair
) -> None:
    pair = make_pair()
    if stage == "work":
        pair.work()
    victim = pair.of(side)
    victim.receive(data, 0.0)
    number = victim._sequence_in
    victim.receive(envelope.encode(envelope.Kind.DATA, victim.link, number, data), 0.0)
    victim.receive(envelope.encode(envelope.Kind.RESET, victim.link, 0, data), 0.0)
    pair.exchange()
    for one in Side:
        pair.closed(one)


FRAGMENTS = st.one_of(
    st.binary(max_size=60),
    st.builds(
        raw,
        st.integers(0, 6),
        st.sampled_from([0, 1, 2, 101, 102, 103, 1 << 31]),
        st.sampled_from([b"", APPLIED, GOOD, EMPTY, BODY, BODY[:3], bytes(8), b"\xff" * 8]),
        flags=st.sampled_from([0, 0, END, 2]),
    ),
)


@given(frames=st.lists(FRAGMENTS, max_size=6), side=st.sampled_from(Side))
@settings(max_examples=60)
def test_any_plaintext_from_an_authenticated_peer_ends_the_link_or_is_a_message(
    frames: list[bytes], side: Side, make_pair: MakePair
) -> None:
    pair = make_pair().work()
    inject(pair, side, *frames)
    found = pair.closed(side.other)
    if found is not None:
        assert isinstance(found.error, LocalError)
        assert pair.closed(side) is not None, "the peer was not told"


@pytest.mark.parametrize("tensors", [True, False])
def test_a_mode_that_was_not_agreed_is_refused_at_both_ends(
    tensors: bool, make_pair: MakePair, example: Example
) -> None:
    """SP-9-8: by who would say it, and by who hears it from a peer that says it all the same."""
    pair = make_pair(client_offer=Offer(features=("train", "dtype.f32"))).work()
    side = CLIENT if tensors else COORDINATOR
    own, other = pair.of(side), pair.of(side.other)
    word: Message = (
        Activations("evaluate", 1, 0, DIGEST, {"x": np.zeros(1 << 16, np.uint8)})
        if tensors
        else replace(example("forward"), mode="evaluate")
    )
    with pytest.raises(UnexpectedMessage, match="evaluate, which was not agreed"):
        own.send(word)
    pair.exchange()
    assert not pair.heard[CLIENT] and not pair.heard[COORDINATOR], "the link lives"
    own.conversation.features = {"train", "evaluate"}
    own.send(word)
    pair.exchange()
    assert isinstance(pair.closed(side.other).error, UnexpectedMessage)
    assert pair.closed(side).error.name == "unexpected-message"
    assert not other._streams and not other._held, "no memory was taken for it"


def test_a_peer_that_asks_and_never_reads_does_not_fill_our_memory(make_pair: MakePair) -> None:
    pair = make_pair().work()
    for _ in range(50):
        pair.client._channel.write(framing.encode_number(FrameType.PING, 1) * 1000)
        pair.coordinator.receive(pair.client.next_envelope(0.0), 0.0)
        pair.coordinator.ping(0.0)
    assert sum(map(len, pair.coordinator._control)) < 64 * 1024


def test_links_that_are_closed_take_and_say_nothing(make_pair: MakePair) -> None:
    pair = make_pair().work()
    pair.client.lost(LinkLost("gone"))
    with pytest.raises(LinkLost):
        pair.client.send(Applied(1))
    pair.client.release(5)
    pair.client.ping(1.0)
    pair.client.handle_timer(1e9)
    pair.client.fail(LinkLost("again"), 1.0)
    pair.client.lost(LinkLost("again"))
    pair.coordinator.ping(0.0)
    pair.exchange()
    assert pair.closed(CLIENT) == Closed(pair.closed(CLIENT).error)
    assert str(pair.closed(CLIENT).error) == "gone"
    assert pair.client.next_timer() == float("inf")
