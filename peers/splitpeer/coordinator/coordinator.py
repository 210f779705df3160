"""The coordinator: gathers the sites a job names, has the loop train with them, says bye.

It owns fusion, bottleneck, decoder, labels, loss and the schedule. Results go to `[output] folder`:
`metrics.jsonl` (one line a step), `result.json`, `predictions/` (masks of the patients held out). Restarted,
it resumes a run that is not complete.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from contextlib import AsyncExitStack
from pathlib import Path

from splitpeer.coordinator.assembly import (
    admit_again,
    labels_of,
    largest_message,
    make_gradient_stacks,
    make_half,
    make_service,
    make_sites,
    open_masks,
    salt_check_of,
)
from splitpeer.coordinator.choosing import choose, in_words
from splitpeer.coordinator.farewell import COMPLETE, FAREWELL_S, Farewell
from splitpeer.coordinator.frozen.work import FrozenWork
from splitpeer.coordinator.gathering import Gathering
from splitpeer.coordinator.inference.service import Service
from splitpeer.coordinator.matching import Matching
from splitpeer.coordinator.probing import Probing
from splitpeer.coordinator.ranks import while_beating
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.run import DISK_S, Run
from splitpeer.coordinator.run_files import RunFiles, RunResult
from splitpeer.coordinator.team import Team
from splitpeer.coordinator.work import COLLECTED, JointWork, RunWork
from splitpeer.daemon import happenings as h
from splitpeer.daemon.console import RunView
from splitpeer.daemon.duty import Duty
from splitpeer.daemon.refusals import Refusals
from splitpeer.daemon.sinks.console import ConsoleSink
from splitpeer.daemon.sinks.log import LogSink
from splitpeer.daemon.sinks.metrics import MetricsSink
from splitpeer.daemon.sinks.trail import TrailSink
from splitpeer.daemon.witness import AGENT, Witness
from splitpeer.data.directory import named_in
from splitpeer.errors import (
    ConfigError,
    DataError,
    DeadlinePassed,
    DiskTrouble,
    PeerError,
    told_of,
)
from splitpeer.federation.compute import Compute
from splitpeer.federation.files import tell
from splitpeer.federation.overlap import ADVICE, shared_with
from splitpeer.federation.seating import Seating
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import (
    NOT_CODED,
    Codings,
    coding_features,
    cut_descriptors,
    job_on_wire,
    services,
    terms_digest,
)
from splitpeer.ranks.group import RankLost, Ranks
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.storage import checkpoint
from splitpeer.timeline.spans import Spans
from splitpeer.training.forms import shown
from splitpeer.training.split_step import CoordinatorHalf
from splitproto import Door, Offer, Session
from splitproto.codings import CODINGS
from splitproto.constants import DEFAULT_MAX_MESSAGE
from splitproto.errors import DeadlineExceeded, SetupError
from splitproto.lanes.base import Lane
from splitproto.lanes.zeromq import ZmqLane
from splitproto.tensors import schema_digest

log = logging.getLogger(__name__)

DRAIN_S = 20.0
"""A coordinator that was asked to stop gives the step under way this long."""
STRAGGLER_S = 5.0
"""The same where sites are leaving too: the others may still finish the step."""
HEARD_S = 1.0
"""The same where all have left: what they said last is still taken in."""
SAVE_S = 60.0
"""A checkpoint on leaving is given up after this: a disk that hangs must not keep the process."""


class Coordinator:
    """One run of one job.

    Args:
        config: a coordinator's `peer.toml`.
        job: `job.toml`.
        stop: set to leave in good order, with a checkpoint.
        view: shown to people while it runs.
        resume: True: resume the job's last run. False: a new one. None: resume the last, if there is one of
            the same terms; if that is over, `run` gives its result again.
        duty: the one that `serve` already holds; None: one of its own.
        curious: a file to record into what is sent and received.
        verify: read every mask to its end before sites are waited for, not only its header.
        readmit: sites whose part in the run goes to the next that joins with their certificate (SP-11.14-5).
        lane: the way in, if not the port of `listen`.
        group: the ranks that this process leads; None: it is alone.
    """

    _serving = False
    """The run is complete, and the sites stay."""
    _work: RunWork

    def __init__(
        self,
        config: PeerConfig,
        job: JobConfig,
        stop: asyncio.Event,
        view: RunView,
        *,
        resume: bool | None = False,
        duty: Duty | None = None,
        curious: Path | None = None,
        verify: bool = False,
        readmit: Collection[str] = (),
        lane: Lane | None = None,
        group: Ranks | None = None,
    ) -> None:
        self._lane = lane
        self._config, self._settings, self._stop, self._view = config, job, stop, view
        self._credentials = config.credentials()
        if config.network.listen is None:
            raise ConfigError("a coordinator needs [network] listen")
        self._listen = config.network.listen
        self._seats = seats_of(job)
        self._duty = duty or Duty(config)
        self._masks = open_masks(config, job, self._duty.report.to(LogSink(log)), verify=verify)
        self._salt_check = salt_check_of(config)
        self._files = RunFiles(config, job, resume=resume, report=self._duty.report)
        self._files.prepare()
        admit_again(self._files, job, readmit)
        record = self._files.record
        undecided = job.wire.auto and record.codings is None
        self._job = job_on_wire(job, record.codings or NOT_CODED)
        if not undecided:
            record.codings = record.codings or Codings(self._job.activations, self._job.gradients)
        half = make_half(config, job, self._job, self._seats, group)
        self._witness = Witness(config, curious)
        everywhere = self._duty.report.to(
            MetricsSink(self._files), ConsoleSink(view), TrailSink(self._witness.note)
        )
        self._everywhere, self._report = everywhere, everywhere.to(LogSink(log))
        self._gradient_stacks = make_gradient_stacks(config, job, self._job, self._seats)
        self._compute = Compute(config.runtime.threads)
        self._assemble(half)
        names = [site.name for site in self.sites]
        self._probing = Probing(names, job.deadlines.step_s, everywhere) if undecided else None
        """Until the codings are chosen."""

    def _assemble(self, half: CoordinatorHalf) -> None:
        """All that the job's terms are part of."""
        config, job = self._config, self._settings
        self.sites = make_sites(
            config, job, self._job, self._seats, self._files, self._witness, self._everywhere, self._bind,
            salt_check=self._salt_check, defences=self.defences,
        )  # fmt: skip
        self._team = Team(self.sites, job.absence, self._everywhere)
        self._farewell = Farewell(self.sites, self._files.record, self._everywhere)
        labels = labels_of(self._masks, self.sites)
        self._matching = Matching(self._job, job, self._seats, labels, self._files.record)
        self.result = RunResult(
            self._job.name, self._files.run.hex(), steps=self._job.steps,
            sites={site: ", ".join(filled) for site, filled in self._seats.filled.items()},
            seats=list(self._seats.names), labels_at=job.labels.at or "",
        )  # fmt: skip
        self._run = Run(
            self._job, job, half, self._team, labels, self._compute, self._files, self.result,
            Seating(self._job, self._seats, {}), self._report, spans=Spans(config.peer.site),
        )  # fmt: skip
        gathering = Gathering(self._run, self._matching, self._witness, self.defences)
        if self._job.frozen:
            work = FrozenWork(self._run, gathering, config, stays=job.inference is not None)
            self._work, self._service = work, make_service(config, job, self._run, work.segmenter)
        else:
            self._service = make_service(config, job, self._run)
            self._work = JointWork(self._run, gathering, self._gradient_stacks, self._service)

    @property
    def defences(self) -> tuple[str, ...]:
        """Defences of gradients before they leave, each as it is written: the same for every site."""
        return next((stack.specs for stack in self._gradient_stacks.values()), ())

    async def run(self) -> RunResult:
        """Run the job to its end, or until `stop` is set.

        Raises: PeerError: the message for the user, with its exit code.
        """
        run = self._files.run.hex()
        on_duty = self._duty.on_duty(
            self._witness,
            job=self._job.name,
            run=run,
            terms="not chosen yet" if self._probing is not None else terms_digest(self._job),
            sites=[f"{site.name} ({site.seat_names})" for site in self.sites],
        )
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(on_duty)
            except BaseException:
                # For example, a trail that cannot be begun: nothing else would end these.
                self._view.close()
                self._compute.close()
                raise
            self._report(h.RunChosen(self._job.name, run, self._job.steps, self._settings.absence.mode))
            if self._settings.wire.auto and self._probing is None:
                self._tell_codings("decided when the run began")
            if self._files.record.state == "over" and self._service is None:
                return self._was_complete()
            return await self._serve()

    def _was_complete(self) -> RunResult:
        """The run ended, and all sites know: starting this coordinator again returns its results again."""
        self.result = self._files.result() or self.result
        self._view.close()
        self._compute.close()
        self._report(h.AlreadyComplete(self._job.name, self._files.run.hex(), self.result.step))
        return self.result

    async def _serve(self) -> RunResult:
        self._started = time.monotonic()
        try:
            await self._work.open(resumed=bool(self._files.record.patients))
            async with Door(
                [self._lane or ZmqLane(self._listen)],
                self._credentials,
                self._settings.allow_list(),
                self._offer(),
                timing=self._config.network.timing(),
                refused=Refusals(self._everywhere),
            ) as listener:
                self._begun(listener.address)
                await self._until_bye(listener)
        except SetupError as error:
            raise ConfigError(str(error)) from error
        finally:
            self._view.close()
            self._compute.close()
            if not self.result.complete:
                self.result.seconds = time.monotonic() - self._started
                # Also of a run that failed: its results must not be mistaken for another run's.
                if self._files.opened:
                    self._files.write(self.result)
        return self.result

    def _offer(self) -> Offer:
        # SP-10-5, SP-10-8, SP-11.19-1: what the job needs is required; a site without `evaluate` still trains.
        average = ("average",) if self._job.average_every else ()
        fuse = ("fuse",) if self._job.fusion is not None else ()
        label = ("label",) if self._settings.labels.at is not None else ()
        # SP-11.22-3: any of them may be chosen.
        probe = ("probe", *(f"coding.{one}" for one in CODINGS)) if self._probing is not None else ()
        codings = dict.fromkeys((*probe, *coding_features(self._job)))
        offered = {*fuse, *label, *(("infer",) if self._service is not None else ())}
        return Offer(
            features=tuple(
                name
                for name in services(frozen=self._job.frozen)
                if name not in ("fuse", "infer", "label") or name in offered
            ),
            requires=(
                "release" if self._job.frozen else "train",
                f"dtype.{self._job.precision}",
                *codings,
                *average,
                *fuse,
            ),
            max_message=max(DEFAULT_MAX_MESSAGE, largest_message(self._settings, self._job, self._seats)),
            agent=AGENT,
        )

    def _begun(self, address: str) -> None:
        """Reports where it listens, and what there is to say about its own files."""
        site, job, run = self._config.peer.site, self._job.name, self._files.run.hex()
        self._report(h.CoordinatorStarted(site, job, address, run, self._salt_check.hex()))
        if self._masks is not None:
            for cause in self._masks.findings:
                self._report(h.DataWarning(cause))
            tell(self._masks.volumes, self._report)

    async def _until_bye(self, listener: Door) -> None:
        """Takes sites in and runs the job; at the end, or at an error, every site is told why."""
        accepting = asyncio.create_task(self._accept(listener))
        began_at = self._files.record.state
        reason, text = "failed", "the coordinator failed with an internal error"
        try:
            reason, text = await self._until_stopped()
        except PeerError as error:
            reason, text = self._farewell_after(error)
            raise
        finally:
            if reason == "complete" and began_at != "farewell":
                await self._farewell.wait(STRAGGLER_S if self._run.draining else FAREWELL_S)
            # A site that comes back now would be offered a job that is over.
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
            await self._bye(reason, text)
            if reason == "complete":
                # A site that is away at that moment learns it at the next start.
                if began_at == "farewell" or set(self._files.record.told) >= {s.name for s in self.sites}:
                    self._files.record.over()
                self._report(h.PhaseBegan("done"))
            self._report(h.JobEnded(self._job.name, self._files.run.hex(), reason, self._run.committed))

    def _farewell_after(self, error: PeerError) -> tuple[str, str]:
        """Reason and text of the bye that an error leads to; patients it names are reported here only."""
        cases = self._masks.volumes.cases if self._masks is not None else {}
        for patient, path in named_in(str(error), cases).items():
            self._report(h.PatientNamed(patient, path))
        # A disk or a rank is mended and the coordinator started again, where it resumes: sites keep dialling.
        reason = "drain" if isinstance(error, DiskTrouble | RankLost) else "failed"
        # Local paths and files stay here; sites learn the kind of trouble.
        local = isinstance(error, DataError | ConfigError)
        return reason, (
            f"the coordinator cannot continue: {told_of(error)}; see its log" if local else str(error)
        )

    # --- joining ---------------------------------------------------------------------------------------

    async def _accept(self, listener: Door) -> None:
        joining: set[asyncio.Task[None]] = set()
        try:
            while True:
                try:
                    session = await listener.accept(3600)
                except DeadlineExceeded:
                    continue
                wanted = self._work.needs_sites
                task = asyncio.create_task(
                    self._join(session) if wanted else self._farewell.turn_away(session)
                )
                joining.add(task)
                task.add_done_callback(joining.discard)
        finally:
            for task in joining:
                task.cancel()

    async def _join(self, session: Session) -> None:
        name = session.peer.site
        if self._probing is not None and not await self._probing.hold(name, session):
            return
        site = next(one for one in self.sites if one.name == name)
        joined = await site.offer_job(session)
        if joined and not self._work.needs_sites:
            # The last release came while it joined.
            await self._farewell.tell(site, COLLECTED)
        elif joined:
            having = self._matching.having([other for other in self.sites if other.patients or other is site])
            few = self._matching.few(having, site.name)
            shared = shared_with(site.name, having)
            self._report(h.SiteOverlaps(site.name, len(having[site.name]), shared, few, ADVICE))
            if self._service is not None:
                self._service.wake()

    def _bind(self, site: str, holder: bytes) -> None:
        try:
            self._files.record.bind(site, holder)
        except PeerError as error:
            # The cost of a full disk: after a restart, the first to join as this site takes its place.
            self._report(h.SiteNotBound(site, str(error)))

    # --- from the first site to the last step -------------------------------------------------------------

    async def _until_stopped(self) -> tuple[str, str]:
        """Run the job; when asked to stop, let the step under way end and write a checkpoint.

        Returns:
            Reason and text of the bye that is due.
        """
        half, step_s = self._run.half, self._settings.deadlines.step_s
        work = asyncio.create_task(while_beating(self._to_the_end(), half, self._compute, step_s))
        stopping = asyncio.create_task(self._stop.wait())
        leaving: list[asyncio.Task[None]] = []
        try:
            await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._run.draining = True
                if self._service is not None:
                    self._service.wake()
                self._report(h.DrainBegan(self.result.step))
                if self._files.opened and self._work.needs_sites:
                    leaving = [asyncio.create_task(site.wait_gone()) for site in self._team.present]
                    await asyncio.wait((work, *leaving), timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
                    gone = asyncio.gather(*leaving, return_exceptions=True)
                    await asyncio.wait((work, gone), timeout=STRAGGLER_S, return_when=asyncio.FIRST_COMPLETED)
                    # What they said before they went is heard yet.
                    await asyncio.wait((work,), timeout=HEARD_S)
                elif self._files.opened:
                    await asyncio.wait((work,), timeout=DRAIN_S)
            # A coordinator that was asked to stop does not complain that others left as well.
            if work.done() and not (self._run.draining and isinstance(work.exception(), DeadlinePassed)):
                work.result()
                if self.result.complete and not self._serving:
                    return "complete", COMPLETE
        finally:
            for task in (stopping, work, *leaving):
                task.cancel()
            await asyncio.gather(work, *leaving, return_exceptions=True)
        if self._serving:
            return "drain", "the service stops; it continues when the coordinator is started again"
        savepoints = self._work.savepoints
        if not self._files.opened or not savepoints.ready:
            return "drain", "stopped before the run began or resumed"
        # The sites may have saved by themselves. If this step is theirs as well, a restart resumes from it; it may
        # be one that not all have applied, so an older one stays.
        try:
            async with asyncio.timeout(SAVE_S):
                saved = await savepoints.save_own(spare=1)
        except TimeoutError:
            raise DeadlinePassed(
                f"the checkpoint was not written within {SAVE_S:g} s: the disk hangs"
            ) from None
        self._report(h.Drained(self._run.committed, saved))
        return "drain", f"stopped at step {self._run.committed}; the coordinator will resume there"

    async def _to_the_end(self) -> None:
        record = self._files.record
        self._report(h.PhaseBegan("gathering"))
        if record.state in ("serving", "over") and self._service is not None:
            await self._only_service(self._service)
            return
        if record.state == "serving":
            # [inference] was removed: the sites may go.
            record.farewell()
        if record.state == "farewell":
            await self._only_goodbyes()
            return
        if self._probing is not None:
            await self._choose_codings(self._probing)
        held = await self._compute.run(
            checkpoint.available, self._files.checkpoints, what="its own checkpoints", timeout=DISK_S
        )
        resumed = bool(record.patients)
        if resumed and held:
            # Its progress, for anyone who looks, or stops it again, before all sites are here.
            self.result.step = max(held)
            self._report(h.RunResumes(self.result.step, self._job.steps))
        await self._work.do(held, resumed=resumed)
        if self.result.complete:
            self.result.bytes_per_step = self._work.bytes_per_step
            self.result.seconds = time.monotonic() - self._started
            # On disk before any site is told: a site that was told has gone, and cannot be asked again.
            self._files.write(self.result)
            if self._service is None:
                record.farewell()
            else:
                record.serve()
                await self._serve_inference(self._service)

    async def _choose_codings(self, probing: Probing) -> None:
        """Measure the links and decide what `[wire]` leaves open; then the job can be offered.

        Raises:
            DeadlinePassed: not all sites came.
        """
        rates = await probing.measure(self._settings.deadlines.join_s)
        seats = {site.name: site.seats for site in self.sites}
        choice = choose(self._settings.wire, self._job, seats, rates)
        self._job = job_on_wire(self._settings, choice.codings)
        self._files.record.codings = Codings(self._job.activations, self._job.gradients)
        self._tell_codings(in_words(rates), choice.activations, choice.gradients)
        self._assemble(self._run.half)
        self._report(h.PhaseBegan("gathering"))
        self._probing = None
        probing.release()

    def _tell_codings(self, measured: str, activations: object = None, gradients: object = None) -> None:
        """What the job is offered with, and why."""
        said = (
            str(activations or shown(self._job.activations)),
            str(gradients or shown(self._job.gradients)),
        )
        self._report(h.CodingsChosen(measured, *said, terms_digest(self._job)))

    async def _serve_inference(self, service: Service) -> None:
        """SP-11.19-15: until the coordinator is asked to stop; a restart goes on with it."""
        self._serving = True
        await service.serve()

    async def _only_service(self, service: Service) -> None:
        """The run is complete; its newest weights are served to every site that comes."""
        run, record = self._run, self._files.record
        self.result = run.result = self._files.result() or self.result
        self.result.complete = True
        record.serve()
        run.seating = Seating(self._job, self._seats, record.patients)
        await self._work.savepoints.restore("the service continues with the newest weights")
        self._witness.start(
            self._files.run,
            self._job,
            schema_digest(cut_descriptors(self._job)),
            [site.party for site in self.sites],
            defences=self.defences,
            features=self._offer().features,
        )
        await self._serve_inference(service)

    async def _only_goodbyes(self) -> None:
        """The run is complete, and this coordinator died before all sites knew."""
        self.result = self._files.result() or self.result
        self.result.complete = True
        untold = [site for site in self.sites if site.name not in self._files.record.told]
        self._report(h.FarewellDue(", ".join(site.name for site in untold)))
        # Each is told when it comes: others may have been told, and be gone, without our having recorded it.
        await self._farewell.wait(self._settings.deadlines.return_s)

    async def _bye(self, reason: str, text: str) -> None:
        self.result.bytes_per_step = self.result.bytes_per_step or self._work.bytes_per_step
        if self._probing is not None:
            await self._probing.say_bye(reason, text)
        await asyncio.gather(*(self._say(site, reason, text) for site in self.sites))

    async def _say(self, site: RemoteSite, reason: str, text: str) -> None:
        if await site.say_bye(reason, text) and reason == "complete":
            self._farewell.note(site.name)
