"""Asking a site: on its present link, and again on the next one when that breaks, until patience ends.

What a failure means for the run is decided here and nowhere else: a broken link is mended by the next, a question that
takes too long or whose links keep breaking ends in `DeadlinePassed`, everything else in `JobFailed`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

from splitpeer.coordinator.presence import Presence
from splitpeer.coordinator.site_link import SiteLink
from splitpeer.errors import DeadlinePassed
from splitproto import SplitprotoError
from splitproto.clock import overslept
from splitproto.errors import DeadlineExceeded, LocalError

Answer = TypeVar("Answer")
Given = ParamSpec("Given")


@dataclass(frozen=True, slots=True)
class Question:
    """What a site is asked."""

    what: str
    """What is waited for, in words, for logs and errors."""
    computed: int = 0
    """It needs that the site remembers the activations of this step; 0: it needs no such thing."""
    even_restarted: bool = False
    """Whether a site that has lost its memory may be asked."""


class Asking:
    """Puts questions to one site.

    Args:
        presence: of the site.
        ready: waits until a question can be asked at all, whatever the link; not in the time of the question.
        prepare: brings a link to where a question can be asked on it.
        patience_s: how long a site may be away, in seconds.
        answer_s: how long one answer may take, in seconds.
    """

    def __init__(
        self,
        presence: Presence,
        ready: Callable[[SiteLink], Awaitable[None]],
        prepare: Callable[[SiteLink, Question], Awaitable[None]],
        patience_s: float,
        answer_s: float,
    ) -> None:
        self._presence, self._ready, self._prepare = presence, ready, prepare
        self._patience_s, self._answer_s = patience_s, answer_s

    async def ask(
        self,
        question: Question,
        verb: Callable[Concatenate[SiteLink, Given], Awaitable[Answer]],
        *args: Given.args,
        **kwargs: Given.kwargs,
    ) -> Answer:
        """`verb(link, *args, **kwargs)` on the present link of the site; when that breaks, on the next one.

        Raises:
            SiteRestarted: the site came back without its memory.
            DeadlinePassed: it did not answer, or not come back, in time.
            JobFailed: it broke the protocol, or failed for good.
        """
        loop = asyncio.get_running_loop()
        # One patience for the whole question: a link that comes up only to die again is not progress.
        patience = loop.time() + self._patience_s + self._answer_s
        try:
            while True:
                link = await self._presence.wait_link_unless_absent(question.what)
                if await link.rotate_if_due():
                    continue
                began = loop.time()
                await self._ready(link)
                patience += loop.time() - began
                # Each message has its deadline; this one is for all of them together.
                together = loop.time() + 2 * self._answer_s
                try:
                    async with asyncio.timeout_at(together):
                        await self._prepare(link, question)
                        return await verb(link, *args, **kwargs)
                except TimeoutError:
                    self._excuse(link, question, together)
                    patience += loop.time() - together
                except DeadlineExceeded as error:
                    link.session.fail(error)
                    raise DeadlinePassed(f"site {self._presence.name}: {error.reason}") from None
                except SplitprotoError as error:
                    self._mend(link, question, error, out_of_patience=loop.time() > patience)
        finally:
            self._presence.stop_waiting()

    def _excuse(self, link: SiteLink, question: Question, together: float) -> None:
        """A question that took too long ends its link; where this process was stopped, the next link is tried.

        Raises:
            DeadlinePassed: the site took too long.
        """
        link.session.fail(DeadlineExceeded(f"{question.what} took too long"))
        if not overslept(together):
            raise DeadlinePassed(f"site {self._presence.name}: {question.what} took too long") from None
        # On a new link both know where they are.
        self._presence.lose(link, "this process did not run for a while", waiting_for=question.what)

    def _mend(
        self, link: SiteLink, question: Question, error: SplitprotoError, *, out_of_patience: bool
    ) -> None:
        """A link broke: the next one may do.

        Raises:
            JobFailed: it will not.
            DeadlinePassed: too many have broken.
        """
        session, presence = link.session, self._presence
        if isinstance(error, LocalError) and session.alive:
            session.fail(error)
        if not error.retry:
            raise presence.fail(error) from error
        presence.lose(link, session.cause_of(error), waiting_for=question.what, patience_s=self._patience_s)
        if out_of_patience:
            raise DeadlinePassed(
                f"site {presence.name} ({presence.seat_names}): its links keep breaking ({error}); "
                f"waiting for: {question.what}"
            ) from error
