"""The coordinator: gathers the sites a job names, trains with them step by step, evaluates, says bye.

It owns fusion, bottleneck, decoder, labels, loss and the schedule. A step is committed when every site has
applied it; checkpoints of all halves are made at committed steps only. Results go to `[output] folder`:
`metrics.jsonl` (one line a step), `result.json`, `predictions/` (masks of the patients held out).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from splitpeer.config import JobConfig, PeerConfig
from splitpeer.data.geometry import compare_geometry
from splitpeer.data.layouts import find_labels
from splitpeer.data.loader import SiteData
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.sampling import TrainingSchedule, split_patients
from splitpeer.data.volumes import Volumes
from splitpeer.defences import Release, Stack, defend, make_stack
from splitpeer.defences.key import for_peer
from splitpeer.errors import ConfigError, DataError, DeadlinePassed, JobFailed, PeerError
from splitpeer.logs import event
from splitpeer.models import build_decoder, site_seed
from splitpeer.roles.batches import TrainingStream
from splitpeer.roles.compute import Compute, defence_key, from_wire, pick_device, to_wire
from splitpeer.roles.evaluation import Plan, Scoring
from splitpeer.roles.refusals import Refusals
from splitpeer.roles.run import Result, RunFiles
from splitpeer.roles.team import Site, SiteRestarted
from splitpeer.roles.terms import cut_descriptors, job_on_wire, window_of
from splitpeer.roles.view import View
from splitpeer.roles.witness import AGENT, Witness, terms_digest
from splitpeer.training import checkpoint
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import CoordinatorHalf
from splitproto import Listener, Offer, SplitprotoError
from splitproto.constants import DEFAULT_MAX_MESSAGE
from splitproto.errors import DeadlineExceeded
from splitproto.messages import Forward, JobOffer, Progress
from splitproto.tensors import Descriptor, body_bytes, schema_digest

log = logging.getLogger(__name__)

Result_ = TypeVar("Result_")
DRAIN_S = 10.0
"""A coordinator that was asked to stop gives the step under way this long."""
STRAGGLER_S = 2.0
"""The same where sites are leaving too: the others may still finish the step."""
PROGRESS_EVERY_S = 2.0
SAVE_S = 60.0
"""A checkpoint on leaving is given up after this: a disk that hangs must not keep the process."""


class Coordinator:
    """One run of one job.

    Args:
        config: a coordinator's `peer.toml`.
        job: `job.toml`.
        stop: set to leave in good order, with a checkpoint.
        view: shown to people while it runs.
        resume: go on with the job's last run instead of a new one.
        curious: a file to record into what is sent and received.
    """

    def __init__(
        self,
        config: PeerConfig,
        job: JobConfig,
        stop: asyncio.Event,
        view: View,
        *,
        resume: bool = False,
        curious: Path | None = None,
    ) -> None:
        self._config, self._settings, self._stop, self._view = config, job, stop, view
        self._credentials = config.credentials()
        if config.network.listen is None or config.data.labels is None or config.data.salt is None:
            raise ConfigError("a coordinator needs [network] listen and [data] labels and salt")
        self._listen = config.network.listen
        self._job = job_on_wire(job)
        self._window = window_of(self._job)
        self._labels = Volumes(
            find_labels(config.data.labels, config.data.layout),
            salt=load_salt(config.data.salt),
            spacing=job.data.spacing,
            labels=config.data.convention,
            cache_mib=config.data.cache_mib,
        )
        self._files = RunFiles(config, job, resume=resume)
        self._files.prepare()
        modalities = sorted(job.sites.values())
        decoder = build_decoder(
            self._job.dimensions,
            self._job.features,
            modalities,
            self._job.levels,
            job.model.fusion,
            seed=site_seed(job.job.seed, "coordinator"),
        )
        optimiser = make_optimiser(
            decoder.parameters(), self._job.optimiser, self._job.learning_rate, self._job.weight_decay
        )
        schedule = make_schedule(optimiser, self._job.schedule, self._job.steps)
        self._half = CoordinatorHalf(decoder, optimiser, schedule, pick_device(config.runtime.device))
        self._witness = Witness(config, curious)
        self._gradient_stacks = self._make_gradient_stacks()
        self._compute = Compute(config.runtime.threads)
        self._schema = schema_digest(cut_descriptors(self._job))
        self.sites = [
            Site(
                name,
                JobOffer(self._files.run, modality, self._job, self._schema, defences=self.defences),
                job.deadlines.reconnect_s,
                self._witness,
            )
            for name, modality in sorted(job.sites.items(), key=lambda item: item[1])
        ]
        self.result = Result(
            self._job.name, self._files.run.hex(), steps=self._job.steps, sites=dict(job.sites)
        )
        self._committed = 0
        self._draining = False
        self._steps_here = 0
        self._training_octets = 0
        self._told = 0.0

    @property
    def defences(self) -> tuple[str, ...]:
        """What is done to gradients before they leave, each as it is written: the same for every site."""
        return next((stack.specs for stack in self._gradient_stacks.values()), ())

    async def run(self) -> Result:
        """Run the job to its end, or until `stop` is set.

        Raises:
            PeerError: what the user is told, with its exit code.
        """
        async with self._witness.on_duty(
            job=self._job.name,
            run=self._files.run.hex(),
            terms=terms_digest(self._job),
            sites=[f"{site.name} ({site.modality})" for site in self.sites],
        ):
            return await self._serve()

    async def _serve(self) -> Result:
        started = time.monotonic()
        offer = Offer(
            # SP-10-5: what the job needs is required, so that a site without it is told so at once.
            requires=("train", "evaluate", f"dtype.{self._job.precision}"),
            max_message=max(DEFAULT_MAX_MESSAGE, self._largest_message()),
            agent=AGENT,
        )
        try:
            async with Listener(
                self._listen,
                self._credentials,
                self._settings.allow_list(),
                offer,
                refused=Refusals(self._witness.note),
            ) as listener:
                event(log, "peer.start", role="coordinator", site=self._config.peer.site, job=self._job.name,
                      listen=listener.address, run=self._files.run.hex()[:12])  # fmt: skip
                accepting = asyncio.create_task(self._accept(listener))
                reason, text = "failed", "the coordinator stopped because of an error of its own"
                try:
                    reason, text = await self._until_stopped()
                except PeerError as error:
                    # Local paths and files stay here; sites hear the kind of trouble.
                    local = isinstance(error, DataError | ConfigError)
                    text = "the coordinator's own data cannot be used" if local else str(error)
                    raise
                finally:
                    if reason == "complete":
                        await self._bye(reason, text)
                    # A site that comes back now would be offered a job that is over.
                    accepting.cancel()
                    await asyncio.gather(accepting, return_exceptions=True)
                    if reason != "complete":
                        await self._bye(reason, text)
                    self._witness.note("job.ended", job=self._job.name, run=self._files.run.hex(), reason=reason,
                                       step=self._committed)  # fmt: skip
        except SplitprotoError as error:
            raise ConfigError(str(error)) from error
        finally:
            self._view.close()
            self._compute.close()
            self.result.seconds = time.monotonic() - started
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
                task = asyncio.create_task(by_name[session.peer.site].join(session))
                joining.add(task)
                task.add_done_callback(joining.discard)
        finally:
            for task in joining:
                task.cancel()

    async def _gather_sites(self) -> None:
        seconds = self._settings.deadlines.join_s
        waiting = {asyncio.create_task(site.joined()): site for site in self.sites}
        deadline = time.monotonic() + seconds
        try:
            while waiting:
                missing = ", ".join(f"{site.name} ({site.modality})" for site in waiting.values())
                self._view.waiting(missing)
                done, _ = await asyncio.wait(
                    waiting, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    del waiting[task]
                    task.result()
                if not done:
                    raise DeadlinePassed(
                        f"missing after {seconds:g} s: {missing}: start them, or raise join_s"
                    )
        finally:
            for task in waiting:
                task.cancel()

    def _match(self) -> tuple[list[bytes], list[bytes]]:
        """Training and validation patients: those that all sites and the labels share."""
        known = {key: self._labels.geometry(key) for key in self._labels.keys()}  # noqa: SIM118 (not a dict)
        common = set(known).intersection(*(site.patients for site in self.sites))
        event(log, "job.patients", shared=len(common), labels=len(known),
              **{site.name: len(site.patients) for site in self.sites})  # fmt: skip
        least = self._settings.data.min_patients
        if len(common) < least:
            counts = ", ".join(f"{site.name} {len(site.patients)}" for site in self.sites)
            raise JobFailed(
                f"{len(common)} patients are at all sites, {least} are needed (labels {len(known)}, {counts}): "
                "do all use the same federation.salt and patient ids?"
            )
        grids = {"labels": {key: known[key] for key in common}}
        grids |= {site.name: {key: site.patients[key] for key in common} for site in self.sites}
        try:
            compare_geometry(grids)
        except DataError as error:
            raise JobFailed(str(error)) from error
        self.result.patients = len(common)
        return split_patients(
            sorted(common), self._settings.data.validation, self._settings.job.seed, self._labels.subjects()
        )

    # --- the loop --------------------------------------------------------------------------------------

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
                self._draining = True
                event(log, "job.draining", step=self._committed)
                if self._files.opened:
                    leaving = [asyncio.create_task(site.left()) for site in self.sites]
                    await asyncio.wait((work, *leaving), timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
                    await asyncio.wait((work,), timeout=STRAGGLER_S)
            # Whoever was asked to stop does not complain that others left as well.
            if work.done() and not (self._draining and isinstance(work.exception(), DeadlinePassed)):
                work.result()
                if self.result.complete:
                    return "complete", "the job is done"
        finally:
            for task in (stopping, work, *leaving):
                task.cancel()
            await asyncio.gather(work, *leaving, return_exceptions=True)
        if not self._files.opened:
            return "drain", "stopped before the run began"
        # The sites may have saved by themselves. If this step is theirs as well, --resume goes on from it; it may
        # be one that not all have applied, so an older one stays.
        try:
            async with asyncio.timeout(SAVE_S):
                saved = await self._save_own(spare=1)
        except TimeoutError:
            raise DeadlinePassed(
                f"the checkpoint was not written within {SAVE_S:g} s: the disk hangs"
            ) from None
        event(log, "job.drained", committed=self._committed, saved=saved)
        return "drain", f"stopped at step {self._committed}; the coordinator will go on with --resume"

    async def _work(self) -> None:
        await self._gather_sites()
        self._witness.start(
            self._files.run,
            self._job,
            self._schema,
            [site.party for site in self.sites],
            defences=self.defences,
            features=frozenset.intersection(*(site.features for site in self.sites)),
        )
        training, validation = await self._compute.run(self._match)
        self.result.validation, self.result.tls = len(validation), self.sites[0].tls
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
        self._view.begin(self._job.steps, [site.name for site in self.sites])
        saved = await self._compute.run(checkpoint.latest, self._files.checkpoints)
        if saved is None:
            await self._save_own()
        if saved or any(site.applied != 0 for site in self.sites):
            await self._rollback()
        self._files.open(resumed=saved is not None)
        if saved:
            self._files.metric(step=self._committed, rollback=True)
        scored = -1
        while scored < self._job.steps and not self._draining:
            try:
                await self._all(lambda site: site.begin(self._committed, self.result.patients))
                if self._committed < self._job.steps:
                    await self._step(stream)
                if self._due(self._settings.training.checkpoint_every):
                    await self._checkpoint()
                elif self._draining and all(site.here for site in self.sites):
                    await self._checkpoint(leaving=True)
                if self._due(self._settings.evaluation.every):
                    await self._evaluate(validation)
                    scored = self._committed
            except SiteRestarted as restarted:
                event(log, "job.restarted_site", logging.WARNING, site=str(restarted))
                await self._rollback()
        self.result.complete = scored == self._job.steps

    def _due(self, every: int) -> bool:
        return self._committed == self._job.steps or (every > 0 and self._committed % every == 0)

    def _boundary(self, step: int) -> int:
        """Batches are announced up to here: sites have nothing else in hand when they save or evaluate."""
        ends = [self._job.steps, step + self._settings.training.ahead]
        pauses = (self._settings.training.checkpoint_every, self._settings.evaluation.every)
        return min(*ends, *(-(-step // every) * every for every in pauses if every))

    async def _step(self, stream: TrainingStream) -> None:
        step, began, octets = self._committed + 1, time.monotonic(), self._octets()
        until = self._boundary(step)
        await self._compute.run(stream.prepare, step - 1, until)
        forward = stream[step - 1]
        target = asyncio.create_task(self._compute.run(self._target, forward))
        try:
            arrived = await self._all(lambda site: site.activations(stream, step - 1, until, self._described))
            waited = time.monotonic() - began
            loss, gradients = await self._compute.run(self._train, arrived, await target, forward)
        finally:
            target.cancel()
        computed = time.monotonic() - began - waited
        await self._all(
            lambda site: site.gradients(step, to_wire(gradients[site.modality], self._job.precision))
        )
        # SP-11-7: a step is committed when every party has applied it.
        self._committed = self.result.step = step
        self._steps_here += 1
        self._training_octets += self._octets() - octets
        took = time.monotonic() - began
        self._view.step(step, loss, {site.name: sum(site.traffic) for site in self.sites})
        self._files.metric(step=step, loss=loss, seconds=took, waited=waited, computed=computed)
        await self._tell(step, {"loss": loss})

    async def _evaluate(self, keys: Sequence[bytes]) -> None:
        began = time.monotonic()
        settings = self._settings.evaluation
        plan = Plan.of(keys, self._labels, self._window, settings.overlap, settings.batch, self._committed)
        final = self._committed == self._job.steps
        scoring = Scoring(plan, self._labels, self._window, self._files.predictions if final else None)
        for index in range(len(plan.forwards)):
            until = index + self._settings.training.ahead
            arrived = await self._all(
                lambda site, index=index, until=until: site.activations(
                    plan.forwards, index, until, self._described
                )
            )
            predicted = await self._compute.run(self._predict, arrived)
            await self._compute.run(scoring.add, index, predicted)
            self._view.evaluating(index + 1, len(plan.forwards))
        self.result.dice = scoring.dice.result() if len(scoring.dice) else {}
        self._view.evaluated(self._committed, self.result.dice)
        self._files.metric(step=self._committed, dice=self.result.dice, seconds=time.monotonic() - began)
        event(log, "job.evaluated", step=self._committed, volumes=len(scoring.dice), **self.result.dice)
        self._told = 0.0
        await self._tell(
            self._committed, {f"dice_{region}": value for region, value in self.result.dice.items()}
        )

    async def _checkpoint(self, *, leaving: bool = False) -> None:
        step = self._committed
        digests = await self._all(lambda site: site.save(step, leaving=leaving))
        # Written last: a step that the coordinator holds, all hold.
        await self._save_own()
        shown = {site.name: digest.hex() for site, digest in zip(self.sites, digests, strict=True)}
        event(log, "job.checkpoint", step=step, **{name: digest[:12] for name, digest in shown.items()})
        self._witness.note("job.checkpoint", run=self._files.run.hex(), step=step, digests=[
            f"{name} {digest}" for name, digest in shown.items()])  # fmt: skip

    async def _save_own(self, spare: int = 0) -> int:
        """Returns the step. `spare`: older ones to keep beyond the usual, where not all may hold this one."""
        tensors, meta = await self._compute.run(self._half.state)
        keep = self._settings.training.keep_checkpoints + spare
        await self._compute.run(checkpoint.save, self._files.checkpoints, meta["step"], tensors, meta, keep)
        return int(meta["step"])

    async def _rollback(self) -> None:
        """All parties go back to the newest step that all hold; once more if a site restarts meanwhile."""
        while True:
            try:
                await self._all(Site.back)
                own = await self._compute.run(checkpoint.available, self._files.checkpoints)
                common = set(own).intersection(*(site.checkpoints for site in self.sites))
                if not common:
                    raise JobFailed(
                        "the parties have no checkpoint in common: start the job anew, without --resume"
                    )
                step = max(common)
                await self._all(lambda site, step=step: site.begin(step, self.result.patients))
                await self._all(lambda site, step=step: site.rollback(step))
                break
            except SiteRestarted as restarted:
                event(log, "job.restarted_site", logging.WARNING, site=str(restarted))
        tensors, meta, _ = await self._compute.run(checkpoint.load, self._files.checkpoints, step)
        await self._compute.run(self._half.load, tensors, meta)
        await self._compute.run(checkpoint.discard_after, self._files.checkpoints, step)
        self._committed = self.result.step = step
        if self._files.opened:
            self._files.metric(step=step, rollback=True)
        event(log, "job.rollback", logging.WARNING, step=step)

    # --- inside ----------------------------------------------------------------------------------------

    async def _all(self, verb: Callable[[Site], Awaitable[Result_]]) -> list[Result_]:
        """`verb` at all sites at once. The first error ends the others.

        Not so `SiteRestarted`: the others finish what they were asked, because a message that is half sent
        would be overtaken by the rollback that follows.
        """
        tasks = [asyncio.create_task(_coroutine(verb(site))) for site in self.sites]
        try:
            waiting = set(tasks)
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if not isinstance(task.exception(), SiteRestarted):
                        task.result()
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _train(
        self, arrived: Sequence[dict[str, np.ndarray]], target: np.ndarray, forward: Forward
    ) -> tuple[float, dict[str, dict[str, np.ndarray]]]:
        activations = self._by_modality(arrived)
        try:
            loss, gradients = self._half.step(activations, target)
        except JobFailed:
            self._blame(activations)
            raise
        release = Release(self._files.run, forward.mode, forward.step, forward.batch, forward.samples, target)
        # The decoder has learned from the true ones; what leaves is defended, for each site on its own.
        for modality, stack in self._gradient_stacks.items():
            gradients[modality] = defend(stack, gradients[modality], release)
        return loss, gradients

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
                for site, modality in self._settings.sites.items()
            }
        except ConfigError as error:
            raise ConfigError(f"{self._settings.source}: [defences] gradients: {error}") from None

    def _predict(self, arrived: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        activations = self._by_modality(arrived)
        predicted = self._half.predict(activations)
        if not np.isfinite(predicted).all():
            self._blame(activations)
            raise JobFailed("the prediction is not a finite number; lower the learning rate")
        return predicted

    def _blame(self, activations: dict[str, dict[str, np.ndarray]]) -> None:
        """Raise JobFailed that names the site whose activations are not numbers, if there is one."""
        for site in self.sites:
            for name, array in activations[site.modality].items():
                if not np.isfinite(array).all():
                    raise JobFailed(
                        f"site {site.name} sent activations ({name}) that are not finite numbers; "
                        "look at its images, or lower the learning rate"
                    )

    def _by_modality(self, arrived: Sequence[dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
        return {
            site.modality: from_wire(tensors, self._job.precision)
            for site, tensors in zip(self.sites, arrived, strict=True)
        }

    def _described(self, forward: Forward) -> tuple[Descriptor, ...]:
        return cut_descriptors(self._job, len(forward.samples))

    def _target(self, forward: Forward) -> np.ndarray:
        return SiteData(self._labels).batch(forward.samples, self._window, forward.seed, None)

    def _largest_message(self) -> int:
        """Octets of the largest body the job itself makes sites send."""
        batches = (self._job.batch, self._settings.evaluation.batch)
        return max(body_bytes(cut_descriptors(self._job, batch)) for batch in batches)

    def _octets(self) -> int:
        return sum(sum(site.traffic) for site in self.sites)

    async def _tell(self, step: int, values: dict[str, float]) -> None:
        """Figures for the sites' logs, now and then."""
        if time.monotonic() - self._told < PROGRESS_EVERY_S:
            return
        self._told = time.monotonic()
        finite = {name: value for name, value in values.items() if np.isfinite(value)}
        await asyncio.gather(*(site.tell(Progress(step, finite)) for site in self.sites))

    async def _bye(self, reason: str, text: str) -> None:
        self.result.bytes_per_step = self._training_octets // max(1, self._steps_here)
        await asyncio.gather(*(site.bye(reason, text) for site in self.sites))


async def _coroutine(awaitable: Awaitable[Result_]) -> Result_:
    return await awaitable
