"""Patients withdrawn from a run because a file of theirs cannot be used (SP-11.13): which, since when, how many."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from splitpeer.coordinator.record import RunRecord, Withdrawal
from splitpeer.errors import JobFailed
from splitpeer.federation.files import counted
from splitpeer.logs import handle
from splitpeer.settings.job import JobData
from splitproto.causes import SHOWN
from splitproto.errors import UnexpectedMessage
from splitproto.messages import Withdraw, Withdrawn
from splitproto.records import Sample, Unusable


class Withdrawals:
    """Those of one run, as its record has them.

    Args:
        record: of the run; every change is durable in it before it counts.
        settings: how many one party may withdraw, and how many patients the job needs.
    """

    def __init__(self, record: RunRecord, settings: JobData) -> None:
        self._record, self._settings = record, settings

    @property
    def all(self) -> tuple[Withdrawal, ...]:
        """Every one; a patient that two sites cannot use is there twice."""
        return self._record.withdrawn

    @property
    def keys(self) -> frozenset[bytes]:
        """Keys of the withdrawn patients."""
        return frozenset(withdrawal.key for withdrawal in self.all)

    def beyond(self, site: str, patients: Sequence[Unusable]) -> str:
        """SP-11.13-10: the problem if `site` ("": the coordinator) withdraws these as well; empty if there is none."""
        causes = {w.key: w.cause for w in self.all if w.site == site} | {p.key: p.cause for p in patients}
        # Nothing is wrong at a site that another run has asked first.
        causes = {key: cause for key, cause in causes.items() if cause != SHOWN}
        most = self._settings.most_withdrawn(len(self._record.patients))
        if len(causes) <= most:
            return ""
        who = f"site {site}" if site else "the coordinator"
        return (
            f"{who} cannot use the files of {counted(causes.values())} of the run's {len(self._record.patients)} "
            f"patients, and may withdraw {most} ([data] max_withdrawn)"
        )

    def add(self, step: int, site: str, patients: Iterable[Unusable]) -> None:
        """These are out from `step` on; durable when this returns."""
        known = {withdrawal.key for withdrawal in self.all if withdrawal.site == site}
        new = [Withdrawal(p.key, step, site, p.cause) for p in patients if p.key not in known]
        self._record.withdraw([*self.all, *new])

    def undone(self, step: int) -> None:
        """SP-11.13-6: all rolled back to `step`; repeated steps are made without the withdrawn patients."""
        earlier = tuple(replace(w, step=min(w.step, step + 1)) for w in self.all)
        if earlier != self.all:
            self._record.withdraw(earlier)

    def check(self) -> None:
        """Raises JobFailed where fewer patients are left than the job needs."""
        left, least = len(set(self._record.patients) - self.keys), self._settings.min_patients
        if left < least:
            raise JobFailed(
                f"{left} patients are left, {least} are needed ([data] min_patients): withdrawn were "
                f"{counted({w.key: w.cause for w in self.all}.values())}"
            )

    def shown(self) -> list[dict[str, str | int]]:
        """For `result.json`."""
        return [
            {"patient": handle(w.key), "step": w.step, "site": w.site, "cause": w.cause} for w in self.all
        ]

    def messages(self, of: Collection[bytes]) -> list[Withdrawn]:
        """SP-11.13-8: what a site is told, a message for each step; of these patients, its own."""
        by_step: dict[int, dict[bytes, Unusable]] = {}
        for w in self.all:
            if w.key in of:
                by_step.setdefault(w.step, {}).setdefault(w.key, Unusable(w.key, w.cause))
        return [Withdrawn(step, tuple(who.values())) for step, who in sorted(by_step.items())]


def check_withdrawal(samples: Collection[Sample], answer: Withdraw) -> None:
    """SP-11.13-4. Raises UnexpectedMessage."""
    keys = [patient.key for patient in answer.patients]
    if len(set(keys)) < len(keys) or not set(keys) <= {sample.key for sample in samples}:
        raise UnexpectedMessage(f"patients withdrawn who are not in the batch of step {answer.step}")
