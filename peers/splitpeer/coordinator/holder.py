"""One holder of a site (SP-11.14): the key that a site keeps with a run, and what happens to a second link.

A certificate proves that a link speaks for a site. Two processes may hold it: the daemon started twice, or a thief with
a copy. The first to join a run binds the site's place in it to a key of its own; nobody else takes over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.log import LogSink
from splitproto import Session, holder
from splitproto.constants import HEARTBEAT_INTERVAL
from splitproto.errors import SecondHolder, Superseded
from splitproto.messages import JobAccept, JobOffer

CHALLENGE_BYTES = 32
ANSWER_S = HEARTBEAT_INTERVAL
"""How long a link that is to be replaced may take to answer a PING."""
JOINING = 4
"""Links of one site that may be joining at once: beyond that the oldest is ended."""

log = logging.getLogger(__name__)


class Holding:
    """A site's part in the run, as the coordinator keeps it.

    Args:
        site: its name.
        report: called with second links.
    """

    def __init__(self, site: str, report: h.Reporter) -> None:
        self.site, self._report = site, report.to(LogSink(log))
        self.holder: bytes | None = None
        """Public key of the holder; None: no holder yet. Empty: a holder that showed no key."""
        self._bind: Callable[[str, bytes], None] = lambda site, key: None

    def restore(self, holder_key: bytes | None, bind: Callable[[str, bytes], None]) -> None:
        """The holder before this process started; `bind` is called with later ones."""
        self.holder, self._bind = holder_key, bind

    def examine(self, offer: JobOffer, accept: JobAccept, link: Session) -> None:
        """SP-11.14-3: whether `link` may take the place.

        Raises:
            SecondHolder: another holder has it.
        """
        shown = accept.holder or b""
        if shown or accept.proof is not None:
            holder.check(shown, accept.proof or b"", offer.run, offer.challenge or b"", link.binding)
        self._admit(shown)

    def _admit(self, shown: bytes) -> None:
        if self.holder is not None and shown != self.holder:
            raise SecondHolder(
                f"another holder of the certificate of {self.site} takes part in this run: look for a second daemon or "
                "a copied key; a site that lost its state folder is readmitted by the coordinator (serve --readmit)"
            )

    async def take(self, link: Session, holder_key: bytes, present: Callable[[], Session | None]) -> None:
        """SP-11.14-4: bind the part to `link`, and end the link that had it unless that one answers.

        Raises:
            Superseded: the present link answers.
            SecondHolder: another holder took it since `examine`.
        """
        while (older := present()) is not None and older.alive:
            if await older.answers(ANSWER_S):
                raise Superseded(f"another link of {self.site} is alive; dial again when it has ended")
            if present() is older:
                self._tell("superseded", link, older, "the older link no longer answered")
                older.fail(Superseded(f"{self.site} opened a newer link"))
                break
        self._admit(holder_key)
        self.holder = holder_key
        self._bind(self.site, holder_key)

    def note_second(self, link: Session, other: Session | None, cause: str) -> None:
        """`link` shows the certificate of this site and may not take its place; `other` has it, if any."""
        self._tell("second_holder", link, other, cause)

    def _tell(
        self,
        outcome: Literal["second_holder", "superseded"],
        link: Session,
        other: Session | None,
        cause: str,
    ) -> None:
        other_address, other_serial = (None, None) if other is None else (other.address, other.peer.serial)
        self._report(
            h.SecondLink(
                self.site, outcome, cause, link.address, link.peer.serial, other_address, other_serial
            )
        )
