"""The client: dials its coordinator, judges the job it is offered, and works until the coordinator says bye.

A lost link is not a lost job: the encoder's state and the pending step live in `SiteJob`, and the client dials
again with growing pauses until `[network] reconnect_s` is over.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection, Coroutine, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from splitpeer.daemon import happenings as h
from splitpeer.daemon.duty import Duty
from splitpeer.daemon.sinks.log import LogSink
from splitpeer.daemon.sinks.metrics import MetricsSink
from splitpeer.daemon.sinks.sparing import Sparing
from splitpeer.daemon.sinks.trail import TrailSink
from splitpeer.daemon.witness import AGENT, Witness
from splitpeer.data.directory import named_in
from splitpeer.data.files import Found
from splitpeer.data.findings import lacking_warning, naming_warnings
from splitpeer.data.modalities import MASK
from splitpeer.data.volumes import Volumes
from splitpeer.errors import ConnectionRefused, DeadlinePassed, JobFailed, PeerError, told_of
from splitpeer.federation.compute import Compute, pick_device
from splitpeer.federation.files import look, tell
from splitpeer.federation.images import find_files, open_consent, open_masks, open_volumes
from splitpeer.federation.terms import judge, services, terms_digest
from splitpeer.models.registry import cut_of
from splitpeer.settings.peer import PeerConfig, Policy
from splitpeer.site.budgets import BudgetSpent
from splitpeer.site.inference.asking import InferenceAsker
from splitpeer.site.inference.tally import SiteTally
from splitpeer.site.job import SiteJob
from splitpeer.site.mask_keys import OtherEpoch
from splitpeer.site.opening import open_job, open_ledger
from splitpeer.site.probes import ProbeAnswers, ProbeTooLarge
from splitpeer.site.run_folders import accepted_terms, mark_complete, mark_run, note_coordinator
from splitpeer.site.serving import Serving
from splitpeer.site.step_rows import StepRows
from splitpeer.site.upkeep import Upkeep
from splitpeer.training.forms import in_words
from splitproto import Offer, Session, SplitprotoError, dial
from splitproto.capture import Party
from splitproto.errors import (
    CarrierVersionError,
    DeadlineExceeded,
    EnvelopeError,
    FlowControlError,
    IdentityError,
    LinkLost,
    LocalError,
    PolicyRefused,
    SchemaMismatch,
    SecureChannelError,
    SiteFailed,
    UnexpectedMessage,
    printable,
)
from splitproto.identity import OWN_UNUSABLE
from splitproto.lanes.base import Destination
from splitproto.messages import (
    Begin,
    Bye,
    Forward,
    FusionKey,
    FusionKeys,
    Inventory,
    JobAccept,
    JobDecline,
    JobOffer,
    Message,
    Probe,
    Withdraw,
    Withdrawn,
)
from splitproto.negotiation import FEATURES
from splitproto.records import Patient

log = logging.getLogger(__name__)
Returned = TypeVar("Returned")

IDLE_S = 3600.0
"""SP-11-19: a coordinator that is alive but asks nothing for this long is given up."""
SERVING_S = 7 * 86_400.0
"""The same for one that serves inference: heartbeats tell whether it is alive."""
READ_S = 600.0
"""Reading every volume's header, or a checkpoint, at most."""
INVENTORY_PIECE = 500
LEAVE_S = 20.0
"""How long a site that was asked to stop gives the step under way: to be sent, and for its gradients to come."""
DAMAGED_AT_FIRST = 3
"""How often a first link may fail in a way that may be damage in transit; after that it is a refusal."""
REST_S, LONGEST_REST_S = 5.0, 600.0
"""Pauses after a coordinator has asked for more than the budgets allow, or in an epoch that is over."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0


class Client:
    """One site's daemon.

    Args:
        config: a client's `peer.toml`.
        stop: set to stop cleanly: the pending step is finished and a checkpoint written.
        duty: the one that `serve` already holds; None: one of its own.
        curious: a file to record into what is sent and received.
        verify: read every image to its end before dialling, not only its header.
        goal: where its coordinator is reached, if not at its address.
    """

    def __init__(
        self,
        config: PeerConfig,
        stop: asyncio.Event,
        *,
        duty: Duty | None = None,
        curious: Path | None = None,
        verify: bool = False,
        goal: Destination | None = None,
    ) -> None:
        self._config = config
        self._stop = stop
        self._credentials = config.credentials()
        self._allow = config.allow_list()
        policy = config.policy
        if policy is None or config.network.coordinator is None:
            raise JobFailed("a client needs [policy] and [network] coordinator")
        if config.data.images is None and config.data.labels is None:
            raise JobFailed("a client needs [data] images")
        self._address = config.network.coordinator
        self._goal = goal or self._address
        features = _features(policy)
        self._offer = Offer(features=features, max_message=policy.max_message_bytes, agent=AGENT)
        pick_device(config.runtime.device)
        self._witness = Witness(config, curious)
        self._duty = duty or Duty(config)
        # Also told by the compute thread: log and trail alone may be.
        self._records = h.Reporter(TrailSink(self._witness.note), LogSink(log))
        # Fail now, not when the first batch is due.
        found = _found(config, policy)
        consent = open_consent(config, found)
        self._volumes = _opened(config, found, consent.withdrawn())
        self._unusable: dict[str, dict[bytes, str]] = {kind: {} for kind in self._volumes}
        for modality, volumes in self._volumes.items():
            # What masks may hold is not known before there is a job.
            look(volumes, self._unusable[modality], self._records, voxels=verify and modality != MASK)
        self._cases = {key: case for volumes in self._volumes.values() for key, case in volumes.cases.items()}
        self._salt_check = next(iter(self._volumes.values())).salt_check.hex()
        self._findings = [*_findings(config, found), *consent.findings()]
        # The trail begins with the daemon's start.
        if (ledger := open_ledger(config, h.Reporter(LogSink(log)))) is not None:
            ledger.close()
        everywhere = self._duty.report.to(TrailSink(self._witness.note), LogSink(log))
        self._report = Sparing(everywhere, len(self._cases))
        self._compute = Compute(config.runtime.threads)
        self._asking = self._asker(policy)
        self._job: SiteJob | None = None
        self._upkeep = Upkeep(config, self._compute, lambda: self._job, self._records)
        self._deadline: float | None = None
        self._pause = _FIRST_PAUSE
        self._rest_s = REST_S
        self._damaged = 0
        """First links that failed so."""
        self._octets = (0, 0)
        """Bytes in and out of links that are over."""

    def _asker(self, policy: Policy) -> InferenceAsker | None:
        """None: neither this site nor people here take part in inference."""
        if policy.inference == "none":
            return None
        names = {self._config.peer.site, *policy.inference_for}
        return InferenceAsker(self._config, self._report, SiteTally(policy.inference, names, self._report))

    async def run(self) -> None:
        """Serve until the job is complete or `stop` is set.

        Raises: PeerError: the message for the user, with its exit code.
        """
        peer = self._config.peer
        self._report(
            h.SiteStarted(peer.site, peer.held or "masks", len(self._cases), self._salt_check, self._address)
        )
        # Names of files: in this site's own log, and nowhere else.
        for cause in self._findings:
            self._report(h.DataWarning(cause))
        for volumes in self._volumes.values():
            tell(volumes, self._records)
        async with self._duty.on_duty(
            self._witness, modality=peer.held or "masks", coordinator=self._address
        ):
            await self._upkeep.look_at_keys()
            self._report(h.Ready(self._address))
            upkeep = asyncio.create_task(self._upkeep.run())
            try:
                async with self._asking or nullcontext():
                    await self._serve()
            except (PeerError, SplitprotoError) as error:
                # Others name a patient by its key or handle: the people here know it by its file.
                for patient, path in named_in(str(error), self._cases).items():
                    self._report(h.PatientNamed(patient, path))
                raise
            finally:
                upkeep.cancel()
                await asyncio.gather(upkeep, return_exceptions=True)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while not self._stop.is_set():
                session = await self._dial()
                if session is None:
                    break
                began = loop.time()
                try:
                    if await self._converse(session):
                        return
                except (BudgetSpent, OtherEpoch, FlowControlError, ProbeTooLarge) as error:
                    await self._rest(error)
                except SplitprotoError as error:
                    if not (error.retry or _half_renewed(error)):
                        raise
                    self._report(h.LinkBroke(session.cause_of(error)))
                except BaseException as error:
                    session.fail(SiteFailed(self._failure(error)))
                    await session.close("failed", timeout=1.0)
                    raise
                finally:
                    self._octets = self._traffic(session)
                    if self._deadline is not None:
                        # Patience is for a coordinator that is away, not for one that waits for other sites.
                        self._deadline += loop.time() - began
            await self._leave()
        finally:
            await self._close_job()
            self._compute.close()

    def _traffic(self, session: Session) -> tuple[int, int]:
        """Octets in and out, over all links."""
        octets_in, octets_out = self._octets
        return octets_in + session.bytes_in, octets_out + session.bytes_out

    async def _close_job(self) -> None:
        job, self._job = self._job, None
        if job is None:
            return
        try:
            await self._compute.run(job.close, what="reading ahead to end", timeout=READ_S)
        except DeadlinePassed as error:
            # The cause of the end is reported; this error is not.
            self._report(h.JobNotClosed(str(error)))

    # --- the link --------------------------------------------------------------------------------------

    async def _dial(self) -> Session | None:
        """A new session; None if asked to stop meanwhile."""
        loop = asyncio.get_running_loop()
        patience = self._config.network.reconnect_s
        said = ""
        if self._deadline is None:
            self._deadline = loop.time() + patience
        else:
            # A link that came up and died before any work was no success: the pauses keep growing.
            await self._wait()
        self._report(h.Dialling(max(0.0, self._deadline - loop.time())))
        while not self._stop.is_set():
            try:
                session = await self._or_stop(
                    dial(
                        self._goal,
                        self._credentials,
                        self._allow,
                        self._offer,
                        timing=self._config.network.timing(),
                    )
                )
            except _Stopped:
                break
            except SplitprotoError as error:
                if not self._may_pass(error):
                    raise ConnectionRefused(f"{self._address}: {error}") from error
                if loop.time() >= self._deadline:
                    raise DeadlinePassed(
                        f"gave up on {self._address} after {patience:g} s: {error}"
                    ) from error
                if str(error) != said:
                    said = str(error)
                    self._report(h.DialFailed(said, patience))
            else:
                self._report(h.LinkUp(session.peer.site, session.tls))
                self._witness.listen(session)
                return session
            await self._wait()
        return None

    def _may_pass(self, error: SplitprotoError) -> bool:
        """Whether dialling again may succeed."""
        if error.retry:
            return True
        if _half_renewed(error):
            return self._job is not None
        if isinstance(error, SecureChannelError):
            # SP-4-6: only a refusal that came encrypted is the coordinator's own word.
            if error.refused == "ours" or (error.refused == "theirs" and self._job is None):
                return False
        elif not isinstance(error, EnvelopeError | CarrierVersionError):
            return False
        if self._job is None:
            # Never admitted: it may be the wrong port, which the operator wants to know soon.
            self._damaged += 1
        return self._damaged <= DAMAGED_AT_FIRST

    async def _wait(self) -> None:
        """Pause before dialling again, or until asked to stop."""
        # Jitter: a hundred sites must not come back at the same moment.
        seconds, self._pause = self._pause * random.uniform(0.5, 1.0), min(2 * self._pause, _LONGEST_PAUSE)
        if self._deadline is not None and (left := self._deadline - asyncio.get_running_loop().time()) > 0:
            # All of the patience is used: the last attempt is at its end.
            seconds = min(seconds, left)
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            return

    async def _rest(self, error: LocalError) -> None:
        """SP-11.15-8: the coordinator asked for what this site declines: the site waits, and stays up."""
        self._report(h.AskedTooMuch(error.reason, self._rest_s))
        # Not the coordinator's absence, so it costs no patience.
        self._deadline = None
        with suppress(TimeoutError):
            async with asyncio.timeout(self._rest_s):
                await self._stop.wait()
        # Each request takes a coordinator one epoch further, so waiting longer does not help.
        if not isinstance(error, OtherEpoch):
            self._rest_s = min(2 * self._rest_s, LONGEST_REST_S)

    def _progress(self) -> None:
        """SP-11-40: the coordinator gave us work: from here on patience and pauses start again."""
        self._deadline, self._pause = None, _FIRST_PAUSE

    async def _leave(self) -> None:
        if self._job is not None:
            job = self._job
            self._report(h.PhaseBegan("draining"))
            held = await self._held(job)
            # A site that came back without its memory has nothing to save before it knows where to continue.
            if job.applied not in held and not job.lost:
                await self._compute.run(job.save, job.applied, held, what="the checkpoint", timeout=READ_S)
            self._report(h.LeftAt(job.applied))
        self._report(h.SiteStopped())

    async def _held(self, job: SiteJob) -> tuple[int, ...]:
        return await self._compute.run(job.checkpoints, what="its checkpoints to be read", timeout=READ_S)

    # --- the conversation ------------------------------------------------------------------------------

    async def _converse(self, session: Session) -> bool:
        """One link, from the offer to bye. True when the job is complete."""
        try:
            job = await self._join(session)
            if isinstance(job, Bye):
                await session.close(job.reason)
                return self._over(job, session.peer.site)
            begun = await self._next(session, "the other sites")
            if isinstance(begun, FusionKeys) and job.summing is not None:
                now = datetime.now(UTC)
                await self._compute.run(
                    job.summing.accept, begun, now, what="the partners to be checked", timeout=READ_S
                )
                begun = await self._next(session, "the other sites")
            if isinstance(begun, Begin) and (job.summing is None or job.summing.ready):
                self._report(h.JobBegan(job.job.name, begun.step, begun.patients))
                bye = await self._work(session, job)
            elif isinstance(begun, Bye):
                bye = begun
            else:
                due = "fusion-keys were" if job.summing is not None and not job.summing.ready else "begin was"
                raise UnexpectedMessage(f"a {begun.name} where {due} due")
        except _Stopped:
            await session.close("drain", "the site was asked to stop")
            # SP-11-20: a message that crossed our own bye is not sent again.
            crossed = session.farewell
            return crossed is not None and self._over(crossed, session.peer.site)
        except LocalError as error:
            session.fail(error)
            await session.close("failed", timeout=1.0)
            raise
        except PeerError as error:
            session.fail(SiteFailed(self._failure(error)))
            await session.close("failed", timeout=1.0)
            raise
        await session.close(bye.reason)
        # SP-11-20: a bye of the coordinator may have crossed our own.
        bye = session.farewell or bye
        if bye.reason == "rotate":
            # SP-11-20: "the dialler dials again at once"; this is no trouble for which pauses grow.
            self._pause = _FIRST_PAUSE
        self._report(h.SiteJobEnded(job.job.name, job.run.hex(), bye.reason, job.applied, job.advanced))
        return self._over(bye, session.peer.site)

    def _failure(self, error: BaseException) -> str:
        """The text for the coordinator, without the path or the patient that this site's own log names."""
        # The texts of these name no file (SP-12-1); for others, the cause is given in general words (SP-11.13-2).
        said = isinstance(error, JobFailed | DeadlinePassed)
        why = str(error) if said else told_of(error)
        return f"site {self._config.peer.site} cannot continue: {why}"[:400] + "; see its log"

    def _over(self, bye: Bye, coordinator: str) -> bool:
        """Whether the job is complete; raises JobFailed if it is not and never will be."""
        if bye.reason == "complete":
            job = self._job
            if bye.run is not None and (job is None or job.run != bye.run):
                # SP-11-20: not of what this process works on, if it works on anything.
                mark_run(self._config.peer.state, bye.run, coordinator, self._records)
                self._report(h.JobComplete())
                return True
            # Only weights that were trained to the end are worth keeping before others.
            if job is not None and (job.job.frozen or job.applied == job.job.steps):
                mark_complete(job.folder, self._records)
            if job is not None and job.job.frozen:
                # SP-11.17-8: the training needs this site no more.
                released = job.released
                late = (
                    "of consent that is withdrawn from now on, the coordinator learns from people only: write to its "
                    f"operator, who runs splitpeer bank drop {job.run.hex()} --patient HANDLE"
                )
                self._report(h.ReleasesEnded(job.run.hex(), released.windows, released.patients, late))
            self._report(h.JobComplete() if job is None else h.JobComplete(job.job.name, job.applied))
            return True
        if bye.reason == "failed":
            raise JobFailed(f"the coordinator ended the job: {printable(bye.text)}")
        self._report(h.LeftByCoordinator(bye.reason, bye.text))
        return False

    async def _next(self, session: Session, what: str) -> Message:
        """The next message, or `_Stopped` if asked to stop while waiting."""
        # SP-11.19-15: a service has nothing to ask for as long as nobody wants a segmentation.
        idle_s = SERVING_S if "infer" in session.agreement.features else IDLE_S
        self._report(h.Awaited(what, idle_s))
        try:
            return await self._or_stop(session.receive(idle_s, what))
        finally:
            self._report(h.NotAwaited())

    async def _or_stop(self, work: Coroutine[Any, Any, Returned], grace_s: float = 0.0) -> Returned:
        """What `work` gives, or `_Stopped` if asked to stop and it is not done `grace_s` later."""
        working = asyncio.create_task(work)
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
            if grace_s and not working.done():
                await asyncio.wait((working,), timeout=grace_s)
            if working.done():
                return working.result()
            raise _Stopped
        finally:
            working.cancel()
            stopping.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)

    async def _join(self, session: Session) -> SiteJob | Bye:
        """The job to work on; or bye, if the coordinator leaves before it offers one."""
        probes = ProbeAnswers(session.peer.site, session.agreement.send_limit)
        try:
            while isinstance(offer := await self._next(session, "a job"), Probe):
                await self._or_stop(session.send(probes.to(offer)))
        finally:
            if (told := probes.told()) is not None:
                self._report(told)
        if isinstance(offer, Bye):
            return offer
        if not isinstance(offer, JobOffer):
            raise UnexpectedMessage("something else where a job was due")
        self._witness.heard(session.peer.site, offer)
        job = await self._judged(session, offer)
        self._report(h.PhaseBegan("joining"))
        await self._compute.run(job.forget_batches, what="reading ahead to end")
        patients, unusable = await self._compute.run(
            job.inventory, what="the volumes' headers to be read", timeout=READ_S
        )
        await self._accept(session, offer, job, patients)
        if job.summing is not None:
            # SP-11.18-7: "before its `inventory` is complete"
            await session.send(FusionKey(job.summing.offer()))
        for first in range(0, max(len(patients), 1), INVENTORY_PIECE):
            piece = patients[first : first + INVENTORY_PIECE]
            last = first + INVENTORY_PIECE >= len(patients)
            bad = tuple(unusable) if last and unusable else None
            await session.send(Inventory(tuple(piece), last, job.channels.salt_check, bad))
        return job

    async def _judged(self, session: Session, offer: JobOffer) -> SiteJob:
        """The job of an offer that this site's policy allows. Raises JobFailed or BudgetSpent once it is declined."""
        try:
            judge(offer, self._config, session.agreement.features)
            known = self._job
            if known is None or known.run != offer.run:
                return await self._take_up(offer)
            if (known.job, known.seats) == (offer.job, offer.seats):
                return known
            if known.terms != accepted_terms(offer).decode():
                raise SchemaMismatch("the terms of a run cannot change while it runs")
            # A coordinator that restarted with another deadline; signed terms (SP-11.18-6) hold it too.
            return await self._take_up(offer)
        except BudgetSpent as error:
            await session.send(JobDecline(error.code, error.reason))
            raise
        except (PolicyRefused, SchemaMismatch) as error:
            self._report(h.JobDeclined(offer.job.name, offer.run.hex(), error.reason))
            await session.send(JobDecline(error.code, error.reason))
            await session.close("failed", error.reason)
            raise JobFailed(f"job {offer.job.name} declined: {error.reason}") from None

    async def _accept(
        self, session: Session, offer: JobOffer, job: SiteJob, patients: Sequence[Patient]
    ) -> None:
        """Reports and records what is agreed on, then sends the acceptance."""
        saved = await self._held(job)
        filled, hub = job.filled(patients), session.peer.site
        note_coordinator(job.folder, hub)
        self._report(h.JobJoined(job.job.name, job.run.hex(), job.applied, job.job.steps, saved, filled))
        await self._witness.expect(offer.run)
        self._witness.start(
            offer.run,
            offer.job,
            offer.schema,
            [Party(hub, (), offer.defences or (), offer.recorded)],
            seats=offer.seats,
            defences=job.defences,
            features=session.agreement.features,
        )
        recorded = self._witness.recorded
        self._report(
            h.JobAccepted(
                offer.job.name,
                offer.run.hex(),
                hub,
                terms_digest(offer.job),
                offer.schema.hex(),
                list(filled),
                list(cut_of(offer.job).names),
                in_words(offer.job),
                job.defences,
                recorded,
                job.applied,
                len(patients),
                [f"{seat} {digest}" for seat, digest in job.weights.items()],
            )
        )
        proof = job.prove(offer, session.binding)
        label = await self._compute.run(job.label, what="its encoders' weights", timeout=READ_S)
        await session.send(
            JobAccept(
                job.incarnation,
                job.applied,
                saved,
                len(patients),
                recorded,
                job.defences,
                **proof,
                weights=label,
            )
        )

    async def _take_up(self, offer: JobOffer) -> SiteJob:
        """A run that this process does not work on yet. Raises PolicyRefused, and what `open_job` raises."""
        await self._close_job()
        self._job = job = await self._compute.run(
            open_job,
            offer,
            self._config,
            self._records,
            self._unusable,
            what="the job's folder and images",
            timeout=READ_S,
        )
        return job

    async def _work(self, session: Session, job: SiteJob) -> Bye:
        self._report(h.PhaseBegan("working"))
        if self._asking is not None:
            self._asking.link(session, job, self._compute)
        rows = h.Reporter(MetricsSink(StepRows(job.folder)))
        serving = Serving(
            session, job, self._compute, self._asking, self._report, rows, self._progress, self._traffic
        )
        watching = asyncio.create_task(self._upkeep.watch_consent(session, job, serving.revoked))
        try:
            return await self._work_on(session, job, serving)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            if self._asking is not None:
                self._asking.unlink()

    async def _work_on(self, session: Session, job: SiteJob, serving: Serving) -> Bye:
        stopping_until = float("inf")
        loop = asyncio.get_running_loop()
        worked = False
        while True:
            # A link that was worn before it carried work would be followed by others like it, for ever.
            if session.rotation_due and worked and not job.step_under_way:
                return Bye("rotate", session.rotation_cause)
            if not self._stop.is_set():
                while (forward := job.due()) is not None:
                    sent = await serving.computed(job.forward, forward)
                    if self._stop.is_set():
                        raise _Stopped
                    if isinstance(sent, Withdraw):
                        serving.patients_out(sent.step, sent.patients, "withdraw")
                    # SP-11-12: once begun it completes, even if nobody waits for it: the step is under way.
                    with job.spans_of(forward).of("send"):
                        await self._or_stop(session.send(sent, job.job.seconds_per_step), LEAVE_S)
                    if forward.mode == "release":
                        self._report(h.WindowsReleased(job.released.windows, *self._traffic(session)))
                    self._progress()
                    worked = True
            elif not job.step_under_way or loop.time() > stopping_until:
                raise _Stopped
            what = f"the end of step {job.applied + 1}" if job.step_under_way else "work"
            try:
                with job.spans.of("gradients" if job.waiting_for_gradients else "batch"):
                    message = await self._next(session, what)
            except _Stopped:
                # SP-11-12: a site that leaves finishes the step that others wait for.
                if not job.step_under_way or loop.time() > stopping_until:
                    raise
                self._report(h.PhaseBegan("draining"))
                stopping_until = min(stopping_until, loop.time() + LEAVE_S)
                try:
                    message = await session.receive(LEAVE_S, "the end of the step under way")
                except DeadlineExceeded:
                    raise _Stopped from None
            if isinstance(message, Bye):
                return message
            await serving.answer(message)
            worked = worked or not isinstance(message, Forward | Withdrawn)


class _Stopped(LinkLost):
    """This side was asked to stop."""

    def __init__(self) -> None:
        super().__init__("asked to stop")


def _features(policy: Policy) -> tuple[str, ...]:
    """What this site offers to do."""
    # SP-11.17-2, SP-11.19-1.
    features = services(frozen=True) if policy.encoders == "frozen" else FEATURES
    out = ("infer",) if policy.inference == "none" else ()
    return tuple(name for name in features if name not in out)


def _found(config: PeerConfig, policy: Policy) -> dict[str, Found]:
    """The files of images by modality, and of masks where a job may ask for them. Raises DataError."""
    images, masks = find_files(config)
    return images if masks is None or not policy.labels else {**images, MASK: masks}


def _opened(config: PeerConfig, found: Mapping[str, Found], without: Collection[bytes]) -> dict[str, Volumes]:
    """See `open_volumes`, `open_masks`."""
    images = {kind: one for kind, one in found.items() if kind != MASK}
    volumes = open_volumes(config, images, without=without)
    if MASK in found:
        volumes[MASK] = open_masks(config, found[MASK], without=without)
    return volumes


def _findings(config: PeerConfig, found: Mapping[str, Found]) -> list[str]:
    """What file names show."""
    images = {kind: one for kind, one in found.items() if kind != MASK}
    lines = naming_warnings(config.data.images, images.values()) if config.data.images is not None else []
    if MASK in found and config.data.labels is not None:
        lines += naming_warnings(config.data.labels, [found[MASK]])
    for modality, kind in images.items():
        lines += lacking_warning(kind, f"{modality} image")
    return lines


def _half_renewed(error: SplitprotoError) -> bool:
    """Certificate and key are two files: during a renewal they briefly do not match."""
    return isinstance(error, IdentityError) and error.reason == OWN_UNUSABLE
