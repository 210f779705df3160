"""One job at one site: its volumes, its encoder, its checkpoints. Knows messages, not links."""

from __future__ import annotations

import logging
import math
import secrets
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from splitpeer.data.loader import Prefetcher, SiteData
from splitpeer.data.sampling import batch_digest
from splitpeer.defences.activation.dp import mechanism
from splitpeer.defences.image.stack import make_image_stack
from splitpeer.defences.network import Defended, build_network
from splitpeer.defences.randomness import Release
from splitpeer.errors import DataError, PatientUnusable
from splitpeer.federation.compute import defence_key, pick_device
from splitpeer.federation.files import counted, look, note
from splitpeer.federation.precision import from_wire, to_wire
from splitpeer.federation.seats import only_modality
from splitpeer.federation.terms import (
    check_bounds,
    checkpoint_octets,
    encoder_octets,
    normalisation_of,
    run_folder,
    window_of,
)
from splitpeer.models import site_seed
from splitpeer.models.registry import backbone_of
from splitpeer.privacy.ledger import Ledger
from splitpeer.settings.bounds import Bounds
from splitpeer.settings.peer import PeerConfig
from splitpeer.site.budgets import Budgets, BudgetSpent, new_run
from splitpeer.site.images import find_cases, open_volumes
from splitpeer.site.run_folders import check_room, make_room
from splitpeer.site.secret import site_secret
from splitpeer.storage import checkpoint
from splitpeer.training.guard import Guard
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import ClientHalf
from splitproto import holder
from splitproto.causes import OF_A_PATIENT
from splitproto.errors import Misaligned, PolicyRefused, SchemaMismatch, StepMismatch
from splitproto.messages import Activations, Forward, Gradients, JobOffer, Patient, Sample, Unusable, Withdraw

log = logging.getLogger(__name__)

MOST_UNUSABLE = 1024
"""SP-11.13-9: a site that cannot use more files than this has failed."""


def open_ledger(config: PeerConfig) -> Ledger | None:
    """The site's privacy budget, if its policy sets one. Raises ConfigError or DataError: see `Ledger`."""
    policy = config.policy
    if policy is None or policy.epsilon is None or policy.delta is None:
        return None
    return Ledger(config.peer.state, policy.epsilon, policy.delta)


class SiteJob:
    """The state that outlives a link. Its compute methods belong to one thread.

    Args:
        unusable: patients whose files were found bad before there was a job.
    """

    def __init__(
        self, offer: JobOffer, config: PeerConfig, unusable: Mapping[bytes, str] | None = None
    ) -> None:
        job = offer.job
        self.run, self.job = offer.run, job
        self.seats = offer.seats
        self.modality = only_modality(offer.seats)
        self.window = window_of(job)
        # SP-11-3: it stands for this process's memory, so a rollback keeps it.
        self.incarnation = secrets.token_bytes(16)
        self.folder: Path = run_folder(config.peer.state, job.name, offer.run)
        self._most_octets = config.policy.max_message_bytes if config.policy else 0
        found = find_cases(config)
        rule = normalisation_of(job, self.modality)
        self.volumes = open_volumes(config, found, job.spacing, lambda _: rule)[self.modality]
        bounds: Bounds = config.policy or Bounds()
        self._state, self._bounds = config.peer.state, bounds
        grids = look(self.volumes, dict(unusable or {}))
        check_bounds(job, bounds, max((math.prod(grid.shape) for grid in grids.values()), default=0))
        if not self.folder.exists():
            new_run(self._state, bounds)
        make_room(self._state, self.folder, bounds, 2 * checkpoint_octets(job))
        self.budgets = Budgets(self.folder, bounds)
        seed = config.runtime.initial_weights
        # SP-14-3: weights that others can compute are a white-box attack on the first step, so the default is
        # private entropy; a seed is a choice for demonstrations and tests.
        policy = config.policy
        written = policy.defences if policy else ()
        on_images = policy.image_defences if policy else ()
        key = defence_key(config) if written or on_images else b""
        encoder = build_network(
            backbone_of(job),
            written,
            key=key,
            seed=None if seed == "private" else site_seed(int(seed), self.modality),
            strict=False,
        )
        self._image_defences = make_image_stack(on_images, key)
        self.defences: tuple[str, ...] = self._image_defences.specs
        if isinstance(encoder, Defended):
            self.defences += encoder.stack.specs
        optimiser = make_optimiser(encoder.parameters(), job.optimiser, job.learning_rate, job.weight_decay)
        schedule = make_schedule(optimiser, job.schedule, job.steps)
        guard = Guard(bounds.max_gradient_norm, refuse=bounds.beyond_norm == "refuse")
        self.half = ClientHalf(encoder, optimiser, schedule, pick_device(config.runtime.device), guard)
        self.unusable = dict(unusable or {})
        """SP-11.13-3: patients whose files this process cannot use, and why: not read again, even if repaired."""
        self._withdrew = False  # what is announced does not count until the coordinator says where to go on
        self._pending: Activations | None = None
        self._announced: deque[Forward] = deque()
        self._prefetch: Prefetcher[Forward, np.ndarray] | None = None
        self._private = seed == "private"
        self._computed = 0
        self.advanced = 0
        """Steps that were made without this site, as far as this process was told."""
        self.lost = False
        """Its weights are of no step of this run until it is told to which to go back."""
        self._mechanism = mechanism(encoder.stack.defences) if isinstance(encoder, Defended) else None
        held = self.checkpoints()
        if not held:
            self.save(0)
        elif 0 in held:
            # Private weights are drawn by every process for itself; those of this run were drawn once.
            tensors, meta, _ = checkpoint.load(self.folder, 0)
            self.half.load(tensors, meta)
        else:
            self.lost = True
        self._secret = site_secret(self.folder)
        self.ledger = open_ledger(config)

    def prove(self, offer: JobOffer, binding: bytes) -> dict[str, bytes]:
        """SP-11.14-2: the fields of `job-accept` that show who holds this site's part in the run."""
        if offer.challenge is None:
            return {}
        proof = holder.prove(self._secret, self.run, offer.challenge, binding)
        return {"holder": holder.public(self._secret), "proof": proof}

    @property
    def applied(self) -> int:
        """Steps whose gradients have been applied."""
        return self.half.steps_done

    @property
    def waiting_for_gradients(self) -> bool:
        """A step's activations are out, its gradients are not back."""
        return self._pending is not None

    def checkpoints(self) -> tuple[int, ...]:
        """Steps that are safe on disk."""
        return tuple(checkpoint.available(self.folder))

    def inventory(self) -> tuple[list[Patient], list[Unusable]]:
        """Every patient by key, with the grid of its volume; and those whose files cannot be used.

        Raises:
            DataError: none can be used, or too many cannot.
        """
        grids = look(self.volumes, self.unusable)
        if len(self.unusable) > MOST_UNUSABLE:
            # SP-11.13-9.
            told = f"the files of too many patients cannot be used: {counted(self.unusable.values())}"
            raise DataError(f"{told}; see the lines above", "data", told)
        patients = [
            Patient(key, grid.shape, grid.spacing, grid.directions, grid.origin, grid.stored)
            for key, grid in grids.items()
        ]
        return patients, [Unusable(key, cause) for key, cause in self.unusable.items()]

    # --- batches ---------------------------------------------------------------------------------------

    def announce(self, forward: Forward) -> None:
        """A batch that will be due soon: check it and start reading.

        Raises:
            Misaligned: the commitment does not fit the samples.
            PolicyRefused: the batch is larger than this site allows.
            SchemaMismatch: a training batch larger than the job's, or places that cannot be.
        """
        # SP-11-27, SP-11-28: an accepted job is no licence: what is asked stays within it.
        if forward.mode not in ("train", "evaluate") or forward.step > self.job.steps:
            raise PolicyRefused(f"{forward.mode} of step {forward.step} is not part of this job")
        if forward.seed is not None and not self.job.augment:
            raise PolicyRefused("the job said that nothing is augmented")
        for sample in forward.samples:
            if sample.key not in self.unusable:
                self._check_window(sample)
        count = len(forward.samples)
        if forward.mode == "train" and count > self.job.batch:
            raise SchemaMismatch(f"a training batch of {count} samples where the job says {self.job.batch}")
        self._check_places(forward)
        # Judged for every batch: an evaluation's may be larger than the job's.
        if encoder_octets(self.job, count) > self._most_octets:
            raise PolicyRefused(
                f"a batch of {count} samples is more than this site computes (max_message_mib)"
            )
        if batch_digest(forward.step, forward.samples, forward.seed, forward.places) != forward.digest:
            raise Misaligned(
                f"batch of step {forward.step}: the samples do not give the digest that came with them"
            )
        if self._withdrew:
            return
        if self._prefetch is None:
            self._prefetch = Prefetcher(self._read, depth=4)
        self._prefetch.submit(forward, timeout=1.0)
        self._announced.append(forward)

    def due(self) -> Forward | None:
        """The next announced batch, if this site's weights are those it is meant for."""
        if not self._announced:
            return None
        forward = self._announced[0]
        # SP-11-6: a batch of a later step waits: gradients, or an `advance`, bring its turn.
        if forward.step == self.applied + (forward.mode == "train"):
            return self._announced.popleft()
        if forward.step <= self.applied:
            raise StepMismatch(
                f"asked for step {forward.step} ({forward.mode}) after step {self.applied} was applied"
            )
        return None

    def forward(self, forward: Forward) -> Activations | Withdraw:
        """Run the encoder on the batch that `due` returned (compute thread); or withdraw patients in it.

        Raises:
            PolicyRefused: the privacy budget does not bear it.
            DataError: not one patient's file, but all of them are out of reach.
        """
        x = self._usable_batch(forward)
        again = self._pending
        if forward.mode == "train" and again is not None and again.digest == forward.digest:
            # SP-11-16: ordered again after a lost link: the same octets, and the graph that waits for its gradients.
            return again
        if x is None:
            return self._withdraw(forward)
        self.budgets.computed(forward)
        self._pay(forward)
        # Where runs must repeat, so must the noise; elsewhere not even a batch that is asked for again gets the same.
        self._computed += 1
        nonce = self.incarnation + self._computed.to_bytes(8, "big") if self._private else b""
        release = Release(self.run, forward.mode, forward.step, forward.batch, forward.samples, nonce=nonce)
        arrays = self.half.forward(x, release) if forward.mode == "train" else self.half.evaluate(x, release)
        sent = Activations(
            forward.mode, forward.step, forward.batch, forward.digest, to_wire(arrays, self.job.precision)
        )
        if forward.mode == "train":
            self._pending = sent
        return sent

    def apply(self, gradients: Gradients) -> None:
        """Backward and optimiser step (compute thread).

        Raises:
            StepMismatch: not the step that is pending.
            SchemaMismatch: not the tensors that were sent.
        """
        if self._pending is None or gradients.step != self._pending.step:
            raise StepMismatch(
                f"gradients of step {gradients.step}, but {self.applied} was the last applied here"
            )
        sent = {name: (array.shape, array.dtype) for name, array in self._pending.tensors.items()}
        if {name: (array.shape, array.dtype) for name, array in gradients.tensors.items()} != sent:
            raise SchemaMismatch(
                f"the gradients of step {gradients.step} do not have the shapes of the activations"
            )
        # SP-11-11: once, as nothing is pending after it.
        try:
            self.half.backward(from_wire(gradients.tensors, self.job.precision))
        except PolicyRefused as error:
            # SP-11.15-8: a coordinator must not be able to switch this site off.
            raise BudgetSpent(error.reason) from None
        self._pending = None

    def advance(self, step: int) -> None:
        """Count on to `step`: those since the last that was applied here were made without this site.

        Raises:
            StepMismatch: `step` is behind, or beyond the job.
        """
        # SP-11-31: nothing announced or computed before counts any more.
        if not self.applied <= step <= self.job.steps:
            raise StepMismatch(
                f"asked to advance to step {step} of {self.job.steps} after step {self.applied}"
            )
        self.forget_batches()
        self.advanced += step - self.applied
        self.half.advance(step)
        self._pending = None

    def forget_batches(self) -> None:
        """The link is new: everything announced will be announced again."""
        self._withdrew = False
        self._announced.clear()
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None

    # --- checkpoints -----------------------------------------------------------------------------------

    def save(self, step: int, keep: Collection[int] | None = None) -> bytes:
        """Write this half durably; returns its digest.

        Args:
            step: the last applied.
            keep: steps whose checkpoints stay beside it; None: the newest few.

        Raises:
            StepMismatch: not the last step applied.
            DataError: it cannot be written; the checkpoints from before are as they were.
        """
        if step != self.applied:
            raise StepMismatch(f"asked to save step {step} after step {self.applied} was applied")
        tensors, meta = self.half.state()
        kept = checkpoint.KEEP if keep is None else keep
        check_room(self._state, self._bounds, checkpoint_octets(self.job))
        return bytes.fromhex(checkpoint.save(self.folder, step, tensors, meta, kept))

    def rollback(self, step: int) -> None:
        """SP-11-14: go back to the checkpoint of `step`. Raises DataError if it is not there or not whole."""
        self.budgets.rollback()
        self.forget_batches()
        tensors, meta, _ = checkpoint.load(self.folder, step)
        self.half.load(tensors, meta)
        checkpoint.discard_after(self.folder, step)
        self._pending, self.lost = None, False

    def close(self) -> None:
        """Stop reading ahead, and settle the privacy ledger."""
        self.forget_batches()
        self.budgets.flush()
        if self.ledger is not None:
            self.ledger.close()

    def _check_window(self, sample: Sample) -> None:
        """A window lies inside the volume, or contains it: cut at a border, it would single out voxels."""
        shape = self.volumes.geometry(sample.key).shape
        for start, width, size in zip(sample.origin, self.window, shape, strict=True):
            if not (0 <= start <= size - width or size - width <= start <= 0):
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
        if forward.mode == "train" and places[-1] >= self.job.batch:
            raise SchemaMismatch(f"a sample at place {places[-1]} of a batch of {self.job.batch}")

    # --- inside ----------------------------------------------------------------------------------------

    def _pay(self, forward: Forward) -> None:
        """For what is about to be computed and sent: before that, so that a crash pays too much and not too little."""
        if self.ledger is not None and self._mechanism is not None:
            self.ledger.pay(
                self.run,
                [sample.key for sample in forward.samples],
                self._mechanism.noise,
                learning=not self._mechanism.frozen,
                training=forward.mode == "train",
            )

    def _usable_batch(self, forward: Forward) -> np.ndarray | None:
        """The batch; None if patients in it cannot be used, whom `unusable` then holds."""
        try:
            return self._next_batch()
        except PatientUnusable:
            pass
        try:
            # SP-11.13-1: once more, since a network drive may have faltered.
            return self._read(forward)
        except PatientUnusable as error:
            note(error, self.unusable)
        for sample in forward.samples:
            try:
                if sample.key not in self.unusable:
                    self.volumes.read(sample.key)
            except PatientUnusable as error:
                note(error, self.unusable)
        return None

    def _withdraw(self, forward: Forward) -> Withdraw:
        """SP-11.13-1: instead of activations. Nothing that is announced counts until all are told where to go on."""
        self.forget_batches()
        self._withdrew = True
        keys = dict.fromkeys(sample.key for sample in forward.samples if sample.key in self.unusable)
        patients = tuple(Unusable(key, self.unusable[key]) for key in keys)
        return Withdraw(forward.mode, forward.step, forward.batch, forward.digest, patients)

    def _read(self, forward: Forward) -> np.ndarray:
        for sample in forward.samples:
            if (cause := self.unusable.get(sample.key)) is not None:
                raise PatientUnusable(sample.key, cause, OF_A_PATIENT[cause])
        data = SiteData(self.volumes, self._image_defences)
        return data.batch(forward.samples, self.window, forward.seed, self.modality, places=forward.places)

    def _next_batch(self) -> np.ndarray:
        if self._prefetch is None:
            raise StepMismatch("a batch is due that was never announced")
        return self._prefetch.get(self.job.seconds_per_step)
