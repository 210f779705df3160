"""From sites that dial to the patients and batches of a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from splitpeer.coordinator.matching import Matching
from splitpeer.coordinator.run import DISK_S, Run
from splitpeer.daemon import happenings as h
from splitpeer.daemon.witness import Witness
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.seating import Lists
from splitpeer.federation.terms import cut_descriptors
from splitproto.tensors import schema_digest

Patients = tuple[list[bytes], list[bytes]]
"""Those to train with, and those held out."""


class Gathering:
    """Gathers the sites of one run.

    Args:
        run: the run; its seating is decided here.
        matching: compares what the parties have.
        witness: told with whom work begins.
        defences: of gradients, each as it is written.
    """

    def __init__(self, run: Run, matching: Matching, witness: Witness, defences: tuple[str, ...]) -> None:
        self._run, self._matching, self._witness, self._defences = run, matching, witness, defences

    async def with_sites(self) -> Patients:
        """Wait for the sites, and match their patients.

        Raises:
            JobFailed, DeadlinePassed: a site declined or did not come; too few patients.
        """
        run = self._run
        await run.team.gather(
            run.settings.deadlines.join_s,
            lambda names: run.report(h.SitesAwaited(names)),
            all_needed=not run.files.record.patients,
        )
        here = run.team.present
        self._witness.start(
            run.files.run,
            run.job,
            schema_digest(cut_descriptors(run.job)),
            [site.party for site in run.team.sites],
            defences=self._defences,
            features=frozenset.intersection(*(site.features for site in here)),
        )
        found = await self._matched(None)
        run.result.tls = here[0].tls
        absent = [site.name for site in run.team.absent]
        run.report(h.RunBegan(run.job.steps, [site.name for site in here], absent))
        return found

    async def without_sites(self, lists: Mapping[str, Lists] | None = None) -> Patients:
        """Match the patients of a run that needs its sites no more, or that has `lists` of what they had.

        Raises:
            JobFailed: too few patients.
        """
        found = await self._matched(lists or {})
        self._run.report(h.RunBegan(self._run.job.steps, [], []))
        return found

    def batches(self, training: Sequence[bytes]) -> TrainingStream:
        """All batches of the run."""
        run = self._run
        labels = run.labels if run.label_site is not None else run.masks
        return TrainingStream.of(run.settings, run.job, training, labels, run.seating.complete)

    def open(self, held_out: Collection[bytes], *, resumed: bool) -> None:
        """From now on there is something to resume."""
        self._run.files.open(resumed=resumed, patients=self._run.seating.filled, held_out=held_out)

    async def _matched(self, lists: Mapping[str, Lists] | None) -> Patients:
        run = self._run
        seating, training, held_out = await run.compute.run(
            self._matching.match, run.team.present, run.team.sites, run.report, lists,
            what="the masks' headers to be read", timeout=DISK_S,
        )  # fmt: skip
        run.seating, run.result.patients = seating, len(seating.filled)
        run.result.validation = len(held_out)
        return training, held_out
