"""Asking a daemon on this machine for segmentations: a few patients at a time, and what becomes of each."""

from __future__ import annotations

import getpass
import os
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

from splitpeer.daemon.lock import holder
from splitpeer.daemon.spool import Spool, folder_of
from splitpeer.daemon.spooled import SpoolRequest, SpoolResult, Status, now
from splitpeer.errors import ConnectionRefused, DataError, DeadlinePassed, JobFailed, PeerError

AT_ONCE = 4
"""Requests handed in at once: the next one is there when one is answered, and other users are not kept waiting."""
LOOK_S = 0.05
ALIVE_S = 1.0
"""Between two looks whether the daemon is there."""
TAKEN_S = 15.0
"""A daemon that takes requests has said so after this time."""
RETURN_S = 60.0
"""How long a daemon that went away may take to come back: a service manager starts it again."""
LATE_S = 5.0
"""So long after its deadline a request is given up even where the daemon has not said so."""
WITHDRAW_S = 2.0
"""How long a daemon may take to stop what was withdrawn; it does so later otherwise."""


@dataclass(frozen=True)
class AnswerTold:
    """What there is to tell of one patient."""

    patient: str
    status: Status
    result: SpoolResult | None = None
    """Of a request that is done."""
    error: PeerError | None = None
    """Why there will be none."""

    @property
    def over(self) -> bool:
        """Nothing follows for this patient."""
        return self.result is not None or self.error is not None


@dataclass
class _Open:
    name: str
    patient: str
    until: float
    since: float
    told: Status = field(default_factory=lambda: Status(state="waiting"))


class SpoolAsker:
    """Asks for some patients.

    Args:
        state: `[peer] state` of the daemon.
        require: least number of seats, or all; None: as many as there are.
        wait: seconds that one patient may take, from when it is handed in.
    """

    def __init__(self, state: Path, *, require: Literal["all"] | int | None = None, wait: float) -> None:
        self._state, self._require, self._wait = state, require, wait
        self._spool = Spool(folder_of(state))
        self._open: list[_Open] = []
        self._looked = self._gone = 0.0

    def check(self) -> None:
        """Whether there is a daemon. Raises ConnectionRefused: none runs."""
        if holder(self._state) is None:
            raise ConnectionRefused(
                f"no daemon runs on {self._state}: start it (splitpeer serve), then ask again"
            )

    def ask(self, patients: Sequence[str]) -> Generator[AnswerTold]:
        """What is new of any of them, until all are over. To be closed: what is open then is withdrawn.

        A result is kept until the next one is asked for, so that it can be written first.

        Raises:
            ConnectionRefused: no daemon runs, or it went away and did not come back.
            ConfigError, DeadlinePassed, DiskTrouble: the requests cannot be handed in.
        """
        self.check()
        left = deque(patients)
        try:
            while left or self._open:
                while left and len(self._open) < AT_ONCE:
                    self._hand_in(left.popleft())
                heard = False
                for one in list(self._open):
                    if (told := self._look(one)) is None:
                        continue
                    heard = True
                    yield told
                    if told.over:
                        self._open.remove(one)
                        self._spool.forget(one.name)
                self._check_alive()
                if not heard:
                    time.sleep(LOOK_S)
        finally:
            self._withdraw()

    def _hand_in(self, patient: str) -> None:
        moment = now()
        request = SpoolRequest(
            patient=patient,
            # A mask that is interpolated onto another grid loses what the probabilities still say of its outline.
            want="probabilities",
            require=self._require,
            created=moment,
            until=moment + timedelta(seconds=self._wait),
            asker=_user(),
        )
        name, began = self._spool.ask(request), time.monotonic()
        self._open.append(_Open(name, patient, began + self._wait, began))

    def _look(self, one: _Open) -> AnswerTold | None:
        try:
            status = self._spool.status(one.name)
            if status.state == "done":
                return AnswerTold(one.patient, status, self._spool.result(one.name))
        except DataError as error:
            return AnswerTold(one.patient, Status.failed("internal", str(error)), error=error)
        if status.state == "failed":
            return AnswerTold(one.patient, status, error=status.error())
        if status.state == "cancelled":
            return AnswerTold(one.patient, status, error=JobFailed("it was cancelled"))
        moment = time.monotonic()
        if moment > one.until + LATE_S:
            waited = f"no answer within {self._wait:g} s"
            if status.reason:
                waited += f" ({status.reason})"
            return AnswerTold(
                one.patient, status, error=DeadlinePassed(f"{waited}: ask again, with a longer --wait")
            )
        # No file: nobody has said anything about it.
        if status.written is None and not self._gone and moment > one.since + TAKEN_S:
            silent = JobFailed(
                "the daemon takes no requests for segmentations: see splitpeer status, and its log"
            )
            return AnswerTold(one.patient, status, error=silent)
        if status == one.told:
            return None
        one.told = status
        return AnswerTold(one.patient, status)

    def _check_alive(self) -> None:
        """A daemon that is started again takes up what it finds. Raises ConnectionRefused: it is gone for good."""
        moment = time.monotonic()
        if moment < self._looked + ALIVE_S:
            return
        self._looked = moment
        if holder(self._state) is not None:
            if self._gone:
                self._gone = 0.0
                for one in self._open:
                    one.since = moment
        elif not self._gone:
            self._gone = moment
        elif moment > self._gone + RETURN_S:
            raise ConnectionRefused(
                f"the daemon stopped and is not back after {RETURN_S:g} s: start it (splitpeer serve), then ask again"
            )

    def _withdraw(self) -> None:
        """Nobody waits for the rest any more."""
        left = [one.name for one in self._open]
        for name in left:
            with suppress(PeerError):
                self._spool.cancel(name)
        until = time.monotonic() + WITHDRAW_S
        while left and time.monotonic() < until and not self._gone:
            left = [name for name in left if not self._is_over(name)]
            time.sleep(LOOK_S)
        for one in self._open:
            self._spool.forget(one.name)
        self._open.clear()

    def _is_over(self, name: str) -> bool:
        try:
            return self._spool.status(name).final
        except DataError:
            return True


def _user() -> str:
    try:
        return getpass.getuser()[:64] or str(os.geteuid())
    except (KeyError, OSError):
        return str(os.geteuid())
