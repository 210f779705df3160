"""Checkpoints of all halves, made at committed steps only, and the way back to one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from functools import partial

from splitpeer.coordinator.exclusion import Exclusion
from splitpeer.coordinator.memory import SiteRestarted
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.run import Run
from splitpeer.daemon import happenings as h
from splitpeer.errors import DataError, DiskTrouble, JobFailed
from splitpeer.federation.batches import TrainingStream
from splitpeer.storage import checkpoint

UNSAVED = 2
"""Checkpoints in a row that a site may fail to write before a run that can do without it does."""

ROOM_S = 5.0
"""Pause before a full disk is tried again, at most."""


class Savepoints:
    """Those of one run.

    Args:
        run: the run.
        exclusion: told where all went back to.
    """

    def __init__(self, run: Run, exclusion: Exclusion) -> None:
        self._run, self._exclusion = run, exclusion
        self.held: tuple[int, ...] = ()
        """The coordinator's own checkpoints, each of a step that all present held."""
        self.ready = False
        """The coordinator's half is that of the committed step: of a new run, or read from a checkpoint."""

    async def save_own(self, *, spare: int = 0) -> int:
        """Write the coordinator's half; returns its step.

        Args:
            spare: older ones to keep beyond the usual, where not all sites may hold this one.

        Raises:
            DataError: it cannot be written; those from before are as they were.
        """
        run = self._run
        tensors, meta = await run.compute.run(run.half.state, what="its own state")
        step = int(meta["step"])
        most = run.settings.training.keep_checkpoints + spare
        keep = [held for held in self.held if held != step][-(most - 1) :] if most > 1 else []
        # The metrics of earlier steps must not be lost when the run continues from here.
        await run.on_disk(run.files.sync, what="the metrics to be written")
        await run.on_disk(
            checkpoint.save, run.files.checkpoints, step, tensors, meta, keep,
            what=f"its own checkpoint of step {step}",
        )  # fmt: skip
        self.held = (*keep, step)
        run.report(h.CheckpointsHeld(self.held))
        return step

    async def save(self, *, leaving: bool = False) -> bool:
        """Have all halves of the committed step written; whether they were."""
        run, step = self._run, self._run.committed
        run.octets_from = None
        run.report(h.PhaseBegan("saving"))
        most = run.settings.training.keep_checkpoints
        keep = [held for held in self.held if held < step][-most:]
        digests = await run.team.ask_all(lambda site: site.save(step, keep, leaving=leaving))
        for site in [site for site, digest in digests.items() if digest is None]:
            if site.unsaved >= UNSAVED and not run.team.all_needed:
                run.team.leave_out(site, f"it could not write {site.unsaved} checkpoints in a row")
                del digests[site]
        if failed := [site.name for site, digest in digests.items() if digest is None]:
            # SP-11-32: not a step that all hold, so it does not count; those from before do.
            run.report(h.CheckpointMissed(step, failed))
            return False
        try:
            # SP-11-13: written last: a step that the coordinator holds, all hold.
            await self.save_own()
        except DataError as error:
            run.report(h.CheckpointMissed(step, cause=str(error)))
            return False
        for site in digests:
            site.forgive()
        shown = {site.name: (digest or b"").hex() for site, digest in digests.items()}
        run.report(h.CheckpointCommitted(run.files.run.hex(), step, shown))
        return True

    async def insist(self) -> bool:
        """Save the last step: again until there is room, as long as a site is waited for; False if draining first.

        Raises:
            DiskTrouble: there is none.
        """
        run, loop = self._run, asyncio.get_running_loop()
        patience = run.settings.deadlines.return_s
        ends = loop.time() + patience
        run.report(h.Awaited("room for the checkpoint of the last step", patience))
        while not run.draining:
            await asyncio.sleep(min(ROOM_S, patience / 10))
            if await self.save():
                run.report(h.NotAwaited())
                return True
            if loop.time() > ends:
                raise DiskTrouble(
                    f"the checkpoint of the last step was not written by all within {patience:g} s"
                    f"{self._who_could_not()}: make room there and start again; the run resumes"
                )
        return False

    def _who_could_not(self) -> str:
        names = ", ".join(site.name for site in self._run.team.present if site.unsaved)
        return f" (not by {names})" if names else ""

    async def roll_back(self, stream: TrainingStream, cause: str) -> None:
        """All parties go back to the newest step that all hold; once more if a site restarts meanwhile.

        Args:
            stream: of the run; withdrawals after the step are undone in it.
            cause: for the log; empty: a site holds steps of this run that the coordinator does not.
        """
        run, before = self._run, self._run.committed
        cause = cause or "a site is at a later step than the coordinator"
        run.report(h.PhaseBegan("rolling back"))
        while True:
            try:
                await run.team.ask_all(RemoteSite.reach)
                own = await run.on_disk(
                    checkpoint.available, run.files.checkpoints, what="its own checkpoints"
                )
                common = set(own).intersection(*(site.checkpoints for site in run.team.present))
                if not common:
                    self._leave_out_oldest(own)
                    continue
                step = max(common)
                patients = self._exclusion.patients
                begin = partial(RemoteSite.begin, step=step, patients=patients, even_restarted=True)
                await run.team.ask_all(begin)
                await run.team.ask_all(partial(RemoteSite.roll_back, step=step))
                break
            except SiteRestarted as restarted:
                run.report(h.SiteForgot(str(restarted)))
                cause = f"{restarted} came back without its memory"
        run.team.note_undone(step)
        await run.on_disk(self._load, step, what=f"its own checkpoint of step {step}")
        self.held = tuple(sorted(saved for saved in own if saved <= step))
        self.ready = True
        run.committed = run.result.step = step
        run.report(h.RunRolledBack(step, before, cause, self.held))
        await self._exclusion.undo(step, stream)

    async def restore(self, cause: str) -> None:
        """In a run with frozen encoders, where sites hold no step: back to the newest of its own checkpoints.

        Raises:
            DataError: none is left, or it cannot be read.
        """
        run = self._run
        own = await run.on_disk(checkpoint.available, run.files.checkpoints, what="its own checkpoints")
        if not own:
            raise DataError(
                f"no checkpoint is left in {run.files.checkpoints}: bring one back, or start with --fresh"
            )
        step = max(own)
        await run.on_disk(self._load, step, what=f"its own checkpoint of step {step}")
        self.held, self.ready = tuple(sorted(own)), True
        run.committed = run.result.step = step
        run.report(h.RunRolledBack(step, step, cause, self.held))

    def _leave_out_oldest(self, own: Collection[int]) -> None:
        """Go back without the site whose steps in common are the oldest. Raises JobFailed if all are needed."""
        team = self._run.team
        newest = {site: max({*own}.intersection(site.checkpoints), default=-1) for site in team.present}
        behind = min(newest, key=lambda site: newest[site])
        if not own:
            raise JobFailed("no checkpoint of the coordinator is left: start a new run, with --fresh")
        if team.all_needed:
            # One that was absent for a while, under another [absence] mode, may hold none that the others hold.
            held = "; ".join(f"{site.name} {_steps(site.checkpoints)}" for site in newest)
            raise JobFailed(
                f"the parties have no checkpoint in common (steps: coordinator {_steps(own)}; {held}): with [absence] "
                f'mode = "drop" the run continues and readmits {behind.name}; --fresh starts a new run'
            )
        team.leave_out(behind, "it has no checkpoint in common with the others")

    def _load(self, step: int) -> None:
        tensors, meta, _ = checkpoint.load(self._run.files.checkpoints, step)
        self._run.half.load(tensors, meta)
        checkpoint.discard_after(self._run.files.checkpoints, step)


def _steps(held: Collection[int]) -> str:
    return ", ".join(map(str, sorted(held))) or "none"
