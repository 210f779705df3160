"""A run under way: what trainer, evaluator, savepoints and exclusions have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from splitpeer.coordinator.labels import LabelsAtSite, OwnLabels, RunLabels
from splitpeer.coordinator.remote_site import RemoteSite, Sent
from splitpeer.coordinator.run_files import RunFiles, RunResult
from splitpeer.coordinator.team import Team
from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.progress import ProgressMessages
from splitpeer.data.volumes import Volumes
from splitpeer.errors import JobFailed
from splitpeer.federation.compute import Compute
from splitpeer.federation.halves import at_places
from splitpeer.federation.seating import Part, Seating
from splitpeer.settings.job import JobConfig
from splitpeer.timeline.spans import LinkTimes, Spans, StepTiming
from splitpeer.training.forms import activations_form
from splitpeer.training.split_round import THE_SUM, Place, Rows
from splitpeer.training.split_step import Arrays, CoordinatorHalf
from splitproto.errors import FusionMismatch
from splitproto.fusion import totals
from splitproto.messages import Forward
from splitproto.records import Job

DISK_S = 600.0
"""Reading or writing on disk, at most."""

Arrived = dict[RemoteSite, Sent]


@dataclass
class Run:
    """Its parties and its progress."""

    job: Job
    """As the sites know it."""
    settings: JobConfig
    half: CoordinatorHalf
    """Fusion and decoder."""
    team: Team
    labels: RunLabels
    """Of whom there are masks, wherever they are."""
    compute: Compute
    files: RunFiles
    result: RunResult
    seating: Seating
    """Empty, before the patients are matched."""
    report: h.Reporter
    committed: int = 0
    """The newest committed step."""
    draining: bool = False
    """Set to end after the step under way."""
    octets_from: int | None = None
    """Bytes on the wire up to the last commit, if training continued since."""
    spans: Spans = field(default_factory=Spans)
    """Where the time of a step goes."""
    link_times: LinkTimes = field(default_factory=LinkTimes)

    @property
    def masks(self) -> Volumes:
        """The coordinator's own masks. Raises ValueError: the labels are at a site."""
        if not isinstance(self.labels, OwnLabels):
            raise ValueError("the masks are at a site")
        return self.labels.volumes

    @property
    def label_site(self) -> RemoteSite | None:
        """The site that holds the masks; None: they are the coordinator's own."""
        return self.labels.site if isinstance(self.labels, LabelsAtSite) else None

    def patients_of(self, site: RemoteSite) -> Collection[bytes]:
        """Those of whom a site fills a seat; of that of the labels, all: there was a mask of each."""
        seating = self.seating
        return seating.filled if site is self.label_site else seating.of(site.name)

    _progress: ProgressMessages = field(default_factory=ProgressMessages)

    async def computed(self, function: Callable[..., Any], *args: Any, what: str, part: str = "") -> Any:
        """`function(*args)` within the deadline that the job has for a step.

        Args:
            part: of the step, that its time is spent on; empty: it records its own.
        """
        function = self.spans.timed(part, function) if part else function
        return await self.compute.run(function, *args, what=what, timeout=self.job.seconds_per_step)

    async def on_disk(self, function: Callable[..., Any], *args: Any, what: str) -> Any:
        """`function(*args)`, which reads or writes files."""
        return await self.compute.run(function, *args, what=what, timeout=DISK_S)

    def timing(self, began: float) -> StepTiming:
        """Of a step that began at `began` (`time.monotonic`) and is over."""
        links = [site.session for site in self.team.sites if site.session is not None]
        return self.spans.take(began, self.link_times.take(links))

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps, and after the last, is due."""
        return self.committed == self.job.steps or (every > 0 and self.committed % every == 0)

    def octets(self) -> int:
        """On the wire, all sites, so far."""
        return sum(sum(site.traffic) for site in self.team.sites)

    def part(self, site: RemoteSite, forward: Forward) -> Part | None:
        """A site's part of a batch; None: it fills nothing of it."""
        return self.seating.part(site.name, site.lists, forward)

    async def tell(self, happening: h.Happening) -> None:
        """Report it, and let the sites know where it is for them too."""
        self.report(happening)
        if (message := self._progress.due(happening)) is not None:
            await asyncio.gather(*(site.tell(message) for site in self.team.present))

    # --- what arrived ----------------------------------------------------------------------------------

    def at_places(self, arrived: Arrived) -> tuple[dict[Place, Arrays], Mapping[Place, Rows]]:
        """Activations, float32, of each site at each seat, or their sum; and which samples of the batch they are.

        Raises:
            JobFailed: the sites' masks do not cancel.
        """
        if (terms := self.job.fusion) is not None:
            batch = len(next(iter(arrived.values())).part.forward.samples)
            answers = {site.name: one.tensors for site, one in arrived.items()}
            try:
                return {THE_SUM: totals(answers, terms)}, {THE_SUM: Rows(tuple(range(batch)))}
            except FusionMismatch as error:
                # SP-11.18-14: nobody can tell whose they are, so the step is not made.
                raise JobFailed(
                    f"{error}: a site was asked something else, or holds another history"
                ) from None
        arrays: dict[Place, Arrays] = {}
        rows: dict[Place, Rows] = {}
        for site, sent in arrived.items():
            here = at_places(site.name, site.seats, sent.tensors, self.job)
            arrays |= here
            rows |= {place: sent.part.rows[place.seat] for place in here}
        return arrays, rows

    async def blamed(self, arrived: Arrived) -> bool:
        """Whether a site sent NaN or infinity; it is removed from `arrived` then. Raises JobFailed if all are
        needed."""
        found = await self.computed(self.culprit, arrived, what="the activations to be checked")
        if found is None:
            return False
        site, name = found
        self.team.leave_out(
            site,
            f"site {site.name} sent activations ({name}) that are not finite numbers; check its images, or "
            "lower the learning rate",
        )
        del arrived[site]
        return True

    def culprit(self, arrived: Arrived) -> tuple[RemoteSite, str] | None:
        """A site that sent NaN or infinity, and in which tensor."""
        form = activations_form(self.job)
        for site, sent in arrived.items():
            for name, array in form.from_wire(sent.tensors).items():
                if not np.isfinite(array).all():
                    return site, name
        return None


def finite(predicted: np.ndarray) -> np.ndarray:
    """The prediction itself. Raises JobFailed."""
    if not np.isfinite(predicted).all():
        raise JobFailed("the prediction is not a finite number; lower the learning rate")
    return predicted
