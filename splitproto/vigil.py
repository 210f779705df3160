"""Looks at the certificates of open links every half minute, and ends those that no longer hold (SP-6-12)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime

from cryptography import x509

from .errors import SplitprotoError
from .identity import Credentials, Identity
from .recheck import Made, Recheck
from .session import Session

log = logging.getLogger(__name__)


class Vigil:
    """Watches the links of one side until `close`.

    Args:
        credentials: this side's files.
        interval: seconds between two looks.
        told: called with (source, error) for each link that had to end.
    """

    def __init__(
        self, credentials: Credentials, interval: float, told: Callable[[str, SplitprotoError], None]
    ) -> None:
        self._recheck = Recheck(credentials)
        self._interval = interval
        self._told = told
        self._links: dict[Session, tuple[str, Made]] = {}
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(interval, self._look)

    def watch(self, session: Session, own: Identity, files: bytes, source: str) -> None:
        """Look at this established session from now on.

        Args:
            session: as soon as it is established.
            own, files: this side's identity and `files_digest`, from before its handshake.
            source: where the peer is, for `told`.
        """
        if session.alive:
            certificate = x509.load_der_x509_certificate(session.peer_certificate)
            self._links[session] = source, Made(own, files, session.peer, certificate, datetime.now(UTC))
            session.ended.add_done_callback(lambda _: self._links.pop(session, None))

    def close(self) -> None:
        """No more looks."""
        self._timer.cancel()
        self._links.clear()

    def _look(self) -> None:
        # First, so that a defect below does not end the vigil; the loop's exception handler reports it.
        self._timer = self._loop.call_later(self._interval, self._look)
        now = datetime.now(UTC)
        try:
            self._recheck.look(now)
        except Exception:
            # Links are still judged by what is known.
            log.exception("the certificate files could not be checked")
        ended = []
        for session, (source, made) in list(self._links.items()):
            if (error := self._recheck.must_end(made, now)) is not None:
                session.fail(error)
                ended.append((source, error))
            elif cause := self._recheck.should_rotate(made, now, self._interval):
                session.rotate(cause)
        for source, error in ended:
            self._told(source, error)
