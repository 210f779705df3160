"""What goes wrong between two hospitals, one test each, on a wire without sockets and with a clock of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from splitproto import codec, envelope, framing
from splitproto.connection import Timing
from splitproto.constants import (
    ENVELOPE_HEADER,
    MAX_ENVELOPE_BODY,
    MAX_HANDSHAKE_BYTES,
    ROTATION_GRACE,
    STREAM_BUDGET,
)
from splitproto.envelope import NO_LINK, Kind, ResetReason
from splitproto.errors import (
    BY_CODE,
    BindingMismatch,
    CarrierVersionError,
    CodecError,
    DeadlineExceeded,
    Draining,
    EnvelopeError,
    FeatureMissing,
    LinkLost,
    LinkReset,
    LocalError,
    NotAuthorised,
    PolicyRefused,
    RemoteError,
    SecureChannelError,
    SequenceGap,
    TooManyLinks,
    VersionMismatch,
)
from splitproto.events import Closed, Established, Received, RotationDue
from splitproto.framing import END, FrameType
from splitproto.identity import AllowList, Credentials
from splitproto.messages import Activations, Applied, Bye, Message
from splitproto.negotiation import Offer
from splitproto.states import Side

CLIENT, COORDINATOR = Side.CLIENT, Side.COORDINATOR
Example = Callable[[str], Message]
MakePair = Callable[..., Any]


def ended(pair: Any, finder: Side, error: type[LocalError], words: str = "") -> None:
    """`finder` found `error`; the other side reads the same cause."""
    found, told = pair.closed(finder), pair.closed(finder.other)
    assert type(found.error) is error and words in str(found.error), found
    assert isinstance(told.error, RemoteError), told
    assert (told.error.code, told.error.reason) == (error.code, found.error.reason)
    assert told.error.retry == error.retry


def never_established(pair: Any, side: Side) -> None:
    assert not any(isinstance(event, Established) for event in pair.heard[side])
    assert pair.of(side).agreement is None


# --- envelopes that get lost, twice or in another order ----------------------------------------------------


@pytest.mark.parametrize("sender", list(Side), ids=lambda side: side.value)
@pytest.mark.parametrize("accident", ["lost", "repeated", "reordered"])
def test_lost_repeated_or_reordered_envelope_ends_the_link_on_both_sides(
    accident: str, sender: Side, make_pair: MakePair, example: Example
) -> None:
    pair = make_pair().work()
    names = ("applied", "saved", "rolled-back") if sender is CLIENT else ("forward", "checkpoint", "rollback")
    envelopes = []
    for name in names:
        pair.of(sender).send(example(name))
        envelopes.append(pair.of(sender).next_envelope(0.0))
    first, second, third = envelopes
    arriving = {
        "lost": [first, third],
        "repeated": [first, first, second, third],
        "reordered": [second, first, third],
    }[accident]
    for data in arriving:
        pair.of(sender.other).receive(data, 0.0)
    pair.exchange()
    ended(pair, sender.other, SequenceGap)
    # No silent resync: what came after the accident was not read.
    assert len(pair.messages(sender.other)) == (0 if accident == "reordered" else 1)


@pytest.mark.parametrize("accident", ["lost", "repeated"])
def test_accident_in_the_handshake_ends_the_link(accident: str, make_pair: MakePair) -> None:
    pair = make_pair(timing=Timing(handshake=10))
    seen = {"count": 0}

    def tamper(side: Side, data: bytes) -> list[bytes]:
        seen["count"] += side is CLIENT
        if side is CLIENT and seen["count"] == 2:
            return [] if accident == "lost" else [data, data]
        return [data]

    pair.tamper = tamper
    pair.exchange()
    for side in Side:
        pair.of(side).handle_timer(10.0)
    pair.exchange(10.0)
    assert pair.closed(COORDINATOR) and pair.closed(CLIENT)
    never_established(pair, COORDINATOR) if accident == "lost" else None


@pytest.mark.parametrize("sender", list(Side), ids=lambda side: side.value)
def test_damaged_ciphertext_ends_the_link_and_the_sender_reads_the_cause(
    sender: Side, make_pair: MakePair, example: Example
) -> None:
    pair = make_pair().work()
    pair.of(sender).send(example("applied" if sender is CLIENT else "progress"))
    data = bytearray(pair.of(sender).next_envelope(0.0))
    data[-1] ^= 1
    pair.of(sender.other).receive(data, 0.0)
    pair.exchange()
    found, told = pair.closed(sender.other).error, pair.closed(sender).error
    assert isinstance(found, LinkLost) and "lost or altered" in str(found)
    assert isinstance(told, LinkLost) and "altered bytes" in str(told), "the alert was delivered"
    assert found.retry and told.retry, "anybody on the way can do this: it costs a reconnect, no more"


def test_a_replayed_recording_is_not_a_peer(make_pair: MakePair) -> None:
    """An eavesdropper repeats all that a client once said, to a fresh listener."""
    recorded = make_pair().work()
    fresh = make_pair()
    for side, data in recorded.wire:
        if side is CLIENT:
            fresh.coordinator.receive(data, 0.0)
            while fresh.coordinator.next_envelope(0.0) is not None:
                pass
    fresh.heard[COORDINATOR] += fresh.coordinator.events()
    never_established(fresh, COORDINATOR)
    assert isinstance(fresh.closed(COORDINATOR).error, SecureChannelError)


# --- resets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "error", "retry"),
    [
        (ResetReason.UNKNOWN_LINK, LinkReset, True),
        (ResetReason.SEQUENCE, LinkReset, True),
        (ResetReason.CARRIER_VERSION, CarrierVersionError, False),
        (ResetReason.MALFORMED, EnvelopeError, False),
        (ResetReason.BUSY, TooManyLinks, True),
    ],
)
def test_a_reset_tells_the_dialler_why(
    reason: ResetReason, error: type[LocalError], retry: bool, make_pair: MakePair
) -> None:
    for link in (None, NO_LINK):
        pair = make_pair()
        pair.client.receive(envelope.encode_reset(link or pair.client.link, reason, "because"), 0.0)
        pair.exchange()
        found = pair.closed(CLIENT).error
        assert type(found) is error and found.retry is retry


@pytest.mark.parametrize("reason", list(ResetReason))
def test_a_forged_reset_costs_an_admitted_peer_a_reconnect_and_no_more(
    reason: ResetReason, make_pair: MakePair
) -> None:
    pair = make_pair().work()
    pair.client.receive(envelope.encode_reset(pair.client.link, reason, "forged"), 0.0)
    pair.exchange()
    assert pair.closed(CLIENT).error.retry


@pytest.mark.parametrize("data", [b"garbage" * 6, b"SPLT\x09" + bytes(27)], ids=["garbage", "other version"])
def test_forged_octets_cost_an_admitted_peer_a_reconnect_and_no_more(
    data: bytes, make_pair: MakePair
) -> None:
    pair = make_pair().work()
    pair.client.receive(data, 0.0)
    pair.exchange()
    assert pair.closed(CLIENT).error.retry and pair.closed(COORDINATOR).error.retry


def test_a_reset_of_a_spoofed_link_id_does_nothing(make_pair: MakePair) -> None:
    pair = make_pair().work()
    for side in Side:
        pair.of(side).receive(envelope.encode_reset(b"other-other-othe", ResetReason.UNKNOWN_LINK, ""), 0.0)
    pair.client.send(Applied(1))
    pair.exchange()
    assert [type(m) for m in pair.messages(COORDINATOR)] == [Applied]


def test_envelopes_of_another_link_are_ignored(make_pair: MakePair) -> None:
    pair = make_pair().work()
    pair.coordinator.receive(envelope.encode(Kind.DATA, b"other-other-othe", 77, b"x"), 0.0)
    pair.exchange()
    assert pair.closed(COORDINATOR) is None


def test_carrier_version_mismatch_is_readable_in_both_directions(make_pair: MakePair) -> None:
    # A newer coordinator answers our OPEN: its RESET, in its own version, lists what it speaks.
    pair = make_pair()
    newer = bytearray(envelope.encode_reset(pair.client.link, ResetReason.CARRIER_VERSION, ""))
    newer[4] = 9
    newer[envelope.ENVELOPE_HEADER : envelope.ENVELOPE_HEADER + 3] = bytes((2, 2, 8, 9))[:4]
    pair.client.receive(newer, 0.0)
    pair.exchange()
    assert str(pair.closed(CLIENT).error) == (
        "the peer speaks carrier version 8, 9, this side 1: update the older one"
    )
    # A newer dialler reaches us: we say so too.
    pair = make_pair()
    data = bytearray(pair.client.next_envelope(0.0))
    data[4] = 2
    pair.coordinator.receive(data, 0.0)
    pair.heard[COORDINATOR] += pair.coordinator.events()
    assert str(pair.closed(COORDINATOR).error) == "the peer uses carrier version 2, this side 1"


@pytest.mark.parametrize("at", range(0, 400, 7))
@pytest.mark.parametrize("sender", list(Side), ids=lambda side: side.value)
def test_damage_in_the_handshake_is_not_taken_for_a_refused_certificate(
    sender: Side, at: int, make_pair: MakePair
) -> None:
    """SP-4-6: a peer that was admitted before dials again."""
    pair = make_pair(timing=Timing(handshake=10))

    def tamper(side: Side, data: bytes) -> list[bytes]:
        body = len(data) - ENVELOPE_HEADER
        if side is sender and not [one for one, _ in pair.wire[:-1] if one is sender]:
            data = bytearray(data)
            data[ENVELOPE_HEADER + at % body] ^= 0x10
        return [bytes(data)]

    pair.tamper = tamper
    pair.exchange()
    for side in Side:
        pair.of(side).handle_timer(10.0)
    pair.exchange(10.0)
    for side in Side:
        ended = pair.closed(side)
        if ended is not None and isinstance(ended.error, SecureChannelError):
            assert not ended.error.refused, ended.error


@pytest.mark.parametrize("alert", [42, 43, 44, 45, 46, 48, 49, 116])
def test_an_alert_that_anybody_can_send_refuses_no_certificate(alert: int, make_pair: MakePair) -> None:
    """SP-4-6: before TLS has keys, an alert is plaintext."""
    pair = make_pair()
    pair.client.next_envelope(0.0)
    forged = bytes((21, 3, 3, 0, 2, 2, alert))
    pair.client.receive(envelope.encode(Kind.DATA, pair.client.link, 0, forged), 0.0)
    (closed,) = [event for event in pair.client.events() if isinstance(event, Closed)]
    assert isinstance(closed.error, SecureChannelError)
    assert not closed.error.refused


# --- admission ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["expired", "another CA"])
def test_tls_done_is_not_admission_when_the_server_refuses_the_certificate(
    who: str, make_pair: MakePair, federation: Any, outsider: Credentials
) -> None:
    pair = make_pair(client=federation.credentials("late") if who == "expired" else outsider)
    pair.exchange()
    assert pair.client._channel.secure, "TLS is done on the client's side"
    never_established(pair, CLIENT)
    never_established(pair, COORDINATOR)
    found, told = pair.closed(COORDINATOR).error, pair.closed(CLIENT).error
    assert isinstance(found, SecureChannelError) and isinstance(told, SecureChannelError)
    assert ("expired" if who == "expired" else "CA") in str(found)
    assert "our certificate" in str(told), "the alert was delivered although the call raised"
    assert (found.refused, told.refused) == ("theirs", "ours"), "no new link changes that"


def test_tls_done_is_not_admission_while_welcome_is_missing(make_pair: MakePair) -> None:
    pair = make_pair()
    pair.tamper = lambda side, data: [data] if side is CLIENT or len(pair.wire) < 3 else []
    pair.exchange()
    assert pair.client._channel.secure
    never_established(pair, CLIENT)
    pair.client.handle_timer(10.0)
    pair.exchange(10.0)
    assert isinstance(pair.closed(CLIENT).error, DeadlineExceeded)


def test_a_client_that_refuses_the_host_name_tells_the_coordinator(make_pair: MakePair) -> None:
    pair = make_pair(hostname="elsewhere.example")
    pair.exchange()
    assert "elsewhere.example" in str(pair.closed(CLIENT).error)
    assert "refuses our certificate" in str(pair.closed(COORDINATOR).error)


def test_the_coordinators_allow_list_refuses_and_both_sides_read_why(make_pair: MakePair) -> None:
    pair = make_pair(client="stranger")
    pair.exchange()
    ended(pair, COORDINATOR, NotAuthorised, "client 'stranger' is not on our allow-list")
    assert "job" in str(pair.closed(COORDINATOR).error), "our own log names the list"
    assert "job" not in str(pair.closed(CLIENT).error), "the peer is not told where it is kept"
    for side in Side:
        never_established(pair, side)


def test_the_clients_allow_list_refuses_and_both_sides_read_why(make_pair: MakePair) -> None:
    pair = make_pair(coordinators=AllowList({"coordinator": {"other"}}, "peer.toml"))
    pair.exchange()
    ended(pair, CLIENT, NotAuthorised, "coordinator 'hub' is not on our allow-list")
    for side in Side:
        never_established(pair, side)


def test_a_site_that_is_listed_in_another_role_is_refused(make_pair: MakePair) -> None:
    pair = make_pair(clients=AllowList({"coordinator": {"charite"}}, "job"))
    pair.exchange()
    ended(pair, COORDINATOR, NotAuthorised)


def test_a_middle_that_ends_tls_is_noticed_by_the_binding(make_pair: MakePair) -> None:
    pair = make_pair()
    pair.client._own_digest = bytes(32)  # what a middle's certificate would do to one side's view
    pair.exchange()
    ended(pair, COORDINATOR, BindingMismatch)


def test_no_common_protocol_version(make_pair: MakePair) -> None:
    pair = make_pair(client_offer=Offer(versions=(7,)))
    pair.exchange()
    ended(pair, COORDINATOR, VersionMismatch, "client speaks 7, the coordinator 1")


def test_a_missing_feature_is_named_to_both(make_pair: MakePair) -> None:
    pair = make_pair(coordinator_offer=Offer(requires=("org.example/secret",)))
    pair.exchange()
    ended(pair, COORDINATOR, FeatureMissing, "the client does not offer org.example/secret")


def test_octets_before_authentication_are_bounded(make_pair: MakePair) -> None:
    pair = make_pair()
    number, sent = 0, 0
    while not pair.coordinator.closed:
        kind = Kind.OPEN if number == 0 else Kind.DATA
        # A TLS record that never ends: nothing to judge yet, only memory to take.
        body = b"\x16\x03\x01\x40\x00\x01\x00\xff\xff" + bytes(4_000) if number == 0 else bytes(4_000)
        pair.coordinator.receive(envelope.encode(kind, pair.client.link, number, body), 0.0)
        number, sent = number + 1, sent + len(body)
        assert sent <= MAX_HANDSHAKE_BYTES + 8_000
    pair = make_pair()
    pair.coordinator.receive(envelope.encode(Kind.OPEN, pair.client.link, 0, bytes(MAX_ENVELOPE_BODY)), 0.0)
    assert pair.coordinator.closed


def test_an_error_text_of_a_peer_is_one_printable_line(make_pair: MakePair) -> None:
    pair = make_pair().work()
    head = codec.encode({"type": "error", "code": 0x7777, "reason": "x\nINFO all is well \x1b[2J"})
    pair.client._channel.write(framing.encode_header(FrameType.HEAD, 101, len(head), end=True) + head)
    pair.exchange()
    told = pair.closed(COORDINATOR).error
    assert isinstance(told, CodecError) and "cannot be printed" in str(told)


def test_an_error_code_that_nobody_knows_is_final(make_pair: MakePair) -> None:
    pair = make_pair().work()
    head = codec.encode({"type": "error", "code": 0x7777, "reason": "from the future"})
    pair.client._channel.write(framing.encode_header(FrameType.HEAD, 101, len(head), end=True) + head)
    pair.exchange()
    told = pair.closed(COORDINATOR).error
    assert told.name == "unknown-0x7777" and not told.retry


# --- time --------------------------------------------------------------------------------------------------


def test_handshake_deadline_names_what_was_missing(make_pair: MakePair) -> None:
    pair = make_pair(timing=Timing(handshake=10))
    assert pair.client.next_timer() == 10.0
    pair.client.handle_timer(9.99)
    assert not pair.client.closed
    pair.client.handle_timer(10.0)
    pair.coordinator.receive(pair.client.next_envelope(0.0), 0.0)
    pair.coordinator.handle_timer(10.0)
    for side, waited in ((CLIENT, "TLS"), (COORDINATOR, "TLS")):
        pair.heard[side] += pair.of(side).events()
        assert isinstance(pair.closed(side).error, DeadlineExceeded)
        assert f"no {waited} within 10 s" in str(pair.closed(side).error)


def test_a_peer_that_says_no_hello_meets_the_deadline_and_is_told(make_pair: MakePair) -> None:
    pair = make_pair()
    pair.client._bodies.clear()
    pair.coordinator.receive(pair.client.next_envelope(0.0), 0.0)
    pair.client.receive(pair.coordinator.next_envelope(0.0), 0.0)
    pair.client._control.clear()  # the hello
    pair.exchange()
    pair.coordinator.handle_timer(10.0)
    pair.exchange(10.0)
    ended(pair, COORDINATOR, DeadlineExceeded, "no hello and welcome within 10 s")


def test_heartbeats_keep_a_silent_link_and_cost_two_small_envelopes(make_pair: MakePair) -> None:
    """SP-9-5."""
    pair = make_pair(timing=Timing(heartbeat=5, silence=20)).work()
    before, now = len(pair.wire), 0.0
    while now < 100:
        now = min(pair.of(side).next_timer() for side in Side)
        for side in Side:
            pair.of(side).handle_timer(now)
        pair.exchange(now)
    assert pair.closed(CLIENT) is None and pair.closed(COORDINATOR) is None
    said = [data for _, data in pair.wire[before:]]
    assert 2 * 20 <= len(said) <= 4 * 21 and max(map(len, said)) < 100


def test_a_peer_that_falls_silent_is_lost_after_the_time_out(make_pair: MakePair) -> None:
    pair = make_pair(timing=Timing(heartbeat=5, silence=20)).work(now=1.0)
    asked, now = [], 1.0
    while (now := pair.client.next_timer()) < math.inf:
        pair.client.handle_timer(now)
        while pair.client.next_envelope(now) is not None:
            asked.append(now)
    assert asked == [6.0, 11.0, 16.0]
    pair.heard[CLIENT] += pair.client.events()
    error = pair.closed(CLIENT).error
    assert isinstance(error, LinkLost) and error.retry and "silent for 20 s" in str(error)


def test_a_record_that_was_cut_short_is_silence(make_pair: MakePair) -> None:
    """SP-9-5: TLS takes the octets of later PINGs for the rest of the record; they are no signs of life."""
    pair = make_pair(timing=Timing(heartbeat=5, silence=20)).work()
    pair.client.send(Bye("drain", "x" * 400))
    data = pair.client.next_envelope(0.0)
    assert len(data) > 400
    pair.coordinator.receive(data[:100], 0.0)
    pair.exchange()
    now, before = 0.0, len(pair.wire)
    while now < 60 and pair.closed(COORDINATOR) is None:
        now += 5.0
        for side in (CLIENT, COORDINATOR):
            pair.of(side).handle_timer(now)
        pair.exchange(now)
    assert [side for side, _ in pair.wire[before:]].count(CLIENT) >= 3, "envelopes arrive all the time"
    assert now == 20.0
    error = pair.closed(COORDINATOR).error
    assert isinstance(error, LinkLost) and error.retry and "silent for 20 s" in str(error)


def test_the_timer_never_asks_for_the_past_twice(make_pair: MakePair) -> None:
    """A timer that does nothing and asks for the same moment again would be a busy loop."""
    pair = make_pair(timing=Timing(heartbeat=5, silence=20)).work()
    pair.client.send(Bye("complete", ""))
    previous = -1.0
    while (now := pair.client.next_timer()) < math.inf:
        assert now > previous
        pair.client.handle_timer(now)
        previous = now


def test_close_gives_up_waiting_for_close_notify_without_an_error(make_pair: MakePair) -> None:
    """SP-9-7."""
    pair = make_pair(timing=Timing(close=2)).work()
    pair.client.send(Bye("complete", ""))
    pair.exchange()
    pair.coordinator.send(Bye("complete", ""))
    now = 15.0  # long after the client was heard last
    while (data := pair.coordinator.next_envelope(now)) is not None:
        last = data
    assert last
    assert pair.coordinator.next_timer() == 17.0
    pair.coordinator.handle_timer(17.0)
    pair.heard[COORDINATOR] += pair.coordinator.events()
    assert pair.closed(COORDINATOR) == Closed(None)


# --- keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timing", [Timing(record_budget=40), Timing(byte_budget=500_000)])
def test_the_budget_of_a_key_asks_for_rotation_once_and_the_link_goes_on(
    timing: Timing, make_pair: MakePair
) -> None:
    pair = make_pair(timing=timing).work()
    for step in range(3):
        pair.client.send(Activations("train", step, 0, bytes(32), {"x": np.zeros(500_000, np.uint8)}))
        pair.exchange()
    (due,) = (event for event in pair.heard[CLIENT] if isinstance(event, RotationDue))
    assert due == RotationDue("the key's budget is spent")
    assert not any(isinstance(event, RotationDue) for event in pair.heard[COORDINATOR])
    assert len(pair.messages(COORDINATOR)) == 3
    for side in Side:
        pair.of(side).send(Bye("rotate", ""))
        pair.exchange()
    assert pair.closed(CLIENT) == pair.closed(COORDINATOR) == Closed(None)


@pytest.mark.parametrize("side", list(Side), ids=lambda side: side.value)
def test_stream_ids_that_come_to_an_end_ask_for_rotation_and_the_link_goes_on(
    side: Side, make_pair: MakePair, example: Example
) -> None:
    """SP-6-10."""
    pair = make_pair().work()
    pair.of(side)._next_stream += STREAM_BUDGET - 10
    message = example("applied" if side is CLIENT else "progress")
    for count in range(1, 8):
        pair.of(side).send(message)
        pair.exchange()
        due = [event for event in pair.heard[side] if isinstance(event, RotationDue)]
        high = pair.of(side)._next_stream >= STREAM_BUDGET
        assert due == ([RotationDue("its stream ids are running out")] if high else []), count
    assert due
    assert not any(isinstance(event, RotationDue) for event in pair.heard[side.other])
    assert len(pair.messages(side.other)) == 7
    for one in (side, side.other):
        pair.of(one).send(Bye("rotate", ""))
        pair.exchange()
    assert pair.closed(CLIENT) == pair.closed(COORDINATOR) == Closed(None)


def test_a_link_that_is_old_asks_for_rotation_once_and_goes_on(make_pair: MakePair) -> None:
    pair = make_pair(timing=Timing(lifetime=100.0)).work(3.0)
    now, seen = 3.0, set()
    while now < 200.0:
        before, now = now, min(pair.of(side).next_timer() for side in Side)
        assert before < now, "a timer asks for the past"
        for side in Side:
            pair.of(side).handle_timer(now)
        pair.exchange(now)
        for side in Side:
            due = [event for event in pair.heard[side] if isinstance(event, RotationDue)]
            assert due == ([RotationDue("the link has lived for 100 s")] if now >= 103.0 else [])
        seen.add(now)
    assert 103.0 in seen
    assert pair.closed(CLIENT) is pair.closed(COORDINATOR) is None
    # A peer that keeps a step pending does not keep the link.
    while now < 103.0 + ROTATION_GRACE:
        assert pair.closed(CLIENT) is pair.closed(COORDINATOR) is None
        now = min(pair.of(side).next_timer() for side in Side)
        for side in Side:
            pair.of(side).handle_timer(now)
        pair.exchange(now)
    for side in Side:
        assert isinstance(pair.closed(side).error, LinkLost) and "replaced" in str(pair.closed(side).error)


# --- ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crossing", [True, False])
def test_two_byes_end_a_link_without_error(crossing: bool, make_pair: MakePair) -> None:
    pair = make_pair().work()
    for side in Side:
        pair.of(side).send(Bye("complete", "thank you"))
        if not crossing:
            pair.exchange()
    pair.exchange()
    for side in Side:
        assert pair.closed(side) == Closed(None)
        assert [type(m) for m in pair.messages(side)] == [Bye]
        assert pair.of(side)._channel.peer_closed, "close_notify came: nothing was cut off"


def test_credit_and_pings_after_close_notify_do_not_turn_a_good_end_into_an_error(
    make_pair: MakePair, example: Example
) -> None:
    """The application takes its last message while close_notify is already out."""
    pair = make_pair().work()
    pair.coordinator.send(example("gradients"))
    pair.coordinator.send(Bye("complete", ""))
    pair.exchange()
    (gradients,) = [event for event in pair.heard[CLIENT] if isinstance(event, Received) and event.octets]
    pair.client.send(Bye("complete", ""))
    held = []
    while (data := pair.client.next_envelope(0.0)) is not None:
        held.append(data)
    assert pair.client._channel.shut
    pair.client.release(gradients.octets)
    pair.client.ping(0.0)
    assert pair.client.next_envelope(0.0) is None
    for data in held:
        pair.coordinator.receive(data, 0.0)
    pair.exchange()
    assert pair.closed(CLIENT) == pair.closed(COORDINATOR) == Closed(None)


def test_a_connection_lost_after_both_byes_is_no_error(make_pair: MakePair) -> None:
    pair = make_pair().work()
    pair.client.send(Bye("complete", ""))
    pair.exchange()
    pair.coordinator.send(Bye("complete", ""))
    while pair.coordinator.next_envelope(0.0) is not None:
        pass
    pair.coordinator.lost(LinkLost("the connection was lost"))
    pair.heard[COORDINATOR] += pair.coordinator.events()
    assert pair.closed(COORDINATOR) == Closed(None)


@pytest.mark.parametrize("said", ["nothing", "ours", "theirs"])
def test_a_connection_lost_before_both_byes_is_an_error(said: str, make_pair: MakePair) -> None:
    pair = make_pair().work()
    if said != "nothing":
        pair.of(CLIENT if said == "ours" else COORDINATOR).send(Bye("complete", ""))
        pair.exchange()
    pair.client.lost(LinkLost("the connection was lost"))
    pair.heard[CLIENT] += pair.client.events()
    assert isinstance(pair.closed(CLIENT).error, LinkLost)


@pytest.mark.parametrize("side", list(Side), ids=lambda side: side.value)
def test_close_notify_without_a_bye_is_a_loss(side: Side, make_pair: MakePair) -> None:
    pair = make_pair().work()
    pair.of(side)._channel.close()
    pair.exchange()
    assert isinstance(pair.closed(side.other).error, LinkLost)
    assert "without a bye" in str(pair.closed(side.other).error)


@pytest.mark.parametrize("cls", BY_CODE.values(), ids=lambda cls: cls.name)
def test_every_error_crosses_the_wire_with_code_reason_and_retry(
    cls: type[LocalError], make_pair: MakePair
) -> None:
    """SP-9-4, SP-12-1."""
    pair = make_pair().work()
    pair.client.send(Activations("train", 1, 0, bytes(32), {"x": np.zeros(1 << 20, np.uint8)}))
    pair.client.fail(cls("one line", "secret detail /etc/path"), 0.0)
    pair.exchange()
    ended(pair, CLIENT, cls, "one line")
    told = pair.closed(COORDINATOR).error
    assert (told.name, told.reason) == (cls.name, "one line") and "secret" not in str(told)
    assert not pair.messages(COORDINATOR), "an error overtakes what was queued"


def test_a_long_reason_is_cut_and_still_said(make_pair: MakePair) -> None:
    pair = make_pair().work()
    pair.coordinator.fail(PolicyRefused("ä" * 2_000), 0.0)
    pair.exchange()
    assert pair.closed(CLIENT).error.reason == "ä" * 500


def test_errors_of_both_sides_may_cross(make_pair: MakePair) -> None:
    pair = make_pair().work()
    pair.client.fail(PolicyRefused("mine"), 0.0)
    pair.coordinator.fail(Draining("yours"), 0.0)
    pair.exchange()
    assert str(pair.closed(CLIENT).error) == "mine" and str(pair.closed(COORDINATOR).error) == "yours"


def test_an_error_frame_from_the_peer_is_the_last_thing_read(make_pair: MakePair) -> None:
    pair = make_pair().work()
    error = codec.encode({"type": "error", "code": 0x0506, "reason": "disk full"})
    applied = codec.encode({"type": "applied", "step": 1})
    frames = [
        framing.encode_header(FrameType.HEAD, stream, len(head), end=bool(END)) + head
        for stream, head in ((101, error), (103, applied))
    ]
    pair.client._channel.write(b"".join(frames))
    pair.exchange()
    assert not pair.messages(COORDINATOR)
    assert pair.closed(COORDINATOR).error.name == "site-failed"
