"""The coordinator's loop over the steps of a job: train, save, evaluate, go back, catch up.

A step is committed when every site that takes part has applied it; checkpoints of all halves are made at committed
steps only. Knows sites (`team`) and the coordinator's own half, and neither listener nor signals.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from splitpeer.coordinator.memory import SiteRestarted
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.run_files import RunFiles, RunResult
from splitpeer.coordinator.team import Team
from splitpeer.coordinator.withdrawals import Withdrawals
from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.log import LogSink
from splitpeer.daemon.sinks.progress import ProgressMessages
from splitpeer.data.loader import SiteData
from splitpeer.data.volumes import Volumes
from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import Stack
from splitpeer.errors import DataError, DiskTrouble, JobFailed, PatientUnusable
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.compute import Compute
from splitpeer.federation.evaluation import Plan, Scoring
from splitpeer.federation.files import note
from splitpeer.federation.precision import from_wire, to_wire
from splitpeer.federation.terms import cut_descriptors, window_of
from splitpeer.logs import handle
from splitpeer.settings.job import JobConfig
from splitpeer.storage import checkpoint
from splitpeer.training.dropout import left_out
from splitpeer.training.split_round import Place, fused_step
from splitpeer.training.split_step import CoordinatorHalf
from splitproto.causes import OF_A_PATIENT
from splitproto.errors import printable
from splitproto.messages import Forward, Job, Missing, Progress, Unusable, Withdraw
from splitproto.tensors import Array, Descriptor

log = logging.getLogger(__name__)

UNSAVED = 2
"""Checkpoints in a row that a site may fail to write before a run that can do without it does."""

DISK_S = 600.0
"""Reading or writing a checkpoint, at most."""
ROOM_S = 5.0
"""Pause before a full disk is tried again, at most."""

Arrived = Mapping[RemoteSite, Mapping[str, Array]]
UnusableBySite = Mapping[RemoteSite | None, Sequence[Unusable]]
"""Patients that cannot be used, by whose files they are: a site's, or (None) the coordinator's own masks."""


class Trainer:
    """The steps of one run, from wherever the parties are to the last one.

    Args:
        job: as the sites know it.
        settings: `job.toml`.
        half: fusion and decoder.
        team: the sites, joined.
        labels: the masks.
        files: where results and checkpoints go.
        gradient_stacks: by modality, what is done to gradients before they leave.
    """

    def __init__(
        self,
        job: Job,
        settings: JobConfig,
        half: CoordinatorHalf,
        team: Team,
        labels: Volumes,
        compute: Compute,
        files: RunFiles,
        result: RunResult,
        gradient_stacks: Mapping[str, Stack],
        *,
        report: h.Reporter,
    ) -> None:
        self._job, self._settings, self._half, self._team = job, settings, half, team
        self._labels, self._compute, self._files, self._result = labels, compute, files, result
        self._gradient_stacks = gradient_stacks
        self._report, self._progress = report.to(LogSink(log)), ProgressMessages()
        self._window = window_of(job)
        self._withdrawals = Withdrawals(files.record, settings.data)
        self._bad_masks: dict[bytes, str] = {}
        self._last_unusable = ""
        self._held: tuple[int, ...] = ()  # own checkpoints, each of a step that all present held
        self.ready = False
        """Its half is that of `committed`: of a new run, or read from a checkpoint."""
        self._missing: dict[RemoteSite, str] = {}  # as the sites were told last
        self._steps_here = 0
        self._octets_here = 0
        self._counted: int | None = (
            None  # octets on the wire up to the last commit, if training went on since
        )
        self.committed = 0
        """The newest committed step."""
        self.draining = False
        """Set to end after the step under way."""

    @property
    def bytes_per_step(self) -> int:
        """Octets on the wire, all sites, per training step made by this process."""
        return self._octets_here // max(1, self._steps_here)

    async def run(
        self, stream: TrainingStream, validation: Sequence[bytes], held: Collection[int] = ()
    ) -> None:
        """Go on until the last step is committed and scored, or `draining` is set.

        Args:
            held: steps of its own checkpoints, where a run is gone on with.

        Raises:
            JobFailed, DeadlinePassed, DataError, ConfigError: the run cannot go on.
        """
        self._held = self._held or tuple(sorted(held))
        self._note_withdrawals(stream)
        if not self.ready or any(site.applied != 0 for site in self._team.present):
            for site in self._team.sites:
                site.set_committed(max(self._held, default=0))
            await self._rollback(stream, "" if self.ready else "the coordinator was started again")
        scored = -1
        while scored < self._job.steps and not self.draining:
            try:
                await self._team.muster(self.committed, self._patients)
                await self._team.ask_all(lambda site: site.begin(self.committed, self._patients))
                await self._tell_missing()
                if self.committed < self._job.steps:
                    while unusable := await self._step(stream):
                        await self._withdraw(unusable, stream)
                if self._due(self._settings.training.checkpoint_every):
                    saved = await self._checkpoint()
                    # The trained weights are not to be lost when everybody leaves.
                    if not saved and self.committed == self._job.steps and not await self._insist():
                        break
                elif self.draining and all(site.here for site in self._team.present):
                    await self._checkpoint(leaving=True)
                if self._due(self._settings.evaluation.every):
                    await self._evaluate(validation, stream)
                    scored = self.committed
            except SiteRestarted as restarted:
                self._report(h.SiteForgot(str(restarted)))
                await self._rollback(stream, f"{restarted} came back without its memory")
                self._counted = None
        self._result.complete = scored == self._job.steps

    async def start(self) -> None:
        """A new run: its beginning is what can be gone back to. Raises DataError."""
        self.ready = True
        await self.save_own()

    async def save_own(self, *, spare: int = 0) -> int:
        """Write the coordinator's half; returns its step.

        Args:
            spare: older ones to keep beyond the usual, where not all sites may hold this one.

        Raises:
            DataError: it cannot be written; those from before are as they were.
        """
        tensors, meta = await self._compute.run(self._half.state, what="its own state")
        step = int(meta["step"])
        most = self._settings.training.keep_checkpoints + spare
        keep = [held for held in self._held if held != step][-(most - 1) :] if most > 1 else []
        # What the metrics tell of steps before this one must not be lost when the run goes on from here.
        await self._compute.run(self._files.sync, what="the metrics to be written", timeout=DISK_S)
        await self._compute.run(
            checkpoint.save, self._files.checkpoints, step, tensors, meta, keep,
            what=f"its own checkpoint of step {step}", timeout=DISK_S,
        )  # fmt: skip
        self._held = (*keep, step)
        self._report(h.CheckpointsHeld(self._held))
        return step

    # --- a step ----------------------------------------------------------------------------------------

    def _due(self, every: int) -> bool:
        return self.committed == self._job.steps or (every > 0 and self.committed % every == 0)

    def _boundary(self, step: int) -> int:
        """Batches are announced up to here: sites have nothing else in hand when they save or evaluate."""
        ends = [self._job.steps, step + self._settings.training.ahead]
        pauses = (self._settings.training.checkpoint_every, self._settings.evaluation.every)
        return min(*ends, *(-(-step // every) * every for every in pauses if every))

    def _sitting_out(self, step: int) -> frozenset[str]:
        """Modalities that are here and sit this step out (SP-11-37)."""
        present = [site.modality for site in self._team.present]
        return left_out(self._settings.job.seed, step, present, self._settings.training.modality_dropout)

    def _announced_until(self, site: RemoteSite, step: int, until: int) -> int:
        """What comes behind a batch that the site sits out is not announced to it yet."""
        ahead = range(step + 1, until + 1)
        return next((later - 1 for later in ahead if site.modality in self._sitting_out(later)), until)

    async def _step(self, stream: TrainingStream) -> UnusableBySite:
        """Make the next step; it is not made where patients in it cannot be used, and these are returned."""
        step, began = self.committed + 1, time.monotonic()
        if self._counted is None:
            self._counted = self._octets()
        self._report(h.TrainingBegan(self.committed, self._job.steps))
        until = self._boundary(step)
        try:
            await self._computed(stream.prepare, step - 1, until, what="the masks of the next batches")
        except PatientUnusable as error:
            return self._own(error)
        forward = stream[step - 1]
        target = asyncio.create_task(self._computed(self._target, forward, what="the masks of a batch"))
        out = self._sitting_out(step)
        unusable: UnusableBySite = {}
        try:
            answers = await self._team.ask_all(
                lambda site: site.compute(
                    stream, step - 1, self._announced_until(site, step, until), self._described(forward)
                ),
                [site for site in self._team.present if site.modality not in out],
            )
            arrived, unusable = _sorted(answers)
            waited = time.monotonic() - began
            wanted = await target
            if unusable:
                return unusable
            loss, gradients = await self._trained(arrived, wanted, forward)
        except PatientUnusable as error:
            return {**self._own(error), **unusable}
        finally:
            target.cancel()
            await asyncio.gather(target, return_exceptions=True)
        computed = time.monotonic() - began - waited
        precision = self._job.precision
        # SP-11-31: who did not take part is told to count on.
        await self._team.ask_all(
            lambda site: (
                site.apply(step, to_wire(gradients[site.modality], precision))
                if site in arrived
                else site.advance(step)
            )
        )
        # SP-11-7: a step is committed when every party has applied it.
        self.committed = self._result.step = step
        for site in self._team.sites:
            site.set_committed(step)
        self._steps_here += 1
        # From commit to commit: the next activations may come at once.
        counted, self._counted = self._counted, self._octets()
        self._octets_here += self._counted - counted
        without = {site.modality for site in self._team.sites if site not in arrived}
        await self._tell(self._committed(loss, without, time.monotonic() - began, waited, computed))
        return {}

    def _committed(
        self, loss: float, without: Collection[str], seconds: float, waited: float, computed: float
    ) -> h.StepCommitted:
        """What there is to tell of the step; who was absent from it is counted."""
        away = [site for site in self._team.absent if site.modality in without]
        for site in away:
            self._result.absences[site.name] = self._result.absences.get(site.name, 0) + 1
        return h.StepCommitted(
            self.committed,
            loss,
            sorted(without),
            sorted({site.modality for site in away}),
            seconds,
            waited,
            computed,
            {site.name: sum(site.traffic) for site in self._team.sites},
        )

    async def _trained(
        self, arrived: Arrived, target: np.ndarray, forward: Forward
    ) -> tuple[float, dict[str, dict[str, np.ndarray]]]:
        """The decoder's step; unless all are needed, without the sites whose values are not numbers."""
        while True:
            try:
                return await self._computed(
                    self._train, arrived, target, forward, what=f"step {forward.step} of the decoder"
                )
            except JobFailed:
                if not await self._blamed(arrived):
                    raise

    def _train(
        self, arrived: Arrived, target: np.ndarray, forward: Forward
    ) -> tuple[float, dict[str, dict[str, np.ndarray]]]:
        release = Release(self._files.run, forward.mode, forward.step, forward.batch, forward.samples)
        activations = {
            Place(site.name, site.modality): from_wire(tensors, self._job.precision)
            for site, tensors in arrived.items()
        }
        stacks = {Place(site.name, site.modality): stack for site in self._team.sites
                  if (stack := self._gradient_stacks.get(site.modality)) is not None}  # fmt: skip
        loss, gradients = fused_step(self._half, activations, target, release, stacks)
        return loss, {place.seat: arrays for place, arrays in gradients.items()}

    # --- evaluation ------------------------------------------------------------------------------------

    async def _evaluate(self, keys: Sequence[bytes], stream: TrainingStream) -> None:
        began = time.monotonic()
        self._counted = None
        if not self._evaluating():
            self._report(h.EvaluationSkipped(self.committed))
            return
        self._report(h.PhaseBegan("evaluating"))
        while not isinstance(volumes := await self._evaluate_with(self._evaluating(), keys), int):
            # SP-11.13-7, and a score is one of the same modalities from the first patient to the last. What was
            # announced is void.
            if volumes:
                await self._withdraw(volumes, stream)
            else:
                await self._team.ask_all(lambda site: site.advance(self.committed))
        await self._tell(
            h.Evaluated(
                self.committed,
                volumes,
                self._result.dice,
                self._result.modalities,
                self._result.missing,
                self._result.hd95,
                self._result.volume_ml,
                time.monotonic() - began,
            )
        )

    def _evaluating(self) -> list[RemoteSite]:
        """SP-10-8: a site without the feature trains, and evaluations are made without it."""
        return [site for site in self._team.present if "evaluate" in site.features]

    async def _evaluate_with(
        self, sites: Sequence[RemoteSite], keys: Sequence[bytes]
    ) -> int | UnusableBySite:
        """Score with these sites: how many volumes; or the patients that cannot be used, nobody if one of the sites
        was left out meanwhile."""
        try:
            left = [key for key in keys if key not in self._withdrawals.keys]
            # The last ones (none: all), as the demonstration records and attacks the first.
            some = self._settings.evaluation.sample if self.committed < self._job.steps else 0
            return await self._score(sites, left[-some:])
        except PatientUnusable as error:
            return self._own(error)

    async def _score(self, sites: Sequence[RemoteSite], keys: Sequence[bytes]) -> int | UnusableBySite:
        settings = self._settings.evaluation
        plan = Plan.of(keys, self._labels, self._window, settings.overlap, settings.batch, self.committed)
        final = self.committed == self._job.steps
        modalities = sorted(site.modality for site in sites)
        masks = self._files.predictions if final else None
        # One more score without each, of the same activations.
        without = modalities if settings.missing and len(modalities) > 1 else []
        scorings = {
            "": Scoring(plan, self._labels, self._window, masks, made_from=modalities, measure=final),
            **{modality: Scoring(plan, self._labels, self._window, None) for modality in without},
        }
        for index in range(len(plan.forwards)):
            until = index + self._settings.training.ahead
            answers = await self._team.ask_all(
                lambda site, index=index, until=until: site.compute(
                    plan.forwards, index, until, self._described(plan.forwards[index])
                ),
                sites,
            )
            arrived, unusable = _sorted(answers)
            if unusable or len(arrived) < len(sites):
                return unusable
            for modality, scoring in scorings.items():
                try:
                    predicted = await self._computed(
                        self._predict, arrived, modality, what=f"the prediction of batch {index}"
                    )
                except JobFailed:
                    if not await self._blamed(arrived):
                        raise
                    return {}
                await self._computed(scoring.add, index, predicted, what=f"the score of batch {index}")
            self._report(h.BatchScored(index + 1, len(plan.forwards)))
        scores = {name: s.dice.result() if len(s.dice) else {} for name, s in scorings.items()}
        self._result.dice, self._result.modalities = scores.pop(""), modalities
        self._result.missing = scores
        if (surfaces := scorings[""].surfaces) is not None and len(surfaces):
            self._result.hd95, self._result.volume_ml = surfaces.distances(), surfaces.volumes()
        return len(scorings[""].dice)

    def _predict(self, arrived: Arrived, missing: str) -> np.ndarray:
        """Probabilities of what arrived, without the modality `missing` if one is named."""
        activations = self._by_modality(arrived)
        activations.pop(missing, None)
        absent = [site.modality for site in self._team.sites if site.modality not in activations]
        predicted = self._half.predict(activations, absent)
        if not np.isfinite(predicted).all():
            raise JobFailed("the prediction is not a finite number; lower the learning rate")
        return predicted

    # --- checkpoints -----------------------------------------------------------------------------------

    async def _insist(self) -> bool:
        """Save the last step: again until there is room, as long as a site is waited for; False if draining first.

        Raises:
            DiskTrouble: there is none.
        """
        loop = asyncio.get_running_loop()
        patience = self._settings.deadlines.return_s
        ends = loop.time() + patience
        self._report(h.Awaited("room for the checkpoint of the last step", patience))
        while not self.draining:
            await asyncio.sleep(min(ROOM_S, patience / 10))
            if await self._checkpoint():
                self._report(h.NotAwaited())
                return True
            if loop.time() > ends:
                raise DiskTrouble(
                    f"the checkpoint of the last step was not written by all within {patience:g} s"
                    f"{self._who_could_not()}: make room there and start again, the run goes on"
                )
        return False

    def _who_could_not(self) -> str:
        names = ", ".join(site.name for site in self._team.present if site.unsaved)
        return f" (not by {names})" if names else ""

    async def _checkpoint(self, *, leaving: bool = False) -> bool:
        """Have all halves of the committed step written; whether they were."""
        step, self._counted = self.committed, None
        self._report(h.PhaseBegan("saving"))
        most = self._settings.training.keep_checkpoints
        keep = [held for held in self._held if held < step][-most:]
        digests = await self._team.ask_all(lambda site: site.save(step, keep, leaving=leaving))
        for site in [site for site, digest in digests.items() if digest is None]:
            if site.unsaved >= UNSAVED and not self._team.all_needed:
                self._team.leave_out(site, f"it could not write {site.unsaved} checkpoints in a row")
                del digests[site]
        if failed := [site.name for site, digest in digests.items() if digest is None]:
            # SP-11-32: not a step that all hold, so it does not count; those from before do.
            self._report(h.CheckpointMissed(step, failed))
            return False
        try:
            # SP-11-13: written last: a step that the coordinator holds, all hold.
            await self.save_own()
        except DataError as error:
            self._report(h.CheckpointMissed(step, cause=str(error)))
            return False
        for site in digests:
            site.forgive()
        shown = {site.name: (digest or b"").hex() for site, digest in digests.items()}
        self._report(h.CheckpointCommitted(self._files.run.hex(), step, shown))
        return True

    async def _rollback(self, stream: TrainingStream, cause: str) -> None:
        """All parties go back to the newest step that all hold; once more if a site restarts meanwhile.

        Args:
            stream: of the run; withdrawals after the step are undone in it.
            cause: for the log; empty: a site holds steps of this run that the coordinator does not.
        """
        cause = cause or "a site is at a later step than the coordinator"
        before = self.committed
        self._report(h.PhaseBegan("rolling back"))
        while True:
            try:
                await self._team.ask_all(RemoteSite.reach)
                own = await self._compute.run(
                    checkpoint.available, self._files.checkpoints, what="its own checkpoints", timeout=DISK_S
                )
                common = set(own).intersection(*(site.checkpoints for site in self._team.present))
                if not common:
                    self._leave_out_oldest(own)
                    continue
                step = max(common)
                await self._team.ask_all(
                    lambda site, step=step: site.begin(step, self._patients, even_restarted=True)
                )
                await self._team.ask_all(lambda site, step=step: site.roll_back(step))
                break
            except SiteRestarted as restarted:
                self._report(h.SiteForgot(str(restarted)))
                cause = f"{restarted} came back without its memory"
        self._team.note_undone(step)
        await self._compute.run(self._load, step, what=f"its own checkpoint of step {step}", timeout=DISK_S)
        self._held = tuple(sorted(saved for saved in own if saved <= step))
        self.ready = True
        self.committed = self._result.step = step
        self._report(h.RunRolledBack(step, before, cause, self._held))
        await self._noted(self._withdrawals.undone, step)
        self._note_withdrawals(stream)
        await self._tell_withdrawals()

    def _leave_out_oldest(self, own: Collection[int]) -> None:
        """Go back without the site whose steps in common are the oldest. Raises JobFailed if all are needed."""
        newest = {site: max({*own}.intersection(site.checkpoints), default=-1) for site in self._team.present}
        behind = min(newest, key=lambda site: newest[site])
        if not own:
            raise JobFailed("no checkpoint of the coordinator's own is left: start a new run, with --fresh")
        if self._team.all_needed:
            # One that was absent for a while, under another [absence] mode, may hold none that the others hold.
            held = "; ".join(f"{site.name} {_steps(site.checkpoints)}" for site in newest)
            raise JobFailed(
                f"the parties have no checkpoint in common (steps: coordinator {_steps(own)}; {held}): with [absence] "
                f'mode = "drop" it goes on, and takes {behind.name} back in; --fresh starts a new run'
            )
        self._team.leave_out(behind, "it has no checkpoint in common with the others")

    def _load(self, step: int) -> None:
        tensors, meta, _ = checkpoint.load(self._files.checkpoints, step)
        self._half.load(tensors, meta)
        checkpoint.discard_after(self._files.checkpoints, step)

    # --- patients whose files cannot be used -----------------------------------------------------------

    async def _withdraw(self, unusable: UnusableBySite, stream: TrainingStream) -> None:
        """SP-11.13-4: go on without these from the next step on; what was announced is void.

        Raises:
            JobFailed: too many from one site, or too few are left.
            DataError: too many masks of the coordinator's own.
        """
        step = self.committed + 1
        for site, patients in unusable.items():
            name = "" if site is None else site.name
            if beyond := self._withdrawals.beyond(name, patients):
                if site is None:
                    raise DataError(
                        f"{beyond}; the last was {self._last_unusable}", patients[0].cause, beyond
                    )
                self._team.leave_out(site, beyond)
                continue
            await self._noted(self._withdrawals.add, step, name, patients)
            run = self._files.run.hex()
            for patient in patients:
                cause = OF_A_PATIENT[patient.cause]
                self._report(h.PatientWithdrawn(run, name, handle(patient.key), step, cause))
        self._note_withdrawals(stream, more=True)
        await self._compute.run(self._remove_predictions, what="masks to be removed", timeout=DISK_S)
        await self._team.ask_all(lambda site: site.advance(self.committed))
        await self._tell_withdrawals()

    async def _tell_withdrawals(self) -> None:
        for message in self._withdrawals.messages():
            await asyncio.gather(*(site.tell(message) for site in self._team.present))

    def _note_withdrawals(self, stream: TrainingStream, *, more: bool = False) -> None:
        """Whatever follows is made without those that are out. Raises JobFailed where too few are left."""
        if not self._withdrawals.keys:
            return
        self._withdrawals.check()
        stream.withdraw(self._withdrawals.keys)
        self._result.withdrawn = self._withdrawals.shown()
        self._report(h.WithdrawnInAll(self.committed, len(self._withdrawals.keys), more))
        for site in self._team.sites:
            site.set_withdrawn(self._withdrawals.messages(), self.committed, self._patients)

    def _own(self, error: PatientUnusable) -> UnusableBySite:
        """SP-11.13-11: a mask of the coordinator's own; only its own log names the file."""
        self._last_unusable = str(error)
        note(error, self._bad_masks)
        return {None: (Unusable(error.key, error.cause),)}

    def _remove_predictions(self) -> None:
        """Of an evaluation before: there is no score to them any more."""
        for key in self._withdrawals.keys:
            path = self._files.predictions / f"{self._labels.case(key).patient}.nii.gz"
            path.unlink(missing_ok=True)

    async def _noted(self, function: Any, *args: Any) -> None:
        await self._compute.run(function, *args, what="a withdrawal to be noted", timeout=DISK_S)

    @property
    def _patients(self) -> int:
        """How many patients are in use."""
        return self._result.patients - len(self._withdrawals.keys)

    # --- inside ----------------------------------------------------------------------------------------

    async def _computed(self, function: Any, *args: Any, what: str) -> Any:
        """`function(*args)` within the deadline that the job has for a step."""
        return await self._compute.run(function, *args, what=what, timeout=self._job.seconds_per_step)

    async def _blamed(self, arrived: Arrived) -> bool:
        """Whether a site sent what are no numbers; it is out of `arrived` then. Raises JobFailed if all are needed."""
        found = await self._computed(self._culprit, arrived, what="the activations to be looked at")
        if found is None:
            return False
        site, name = found
        self._team.leave_out(
            site,
            f"site {site.name} sent activations ({name}) that are not finite numbers; look at its images, or "
            "lower the learning rate",
        )
        del arrived[site]
        return True

    def _culprit(self, arrived: Arrived) -> tuple[RemoteSite, str] | None:
        for site, tensors in arrived.items():
            for name, array in from_wire(tensors, self._job.precision).items():
                if not np.isfinite(array).all():
                    return site, name
        return None

    def _by_modality(self, arrived: Arrived) -> dict[str, dict[str, np.ndarray]]:
        return {site.modality: from_wire(tensors, self._job.precision) for site, tensors in arrived.items()}

    def _described(self, forward: Forward) -> tuple[Descriptor, ...]:
        return cut_descriptors(self._job, len(forward.samples))

    def _target(self, forward: Forward) -> np.ndarray:
        return SiteData(self._labels).batch(forward.samples, self._window, forward.seed, None)

    def _octets(self) -> int:
        return sum(sum(site.traffic) for site in self._team.sites)

    async def _tell_missing(self) -> None:
        """SP-11-42: the others learn whom the run goes on without, and why, and when it is back."""
        missing = {site: site.absence for site in self._team.absent}
        if missing.keys() != self._missing.keys():
            self._missing = missing
            shown = tuple(Missing(site.modality, printable(cause)[:200]) for site, cause in missing.items())
            await asyncio.gather(
                *(site.tell(Progress(self.committed, {}, shown)) for site in self._team.present)
            )

    async def _tell(self, happening: h.Happening) -> None:
        """Report it, and let the sites know where it is for them too."""
        self._report(happening)
        if (message := self._progress.due(happening)) is not None:
            await asyncio.gather(*(site.tell(message) for site in self._team.present))


def _sorted(
    answers: Mapping[RemoteSite, Mapping[str, Array] | Withdraw],
) -> tuple[dict[RemoteSite, Any], UnusableBySite]:
    """What sites sent, and what they cannot send."""
    unusable = {site: answer.patients for site, answer in answers.items() if isinstance(answer, Withdraw)}
    return {site: answer for site, answer in answers.items() if site not in unusable}, unusable


def _steps(held: Collection[int]) -> str:
    return ", ".join(map(str, sorted(held))) or "none"
