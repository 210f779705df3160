"""One link of a site, from the job offer to its end: messages sent and received, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

from splitpeer.errors import JobFailed
from splitpeer.federation.seating import Part
from splitproto import Session
from splitproto.errors import LinkLost, UnexpectedMessage, printable
from splitproto.messages import Bye, JobDecline, Message

Heard = TypeVar("Heard", bound=Message)
Other = TypeVar("Other", bound=Message)


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
        self._stream: object = None
        self._announced = 0  # batches of `_stream` that were sent

    @property
    def alive(self) -> bool:
        """Whether it can still carry messages."""
        return self.session.alive

    async def send(self, message: Message) -> None:
        """Queue a message; raises SplitprotoError if the site does not take it in time, or the link is over."""
        await self.session.send(message, self._answer_s)

    async def announce(self, stream: Sequence[Part], index: int, until: int) -> None:
        """Send the batches from `stream[index]` up to, not including, `until` that were not sent on this link yet."""
        if self._stream is not stream:
            self._stream, self._announced = stream, index
        self._announced = max(self._announced, index)
        while self._announced < min(until, len(stream)):
            await self.send(stream[self._announced].forward)
            self._announced += 1

    def void_announced(self) -> None:
        """What was announced does not count any more: the next `announce` begins at its index."""
        self._stream = None

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
        message = await self.session.receive(self._answer_s, f"{what} from {self.site}")
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
