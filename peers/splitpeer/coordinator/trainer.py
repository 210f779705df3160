"""The coordinator's loop over the steps of a job: train, save, evaluate, go back, catch up.

A step is committed when every site that takes part has applied it. Knows sites (`team`) and the coordinator's own
half, and neither listener nor signals.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from splitpeer.coordinator.averaging import Averaging
from splitpeer.coordinator.evaluator import Evaluator
from splitpeer.coordinator.exclusion import Exclusion, UnusableBySite, told_apart
from splitpeer.coordinator.inference.service import Service
from splitpeer.coordinator.label_site import loss_gradients
from splitpeer.coordinator.labels import MasksUnusable
from splitpeer.coordinator.memory import SiteRestarted
from splitpeer.coordinator.remote_site import RemoteSite, Sent, Unable
from splitpeer.coordinator.run import Arrived, Run
from splitpeer.coordinator.savepoints import Savepoints
from splitpeer.coordinator.turns import Exchanges
from splitpeer.daemon import happenings as h
from splitpeer.data.loader import SiteData
from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import Stack
from splitpeer.errors import JobFailed, PatientUnusable
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.halves import for_site
from splitpeer.federation.masks import LOGITS
from splitpeer.federation.seating import Parts
from splitpeer.federation.terms import window_of
from splitpeer.training.dropout import left_out
from splitpeer.training.split_round import Place, Rows, StepWithoutLabels, fused_step
from splitpeer.training.split_step import Arrays
from splitproto.errors import printable
from splitproto.messages import Forward, Logits, Progress, Withdraw
from splitproto.records import Missing


class Trainer:
    """The steps of one run, from where the peers are to the last one.

    Args:
        run: the run; its sites have joined.
        gradient_stacks: what is done to gradients before they leave for a site's seat.
        service: of inference, which may work between two steps; None: nothing does.
    """

    def __init__(
        self, run: Run, gradient_stacks: Mapping[Place, Stack], service: Service | None = None
    ) -> None:
        self._service = service
        self._announced = 0  # batches up to this step may have been announced
        self._run, self._gradient_stacks = run, gradient_stacks
        self._window = window_of(run.job)
        self._exclusion = Exclusion(run)
        self.savepoints = Savepoints(run, self._exclusion)
        self._evaluator = Evaluator(run, self._exclusion)
        self._averaging = Averaging(run.job, run.seating.seats, run.team, run.computed, run.report)
        self._missing: frozenset[str] = frozenset()  # seats, as the sites were told last
        self._exchanges = Exchanges(
            run.settings.wire.gradients_in_turns, run.job.seconds_per_step / 2, run.report
        )
        self._parts: dict[RemoteSite, Parts] = {}
        self._steps_here = 0
        self._octets_here = 0

    @property
    def bytes_per_step(self) -> int:
        """Octets on the wire, all sites, per training step made by this process."""
        return self._octets_here // max(1, self._steps_here)

    async def start(self) -> None:
        """A new run: its beginning is a step to roll back to. Raises DataError."""
        self.savepoints.ready = True
        await self.savepoints.save_own()

    async def train(
        self, stream: TrainingStream, validation: Sequence[bytes], held: Collection[int] = ()
    ) -> None:
        """Go on until the last step is committed and scored, or the run is draining.

        Args:
            held: steps of its own checkpoints, if a run is resumed.

        Raises:
            JobFailed, DeadlinePassed, DataError, ConfigError: the run cannot continue.
        """
        run, saved = self._run, self.savepoints
        self._parts = {site: self._parts_of(site, stream) for site in run.team.sites}
        saved.held = saved.held or tuple(sorted(held))
        self._exclusion.note(stream)
        if not saved.ready or any(site.applied != 0 for site in run.team.present):
            for site in run.team.sites:
                site.set_committed(max(saved.held, default=0))
            await saved.roll_back(stream, "" if saved.ready else "the coordinator was restarted")
        scored = -1
        while scored < run.job.steps and not run.draining:
            try:
                await self._assemble()
                if told := self._exclusion.revoked():
                    # SP-11.13-12: not only when a batch asks for them.
                    self._exchanges.none()
                    await self._exclusion.withdraw(told, stream)
                await self._infer()
                if run.committed < run.job.steps:
                    while unusable := await self._step(stream):
                        await self._exclusion.withdraw(unusable, stream)
                if not await self._save():
                    break
                if run.due(run.settings.evaluation.every):
                    with run.spans.of("evaluation"):
                        await self._evaluator.evaluate(validation, stream)
                    scored = run.committed
            except SiteRestarted as restarted:
                run.report(h.SiteForgot(str(restarted)))
                await saved.roll_back(stream, f"{restarted} came back without its memory")
                self._averaging.forget()
                self._exchanges.none()
                run.octets_from = None
        run.result.complete = scored == run.job.steps

    async def _assemble(self) -> None:
        """Returned sites catch up; all learn where work continues, and without which sites."""
        run, patients = self._run, self._exclusion.patients
        await run.team.muster(run.committed, patients)
        await run.team.ask_all(lambda site: site.begin(run.committed, patients))
        await self._tell_missing()

    async def _infer(self) -> None:
        """SP-11.19-8: between two steps, when no site has a batch in hand."""
        if self._service is not None and self._service.wanted and self._announced <= self._run.committed:
            self._run.octets_from = None
            await self._service.serve_one()

    async def _save(self) -> bool:
        """Whether work continues, with a checkpoint if one is due."""
        run = self._run
        if run.due(run.settings.training.checkpoint_every):
            with run.spans.of("checkpoint"):
                saved = await self.savepoints.save()
            # The trained weights are not to be lost when everybody leaves.
            return saved or run.committed < run.job.steps or await self.savepoints.insist()
        if run.draining and all(site.here for site in run.team.present):
            await self.savepoints.save(leaving=True)
        return True

    # --- who takes part in a step ------------------------------------------------------------------------

    def _parts_of(self, site: RemoteSite, stream: TrainingStream) -> Parts:
        return Parts(stream, lambda forward: self._run.part(site, forward))

    def _left_out(self, forward: Forward) -> frozenset[str]:
        """Seats that the sites here fill in this batch, and that sit the step out (SP-11-37)."""
        run, chance = self._run, self._run.settings.training.seat_dropout
        if not chance:
            return frozenset()
        parts = [run.part(site, forward) for site in run.team.present]
        here = frozenset().union(*(part.seats() for part in parts if part is not None))
        return left_out(run.settings.job.seed, forward.step, here, chance)

    def _takes_part(self, site: RemoteSite, forward: Forward, out: Collection[str]) -> bool:
        part = self._run.part(site, forward)
        return part is not None and bool(part.seats(out))

    def _boundary(self, step: int) -> int:
        """Batches are announced up to here: sites have nothing else in hand when they save, evaluate or average."""
        settings = self._run.settings
        ends = [self._run.job.steps, step + settings.training.ahead]
        training = settings.training
        pauses = (training.checkpoint_every, settings.evaluation.every, training.average_every)
        until = min(*ends, *(-(-step // every) * every for every in pauses if every))
        if self._service is not None and self._service.wanted:
            # Those that are announced come first; then it is the service's turn.
            until = min(until, max(step, self._announced))
        self._announced = until
        return until

    def _announced_until(
        self, site: RemoteSite, ahead: Sequence[Forward], outs: Sequence[frozenset[str]]
    ) -> int:
        """How many of the batches `ahead` are announced: none from one that the site sits out, as that is told by an
        `advance`, which makes void what was announced."""
        for count, (forward, out) in enumerate(zip(ahead, outs, strict=True)):
            if not self._takes_part(site, forward, out):
                return count
        return len(ahead)

    # --- a step ----------------------------------------------------------------------------------------

    async def _step(self, stream: TrainingStream) -> UnusableBySite:
        """Make the next step; it is not made where patients in it cannot be used, and these are returned."""
        run, step, began = self._run, self._run.committed + 1, time.monotonic()
        if run.octets_from is None:
            run.octets_from = run.octets()
        run.report(h.TrainingBegan(run.committed, run.job.steps))
        until = self._boundary(step)
        try:
            await run.computed(
                stream.prepare, step - 1, until, what="the masks of the next batches", part="masks"
            )
        except PatientUnusable as error:
            self._exchanges.none()
            return self._exclusion.own(error)
        await self._averaging.before(step, lambda site, seat: run.seating.count(site, seat, stream.patients))
        forward = stream[step - 1]
        target = asyncio.create_task(self._wanted(forward))
        unusable: UnusableBySite = {}
        try:
            out = self._left_out(forward)
            with run.spans.of("activations"):
                arrived, unusable = told_apart(await self._ask(stream, step, until, out))
            if unusable:
                self._exchanges.none()
            else:
                self._exchanges.end(step)
            waited = time.monotonic() - began
            wanted = await target
            if unusable:
                return unusable
            loss, gradients = await self._trained(arrived, wanted, forward, out)
        except PatientUnusable as error:
            return {**self._exclusion.own(error), **unusable}
        except MasksUnusable as error:
            return {error.site: error.patients}
        finally:
            target.cancel()
            await asyncio.gather(target, return_exceptions=True)
        computed = time.monotonic() - began - waited
        await self._apply(step, gradients)
        self._commit(step)
        told = self._told(forward, loss, arrived, gradients, began, waited, computed)
        await run.tell(told)
        return {}

    async def _ask(
        self, stream: TrainingStream, step: int, until: int, out: Collection[str]
    ) -> dict[RemoteSite, Sent | Withdraw | Unable]:
        """The activations of all that take part, and what comes next announced to them."""
        run = self._run
        ahead = [stream[index] for index in range(step, until)]
        outs = [self._left_out(forward) for forward in ahead]
        return await run.team.ask_all(
            lambda site: run.spans.answer(
                "activations",
                site.name,
                site.compute(self._parts[site], step - 1, step + self._announced_until(site, ahead, outs)),
            ),
            [site for site in run.team.present if self._takes_part(site, stream[step - 1], out)],
        )

    async def _apply(self, step: int, gradients: Mapping[Place, Arrays]) -> None:
        """Each site applies what is its own; SP-11-31: who did not take part is told to count on."""
        run = self._run
        with run.spans.of("encode"):
            back = {site: for_site(site.name, site.seats, gradients, run.job) for site in run.team.sites}
        # Where the next batch is not announced, no site could begin with it, and it is asked for after something else.
        sent = [site for site in run.team.present if back[site]] if self._announced > step else []
        turns = self._exchanges.begin(step, sent, run.team.present)

        async def apply(site: RemoteSite) -> None:
            if not back[site]:
                await site.advance(step)
            elif turns is None:
                await site.apply(step, back[site])
            else:
                async with turns.of(site) as pass_on:
                    if not site.here:
                        pass_on()
                    await site.apply(step, back[site], pass_on)

        with run.spans.of("apply"):
            await run.team.ask_all(lambda site: run.spans.answer("apply", site.name, apply(site)))

    def _commit(self, step: int) -> None:
        """SP-11-7: a step is committed when every party has applied it."""
        run = self._run
        run.committed = run.result.step = step
        for site in run.team.sites:
            site.set_committed(step)
        self._steps_here += 1
        # From commit to commit: the next activations may come at once.
        counted, run.octets_from = run.octets_from or 0, run.octets()
        self._octets_here += run.octets_from - counted

    def _told(
        self, forward: Forward, loss: float, arrived: Arrived, gradients: Collection[Place],
        began: float, waited: float, computed: float,
    ) -> h.StepCommitted:  # fmt: skip
        """What there is to tell of the step; who was absent from it is counted."""
        run = self._run
        away = [site for site in run.team.absent if site not in arrived]
        for site in away:
            run.result.absences[site.name] = run.result.absences.get(site.name, 0) + 1
        parts = [run.part(site, forward) for site in away]
        made_with = {place.seat for place in gradients} if run.job.fusion is None else run.seating.seats.names
        return h.StepCommitted(
            run.committed,
            loss,
            [seat for seat in run.seating.seats.names if seat not in made_with],
            sorted({seat for part in parts if part is not None for seat in part.seats()}),
            time.monotonic() - began,
            waited,
            computed,
            {site.name: sum(site.traffic) for site in run.team.sites},
            run.timing(began),
            self._exchanges.in_turns,
        )

    async def _trained(
        self, arrived: Arrived, target: np.ndarray | None, forward: Forward, out: Collection[str]
    ) -> tuple[float, dict[Place, Arrays]]:
        """The decoder's step; unless all are needed, without the sites whose values hold NaN or infinity.

        Args:
            target: None: the masks are at a site. Raises MasksUnusable: it cannot use some.
        """
        site = self._run.label_site
        while True:
            try:
                trained: tuple[float, dict[Place, Arrays]] = (
                    await self._run.computed(
                        self._train, arrived, target, forward, out, what=f"step {forward.step} of the decoder"
                    )
                    if site is None
                    else await self._trained_with(site, arrived, forward, out)
                )
            except JobFailed:
                if not await self._run.blamed(arrived):
                    raise
            else:
                return trained

    async def _trained_with(
        self, site: RemoteSite, arrived: Arrived, forward: Forward, out: Collection[str]
    ) -> tuple[float, dict[Place, Arrays]]:
        """SP-11.20-6: with the gradient of the loss from the site of the labels. Raises MasksUnusable."""
        run, what = self._run, f"step {forward.step} of the decoder"
        step: StepWithoutLabels = await run.computed(self._begin, arrived, forward, out, what=what)
        loss, gradient = math.nan, None
        if step.logits is not None:
            asked = Logits(forward.step, forward.samples, forward.digest, forward.seed, {LOGITS: step.logits})
            with run.spans.of("labels"):
                answers = await run.team.ask_all(lambda one: loss_gradients(one, asked), [site])
            if isinstance(answer := answers[site], Withdraw):
                raise MasksUnusable(site, answer.patients)
            gradient = np.asarray(answer.tensors[LOGITS])
            loss = math.nan if answer.loss is None else answer.loss
        return loss, await run.computed(step.end, gradient, what=what, part="decoder")

    def _begin(self, arrived: Arrived, forward: Forward, out: Collection[str]) -> StepWithoutLabels:
        used, rows, release = self._used(arrived, forward, out)
        with self._run.spans.of("decoder"):
            return StepWithoutLabels(self._run.half, used, release, self._gradient_stacks, rows=rows)

    def _train(
        self, arrived: Arrived, target: np.ndarray, forward: Forward, out: Collection[str]
    ) -> tuple[float, dict[Place, Arrays]]:
        used, rows, release = self._used(arrived, forward, out)
        with self._run.spans.of("decoder"):
            return fused_step(self._run.half, used, target, release, self._gradient_stacks, rows=rows)

    def _used(
        self, arrived: Arrived, forward: Forward, out: Collection[str]
    ) -> tuple[dict[Place, Arrays], Mapping[Place, Rows], Release]:
        """What a step is made of. `out`: seats whose activations are not used."""
        run = self._run
        release = Release(run.files.run, forward.mode, forward.step, forward.batch, forward.samples)
        with run.spans.of("decode"):
            arrays, rows = run.at_places(arrived)
        return {place: tensors for place, tensors in arrays.items() if place.seat not in out}, rows, release

    async def _wanted(self, forward: Forward) -> np.ndarray | None:
        """The masks of a batch; None: they are at a site."""
        if self._run.label_site is not None:
            return None
        target: np.ndarray = await self._run.computed(
            self._target, forward, what="the masks of a batch", part="masks"
        )
        return target

    def _target(self, forward: Forward) -> np.ndarray:
        return SiteData(self._run.masks).batch(forward.samples, self._window, forward.seed, None)

    # --- inside ----------------------------------------------------------------------------------------

    async def _tell_missing(self) -> None:
        """SP-11-42: tell the others which seats the run continues without, why, and when they are back."""
        run = self._run
        why = {site.name: site.absence for site in run.team.absent}
        causes = {}
        for seat in run.seating.seats.names:
            if (fillers := run.seating.fillers(seat)) and fillers <= why.keys():
                causes[seat] = "; ".join(why[name] for name in sorted(fillers))
        if causes.keys() != self._missing:
            self._missing = frozenset(causes)
            shown = tuple(Missing(seat, printable(cause)[:200]) for seat, cause in causes.items())
            message = Progress(run.committed, {}, shown)
            await asyncio.gather(*(site.tell(message) for site in run.team.present))
