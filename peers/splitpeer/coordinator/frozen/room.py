"""How much of what sites released for requests is kept, and how long ([inference] max_kept_mib, keep_s).

What is cleared here may be released again, under its number and with the same octets (SP-11.17-5, SP-11.19-14): that
costs time, and nothing else. What goes for good, after consent was withdrawn, is not this module's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from splitpeer.coordinator.inference.locating import NoSegmentation
from splitpeer.coordinator.run import Run
from splitpeer.daemon import happenings as h
from splitpeer.errors import PeerError
from splitpeer.settings.job import Inference
from splitpeer.storage.bank import Bank, Contents
from splitpeer.storage.reading import size
from splitpeer.storage.request_banks import Cleared, RequestBanks

LOOK_S = 3600.0
"""Between two looks for what was kept long enough."""


class RequestRoom:
    """Of one run.

    Args:
        run: the run.
        banks: what is kept.
        report: told what was cleared.
    """

    def __init__(self, run: Run, banks: RequestBanks, report: h.Reporter) -> None:
        self._run, self._banks, self._report = run, banks, report
        self._settings = run.settings.inference or Inference()
        self._look_at = float("-inf")

    async def clear_old(self) -> None:
        """Now and then: patients about whom nobody has asked for long enough."""
        now = asyncio.get_running_loop().time()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            await self._clear(
                lambda: self._banks.clear(self._banks.unasked(self._oldest())), "nobody asks any more"
            )

    async def clear_after(self, patient: bytes, *, cancelled: bool) -> None:
        """A request about this patient is over."""
        if cancelled:
            await self._clear(lambda: self._banks.clear_unfinished(patient), "the request was cancelled")
        if self._settings.keep_s == 0:
            await self._clear(lambda: self._banks.clear([patient]), "the request is over")

    async def clear_all(self) -> None:
        """The service has ended."""
        await self._clear(lambda: self._banks.clear(self._banks.patients()), "the service has ended")

    async def make(self, patient: bytes, begun: Sequence[Bank], new: Sequence[Contents]) -> None:
        """Before anything of a patient is asked, or written.

        Args:
            begun: banks of the patient that are there.
            new: contents of those that are not.

        Raises:
            NoSegmentation: it is too much, whoever else is cleared.
            DiskTrouble, ConfigError: something cannot be removed.
        """
        most = self._settings.max_kept_mib << 20

        def made() -> tuple[int, Cleared | None]:
            octets = sum(bank.octets_missing() for bank in begun) + sum(contents.octets for contents in new)
            self._banks.note_asked(patient)
            return octets, self._banks.make_room(octets, most, patient) if octets else Cleared()

        octets, cleared = await self._run.on_disk(made, what="room for what is released of a patient")
        if cleared is None:
            raise NoSegmentation(
                "too-large",
                f"sites would release {size(octets)} of the patient, and the coordinator keeps at most {size(most)} "
                "for requests ([inference] max_kept_mib)",
            )
        self._tell(cleared, "room was needed")

    # --- inside ----------------------------------------------------------------------------------------------

    def _oldest(self) -> float:
        """Who was not asked about since is cleared; of `time.time`."""
        return time.time() - self._settings.keep_s

    async def _clear(self, clear: Callable[[], Cleared], why: str) -> None:
        """The service goes on where it fails, and the next look tries again."""
        try:
            self._tell(await self._run.on_disk(clear, what="releases to be removed"), why)
        except PeerError as error:
            self._report(h.DataWarning(str(error)))

    def _tell(self, cleared: Cleared, why: str) -> None:
        if cleared.patients:
            self._report(
                h.ReleasesCleared(self._run.files.run.hex(), sorted(cleared.patients), cleared.octets, why)
            )
