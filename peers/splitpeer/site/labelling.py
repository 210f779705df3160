"""The site of the labels: the loss's gradient for logits, and scores of predictions. No mask leaves it (SP-11.20)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from splitpeer.daemon import happenings as h
from splitpeer.data.geometry import Triple
from splitpeer.data.layouts import subject
from splitpeer.data.loader import SiteData
from splitpeer.data.sampling import batch_digest
from splitpeer.data.task import Task
from splitpeer.data.volumes import Volumes
from splitpeer.defences.randomness import Release
from splitpeer.defences.specs import placed
from splitpeer.defences.stack import Stack, defend
from splitpeer.errors import JobFailed, PatientUnusable
from splitpeer.federation.evaluation import SUFFIX, remove_masks, save_mask
from splitpeer.federation.files import note
from splitpeer.federation.masks import LOGITS, MASK, logits_shape
from splitpeer.federation.terms import window_of
from splitpeer.site.budgets import Budgets
from splitpeer.site.scoring import ScoreTable, forget, measured, rounded
from splitpeer.site.sides import Sides
from splitpeer.training.loss import loss_gradient
from splitproto.errors import Misaligned, PolicyRefused, SchemaMismatch, StepMismatch
from splitproto.messages import Conclude, Logits, LossGradients, Prediction, Scores, Withdraw
from splitproto.records import Job, Sample, Unusable

PREDICTIONS = "predictions"
"""In the folder of a run."""
DEFENDED = "x0"
"""How defences know the logits: as the finest level."""
Asked = TypeVar("Asked", Logits, Prediction)
Answer = TypeVar("Answer", LossGradients, Scores)


@dataclass(frozen=True)
class LossTold:
    """[policy]: what the coordinator learns of the scores."""

    figures: tuple[str, ...] = ()
    round_to: float = 0.01
    least: int = 2
    """Persons of whom figures are means."""


class Labelling:
    """The masks of one run at work.

    It keeps nothing of a step: asked again, it answers with the same octets (SP-11.20-6).

    Args:
        run, job: of the offer.
        masks: on the job's grid.
        task: of the masks.
        folder: of the run at this site; scores and predictions stay there.
        told: what of them leaves.
        stack: what is done to gradients before they leave.
        budgets: what was asked for.
        device: that losses are computed on.

    Raises:
        DataError: who was scored cannot be read.
    """

    def __init__(
        self,
        run: bytes,
        job: Job,
        masks: Volumes,
        task: Task,
        folder: Path,
        told: LossTold,
        stack: Stack | None,
        budgets: Budgets,
        device: str = "cpu",
    ) -> None:
        self.run, self._job, self._masks, self._task = run, job, masks, task
        self._folder, self._told, self._stack, self._budgets = folder, told, stack, budgets
        self._device, self._window = device, window_of(job)
        self._table: tuple[int, ScoreTable] | None = None
        self._sides = Sides(folder)

    @property
    def announced(self) -> tuple[str, ...]:
        """What is done to gradients of logits, as job-accept says it."""
        return () if self._stack is None else placed("gradients", self._stack.specs)

    def loss_gradients(self, asked: Logits, applied: int) -> LossGradients:
        """SP-11.20-5, SP-11.20-6: the gradient of the loss of one batch (compute thread).

        Args:
            applied: steps that this site has applied or counted.

        Raises:
            StepMismatch, SchemaMismatch, PolicyRefused, Misaligned: SP-11.20-7.
            BudgetSpent: one of the patients was scored (SP-11.20-13).
            PatientUnusable: a mask cannot be used.
            JobFailed: the loss is not finite.
        """
        self._check(asked, applied)
        self._sides.train({self._person(sample.key) for sample in asked.samples})
        self._budgets.logits(asked.step)
        exclusive, samples = self._task.exclusive, asked.samples
        target = SiteData(self._masks).batch(samples, self._window, asked.seed, None)
        loss, gradient = loss_gradient(
            asked.tensors[LOGITS], target, exclusive=exclusive, device=self._device
        )
        if not (math.isfinite(loss) and np.isfinite(gradient).all()):
            raise JobFailed(f"the loss at step {applied} is not a finite number; lower the learning rate")
        if self._stack:
            release = Release(self.run, "train", asked.step, 0, samples, target)
            gradient = defend(self._stack, {DEFENDED: gradient}, release)[DEFENDED]
        tells = "loss" in self._told.figures
        return LossGradients(
            asked.step,
            asked.digest,
            rounded(loss, self._told.round_to) if tells else None,
            {LOGITS: gradient},
        )

    def score(self, asked: Prediction, applied: int) -> Scores:
        """SP-11.20-9: one prediction, scored and kept (compute thread).

        Raises:
            StepMismatch, SchemaMismatch, Misaligned, PolicyRefused: it is not what may be asked.
            BudgetSpent: the run has trained on the patient (SP-11.20-13).
            PatientUnusable: the mask cannot be used.
            ConfigError, DiskTrouble: the scores cannot be kept.
        """
        self._check_step(asked.step, applied)
        key, mask = asked.sample.key, asked.tensors.get(MASK)
        if asked.sample.origin != (0, 0, 0) or key not in self._masks.cases:
            raise SchemaMismatch("a prediction is of a whole volume whose mask is here")
        self._check_digest(asked.step, (asked.sample,), None, asked.digest)
        grid = self._masks.geometry(key)
        if (
            mask is None
            or len(asked.tensors) != 1
            or mask.dtype != np.uint8
            or mask.shape != (len(self._task.regions), *grid.shape)
            or mask.max() > 1
        ):
            raise SchemaMismatch("a prediction is zeros and ones, by region, on the grid of the mask")
        table, patient = self._table_of(asked.step), self._masks.case(key).patient
        if asked.without == "":
            raise SchemaMismatch("a prediction without a seat that has no name")
        if not table.takes(asked.batch, patient, asked.without or ""):
            raise SchemaMismatch("a patient is scored once in an evaluation, and once without each seat")
        self._sides.score(self._person(key))
        self._budgets.predicted(key, asked.without or "")
        truth = self._masks.window(key, (0, 0, 0), grid.shape)
        final = asked.step == self._job.steps and asked.without is None
        row = measured(
            self._task,
            patient,
            asked.seats,
            asked.without or "",
            (mask, truth),
            grid.spacing if final else None,
        )
        table.put(asked.batch, row)
        if final:
            path = self._folder / PREDICTIONS / f"{patient}{SUFFIX}"
            save_mask(path, mask.astype(bool), grid, self._task, made_from=asked.seats)
        return Scores(asked.step, asked.batch, {})

    def conclude(self, asked: Conclude, applied: int) -> tuple[Scores, ScoreTable]:
        """SP-11.20-9: the figures that are told, and the table that stays. Raises StepMismatch: other rows."""
        self._check_step(asked.step, applied)
        table = self._table_of(asked.step)
        if not table.holds(asked.batch):
            raise StepMismatch(f"{len(table)} of {asked.batch} predictions of step {asked.step} are here")
        told = self._told
        values = table.figures(told.figures, told.round_to, told.least)
        return Scores(asked.step, asked.batch, values), table

    def forget(self, keys: Collection[bytes], *, everywhere: bool) -> frozenset[bytes]:
        """SP-11.20-12: remove predictions of these patients, and their ids from tables of scores.

        Args:
            everywhere: in the folders of all runs; else in that of this one.

        Returns:
            Of whom there was something.

        Raises:
            DataError: a table cannot be read.
            ConfigError, DiskTrouble: something cannot be removed.
        """
        masks, gone = self._masks, set[bytes]()
        for folder in sorted(self._folder.parent.glob("*/")) if everywhere else [self._folder]:
            gone |= remove_masks(folder / PREDICTIONS, keys, masks)
            for path in sorted(folder.glob("scores-*.json")):
                ids = forget(path, lambda patient: masks.key_of(patient) in keys)
                gone |= {masks.key_of(patient) for patient in ids}
        self._table = None
        return frozenset(gone)

    # --- inside ----------------------------------------------------------------------------------------

    def _person(self, key: bytes) -> bytes:
        """The key of the person behind a patient's."""
        return self._masks.key_of(subject(self._masks.case(key).patient))

    def _table_of(self, step: int) -> ScoreTable:
        if self._table is None or self._table[0] != step:
            self._table = step, ScoreTable(self._folder / f"scores-{step:08d}.json", self._task)
        return self._table[1]

    def _check(self, asked: Logits, applied: int) -> None:
        """SP-11.20-7."""
        job, samples = self._job, asked.samples
        if asked.step != applied + 1 or asked.step > job.steps:
            raise StepMismatch(f"logits of step {asked.step} of {job.steps} after step {applied}")
        if len(samples) > job.batch:
            raise SchemaMismatch(f"logits of {len(samples)} samples where the job says {job.batch}")
        if asked.seed is not None and not job.augment:
            raise PolicyRefused("the job said that nothing is augmented")
        for sample in samples:
            if sample.key not in self._masks.cases:
                raise SchemaMismatch("logits of a patient whose mask is not here")
        check_windows(samples, self._window, lambda key: self._masks.geometry(key).shape)
        self._check_digest(asked.step, samples, asked.seed, asked.digest)
        logits = asked.tensors.get(LOGITS)
        if (
            logits is None
            or len(asked.tensors) != 1
            or logits.dtype != np.float32
            or logits.shape != logits_shape(job, self._task.channels, len(samples))
        ):
            raise SchemaMismatch("the logits are not those of the job's task and window")

    def _check_step(self, step: int, applied: int) -> None:
        if step != applied:
            raise StepMismatch(f"predictions of step {step} after step {applied}")

    def _check_digest(self, step: int, samples: tuple[Sample, ...], seed: int | None, digest: bytes) -> None:
        if batch_digest(step, samples, seed) != digest:
            raise Misaligned(f"step {step}: the samples do not give the digest that came with them")


class MaskAnswers:
    """What a site answers with its masks, or whose it cannot use (SP-11.20-8). All for the compute thread.

    Args:
        labelling: the masks at work.
        unusable: patients whose files cannot be used, and why; those that are found go there.
        heed_consent: brings that up to date with who has withdrawn consent.
        report: told of masks that go bad.
    """

    def __init__(
        self,
        labelling: Labelling,
        unusable: dict[bytes, str],
        heed_consent: Callable[[], None],
        report: h.Reporter,
    ) -> None:
        self._labelling, self._unusable = labelling, unusable
        self._heed_consent, self._report = heed_consent, report
        self._forgotten: dict[bool, set[bytes]] = {False: set(), True: set()}
        self.answered = 0
        """The last step whose loss was answered on this link."""

    def loss_gradients(self, asked: Logits, applied: int) -> LossGradients | Withdraw:
        """SP-11.20-6: the gradient of a batch's loss. See `Labelling.loss_gradients`."""
        answer = self._answer(self._labelling.loss_gradients, asked, applied, "train", 0, asked.samples)
        if not isinstance(answer, Withdraw):
            self.answered = asked.step
        return answer

    def score(self, asked: Prediction, applied: int) -> Scores | Withdraw:
        """SP-11.20-9: one prediction is scored here. See `Labelling.score`."""
        return self._answer(self._labelling.score, asked, applied, "evaluate", asked.batch, (asked.sample,))

    def conclude(self, asked: Conclude, applied: int) -> tuple[Scores, ScoreTable]:
        """SP-11.20-9: what is told of an evaluation, and what it came to. See `Labelling.conclude`."""
        return self._labelling.conclude(asked, applied)

    def forget(self, keys: Collection[bytes], *, everywhere: bool) -> None:
        """SP-11.20-12: once for each patient. See `Labelling.forget`."""
        known = self._forgotten[everywhere]
        if new := set(keys) - known:
            if gone := self._labelling.forget(new, everywhere=everywhere):
                self._report(h.PredictionsRemoved(self._labelling.run.hex(), gone))
            known |= new

    def _answer(
        self,
        answer: Callable[[Asked, int], Answer],
        asked: Asked,
        applied: int,
        mode: str,
        batch: int,
        samples: Sequence[Sample],
    ) -> Answer | Withdraw:
        self._heed_consent()
        keys = dict.fromkeys(sample.key for sample in samples)
        if not any(key in self._unusable for key in keys):
            try:
                return answer(asked, applied)
            except PatientUnusable as error:
                if error.key not in keys:
                    raise
                note(error, self._unusable, self._report)
        patients = tuple(Unusable(key, self._unusable[key]) for key in keys if key in self._unusable)
        return Withdraw(mode, asked.step, batch, asked.digest, patients)


def check_windows(samples: Collection[Sample], window: Triple, shape_of: Callable[[bytes], Triple]) -> None:
    """A window must be inside the volume, or contain it: cut at a border, it would single out voxels.

    Raises PolicyRefused.
    """
    for sample in samples:
        for start, width, size in zip(sample.origin, window, shape_of(sample.key), strict=True):
            if not (0 <= start <= size - width or size - width <= start <= 0):
                raise PolicyRefused("a window that is cut by the border of the volume")
