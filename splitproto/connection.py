"""One link, without I/O: envelopes in, events out; messages in, envelopes out (SP-5 to SP-9).

The owner does three things: gives every received ZeroMQ message to `receive`, sends what `next_envelope`
returns until it returns None, and calls `handle_timer` at `next_timer`. After each it reads `events`. `now` is
any monotonic clock in seconds. Network errors never raise here: they end the link with a `Closed` event.
Only `send` raises, and only for a message that the state tables or the peer's limits forbid.
"""

from __future__ import annotations

import hashlib
import math
import ssl
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from . import codec, constants, envelope, framing, messages
from .channel import Channel
from .errors import (
    BindingMismatch,
    CarrierVersionError,
    DeadlineExceeded,
    EnvelopeError,
    FlowControlError,
    FrameError,
    LinkLost,
    LinkReset,
    LocalError,
    MessageTooLarge,
    RemoteError,
    SecureChannelError,
    SequenceGap,
    SplitprotoError,
    TooManyLinks,
)
from .events import Closed, Established, Event, Received, RotationDue
from .framing import FrameType
from .identity import Identity
from .messages import Bye, Error, Hello, Message, Welcome
from .negotiation import Agreement, Offer, confirm, negotiate
from .states import Conversation, Side, State
from .tensors import DTYPES, Array, Descriptor, body_bytes

SMALL = 16 * 1024
"""Pieces below one TLS record are joined; larger ones are encrypted in place."""
WAITING = 64
"""PING and PONG are left out while so many control frames wait to be sent."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Deadlines in seconds, and the budget of one link and its TLS key."""

    handshake: float = constants.HANDSHAKE_TIMEOUT
    heartbeat: float = constants.HEARTBEAT_INTERVAL
    silence: float = constants.PEER_TIMEOUT
    close: float = constants.CLOSE_TIMEOUT
    record_budget: int = constants.RECORD_BUDGET
    byte_budget: int = constants.BYTE_BUDGET
    lifetime: float = constants.LINK_LIFETIME
    recheck: float = constants.RECHECK_INTERVAL
    """How often the shells check certificates and revocation list again; not used here."""


def binding(dialler: bytes, listener: bytes) -> bytes:
    """SP-6-8: both certificates' SHA-256, the dialler's first, hashed together."""
    return hashlib.sha256(dialler + listener).digest()


def _mode(message: Message) -> str:
    """The service that a message names, if it names one."""
    mode: str = getattr(message, "mode", "")
    return mode


class _Incoming:
    """A message whose tensors are arriving straight into their arrays."""

    def __init__(self, message: Message, described: tuple[Descriptor, ...], octets: int, head: int) -> None:
        self.message = message
        self.head = head
        self.octets = octets
        self.left = octets
        self.tensors: dict[str, Array] = {}
        self._targets: deque[tuple[memoryview, bytes]] = deque()
        for d in described:
            opening = codec.bin_header(d.nbytes)
            array = np.empty(d.shape, DTYPES[d.dtype])
            self.tensors[d.name] = array
            self._targets.append((memoryview(bytearray(len(opening))), opening))
            self._targets.append((array.reshape(-1).view(np.uint8).data, b""))
        self._place = 0

    def target(self) -> memoryview:
        return self._targets[0][0][self._place :]

    def advance(self, count: int) -> None:
        self.left -= count
        self._place += count
        view, expected = self._targets[0]
        if self._place == len(view):
            # SP-8.3-2: "Each tensor is exactly the bin its descriptor announces."
            if expected and bytes(view) != expected:
                raise FrameError("a tensor's octets do not start with the bin its descriptor announces")
            self._targets.popleft()
            self._place = 0


@dataclass(slots=True)
class _Outgoing:
    """A message with tensors, waiting for credit or on its way."""

    head: bytes
    segments: list[memoryview]
    octets: int
    sent: Callable[[], None] | None
    halfway: int | None
    left: int
    stream: int = 0
    frames: Iterator[tuple[list[memoryview], int, bool]] | None = None


class Connection:
    """One link.

    Args:
        side: CLIENT dials, COORDINATOR listens.
        link: 16 random octets; the dialler's choice.
        context: TLS context of this side.
        certificate_sha256: digest of this side's own certificate, 64 hex digits.
        authorise: called with the peer's identity once TLS is done; raises `NotAuthorised` or `IdentityError`.
        offer: versions, features and limits of this side.
        now: the owner's clock.
        hostname: dialler only: the name that was dialled.
    """

    def __init__(
        self,
        side: Side,
        link: bytes,
        context: ssl.SSLContext,
        certificate_sha256: str,
        authorise: Callable[[Identity], None],
        offer: Offer,
        now: float,
        *,
        hostname: str | None = None,
        timing: Timing | None = None,
    ) -> None:
        self.side = side
        self.link = link
        self.conversation = Conversation()
        self.peer: Identity | None = None
        self.agreement: Agreement | None = None
        self.closed = False
        self.answered = 0
        """Highest number of a PONG so far."""
        self._offer = offer
        self._authorise = authorise
        self._own_digest = bytes.fromhex(certificate_sha256)
        self._timing = timing or Timing()
        self._channel = Channel(context, server_side=side is Side.COORDINATOR, hostname=hostname)
        self._events: deque[Event] = deque()

        self._sequence_in = 0
        self._sequence_out = 0
        self._inbox = framing.Inbox()
        self._streams: dict[int, _Incoming] = {}
        self._scratch: memoryview | None = None
        self._last_stream_in = 0
        self._held = 0  # body octets that arrived, or will, and were not released
        self._next_stream = 1 if side is Side.CLIENT else 2
        self._control: deque[bytes] = deque()
        self._bodies: deque[_Outgoing] = deque()
        self._credit = 0
        self._finishing = False  # close_notify goes out when the queues are empty
        self._rotation_told = False

        self._handshake_ends = now + self._timing.handshake
        self._close_ends = math.inf
        self._worn_at = math.inf
        self._retired_at = math.inf
        self._heard = now
        self._pinged = now

        if side is Side.CLIENT:
            self._channel.handshake()

    # --- for the owner ------------------------------------------------------------------------------

    def receive(self, data: bytes | bytearray | memoryview, now: float) -> None:
        """One ZeroMQ message of this link."""
        if self.closed:
            return
        try:
            arrived = envelope.decode(data)
            if arrived.link != self.link and (
                arrived.kind is not envelope.Kind.RESET or arrived.link != envelope.NO_LINK
            ):
                return  # for a link that is over
            if arrived.kind is envelope.Kind.RESET:
                self._reset(arrived.body)
                return
            if arrived.sequence != self._sequence_in:
                raise SequenceGap(f"envelope {arrived.sequence} arrived where {self._sequence_in} was due")
            self._sequence_in += 1
            self._channel.feed(arrived.body)
            self._pump(now)
        except (EnvelopeError, CarrierVersionError, SecureChannelError) as error:
            # SP-4-6: forged or damaged octets cost an admitted peer a reconnect and nothing more.
            self._fail(error if self.agreement is None else LinkLost(error.reason), now)
        except LocalError as error:
            self._fail(error, now)

    def send(
        self, message: Message, *, sent: Callable[[], None] | None = None, halfway: int | None = None
    ) -> None:
        """Queue a message; `sent` is called when its last octet has been encrypted.

        Messages with tensors keep their order among themselves, those without among themselves; the latter
        overtake the former. The arrays must not change before `sent`.

        Args:
            halfway: number of a PING that follows the first half of the tensors: its PONG says that they are there.

        Raises:
            UnexpectedMessage: not allowed in this state.
            MessageTooLarge: beyond the peer's limit.
            CodecError, TensorError: not a message of version 1.
            LinkLost: the link is closed.
        """
        if self.closed or self._finishing:
            raise LinkLost("the link is closed")
        head, segments = messages.encode(message)
        octets = sum(len(segment) for segment in segments)
        if self.agreement is not None and octets > self.agreement.send_limit:
            raise MessageTooLarge(
                f"a {message.name} of {octets} octets; the peer takes {self.agreement.send_limit}: "
                "use smaller batches or windows, or raise max_message_mib there"
            )
        self.conversation.say(self.side, message.name, _mode(message))
        # SP-7-6: "A bye is the last message": it never overtakes tensors.
        if segments or isinstance(message, Bye):
            self._bodies.append(_Outgoing(head, segments, octets, sent, halfway, octets))
        else:
            stream = self._new_stream()
            self._control.append(framing.encode_header(FrameType.HEAD, stream, len(head), end=True) + head)
            if sent is not None:
                sent()
        if self.conversation.finished:
            self._finishing = True

    def next_envelope(self, now: float) -> bytes | None:
        """The next ZeroMQ message to send; None when there is none now."""
        first = self._sequence_out == 0 and self.side is Side.CLIENT
        kind = envelope.Kind.OPEN if first else envelope.Kind.DATA
        head = envelope.encode_header(kind, self.link, self._sequence_out)
        if self._channel.waiting:
            octets = head + self._channel.drain()
        elif self.closed:
            return None
        else:
            # The header goes into the buffer first: joining it to the ciphertext would be another copy.
            self._channel.lead(head)
            self._encrypt_more(now)
            octets = self._channel.drain(constants.ENVELOPE_HEADER + constants.MAX_ENVELOPE_BODY)
            if len(octets) == len(head):
                return None
        self._sequence_out += 1
        return octets

    def release(self, octets: int) -> None:
        """The owner has processed a message with a body of `octets`: the peer may send as much again."""
        if octets and not self.closed:
            self._held -= octets
            self._control.append(framing.encode_number(FrameType.CREDIT, octets))

    def events(self) -> Iterator[Event]:
        """Return the events so far, and forget them."""
        while self._events:
            yield self._events.popleft()

    def next_timer(self) -> float:
        """When `handle_timer` wants to be called; infinity when the link is closed."""
        if self.closed:
            return math.inf
        if self._channel.shut:
            return self._close_ends
        if self.agreement is None:
            return self._handshake_ends
        silent_until = max(self._heard, self._pinged) + self._timing.heartbeat
        return min(silent_until, self._heard + self._timing.silence, self._worn_at, self._retired_at)

    def handle_timer(self, now: float) -> None:
        """Heartbeats, deadlines, and the end of the link's life."""
        if self.closed:
            return
        if now >= self._worn_at:
            self._rotation(f"the link has lived for {self._timing.lifetime:g} s", now)
        if self._channel.shut:
            if now >= self._close_ends:
                self._close(None)
        elif self.agreement is None:
            if now >= self._handshake_ends:
                waited = "TLS" if not self._channel.secure else "hello and welcome"
                self._fail(DeadlineExceeded(f"no {waited} within {self._timing.handshake:g} s"), now)
        elif now >= self._retired_at:
            self.lost(
                LinkLost(f"the link was to be replaced for {constants.ROTATION_GRACE:g} s, and was not")
            )
        elif now >= self._heard + self._timing.silence:
            self.lost(LinkLost(f"the peer was silent for {self._timing.silence:g} s"))
        elif now >= max(self._heard, self._pinged) + self._timing.heartbeat:
            self.ping(now)

    @property
    def parted(self) -> bool:
        """The peer's close_notify has arrived: it knows both byes (SP-9-3), or has ended the link by an error."""
        return self._channel.peer_closed

    @property
    def peer_certificate(self) -> bytes:
        """DER; empty before the handshake."""
        return self._channel.peer_certificate

    @property
    def binding(self) -> bytes:
        """SP-6-8: digest of both certificates; what is signed with it holds on this pair only."""
        peer = hashlib.sha256(self._channel.peer_certificate).digest()
        own = self._own_digest
        return binding(own, peer) if self.side is Side.CLIENT else binding(peer, own)

    def ping(self, now: float, number: int | None = None) -> None:
        """Ask for a sign of life; the PONG that answers brings back `number`."""
        if self.agreement is not None and not self.closed:
            self._pinged = now
            self._sign_of_life(FrameType.PING, self._sequence_out if number is None else number)

    def fail(self, error: LocalError, now: float) -> None:
        """End the link because of `error`, telling the peer."""
        if not self.closed:
            self._fail(error, now)

    def lost(self, error: SplitprotoError) -> None:
        """The connection below is gone: nothing can be sent any more."""
        if not self.closed:
            # SP-9-7: after two byes nothing is lost but the close_notify.
            self._close(None if self._channel.shut else error)

    def _sign_of_life(self, kind: FrameType, number: int) -> None:
        # A peer that sends PING and does not read must not fill our memory; what is queued already shows life.
        if len(self._control) < WAITING:
            self._control.append(framing.encode_number(kind, number))

    # --- receiving -------------------------------------------------------------------------------------

    def _pump(self, now: float) -> None:
        if self.peer is None:
            if not self._channel.handshake():
                return
            peer = Identity.from_certificate(self._channel.peer_certificate)
            self._authorise(peer)
            self.peer = peer
            if self.side is Side.CLIENT:
                self.send(
                    Hello(
                        versions=self._offer.versions,
                        features=self._offer.features,
                        requires=self._offer.requires,
                        max_message=self._offer.max_message,
                        agent=self._offer.agent,
                        binding=self.binding,
                    )
                )
        while not self.closed:
            count = self._channel.read_into(self._inbox.buffer())
            if count == 0:
                break
            # SP-9-5: octets that do not decrypt are no sign of life: after a truncated record TLS waits indefinitely.
            self._heard = now
            full = self._inbox.filled(count)
            header = self._inbox.header
            if header is None:
                if full:
                    self._start_frame()
            elif header.type is FrameType.BODY:
                self._body_octets(header, count)
            elif full:
                self._small_frame(header, now)
        if self._channel.peer_closed and not self.closed:
            self._close(
                None if self.conversation.finished else LinkLost("the peer closed the link without a bye")
            )

    def _start_frame(self) -> None:
        header = self._inbox.take_header()
        if header.type is FrameType.BODY:
            incoming = self._streams.get(header.stream)
            if incoming is None:
                raise FrameError(f"a BODY on stream {header.stream}, which has no HEAD")
            if not 0 < header.length <= incoming.left or header.end != (header.length == incoming.left):
                raise FrameError("a BODY that does not end where its tensors end")
            self._body_left = header.length
            self._inbox.payload_into(incoming.target()[: header.length])
        else:
            self._scratch = self._inbox.payload_small(header.length)

    def _body_octets(self, header: framing.FrameHeader, count: int) -> None:
        incoming = self._streams[header.stream]
        incoming.advance(count)
        self._body_left -= count
        if self._body_left:
            self._inbox.payload_into(incoming.target()[: self._body_left])
            return
        self._inbox.next_frame()
        if incoming.left == 0:
            del self._streams[header.stream]
            for name, array in incoming.tensors.items():
                incoming.message.tensors[name] = array  # type: ignore[attr-defined]
            self._heard_message(incoming.message, incoming.octets, incoming.head)

    def _small_frame(self, header: framing.FrameHeader, now: float) -> None:
        payload = self._scratch
        if payload is None:  # pragma: no cover - _start_frame always set it
            raise FrameError("a frame without a payload")
        self._inbox.next_frame()
        if header.type is FrameType.HEAD:
            self._head(header, payload)
            return
        if self.agreement is None:
            raise FrameError("a control frame before welcome")
        number = framing.decode_number(payload)
        if header.type is FrameType.PING:
            self._sign_of_life(FrameType.PONG, number)
        elif header.type is FrameType.PONG:
            self.answered = max(self.answered, number)
        elif header.type is FrameType.CREDIT:
            self._credit += number
            if self._credit > self.agreement.send_limit:
                raise FlowControlError("more credit than was taken")

    def _head(self, header: framing.FrameHeader, payload: memoryview) -> None:
        # SP-7-5: "Stream ids have the sender's parity and only grow."
        parity = 0 if self.side is Side.CLIENT else 1
        if header.stream % 2 != parity or header.stream <= self._last_stream_in:
            raise FrameError(f"a HEAD on stream {header.stream}, which is not new or not the peer's")
        self._last_stream_in = header.stream
        message, described = messages.decode_head(payload)
        if header.end == bool(described):
            raise FrameError("END on a HEAD means no tensors follow, and the reverse")
        if not described:
            self._heard_message(message, 0, len(payload))
            return
        if self.agreement is None or len(self._streams) >= constants.MAX_STREAMS:
            raise FrameError("tensors before welcome, or too many messages half received")
        # SP-9-1: checked again when the body is complete; here, so that no memory is taken for it.
        self.conversation.check(self.side.other, message.name, _mode(message))
        octets = body_bytes(described)
        if octets > self.agreement.receive_limit:
            raise MessageTooLarge(
                f"a {message.name} of {octets} octets; this side takes {self.agreement.receive_limit}"
            )
        # SP-7-8: a body is charged when its HEAD is sent, so memory is bounded before it is taken.
        if self._held + octets > self.agreement.receive_limit:
            raise FlowControlError(f"a {message.name} beyond the credit given")
        self._held += octets
        self._streams[header.stream] = _Incoming(message, described, octets, len(payload))

    def _heard_message(self, message: Message, octets: int, head: int) -> None:
        if isinstance(message, Error):
            # SP-9-4: "its receiver ends the link at once and answers nothing."
            self.conversation.say(self.side.other, message.name)
            self._close(RemoteError(message.code, message.reason))
            return
        self.conversation.say(self.side.other, message.name, _mode(message))
        if isinstance(message, Hello):
            self._admit(message)
        elif isinstance(message, Welcome):
            self._welcomed(message)
        elif self.conversation.states[self.side] is State.DONE and not isinstance(message, Bye):
            # SP-9-2: "A side in DONE ignores what crosses its bye."
            self.release(octets)
            return
        else:
            self._events.append(Received(message, octets, head))
        if self.conversation.finished:
            self._finishing = True

    def _admit(self, hello: Hello) -> None:
        self._check_binding(hello.binding)
        agreement = negotiate(self._offer, hello)
        self.send(
            Welcome(
                version=agreement.version,
                features=tuple(sorted(agreement.features)),
                max_message=self._offer.max_message,
                agent=self._offer.agent,
                binding=self.binding,
            )
        )
        self._established(agreement)

    def _welcomed(self, welcome: Welcome) -> None:
        self._check_binding(welcome.binding)
        self._established(confirm(self._offer, welcome))

    def _established(self, agreement: Agreement) -> None:
        if self.peer is None:  # pragma: no cover - _pump sets it before any frame is read
            raise FrameError("a message before TLS")
        self.agreement = agreement
        self.conversation.features = agreement.features
        self._credit = agreement.send_limit
        self._worn_at = self._heard + self._timing.lifetime
        self._events.append(Established(self.peer, agreement, self._channel.description))

    def _check_binding(self, theirs: bytes) -> None:
        if theirs != self.binding:
            raise BindingMismatch(
                "the two sides see different certificates: something between them ends TLS, "
                "or a certificate was replaced while they connected (then start this side again)"
            )

    def _reset(self, body: memoryview) -> None:
        reset = envelope.decode_reset(body)
        said = f": {reset.text}" if reset.text else ""
        error: SplitprotoError
        if self.agreement is not None:
            # SP-4-6: not authenticated, so whatever it says, it only makes us dial again.
            error = LinkReset(f"the peer, or something on the way, gave up this link{said}")
        elif reset.reason == envelope.ResetReason.CARRIER_VERSION:
            spoken = ", ".join(map(str, reset.versions)) or "none"
            error = CarrierVersionError(
                f"the peer speaks carrier version {spoken}, this side {constants.CARRIER_VERSION}: update the older one"
            )
        elif reset.reason == envelope.ResetReason.BUSY:
            error = TooManyLinks(f"the peer has too many half-open links{said}")
        elif reset.reason == envelope.ResetReason.MALFORMED:
            error = EnvelopeError(f"the peer did not understand our envelope{said}")
        else:
            error = LinkReset(f"the peer no longer knows this link{said}")
        self._close(error)

    # --- sending ----------------------------------------------------------------------------------------

    def _new_stream(self) -> int:
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        return stream

    def _encrypt_more(self, now: float) -> None:
        """Fill an envelope: small messages first, then frames of bodies."""
        try:
            while self._channel.waiting < constants.ENVELOPE_FILL:
                before = self._channel.waiting
                self._encrypt_next(now)
                if self._channel.waiting == before:
                    return
        except LocalError as error:
            self._fail(error, now)

    def _encrypt_next(self, now: float) -> None:
        """Give TLS at most `TLS_FEED` octets: small messages, else one frame of a body."""
        if not self._channel.secure or self._channel.shut:
            return
        if self._control:
            batch = [self._control.popleft()]
            size = len(batch[0])
            while self._control and size + len(self._control[0]) <= constants.TLS_FEED:
                size += len(self._control[0])
                batch.append(self._control.popleft())
            self._channel.write(b"".join(batch))
        elif self._bodies and self.agreement is not None:
            self._body_frame(self._bodies[0])
        elif self._finishing:
            # SP-9-3: both byes are said, and nothing waits.
            self._channel.close()
            self._close_ends = now + self._timing.close
        self._count_budget(now)

    def _body_frame(self, out: _Outgoing) -> None:
        if out.frames is None:
            if self._credit < out.octets:
                return
            self._credit -= out.octets
            out.stream = self._new_stream()
            out.frames = framing.cut(out.segments)
            head = framing.encode_header(FrameType.HEAD, out.stream, len(out.head), end=not out.segments)
            self._channel.write(head + out.head)
            if not out.segments:
                self._body_done(out)
                return
        pieces, octets, end = next(out.frames)
        small: list[bytes | memoryview] = [framing.encode_header(FrameType.BODY, out.stream, octets, end=end)]
        for piece in pieces:
            if len(piece) < SMALL:
                small.append(piece)
                continue
            self._channel.write(b"".join(small))
            self._channel.write(piece)
            small = []
        self._channel.write(b"".join(small))
        out.left -= octets
        if out.halfway is not None and 2 * out.left <= out.octets:
            self._sign_of_life(FrameType.PING, out.halfway)
            out.halfway = None
        if end:
            self._body_done(out)

    def _body_done(self, out: _Outgoing) -> None:
        self._bodies.popleft()
        if out.sent is not None:
            out.sent()

    def _count_budget(self, now: float) -> None:
        # SP-6-10: nobody updates keys for us, so a link retires before AES-GCM's limit.
        if (
            self._channel.records_out >= self._timing.record_budget
            or self._channel.bytes_out >= self._timing.byte_budget
        ):
            self._rotation("the key's budget is spent", now)
        elif self._next_stream >= constants.STREAM_BUDGET:
            self._rotation("its stream ids are running out", now)

    def _rotation(self, cause: str, now: float) -> None:
        # SP-6-10: a peer that never replaces the link does not keep it.
        self._retired_at, self._worn_at = min(self._retired_at, now + constants.ROTATION_GRACE), math.inf
        if not self._rotation_told:
            self._rotation_told = True
            self._events.append(RotationDue(cause))

    # --- ending -----------------------------------------------------------------------------------------

    def _fail(self, error: LocalError, now: float) -> None:
        """Send the error if the link still can, then close. What is in `drain` (an alert) is still sent."""
        if self._channel.secure and self.conversation.states[self.side] is not State.ERROR:
            self._control.clear()
            self._bodies.clear()
            head, _ = messages.encode(Error(error.code, error.reason[:500]))
            try:
                self.conversation.say(self.side, Error.name)
                frame = framing.encode_header(FrameType.HEAD, self._new_stream(), len(head), end=True)
                self._channel.write(frame + head)
                self._channel.close()
            except LocalError:
                # TLS itself is broken: its alert is all that can be said.
                self._close(error)
                return
        self._close(error)

    def _close(self, error: SplitprotoError | None) -> None:
        self._streams.clear()
        self._control.clear()
        self._bodies.clear()
        if error is None:
            self._channel.close()
        self.closed = True
        self._events.append(Closed(None if error is None else error.again()))
