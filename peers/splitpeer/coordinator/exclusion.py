"""Patients whose files cannot be used: the run continues without them, and every site that has them learns it
(SP-11.13)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from splitpeer.coordinator.remote_site import RemoteSite, Sent, Unable
from splitpeer.coordinator.run import Run
from splitpeer.coordinator.withdrawals import Withdrawals
from splitpeer.daemon import happenings as h
from splitpeer.errors import DataError, PatientUnusable
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.evaluation import remove_masks
from splitpeer.federation.files import note
from splitpeer.logs import handle
from splitproto.causes import CONSENT, OF_A_PATIENT
from splitproto.messages import Withdraw, Withdrawn
from splitproto.records import Unusable

UnusableBySite = Mapping[RemoteSite | None, Sequence[Unusable]]
"""Patients that cannot be used, by whose files they are: a site's, or (None) the coordinator's own masks."""


class Exclusion:
    """Leaves patients out of a run.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._withdrawals = Withdrawals(run.files.record, run.settings.data)
        self._bad_masks: dict[bytes, str] = {}
        self._last_unusable = ""

    @property
    def keys(self) -> frozenset[bytes]:
        """Keys of the withdrawn patients."""
        return self._withdrawals.keys

    @property
    def withdrawn_by_sites(self) -> frozenset[bytes]:
        """Those of them whom a site has withdrawn."""
        return frozenset(one.key for one in self._withdrawals.all if one.site)

    @property
    def patients(self) -> int:
        """How many patients are in use."""
        return self._run.result.patients - len(self.keys)

    def own(self, error: PatientUnusable) -> UnusableBySite:
        """SP-11.13-11: a mask of the coordinator's own; only its own log names the file."""
        self._last_unusable = str(error)
        note(error, self._bad_masks, self._run.report)
        return {None: (Unusable(error.key, error.cause),)}

    async def withdraw(self, unusable: UnusableBySite, stream: TrainingStream) -> None:
        """SP-11.13-4: continue without these from the next step on; announced batches are void.

        Raises:
            JobFailed: too many from one site, or too few are left.
            DataError: too many masks of the coordinator's own.
        """
        run = self._run
        await self._withdrawn(unusable)
        self.note(stream, more=True)
        await run.on_disk(self._remove_predictions, what="masks to be removed")
        await run.team.ask_all(lambda site: site.advance(run.committed))
        await self._tell()

    async def _withdrawn(self, unusable: UnusableBySite) -> None:
        """Durable in the record, and reported. Raises as `withdraw`."""
        run = self._run
        for site, patients in unusable.items():
            name = "" if site is None else site.name
            if beyond := self._withdrawals.beyond(name, patients):
                if site is None:
                    raise DataError(
                        f"{beyond}; the last was {self._last_unusable}", patients[0].cause, beyond
                    )
                run.team.leave_out(site, beyond)
                continue
            await self._accepted(name, patients)

    async def _accepted(self, name: str, patients: Sequence[Unusable]) -> None:
        """Durable in the record, and reported; whatever the limit of the site `name` is."""
        run, step = self._run, self._run.committed + 1
        await self._noted(self._withdrawals.add, step, name, patients)
        for patient in patients:
            cause = OF_A_PATIENT[patient.cause]
            run.report(h.PatientWithdrawn(run.files.run.hex(), name, handle(patient.key), step, cause))

    async def _done_without(self, stream: TrainingStream | None) -> None:
        """What follows a withdrawal wherever activations come from. Raises JobFailed: too few are left."""
        self.note(stream, more=True)
        await self._run.on_disk(self._remove_predictions, what="masks to be removed")
        await self._tell()

    def revoked(self) -> UnusableBySite:
        """Patients of the run who have withdrawn consent, as sites have listed them or said since (SP-11.13-12), and
        who are in it still."""
        found = dict[RemoteSite | None, Sequence[Unusable]]()
        for site in self._run.team.present:
            gone = [key for key, cause in site.unusable.items() if cause == CONSENT and key not in self.keys]
            if own := sorted(set(gone).intersection(self._run.patients_of(site))):
                found[site] = tuple(Unusable(key, CONSENT) for key in own)
        return found

    def note(self, stream: TrainingStream | None, *, more: bool = False) -> None:
        """Whatever follows is made without those that are out. Raises JobFailed where too few are left."""
        run = self._run
        if not self.keys:
            return
        self._withdrawals.check()
        if stream is not None:
            stream.withdraw(self.keys)
        run.result.withdrawn = self._withdrawals.shown()
        run.report(h.WithdrawnInAll(run.committed, len(self.keys), more))
        for site in run.team.sites:
            site.set_withdrawn(self._messages(site), run.committed, self.patients)

    async def since_complete(self, site: str, keys: Collection[bytes]) -> None:
        """Patients of the run have withdrawn consent since it is complete, at `site` or (empty) here: predictions of
        theirs go, and the site of the labels is told; the result stays.

        Raises:
            DiskTrouble, ConfigError: something cannot be removed or recorded.
        """
        run = self._run
        known = {one.key for one in self._withdrawals.all if one.site == site}
        if new := sorted(run.seating.filled.keys() & set(keys) - known):
            await self._accepted(site, tuple(Unusable(key, CONSENT) for key in new))
        # Also of those who were known: a process may have ended in between.
        await run.on_disk(self._remove_predictions, what="masks to be removed")
        step = 0 if run.job.frozen else run.committed
        for one in run.team.sites:
            one.set_withdrawn(self._messages(one), step, self.patients)
        await self._tell()

    async def undo(self, step: int, stream: TrainingStream) -> None:
        """SP-11.13-6: all rolled back to `step`; repeated steps are made without the withdrawn patients."""
        await self._noted(self._withdrawals.undone, step)
        self.note(stream)
        await self._tell()

    async def _tell(self) -> None:
        """SP-11.13-8: each site of its own patients only."""
        run = self._run
        for site, messages in {site: self._messages(site) for site in run.team.present}.items():
            for message in messages:
                await site.tell(message)

    def _messages(self, site: RemoteSite) -> list[Withdrawn]:
        return self._withdrawals.messages(self._run.patients_of(site))

    def _remove_predictions(self) -> None:
        """Predictions of an earlier evaluation, which no longer have a score."""
        run = self._run
        if run.label_site is not None:
            return  # they are there
        if gone := remove_masks(run.files.predictions, self.keys, run.masks):
            run.report(h.PredictionsRemoved(run.files.run.hex(), gone))

    async def _noted(self, function: Any, *args: Any) -> None:
        await self._run.on_disk(function, *args, what="a withdrawal to be recorded")


def told_apart(
    answers: Mapping[RemoteSite, Sent | Withdraw | Unable],
) -> tuple[dict[RemoteSite, Sent], UnusableBySite]:
    """What sites sent, and what they cannot send."""
    unusable: dict[RemoteSite | None, Sequence[Unusable]] = {
        site: answer.patients for site, answer in answers.items() if isinstance(answer, Withdraw)
    }
    sent = {site: answer for site, answer in answers.items() if isinstance(answer, Sent)}
    return sent, unusable
