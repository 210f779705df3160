"""What a site answers on a link on which work has begun, service by service, and what is reported of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from splitpeer.daemon import happenings as h
from splitpeer.errors import DataError, told_of
from splitpeer.federation.compute import Compute
from splitpeer.logs import handle
from splitpeer.site.inference.asking import InferenceAsker
from splitpeer.site.job import SiteJob
from splitpeer.timeline.spans import LinkTimes
from splitproto import Session
from splitproto.causes import CONSENT, OF_A_PATIENT
from splitproto.errors import UnexpectedMessage
from splitproto.messages import (
    Advance,
    Advanced,
    Applied,
    Average,
    Checkpoint,
    Conclude,
    Forward,
    Gradients,
    Locate,
    Logits,
    LossGradients,
    Message,
    Prediction,
    Progress,
    Rollback,
    RolledBack,
    Saved,
    Scores,
    Segmented,
    Segmenting,
    Settled,
    Share,
    Unsaved,
    Unsegmented,
    Withdraw,
    Withdrawn,
)
from splitproto.records import Unusable

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Serving:
    """Answers of one job on one link."""

    session: Session
    job: SiteJob
    compute: Compute
    asking: InferenceAsker | None
    """Of people at this site; None: they may not ask."""
    report: Callable[[h.Happening], None]
    rows: h.Sink
    """Told of the time of each step."""
    progress: Callable[[], None]
    """SP-11-40: called when the coordinator gave work."""
    traffic: Callable[[Session], tuple[int, int]]
    """Bytes in and out, over all links."""
    link_times: LinkTimes = field(default_factory=LinkTimes)

    async def answer(self, message: Message) -> None:
        """Raises UnexpectedMessage: nothing that is asked of a site at work; and what the job raises."""
        self.job.budgets.message()
        match message:
            case Progress():
                self._hear_progress(message)
            case Withdrawn():
                self.patients_out(message.step, message.patients, "withdrawn")
                await self.computed(self.job.hear_withdrawn, message)
            case Checkpoint() | Rollback():
                await self._checkpoint(message)
            case Settled():
                await self._settle(message)
            case Share() | Average():
                await self._average(message)
            case Logits() | Prediction() | Conclude():
                await self._label(message)
            case Locate() | Segmenting() | Segmented() | Unsegmented():
                await self._infer(message)
            case _:
                await self._train(message)

    async def computed(self, function: Callable[..., Returned], *args: Any) -> Returned:
        """`function(*args)` within the job's deadline for a step."""
        what = f"{function.__name__.replace('_', ' ')} after step {self.job.applied}"
        return await self.compute.run(function, *args, what=what, timeout=self.job.job.seconds_per_step)

    def patients_out(self, step: int, patients: Sequence[Unusable], by: str) -> None:
        """SP-11.13-8: what concerns this site's own patients."""
        job = self.job
        known = set(job.channels.keys())
        for patient in patients:
            key = patient.key
            if key in known:
                file = job.channels.case(key).path if key in job.unusable else None
                self.report(h.PatientOut(by, job.run.hex(), key, step, OF_A_PATIENT[patient.cause], file))

    async def _settle(self, message: Settled) -> None:
        """SP-11.18-16, SP-11.18-18."""
        if self.job.summing is None:
            raise UnexpectedMessage("a word about keys of a sum where there is none")
        await self.computed(self.job.summing.keys.settle, message)

    def revoked(self, keys: Sequence[bytes]) -> None:
        """SP-11.13-12: the coordinator was told of these, without having asked."""
        job = self.job
        step = 1 if job.job.frozen else job.applied + 1
        self.patients_out(step, [Unusable(key, CONSENT) for key in keys], "withdraw")

    # --- services --------------------------------------------------------------------------------------

    async def _train(self, message: Message) -> None:
        job = self.job
        match message:
            case Forward():
                job.announce(message)
            case Gradients():
                await self.computed(job.apply, message)
                octets_in, octets_out = self.traffic(self.session)
                self.report(h.StepApplied(job.applied, octets_in, octets_out))
                await self.session.send(Applied(message.step))
                # The coordinator need not wait for a row to be written.
                seconds = time.monotonic() - job.began
                timing = job.spans.take(job.began, self.link_times.take([self.session]))
                self.rows(h.StepTimed(message.step, seconds, timing))
            case Advance():
                await self.computed(job.advance, message.step)
                self.report(h.StepCounted(job.applied))
                self.progress()
                await self.session.send(Advanced(message.step))
            case _:
                raise UnexpectedMessage(f"a {message.name} where work was due")

    async def _average(self, message: Share | Average) -> None:
        """SP-11.16-2, SP-11.16-5."""
        job = self.job
        if isinstance(message, Average):
            await self.session.send(await self.computed(job.take_average, message))
            return
        shared = await self.computed(job.share, message)
        self.report(h.EncoderShared(job.run.hex(), message.step, job.seats[message.seat].name))
        await self.session.send(shared)

    async def _label(self, message: Logits | Prediction | Conclude) -> None:
        """SP-11.20-6, SP-11.20-9."""
        job, labels = self.job, self.job.labels
        answer: LossGradients | Scores | Withdraw
        match message:
            case Logits():
                with job.spans.of("loss"):
                    answer = await self.computed(labels.loss_gradients, message, job.applied)
            case Prediction():
                answer = await self.computed(labels.score, message, job.applied)
            case Conclude():
                scores, table = await self.computed(labels.conclude, message, job.applied)
                answer = scores
                told = dict(scores.values)
                self.report(h.LabelsScored(job.run.hex(), message.step, table.dice(), told, message.batch))
        if isinstance(answer, Withdraw):
            self.patients_out(answer.step, answer.patients, "withdraw")
        await self.session.send(answer, job.job.seconds_per_step)
        self.progress()

    async def _infer(self, message: Locate | Segmenting | Segmented | Unsegmented) -> None:
        job, asking = self.job, self.asking
        if isinstance(message, Locate):
            located = await self.computed(job.locate, message, self._owns)
            outcome = located.cause or "used"
            run, request, patient = job.run.hex(), message.request.hex(), handle(message.key)
            self.report(h.PatientLocated(run, request, patient, message.asker, outcome))
            if asking is not None:
                asking.tally.answered(message.request, message.asker, located.cause)
            await self.session.send(located)
        elif asking is None:
            raise UnexpectedMessage(f"a {message.name} where work was due")
        else:
            await asking.hear(message)

    def _owns(self, request: bytes, key: bytes) -> bool:
        """SP-11.19-4: whether this site asked for this patient itself."""
        return self.asking is not None and self.asking.owns(request, key)

    # --- what all have in common -----------------------------------------------------------------------

    async def _checkpoint(self, message: Checkpoint | Rollback) -> None:
        job = self.job
        if isinstance(message, Checkpoint):
            await self.session.send(await self._saved(message))
            return
        before = job.applied
        await self.computed(job.rollback, message.step)
        self.report(h.SiteRolledBack(job.run.hex(), message.step, before))
        await self.session.send(RolledBack(message.step))

    async def _saved(self, asked: Checkpoint) -> Saved | Unsaved:
        """SP-11-32: a disk that is full costs this checkpoint, not the run."""
        job = self.job
        try:
            with job.spans.of("checkpoint"):
                digest = await self.computed(job.save, asked.step, asked.keep)
        except DataError as error:
            self.report(h.SiteNotSaved(job.run.hex(), asked.step, str(error)))
            # Not the error's text: it names a folder of this site.
            return Unsaved(asked.step, f"the site could not write it: {told_of(error)}")
        held = sorted({*(asked.keep or ()), asked.step})
        self.report(h.SiteSaved(job.run.hex(), asked.step, digest.hex(), held))
        return Saved(asked.step, digest)

    def _hear_progress(self, message: Progress) -> None:
        if message.missing is not None:
            missing = {one.seat: one.cause for one in message.missing}
            self.report(h.MissingTold(message.step, missing))
        if message.values:
            self.report(h.FiguresTold(message.step, self.job.job.steps, message.values))
