"""The coordinator: gathers the sites a job names, has the loop train with them, says bye.

It owns fusion, bottleneck, decoder, labels, loss and the schedule. Results go to `[output] folder`: `metrics.jsonl`
(one line a step), `result.json`, `predictions/` (masks of the patients held out). Started again, it goes on with a
run that is not complete.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.run_files import RunFiles, RunResult
from splitpeer.coordinator.team import Team
from splitpeer.coordinator.trainer import DISK_S, Trainer
from splitpeer.daemon import happenings as h
from splitpeer.daemon.console import RunView
from splitpeer.daemon.duty import Duty
from splitpeer.daemon.refusals import Refusals
from splitpeer.daemon.sinks.console import ConsoleSink
from splitpeer.daemon.sinks.log import LogSink
from splitpeer.daemon.sinks.metrics import MetricsSink
from splitpeer.daemon.sinks.trail import TrailSink
from splitpeer.daemon.witness import AGENT, Witness, terms_digest
from splitpeer.data.directory import named_in
from splitpeer.data.findings import naming_warnings
from splitpeer.data.geometry import compare_geometry
from splitpeer.data.layouts import find
from splitpeer.data.mask_values import MaskCensus
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.sampling import TrainingSchedule, split_patients
from splitpeer.data.volumes import Volumes
from splitpeer.defences.key import for_peer
from splitpeer.defences.stack import Stack, make_stack
from splitpeer.errors import (
    ConfigError,
    DataError,
    DeadlinePassed,
    DiskTrouble,
    JobFailed,
    PeerError,
    told_of,
)
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.compute import Compute, defence_key, pick_device
from splitpeer.federation.files import counted, look, tell
from splitpeer.federation.overlap import ADVICE, pairwise, shared_with
from splitpeer.federation.seats import modality_by_site, seats_of
from splitpeer.federation.terms import cut_descriptors, job_on_wire, seat_descriptors, window_of
from splitpeer.models import build_decoder, site_seed
from splitpeer.models.registry import backbone_of
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.storage import checkpoint
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import CoordinatorHalf
from splitproto import Listener, Offer, Session
from splitproto.constants import DEFAULT_MAX_MESSAGE
from splitproto.errors import DeadlineExceeded, SetupError
from splitproto.messages import JobOffer
from splitproto.tensors import body_bytes, schema_digest

log = logging.getLogger(__name__)

COMPLETE = "the job is done"
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
        resume: True: go on with the job's last run. False: a new one. None: go on with the last, if there is one of
            the same terms; if that is over, `run` gives its result again.
        duty: what `serve` holds already; None: one of its own.
        curious: a file to record into what is sent and received.
        verify: read every mask to its end before sites are waited for, not only its header.
        readmit: sites whose part in the run goes to the next that joins with their certificate (SP-11.14-5).
    """

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
    ) -> None:
        self._config, self._settings, self._stop, self._view = config, job, stop, view
        self._credentials = config.credentials()
        if config.network.listen is None or config.data.labels is None or config.data.salt is None:
            raise ConfigError("a coordinator needs [network] listen and [data] labels and salt")
        self._listen = config.network.listen
        self._job = job_on_wire(job)
        self._window = window_of(self._job)
        found = find(config.data.labels, config.data.layout, None)
        self._findings = naming_warnings(config.data.labels, [found])
        task = job.task.task(config.data.convention)
        census = MaskCensus(task) if verify else None
        self._labels = Volumes(
            found.cases,
            salt=load_salt(config.data.salt),
            spacing=job.data.spacing,
            labels=task,
            cache_mib=config.data.cache_mib,
            census=census,
            rules=config.data.rules(),
        )
        self._unusable: dict[bytes, str] = {}
        look(self._labels, self._unusable, voxels=verify)
        if census is not None:
            self._findings += census.warnings()
        self._duty = duty or Duty(config)
        self._files = RunFiles(config, job, resume=resume, report=self._duty.report)
        self._files.prepare()
        for name in readmit:
            if name not in job.sites:
                raise ConfigError(f"--readmit {name}: {job.source} [sites] names no such site")
            self._files.record.readmit(name)
        held = modality_by_site(job)
        seats = seats_of(job)
        decoder = build_decoder(
            backbone_of(self._job),
            seats.names,
            job.model.fusion,
            task.channels,
            exclusive=task.exclusive,
            seed=site_seed(job.job.seed, "coordinator"),
        )
        optimiser = make_optimiser(
            decoder.parameters(), self._job.optimiser, self._job.learning_rate, self._job.weight_decay
        )
        schedule = make_schedule(optimiser, self._job.schedule, self._job.steps)
        device = pick_device(config.runtime.device)
        self._half = CoordinatorHalf(decoder, optimiser, schedule, device, exclusive=task.exclusive)
        self._witness = Witness(config, curious)
        everywhere = self._duty.report.to(
            MetricsSink(self._files), ConsoleSink(view), TrailSink(self._witness.note)
        )
        self._everywhere, self._report = everywhere, everywhere.to(LogSink(log))
        self._gradient_stacks = self._make_gradient_stacks()
        self._compute = Compute(config.runtime.threads)
        self._schema = schema_digest(cut_descriptors(self._job))
        self.sites = [
            RemoteSite(
                name,
                JobOffer(
                    self._files.run,
                    seats.of(name),
                    self._job,
                    schema_digest(seat_descriptors(self._job, seats.of(name))),
                    defences=self.defences,
                ),
                job.absence.per_site_s.get(name, job.deadlines.return_s),
                self._witness,
                everywhere,
                self._labels.salt_check,
            )
            for name, _ in sorted(held.items(), key=lambda item: item[1])
        ]
        for site in self.sites:
            site.holding.restore(self._files.record.holders.get(site.name), self._bind)
        self._team = Team(self.sites, job.absence, everywhere)
        self.result = RunResult(self._job.name, self._files.run.hex(), steps=self._job.steps, sites=held)
        self._trainer = Trainer(
            self._job, job, self._half, self._team, self._labels, self._compute, self._files, self.result,
            self._gradient_stacks, report=everywhere,
        )  # fmt: skip

    @property
    def defences(self) -> tuple[str, ...]:
        """What is done to gradients before they leave, each as it is written: the same for every site."""
        return next((stack.specs for stack in self._gradient_stacks.values()), ())

    async def run(self) -> RunResult:
        """Run the job to its end, or until `stop` is set.

        Raises:
            PeerError: what the user is told, with its exit code.
        """
        run = self._files.run.hex()
        on_duty = self._duty.on_duty(
            self._witness,
            job=self._job.name,
            run=run,
            terms=terms_digest(self._job),
            sites=[f"{site.name} ({site.modality})" for site in self.sites],
        )
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(on_duty)
            except BaseException:
                # Such as a trail that cannot be begun: nobody else would end these.
                self._view.close()
                self._compute.close()
                raise
            self._report(h.RunChosen(self._job.name, run, self._job.steps, self._settings.absence.mode))
            if self._files.record.state == "over":
                return self._was_complete()
            return await self._serve()

    def _was_complete(self) -> RunResult:
        """The run ended, and all sites know: whoever starts this coordinator again gets its results again."""
        self.result = self._files.result() or self.result
        self._view.close()
        self._compute.close()
        self._report(h.AlreadyComplete(self._job.name, self._files.run.hex(), self.result.step))
        return self.result

    async def _serve(self) -> RunResult:
        self._started = time.monotonic()
        offer = Offer(
            # SP-10-5, SP-10-8: what the job needs is required; a site without `evaluate` trains all the same.
            requires=(
                "train",
                f"dtype.{self._job.precision}",
                *(("average",) if self._job.average_every else ()),
            ),
            max_message=max(DEFAULT_MAX_MESSAGE, self._largest_message()),
            agent=AGENT,
        )
        try:
            async with Listener(
                self._listen,
                self._credentials,
                self._settings.allow_list(),
                offer,
                timing=self._config.network.timing(),
                refused=Refusals(self._everywhere),
            ) as listener:
                self._report(
                    h.CoordinatorStarted(
                        self._config.peer.site,
                        self._job.name,
                        listener.address,
                        self._files.run.hex(),
                        self._labels.salt_check.hex(),
                    )
                )
                for cause in self._findings:
                    self._report(h.DataWarning(cause))
                tell(self._labels)
                accepting = asyncio.create_task(self._accept(listener))
                began_at = self._files.record.state
                reason, text = "failed", "the coordinator stopped because of an error of its own"
                try:
                    reason, text = await self._until_stopped()
                except PeerError as error:
                    for patient, path in named_in(str(error), self._labels.cases).items():
                        self._report(h.PatientNamed(patient, path))
                    # Local paths and files stay here; sites hear the kind of trouble.
                    local = isinstance(error, DataError | ConfigError)
                    why = f"the coordinator cannot go on: {told_of(error)}; its log has the details"
                    if isinstance(error, DiskTrouble):
                        # Started again, it goes on: sites keep dialling.
                        reason = "drain"
                    text = why if local else str(error)
                    raise
                finally:
                    if reason == "complete":
                        await self._bye(reason, text)
                        # Whoever was away in that moment hears it from the next start.
                        if began_at == "farewell" or set(self._files.record.told) >= {
                            s.name for s in self.sites
                        }:
                            self._files.record.over()
                        self._report(h.PhaseBegan("done"))
                    # A site that comes back now would be offered a job that is over.
                    accepting.cancel()
                    await asyncio.gather(accepting, return_exceptions=True)
                    if reason != "complete":
                        await self._bye(reason, text)
                    self._report(
                        h.JobEnded(self._job.name, self._files.run.hex(), reason, self._trainer.committed)
                    )
        except SetupError as error:
            raise ConfigError(str(error)) from error
        finally:
            self._view.close()
            self._compute.close()
            if not self.result.complete:
                self.result.seconds = time.monotonic() - self._started
                # Also of a run that failed: what lies there must not be taken for another run's.
                if self._files.opened:
                    self._files.write(self.result)
        return self.result

    # --- joining ---------------------------------------------------------------------------------------

    async def _accept(self, listener: Listener) -> None:
        by_name = {site.name: site for site in self.sites}
        joining: set[asyncio.Task[None]] = set()
        try:
            while True:
                try:
                    session = await listener.accept(3600)
                except DeadlineExceeded:
                    continue
                task = asyncio.create_task(self._join(by_name[session.peer.site], session))
                joining.add(task)
                task.add_done_callback(joining.discard)
        finally:
            for task in joining:
                task.cancel()

    async def _join(self, site: RemoteSite, session: Session) -> None:
        if await site.offer_job(session):
            having = self._having([other for other in self.sites if other.patients or other is site])
            few = (
                len(set(having["labels"]).intersection(having[site.name])) < self._settings.data.min_patients
            )
            shared = shared_with(site.name, having)
            self._report(h.SiteOverlaps(site.name, len(having[site.name]), shared, few, ADVICE))

    def _having(self, sites: Sequence[RemoteSite]) -> dict[str, set[bytes]]:
        """Whom each party has, usable or not."""
        return {"labels": set(self._labels.keys())} | {
            site.name: {*site.patients, *site.unusable} for site in sites
        }

    def _bind(self, site: str, holder: bytes) -> None:
        try:
            self._files.record.bind(site, holder)
        except PeerError as error:
            # A full disk costs this much: after a restart, the first to join as this site has its part.
            self._report(h.SiteNotBound(site, str(error)))

    def _match(self) -> tuple[list[bytes], list[bytes]]:
        """Training and validation patients: those that all sites and the labels share, or of the run gone on with."""
        # SP-11.13-11.
        known = look(self._labels, unusable := self._unusable)
        here = self._team.present
        common = set(known).intersection(*(site.patients for site in here))
        counted_at = {site.name: len(site.patients) for site in here}
        self._report(h.PatientsMatched(len(common), len(known), counted_at))
        if of_run := set(self._files.record.patients):
            # Also where a site is absent: the run keeps its patients, but for those that are withdrawn, or will be.
            out = {w.key for w in self._files.record.withdrawn}
            if lost := len(of_run - common - out.union(unusable, *(site.unusable for site in here))):
                raise JobFailed(
                    f"{lost} of the run's {len(of_run)} patients are not at all sites any more: bring them back, "
                    "or start with --fresh"
                )
            common = of_run
        least = self._settings.data.min_patients
        if len(common) < least:
            have = [(site.name, site.patients, site.unusable) for site in here]
            counts = ", ".join(
                f"{name} {len(usable)}" + (f" and not usable {counted(bad.values())}" if bad else "")
                for name, usable, bad in [("labels", known, unusable), *have]
            )
            raise JobFailed(
                f"{len(common)} patients are at all sites, {least} are needed ({counts}; in common: "
                f"{pairwise(self._having(here))}): {ADVICE}"
            )
        grids = {name: {key: grid for key, grid in has.items() if key in common}
                 for name, has in [("labels", known), *((site.name, site.patients) for site in here)]}  # fmt: skip
        try:
            compare_geometry(grids)
        except DataError as error:
            raise JobFailed(str(error)) from error
        for site in self.sites:
            site.expect(grids["labels"])
        self.result.patients = len(common)
        return split_patients(
            sorted(common), self._settings.data.validation, self._settings.job.seed, self._labels.subjects()
        )

    # --- from the first site to the last step -------------------------------------------------------------

    async def _until_stopped(self) -> tuple[str, str]:
        """Run the job; when asked to stop, let the step under way end and write a checkpoint.

        Returns:
            Reason and text of the bye that is due.
        """
        work = asyncio.create_task(self._work())
        stopping = asyncio.create_task(self._stop.wait())
        leaving: list[asyncio.Task[None]] = []
        try:
            await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._trainer.draining = True
                self._report(h.DrainBegan(self.result.step))
                if self._files.opened:
                    leaving = [asyncio.create_task(site.wait_gone()) for site in self._team.present]
                    await asyncio.wait((work, *leaving), timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
                    gone = asyncio.gather(*leaving, return_exceptions=True)
                    await asyncio.wait((work, gone), timeout=STRAGGLER_S, return_when=asyncio.FIRST_COMPLETED)
                    # What they said before they went is heard yet.
                    await asyncio.wait((work,), timeout=HEARD_S)
            # A coordinator that was asked to stop does not complain that others left as well.
            if work.done() and not (self._trainer.draining and isinstance(work.exception(), DeadlinePassed)):
                work.result()
                if self.result.complete:
                    return "complete", COMPLETE
        finally:
            for task in (stopping, work, *leaving):
                task.cancel()
            await asyncio.gather(work, *leaving, return_exceptions=True)
        if not self._files.opened or not self._trainer.ready:
            return "drain", "stopped before the run began, or went on"
        # The sites may have saved by themselves. If this step is theirs as well, a restart goes on from it; it may
        # be one that not all have applied, so an older one stays.
        try:
            async with asyncio.timeout(SAVE_S):
                saved = await self._trainer.save_own(spare=1)
        except TimeoutError:
            raise DeadlinePassed(
                f"the checkpoint was not written within {SAVE_S:g} s: the disk hangs"
            ) from None
        self._report(h.Drained(self._trainer.committed, saved))
        return "drain", f"stopped at step {self._trainer.committed}; the coordinator will go on with it"

    async def _work(self) -> None:
        record = self._files.record
        self._report(h.PhaseBegan("gathering"))
        if record.state == "farewell":
            await self._only_goodbyes()
            return
        held = await self._compute.run(
            checkpoint.available, self._files.checkpoints, what="its own checkpoints", timeout=DISK_S
        )
        resumed = bool(record.patients)
        if resumed and held:
            # Where it stands, for anyone who looks, or stops it again, before all are here.
            self.result.step = max(held)
            self._report(h.RunResumes(self.result.step, self._job.steps))
        await self._team.gather(
            self._settings.deadlines.join_s,
            lambda names: self._report(h.SitesAwaited(names)),
            all_needed=not record.patients,
        )
        here = self._team.present
        self._witness.start(
            self._files.run,
            self._job,
            self._schema,
            [site.party for site in self.sites],
            defences=self.defences,
            features=frozenset.intersection(*(site.features for site in here)),
        )
        training, validation = await self._compute.run(
            self._match, what="the masks' headers to be read", timeout=DISK_S
        )
        self.result.validation, self.result.tls = len(validation), here[0].tls
        stream = TrainingStream(
            TrainingSchedule(
                training,
                self._labels,
                window=self._window,
                batch=self._job.batch,
                steps=self._job.steps,
                seed=self._settings.job.seed,
                positive_fraction=self._settings.data.positive_fraction,
            ),
            self._settings.data.augment,
        )
        absent = [site.name for site in self._team.absent]
        self._report(h.RunBegan(self._job.steps, [site.name for site in here], absent))
        if resumed and not held:
            raise DataError(
                f"no whole checkpoint of the run is left in {self._files.checkpoints}: bring one back, or start "
                "with --fresh"
            )
        if not resumed:
            await self._trainer.start()
        self._files.open(resumed=resumed, patients=[*training, *validation])
        await self._trainer.run(stream, validation, held if resumed else ())
        if self.result.complete:
            self.result.bytes_per_step = self._trainer.bytes_per_step
            self.result.seconds = time.monotonic() - self._started
            # On disk before anybody is told: a site that was told has gone, and cannot be asked again.
            self._files.write(self.result)
            record.farewell()

    async def _only_goodbyes(self) -> None:
        """The run is complete, and this coordinator died before all sites knew."""
        self.result = self._files.result() or self.result
        self.result.complete = True
        untold = [site for site in self.sites if site.name not in self._files.record.told]
        self._report(h.FarewellDue(", ".join(site.name for site in untold)))
        # Each hears it as it comes: others may have been told, and be gone, without our having noted it.
        waiting = [asyncio.create_task(self._farewell(site)) for site in untold]
        if waiting:
            await asyncio.wait(waiting, timeout=self._settings.deadlines.return_s)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    def _make_gradient_stacks(self) -> dict[str, Stack]:
        """By modality, each with a key of its own; none where the job names no defences.

        Raises:
            ConfigError: a defence of a level that the job does not send; or see `defence_key`.
        """
        written = self._settings.defences.gradients
        if not written:
            return {}
        key = defence_key(self._config)
        channels = {described.name: described.shape[1] for described in cut_descriptors(self._job)}
        try:
            return {
                modality: make_stack(
                    written,
                    key=for_peer(key, site),
                    channels=channels,
                    dimensions=self._job.dimensions,
                    place="gradients",
                )
                for site, modality in modality_by_site(self._settings).items()
            }
        except ConfigError as error:
            raise ConfigError(f"{self._settings.source}: [defences] gradients: {error}") from None

    def _largest_message(self) -> int:
        """Octets of the largest body the job itself makes sites send."""
        batches = (self._job.batch, self._settings.evaluation.batch)
        return max(body_bytes(cut_descriptors(self._job, batch)) for batch in batches)

    async def _bye(self, reason: str, text: str) -> None:
        self.result.bytes_per_step = self.result.bytes_per_step or self._trainer.bytes_per_step
        told = self._files.record.told
        left = [site for site in self.sites if site.here or site.name not in told]
        await asyncio.gather(*(self._say(site, reason, text) for site in left))

    async def _farewell(self, site: RemoteSite) -> None:
        await site.wait_joined()
        await self._say(site, "complete", COMPLETE)

    async def _say(self, site: RemoteSite, reason: str, text: str) -> None:
        if await site.say_bye(reason, text) and reason == "complete":
            self._files.record.farewell([site.name])
