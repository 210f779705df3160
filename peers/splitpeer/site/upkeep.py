"""What a site's daemon looks after whatever its coordinator asks: keys whose time is over, and the list of those who
have withdrawn consent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from splitpeer.daemon import happenings as h
from splitpeer.errors import DeadlinePassed, PeerError
from splitpeer.federation.compute import Compute
from splitpeer.settings.peer import PeerConfig
from splitpeer.site.job import SiteJob
from splitpeer.site.mask_keys import forget_keys
from splitproto import Session, SplitprotoError
from splitproto.errors import DeadlineExceeded
from splitproto.messages import Revoked

KEYS_S = 3600.0
"""Between two looks at the age of keys (SP-11.18-19)."""
READ_S = 600.0
CONSENT_S = 5.0
"""Between two looks at the list of withdrawn patients while connected (SP-11.13-12)."""
MOST_AT_ONCE = 1024
"""Patients in one `revoked`."""


class Upkeep:
    """Of one daemon.

    Args:
        config: its `peer.toml`.
        compute: the thread in which a job's state may be changed.
        job: the present one, if any.
        report: told what was done.
    """

    def __init__(
        self, config: PeerConfig, compute: Compute, job: Callable[[], SiteJob | None], report: h.Reporter
    ) -> None:
        self._config, self._compute, self._job, self._report = config, compute, job, report

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self.look_at_keys()
            await asyncio.sleep(KEYS_S)

    async def watch_consent(
        self, session: Session, job: SiteJob, said: Callable[[Sequence[bytes]], None]
    ) -> None:
        """Tell the coordinator at once of consent that is withdrawn; until it is cancelled, or the link is over.

        A list that cannot be read is reported here once; the next batch, request or link then stops the site. If a look
        takes too long, the next one finds the same patients again.

        Args:
            said: told whom the coordinator is told of.
        """
        trouble = ""
        while True:
            try:
                gone = await self._compute.run(job.newly_revoked, what="the list of consent", timeout=READ_S)
                for first in range(0, len(gone), MOST_AT_ONCE):
                    some = gone[first : first + MOST_AT_ONCE]
                    with suppress(DeadlineExceeded):
                        # What is not taken in time stays queued: sent again, it would be said twice.
                        await session.send(Revoked(tuple(some)), job.job.seconds_per_step)
                    job.note_revoked(some)
                    said(some)
            except SplitprotoError:
                return  # on the next link, the site says so when it joins
            except PeerError as error:
                if str(error) != trouble:
                    trouble = str(error)
                    self._report(h.DataWarning(trouble))
            await asyncio.sleep(CONSENT_S)

    async def look_at_keys(self) -> None:
        """Keys that were used for as long as the policy allows go. What cannot be removed is reported."""
        try:
            await self._compute.run(self._expire, what="the age of keys", timeout=READ_S)
        except DeadlinePassed:
            return  # whatever hangs is reported where it hangs

    def _expire(self) -> None:
        policy, job = self._config.policy, self._job()
        if policy is None:
            return
        try:
            if job is not None and job.summing is not None:
                job.summing.keys.expire()
        except PeerError as error:
            self._report(h.DataWarning(str(error)))
        try:
            forget_keys(self._config.peer.state, policy.max_key_days, self._report)
        except OSError as error:
            self._report(h.DataWarning(f"the age of keys could not be looked at ({error.strerror})"))
