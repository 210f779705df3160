"""One link of a site, from the job offer to its end: messages sent and received, one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar, overload

from splitpeer.errors import JobFailed
from splitpeer.federation.seating import Part
from splitproto import Session, SplitprotoError
from splitproto.causes import CONSENT
from splitproto.clock import overslept
from splitproto.errors import DeadlineExceeded, LinkLost, UnexpectedMessage, printable
from splitproto.messages import Bye, Cancel, JobDecline, Message, Revoked, Segment

Heard = TypeVar("Heard", bound=Message)
Other = TypeVar("Other", bound=Message)


Unsolicited = Callable[[Message], Awaitable[None]]
"""Takes a message that answers nothing; raises nothing."""
LISTEN_S = 3600.0
"""Between two messages; then it listens again."""
MOST_REVOKED = 1 << 16
"""Patients of whom a site may say on one link that they withdrew consent: they are kept in memory."""


class LinkListener:
    """Reads a link also while nothing is waited for: what a site asks goes to `unsolicited`, all else waits for
    `receive`, one message at a time.

    Args:
        session: that nobody else reads from now on.
        unsolicited: see there; the next message is read when it is done.
    """

    def __init__(self, session: Session, unsolicited: Unsolicited) -> None:
        self._session, self._unsolicited = session, unsolicited
        self._heard: Message | None = None
        self._arrived, self._taken = asyncio.Event(), asyncio.Event()
        self._listening = asyncio.create_task(self._listen())

    async def receive(self, timeout: float, what: str) -> Message:
        """As `Session.receive`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while self._heard is None:
            if self._listening.done():
                return await self._session.receive(timeout, what)
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._arrived.wait()
            except TimeoutError:
                if overslept(deadline):
                    deadline = loop.time() + timeout
                elif self._heard is None:
                    raise DeadlineExceeded(f"waited {timeout:g} s for {what}") from None
        message, self._heard = self._heard, None
        self._taken.set()
        return message

    async def _listen(self) -> None:
        try:
            while True:
                try:
                    message = await self._session.receive(LISTEN_S)
                except DeadlineExceeded:
                    continue
                if isinstance(message, Segment | Cancel | Revoked):
                    await self._unsolicited(message)
                    continue
                self._taken.clear()
                self._heard = message
                self._arrived.set()
                await self._until_taken()
        except SplitprotoError:
            pass  # `receive` tells of it
        finally:
            self._arrived.set()

    async def _until_taken(self) -> None:
        taken = asyncio.ensure_future(self._taken.wait())
        try:
            await asyncio.wait((taken, self._session.ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            taken.cancel()


class SiteLink:
    """A session with a site, and how far the conversation on it is.

    Args:
        site: its name.
        session: admitted.
        answer_s: how long an answer may take, in seconds.
        show_waiting: called with what is waited for, and for how many seconds at most.
    """

    def __init__(
        self, site: str, session: Session, answer_s: float, show_waiting: Callable[[str, float], None]
    ) -> None:
        self.site, self.session = site, session
        self.begun = False
        """`begin` was sent: the site works."""
        self.holder_known = False
        """It has shown the key of the site's holder (SP-11.14-6)."""
        self._answer_s, self._show_waiting = answer_s, show_waiting
        self.located = b""
        """The request for which the site was asked on this link where a patient is."""
        self.unanswered = 0
        """Questions whose answers are due, and would come in place of others'."""
        self._stream: object = None
        self._announced = 0  # batches of `_stream` that were sent
        self._listener: LinkListener | None = None
        self.unusable: dict[bytes, str] = {}
        """Patients whom the site cannot use, and why, as it said when it joined, and by `revoked` since."""

    @property
    def alive(self) -> bool:
        """Whether it can still carry messages."""
        return self.session.alive

    def listen(self, unsolicited: Unsolicited) -> None:
        """From now on the site may ask for something at any time."""

        async def heard(message: Message) -> None:
            if isinstance(message, Revoked):
                try:
                    self._revoke(message)
                except UnexpectedMessage as error:
                    self.session.fail(error)
            else:
                await unsolicited(message)

        self._listener = LinkListener(self.session, heard)

    def _revoke(self, told: Revoked) -> None:
        """SP-11.13-12: whoever works on the run finds it before the next step or request. Raises UnexpectedMessage."""
        if len(self.unusable) + len(told.patients) > MOST_REVOKED:
            raise UnexpectedMessage(f"{self.site} says of too many patients that they withdrew consent")
        self.unusable.update(dict.fromkeys(told.patients, CONSENT))

    async def send(self, message: Message, halfway: Callable[[], None] | None = None) -> None:
        """Queue a message; raises SplitprotoError if the site does not take it in time, or the link is over.

        `halfway`: as of `Session.send`.
        """
        await self.session.send(message, self._answer_s, halfway)

    async def announce(self, stream: Sequence[Part], index: int, until: int) -> None:
        """Send the batches from `stream[index]` up to, not including, `until` that were not sent on this link yet."""
        if self._stream is not stream:
            self._stream, self._announced = stream, index
        self._announced = max(self._announced, index)
        while self._announced < min(until, len(stream)):
            await self.send(stream[self._announced].forward)
            self._announced += 1
            self.unanswered += 1

    def void_announced(self) -> None:
        """What was announced does not count any more: the next `announce` begins at its index."""
        self._stream = None
        self.unanswered = 0

    @overload
    async def hear(self, what: str, kind: type[Heard], /) -> Heard: ...

    @overload
    async def hear(self, what: str, kind: type[Heard], other: type[Other], /) -> Heard | Other: ...

    @overload
    async def hear(self, what: str, /, *kinds: type[Message]) -> Message: ...

    async def hear(self, what: str, /, *kinds: type[Message]) -> Message:
        """The next message, which is one of `kinds` (SP-11-19).

        Args:
            what: is waited for, in words.

        Raises:
            JobFailed: the site declines the job.
            DeadlineExceeded: nothing came in time; the link lives on.
            SplitprotoError: another message came, the site says bye, or the link is over.
        """
        self._show_waiting(what, self._answer_s)
        source = self._listener or self.session
        while isinstance(
            message := await source.receive(self._answer_s, f"{what} from {self.site}"), Revoked
        ):
            self._revoke(message)
        if isinstance(message, JobDecline):
            await self.session.close("failed", "the job was declined")
            raise JobFailed(f"site {self.site} declined the job: {printable(message.reason)}")
        if isinstance(message, Bye):
            await self.session.close(message.reason)
            raise LinkLost(f"{self.site} said bye ({message.reason}: {printable(message.text)})")
        if not isinstance(message, kinds):
            raise UnexpectedMessage(f"{message.name} where {what} was due")
        return message

    async def rotate_if_due(self) -> bool:
        """SP-6-10: end a link whose key is worn; the site dials again at once. Returns whether it was ended."""
        # Each link is asked something, or links that wear out while a site joins would carry nothing, for ever.
        if not (self.begun and self.session.rotation_due):
            return False
        await self.session.close("rotate", self.session.rotation_cause)
        return True
