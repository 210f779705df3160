"""The batches that a coordinator has announced to a site: checked when they arrive, read ahead, handed out in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection

import numpy as np

from splitpeer.data.channels import Channels
from splitpeer.data.loader import Prefetcher
from splitpeer.data.sampling import batch_digest
from splitpeer.federation.terms import READ_AHEAD, Room, window_of
from splitpeer.site.budgets import BudgetSpent
from splitpeer.site.released import Released
from splitproto.errors import Misaligned, PolicyRefused, SchemaMismatch, StepMismatch
from splitproto.messages import Forward
from splitproto.records import Job, Sample

MOST_WAITING = 64
"""SP-11-6: "can hold at least 64 that are not yet due"; no coordinator announces more ([training] ahead)."""
Images = dict[str, np.ndarray]
"""Images by seat: float32 [B, channels, *spatial]; a seat that no patient of the batch fills is left out."""


class Announced:
    """Of one run.

    Args:
        job: its terms.
        channels: the site's images.
        room: what one batch may take.
        released: in a frozen job, what has left.
        inference: checks a batch of that mode; None: this site takes no part in it.
        read: makes the images of a batch; called in a thread of its own.
    """

    def __init__(
        self,
        job: Job,
        channels: Channels,
        room: Room,
        read: Callable[[Forward], Images],
        released: Released | None = None,
        inference: Callable[[Forward], None] | None = None,
    ) -> None:
        self._job, self._channels, self._room, self._read = job, channels, room, read
        self._released = released or Released()
        self._inference = inference
        self._window = window_of(job)
        self._waiting: deque[Forward] = deque()
        self._prefetch: Prefetcher[Forward, Images] | None = None

    def check(self, forward: Forward, unusable: Collection[bytes]) -> None:
        """SP-11-27, SP-11-28: what is asked must stay within the accepted job.

        Raises:
            Misaligned: the commitment does not fit the samples.
            PolicyRefused: the batch is larger than this site allows, or no part of the job.
            SchemaMismatch: a training batch larger than the job's, or places that cannot be.
        """
        job = self._job
        modes = ("release",) if job.frozen else ("train", "evaluate", "infer")
        if forward.mode not in modes or forward.step > job.steps:
            raise PolicyRefused(f"{forward.mode} of step {forward.step} is not part of this job")
        if forward.seed is not None and not job.augment:
            raise PolicyRefused("the job said that nothing is augmented")
        # SP-11-17: answers that differ with the seed would average out a defence's kept noise.
        if forward.seed is not None and forward.mode == "evaluate":
            raise PolicyRefused("an evaluation has no seed")
        if forward.mode == "release":
            self._released.check(forward, unusable)
        if forward.mode == "infer":
            if self._inference is None:
                raise PolicyRefused("this site takes no part in inference")
            self._inference(forward)
        for sample in forward.samples:
            if sample.key not in unusable:
                self._check_window(sample)
        count = len(forward.samples)
        if forward.mode == "train" and count > job.batch:
            raise SchemaMismatch(f"a training batch of {count} samples where the job says {job.batch}")
        self._check_places(forward)
        # Checked for every batch: an evaluation's may be larger than the job's.
        rows = {seat: len(held) for seat, held in self._channels.rows(forward.samples).items()}
        if job.fusion is not None and any(rows.get(seat) != count for seat in self._channels.seats):
            # SP-11.18-2: another patient's values would be added in place of those that are missing.
            raise PolicyRefused(
                "a patient of the batch does not fill all seats of this site, and the job sums them"
            )
        self._room.check(rows, train=forward.mode == "train")
        if batch_digest(forward.step, forward.samples, forward.seed, forward.places) != forward.digest:
            raise Misaligned(
                f"batch of step {forward.step}: the samples do not give the digest that came with them"
            )

    def add(self, forward: Forward) -> None:
        """A batch that was checked will be due soon: start reading, at once. Raises BudgetSpent: too many wait."""
        if len(self._waiting) >= MOST_WAITING:
            raise BudgetSpent(f"more than {MOST_WAITING} batches are announced that are not due yet")
        if self._prefetch is None:
            # One is due, and its images are not fetched yet.
            self._prefetch = Prefetcher(self._read, depth=READ_AHEAD, pending=MOST_WAITING + 1)
        self._prefetch.submit(forward, timeout=0.0)
        self._waiting.append(forward)

    def due(self, applied: int) -> Forward | None:
        """The next batch, if weights after `applied` steps are those it is meant for. Raises StepMismatch."""
        if not self._waiting:
            return None
        forward = self._waiting[0]
        # SP-11-6: a batch of a later step waits: gradients, or an `advance`, bring its turn.
        if forward.step == applied + (forward.mode == "train"):
            return self._waiting.popleft()
        if forward.step <= applied:
            raise StepMismatch(
                f"asked for step {forward.step} ({forward.mode}) after step {applied} was applied"
            )
        return None

    def images(self) -> Images:
        """Images of the batch that `due` returned last. Raises what reading it raised."""
        if self._prefetch is None:
            raise StepMismatch("a batch is due that was never announced")
        return self._prefetch.get(self._job.seconds_per_step)

    def clear(self) -> None:
        """Forget all of them, and stop reading."""
        self._waiting.clear()
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None

    def _check_window(self, sample: Sample) -> None:
        """A window must be inside the volume, or contain it: cut at a border, it would single out voxels.

        SP-11.12-9: where volumes are resampled, the run's may be a little longer than this site's, so its last windows
        are cut here. They must show half of what they could, or lie beyond the end and show nothing.
        """
        shape = self._channels.geometry(sample.key).shape
        for start, width, size in zip(sample.origin, self._window, shape, strict=True):
            most, shown = min(width, size), min(start + width, size) - max(start, 0)
            tolerated = bool(self._job.spacing) and (start >= size or 2 * shown >= most)
            if shown < most and not tolerated:
                raise PolicyRefused("a window that is cut by the border of the volume")

    def _check_places(self, forward: Forward) -> None:
        """SP-11-27: one for each sample, ascending, and below the job's batch."""
        places = forward.places
        if places is None:
            return
        if len(places) != len(forward.samples) or list(places) != sorted(set(places)):
            raise SchemaMismatch(
                f"{len(forward.samples)} samples whose places in the batch are {list(places)}"
            )
        if forward.mode == "train" and places[-1] >= self._job.batch:
            raise SchemaMismatch(f"a sample at place {places[-1]} of a batch of {self._job.batch}")
