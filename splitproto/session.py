"""A link as asyncio sees it: `send` and `receive` messages; timers, credit and the writer run by themselves.

`Session` drives one `Connection` over a `Carrier`. It is made by `dialling` or by the `door`; lanes own the sockets.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Literal, Protocol

from .clock import overslept
from .connection import Connection
from .cost import LinkCost
from .errors import (
    DeadlineExceeded,
    Draining,
    FlowControlError,
    InternalError,
    LinkLost,
    LocalError,
    SplitprotoError,
    printable,
)
from .events import Closed, Established, Received, RotationDue
from .identity import Identity
from .messages import Bye, Message
from .negotiation import Agreement

_FIRST_PAUSE, _LONGEST_PAUSE, _LONGER = 0.0005, 0.02, 1.25
"""Seconds between two attempts at a full queue: short for one that moves, longer for a peer that has stopped."""
_LINGER, _LAST_WORDS = 1.0, 0.05
_EXCUSE_S = 5.0
"""A link that ends so soon after this process was stopped ended because of that."""
SEND_TIMEOUT = 120.0
"""Seconds that a peer may leave a message untaken, unless the caller says otherwise."""
HALVES = 16
"""Messages of which the peer has not said yet that it has half; of older ones nobody is told."""
UNREAD = 8 << 20
"""Octets of heads, which need no credit, that may wait while the application takes no message."""

Tap = Callable[[Literal["in", "out"], Message], None]
"""Called with every message of the application; must be quick and must not change it."""


class Carrier(Protocol):
    """What a session needs from below."""

    def try_send(self, data: bytes) -> bool:
        """Hand over one envelope; False when the queue is full now. Raises `LinkLost` if the peer is gone."""
        ...

    def close(self) -> None:
        """The session is over."""
        ...


class Session:
    """One admitted peer.

    All methods belong to one event loop. Any method that waits takes its deadline; when the link has ended,
    they raise the reason: a `LocalError`, or a `RemoteError` with what the peer said.
    """

    address = ""
    """Where the peer was dialled, or dialled from, for logs."""

    def __init__(self, connection: Connection, carrier: Carrier) -> None:
        self._connection = connection
        self._carrier = carrier
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[Received] = deque()
        self._unread = 0  # octets of heads in the inbox
        self._arrived = asyncio.Event()
        self._wake = asyncio.Event()
        self._established: asyncio.Future[Established] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf  # when it is to fire
        self._woke = -math.inf  # when this process ran again after it had been stopped
        self._gone = False
        self._unsent: set[asyncio.Future[None]] = set()
        self.ended: asyncio.Future[SplitprotoError | None] = self._loop.create_future()
        """Done when the link is over: the error, or None after two byes."""
        self.rotation_due = False
        """End with `close("rotate")` at the next good moment; the dialler dials again: see `rotate`."""
        self.rotation_cause = ""
        """Why, for people."""
        self.farewell: Bye | None = None
        """The peer's bye, as soon as it arrived: also one that crossed ours, which nobody receives any more."""
        self.slept = 0.0
        """Seconds for which this process did not run (stopped, suspended) right before the link ended: then the silence
        was ours. Heartbeats make it precise to about five."""
        self.leaving: asyncio.Future[None] = self._loop.create_future()
        """Done when the peer has said bye, or the link is over."""
        self.tap: Tap | None = None
        """Told ("out", message) when a message is queued and ("in", message) when it is handed over: all that the
        application sends and receives, bye included; not hello, welcome, error, heartbeats."""
        self.bytes_in = 0
        self.bytes_out = 0
        self.cost = LinkCost()
        """Seconds that this link has cost."""
        self._questions = 0
        self._answered = asyncio.Event()
        self._halves: deque[tuple[int, Callable[[], None]]] = deque(maxlen=HALVES)
        self._writer = self._loop.create_task(self._write())
        self._after()

    # --- for the application ----------------------------------------------------------------------------

    @property
    def peer(self) -> Identity:
        """The peer's identity, from its certificate."""
        return self._established.result().peer

    @property
    def peer_certificate(self) -> bytes:
        """DER."""
        return self._connection.peer_certificate

    @property
    def agreement(self) -> Agreement:
        """What was negotiated."""
        return self._established.result().agreement

    @property
    def tls(self) -> str:
        """Version and suite, such as `TLSv1.3 TLS_AES_256_GCM_SHA384`."""
        return self._established.result().tls

    @property
    def binding(self) -> bytes:
        """Digest of both certificates (SP-6-8)."""
        return self._connection.binding

    @property
    def alive(self) -> bool:
        """Whether the link can still carry messages."""
        return not self.ended.done()

    async def answers(self, timeout: float) -> bool:
        """Whether the peer answers a PING sent now within `timeout` seconds. A dead connection may look alive."""
        number = self._question()
        self._connection.ping(self._loop.time(), number)
        self._after()
        try:
            async with asyncio.timeout(timeout):
                while self.alive and self._connection.answered < number:
                    self._answered.clear()
                    await self._answered.wait()
        except TimeoutError:
            return False
        return self.alive

    async def established(self) -> Session:
        """Wait for mutual admission (the connection's handshake deadline bounds this); raises why not."""
        await asyncio.wait((self._established, self.ended), return_when=asyncio.FIRST_COMPLETED)
        if not self._established.done():
            raise self._why()
        return self

    async def send(
        self, message: Message, timeout: float = SEND_TIMEOUT, halfway: Callable[[], None] | None = None
    ) -> None:
        """Queue `message`; one with tensors returns when its last octet is encrypted (credit permitting).

        Args:
            message: any message that the state tables allow now.
            timeout: seconds to wait for credit and carrier at most.
            halfway: called when the peer says that it has half of the tensors' octets, often after this has returned; a
                peer that says so early, late or never is believed. Never, if the link ends first.

        Raises:
            DeadlineExceeded: the peer took nothing in time; the message stays queued, so end the link.
            UnexpectedMessage, MessageTooLarge, CodecError, TensorError: see `Connection.send`.
            SplitprotoError: the link ended first.
        """
        if self.ended.done():
            raise self._why()
        done: asyncio.Future[None] = self._loop.create_future()
        began = self._loop.time()
        number = None if halfway is None else self._question()
        self._connection.send(
            message, sent=lambda: None if done.done() else done.set_result(None), halfway=number
        )
        if number is not None and halfway is not None:
            self._halves.append((number, halfway))
        self.cost.message += self._loop.time() - began
        self._tell("out", message)
        self._after()
        if done.done():
            return
        self._unsent.add(done)
        try:
            async with asyncio.timeout(timeout):
                await done
        except TimeoutError:
            raise DeadlineExceeded(f"waited {timeout:g} s for the peer to take a {message.name}") from None
        finally:
            self._unsent.discard(done)

    async def receive(self, timeout: float, what: str = "a message") -> Message:
        """The next message.

        Args:
            timeout: seconds to wait at most.
            what: named in the error when the time is over.

        Raises:
            DeadlineExceeded: nothing came; the link lives on.
            SplitprotoError: the link ended.
        """
        deadline = self._loop.time() + timeout
        while not self._inbox:
            if self.ended.done():
                raise self._why()
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._arrived.wait()
            except TimeoutError:
                if overslept(deadline):
                    deadline = self._loop.time() + timeout
                elif not self._inbox:
                    raise DeadlineExceeded(f"waited {timeout:g} s for {what}") from None
        received = self._inbox.popleft()
        self._unread -= received.head
        self._connection.release(received.octets)
        self._after()
        self._tell("in", received.message)
        return received.message

    async def close(
        self, reason: str, text: str = "", timeout: float = 5.0, *, run: bytes | None = None
    ) -> bool:
        """Say bye and wait until the peer has answered, at most `timeout` seconds; never raises.

        Args:
            run: of `Bye`.

        Returns:
            Whether the peer is known to have this bye. Not, where another one was said before: each side has one.
        """
        said = False
        if not self.ended.done():
            bye = Bye(reason, printable(text[:500]), run)
            try:
                self._connection.send(bye)
            except LocalError:
                # Bye is said already: only wait. Not admitted yet: there is nobody to say bye to.
                if self._connection.agreement is None:
                    self._connection.fail(Draining("closed before it was established"), self._loop.time())
            else:
                said = True
                self._tell("out", bye)
            self._after()
            await asyncio.wait((self.ended,), timeout=timeout)
        if not self.ended.done():
            self._connection.lost(LinkLost("the peer did not answer our bye"))
            self._after()
        await asyncio.wait((self._writer,), timeout=_LINGER)
        if not said or self.ended.result() is not None:
            return False
        # A bye that crossed ours proves nothing; a client repeats the reason that it received (SP-11-20).
        repeated = self.farewell is not None and self.farewell.reason == reason
        return repeated or self._connection.parted

    def fail(self, error: LocalError) -> None:
        """End the link because of `error`; the peer is told its code and reason."""
        self._connection.fail(error, self._loop.time())
        self._after()

    def cause_of(self, error: SplitprotoError) -> str:
        """Why the link was lost, for a log: a process that was stopped does not blame its peer."""
        return (
            f"this process did not run for about {self.slept:.0f} s ({error})" if self.slept else str(error)
        )

    def rotate(self, cause: str) -> None:
        """A new link should replace this one: its key is worn, or certificates have changed."""
        if not self.rotation_due:
            self.rotation_due, self.rotation_cause = True, printable(cause)

    # --- for the carrier --------------------------------------------------------------------------------

    def arrived(self, data: bytes | memoryview) -> None:
        """One envelope from the peer."""
        self.bytes_in += len(data)
        began = self._loop.time()
        self._connection.receive(data, began)
        self.cost.decrypt += self._loop.time() - began
        self._after()
        # SP-7-9: bodies wait for credit; heads do not, so a peer could fill our memory with them.
        if self._unread > UNREAD and self.alive:
            self.fail(FlowControlError(f"{self._unread >> 20} MiB of messages arrived and were not read"))

    def carrier_lost(self, error: SplitprotoError) -> None:
        """The connection below is gone."""
        self._gone = True
        self._connection.lost(error)
        self._after()

    def probe(self) -> None:
        """Something happened below: check now whether the peer is still there."""
        self._connection.ping(self._loop.time())
        self._after()

    # --- inside -----------------------------------------------------------------------------------------

    def _question(self) -> int:
        """Number of a PING whose answer is waited for: no heartbeat has such a one."""
        self._questions += 1
        return 1 << 63 | self._questions

    def _tell(self, direction: Literal["in", "out"], message: Message) -> None:
        if self.tap is None:
            return
        try:
            self.tap(direction, message)
        except Exception as error:
            # A tap that fails must not disturb the conversation; it is not called again.
            self.tap = None
            self._loop.call_exception_handler({"message": "a session's tap failed", "exception": error})

    def _why(self) -> SplitprotoError:
        error = self.ended.result()
        return LinkLost("the link is closed") if error is None else error.again()

    def _after(self) -> None:
        """After anything that may have moved the connection: take events, wake the writer, set the timer."""
        for event in self._connection.events():
            if isinstance(event, Received):
                if isinstance(event.message, Bye):
                    self.farewell = event.message
                    self._departs()
                self._inbox.append(event)
                self._unread += event.head
                self._arrived.set()
            elif isinstance(event, Established):
                self._established.set_result(event)
            elif isinstance(event, RotationDue):
                self.rotate(event.cause)
            elif isinstance(event, Closed):
                self._end(event.error)
        self._wake.set()
        self._answered.set()
        while self._halves and self._halves[0][0] <= self._connection.answered:
            self._halves.popleft()[1]()
        when = self._connection.next_timer()
        # A timer that fires too early is set again: cheaper than a new one for every envelope.
        if self._timer is not None and (when < self._due or when == math.inf):
            self._timer.cancel()
            self._timer = None
        if self._timer is None and when < math.inf:
            self._due = when
            self._timer = self._loop.call_at(when, self._on_timer)

    def _note_sleep(self) -> None:
        """A timer that is this late was not delayed by the peer."""
        if overslept(self._due):
            self._woke, self.slept = self._loop.time(), self._loop.time() - self._due

    def _on_timer(self) -> None:
        self._timer = None
        self._note_sleep()
        self._connection.handle_timer(self._loop.time())
        self._after()

    def _departs(self) -> None:
        if not self.leaving.done():
            self.leaving.set_result(None)

    def _end(self, error: SplitprotoError | None) -> None:
        if self.ended.done():
            return
        self._note_sleep()
        if self._loop.time() - self._woke > _EXCUSE_S:
            self.slept = 0.0
        self.ended.set_result(error)
        self._halves.clear()
        self._departs()
        self._arrived.set()
        for future in self._unsent:
            if not future.done():
                future.set_exception(self._why())

    async def _write(self) -> None:
        """Move envelopes from the connection to the carrier, one at a time, so that small ones overtake."""
        try:
            while True:
                began = self._loop.time()
                data = self._connection.next_envelope(began)
                self.cost.encrypt += self._loop.time() - began
                # Nobody else runs from here to the wait, so no wake-up is lost by clearing what `_after` sets.
                self._after()
                self._wake.clear()
                if data is None:
                    if self._connection.closed:
                        break
                    await self._wake.wait()
                    continue
                if not await self._hand_over(data):
                    break
                # Other sessions and the reader get their turn between two envelopes.
                await asyncio.sleep(0)
        except LinkLost as error:
            # What has already arrived (an error, a bye) explains the loss better than the loss itself.
            await asyncio.sleep(_LAST_WORDS)
            self.carrier_lost(error)
        except Exception as error:
            # A defect must end the link, not freeze it.
            self._connection.lost(InternalError("the writer failed", detail=repr(error)))
            self._after()
            raise
        finally:
            self._carrier.close()

    async def _hand_over(self, data: bytes) -> bool:
        """False when the link ended while its queue stayed full."""
        pause, ends, full_from = _FIRST_PAUSE, math.inf, self._loop.time()
        while not self._carrier.try_send(data):
            if self.ended.done():
                # The message that explains the end may still get through, unless the peer is gone.
                ends = min(ends, self._loop.time() + _LINGER)
                if self._gone or self._loop.time() >= ends:
                    return False
            await asyncio.sleep(pause)
            pause = min(_LONGER * pause, _LONGEST_PAUSE)
        if pause > _FIRST_PAUSE:
            self.cost.blocked += self._loop.time() - full_from
        self.bytes_out += len(data)
        return True
