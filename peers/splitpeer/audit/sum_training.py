"""A job with secure fusion whose encoders learn, played in one process: this site, and stand-ins for its partners."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from splitpeer.attacks.base import Progress, Shot, Target
from splitpeer.audit.cohort import Cohort
from splitpeer.audit.experiment import MOST_RELEASED
from splitpeer.audit.released import FrozenSeat
from splitpeer.audit.stand_in_partners import StandIns
from splitpeer.data.channels import Channels
from splitpeer.data.loader import SiteData
from splitpeer.data.volumes import Volumes
from splitpeer.defences.image.stack import ImageStack
from splitpeer.defences.key import from_seed
from splitpeer.defences.randomness import Release
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.halves import coordinator_half, gradient_stacks
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import window_of
from splitpeer.settings.job import JobConfig
from splitpeer.training.split_round import THE_SUM, fused_step
from splitpeer.training.split_step import Arrays
from splitpeer.training.sums import fused
from splitproto.messages import Forward
from splitproto.records import Fusion, Job, Sample

HUB = "hub"
RUN = bytes(16)


@dataclass
class SumTraining:
    """The training of all parties, and what hospitals were sent.

    Args:
        config: the job, as it is on the wire in `job`.
        terms: of its sum.
        cohort: of this site, with masks.
        partners: who stands in for the others.
        own, others: encoders; they learn where they are.
        stacks: defences of this site's images, by modality.
        gradients: defences of what hospitals are sent, as written.
    """

    config: JobConfig
    job: Job
    terms: Fusion
    cohort: Cohort
    partners: StandIns
    own: Sequence[FrozenSeat]
    others: Sequence[FrozenSeat]
    stacks: Mapping[str, ImageStack]
    gradients: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"
    _shots: dict[Sample, list[Shot]] = field(default_factory=dict, init=False, repr=False)

    def play(self, training: Sequence[bytes], progress: Progress) -> None:
        """Train on these patients, all of the job's steps."""
        labels, seats = self._labels, seats_of(self.config)
        task = labels.labels
        if task is None:
            raise ValueError("training needs masks")
        half = coordinator_half(self.config, self.job, seats.names, task, self.device)
        defended = gradient_stacks(self.gradients, self.job, seats, from_seed(self.seed, HUB))
        stream = TrainingStream.of(self.config, self.job, training, labels, frozenset(training))
        followed = self._most_released(stream)
        for index in range(self.job.steps):
            forward = stream[index]
            target = SiteData(labels).batch(forward.samples, window_of(self.job), forward.seed, None)
            release = Release(RUN, forward.mode, forward.step, forward.batch, forward.samples)
            images, sent = self._shown(forward), dict[str, dict[str, Arrays]]()
            for part in (*self.own, *self.others):
                sent.setdefault(part.site, {})[part.seat.name] = part.half.forward(
                    images[part.seat.name], release
                )
            _, back = fused_step(half, {THE_SUM: fused(sent, self.terms)}, target, release, defended)
            for part in (*self.own, *self.others):
                part.half.backward(back[THE_SUM])
            self._note(forward, back[THE_SUM], followed)
            progress("training", index + 1, self.job.steps)

    def first(self) -> tuple[Target, ...]:
        """The samples of the first step, with the gradient that came back."""
        return tuple(
            Target(sample, (shots[0],)) for sample, shots in self._shots.items() if shots[0].step == 1
        )

    def followed(self) -> tuple[Target, ...]:
        """The samples with a target that were trained on most often, with all gradients."""
        released = sorted(self._shots.items(), key=lambda one: -len(one[1]))
        held = (Target(sample, tuple(shots)) for sample, shots in released if self._holds(sample))
        return tuple(islice(held, MOST_RELEASED))

    # --- inside ----------------------------------------------------------------------------------------------

    @property
    def _labels(self) -> Volumes:
        if self.cohort.labels is None:
            raise ValueError("a site's cohort has masks or stand-ins for them")
        return self.cohort.labels

    def _holds(self, sample: Sample) -> bool:
        return bool(self._labels.window(sample.key, sample.origin, window_of(self.job)).any())

    def _most_released(self, stream: TrainingStream) -> set[Sample]:
        """Those of whom all gradients are kept: a run's would not fit the memory."""
        counts = Counter(sample for index in range(self.job.steps) for sample in stream[index].samples)
        return set(islice((s for s, _ in counts.most_common() if self._holds(s)), MOST_RELEASED))

    def _shown(self, forward: Forward) -> dict[str, np.ndarray]:
        """By seat, a batch as each encoder sees it: float32 [B, channels, *spatial]."""
        window, seed = window_of(self.job), forward.seed
        mine = Channels(self.cohort.images, {p.seat.name: p.seat.modalities for p in self.own}, self.stacks)
        own = next(iter(self.cohort.images.values()))
        placed = self.partners.places(forward.samples, own, window)
        theirs = Channels(self.partners.cohort.images, {p.seat.name: p.seat.modalities for p in self.others})
        shown = {seat: mine.batch(seat, forward.samples, window, seed) for seat in mine.seats}
        return shown | {seat: theirs.batch(seat, placed, window, seed) for seat in theirs.seats}

    def _note(self, forward: Forward, back: Arrays, followed: set[Sample]) -> None:
        for row, sample in enumerate(forward.samples):
            if sample in followed or forward.step == 1:
                gradient = {name: np.array(array[row]) for name, array in back.items()}
                shot = Shot(forward.mode, forward.step, row, forward.seed, {}, gradient)
                self._shots.setdefault(sample, []).append(shot)
