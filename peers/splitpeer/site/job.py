"""One job at one site: its images, its encoders, its checkpoints. Knows messages, not links."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from splitpeer.daemon import happenings as h
from splitpeer.data.channels import Channels
from splitpeer.data.consent import Consent
from splitpeer.data.files import Found
from splitpeer.data.layouts import subject
from splitpeer.data.pseudonym import pseudonym
from splitpeer.defences.randomness import Release
from splitpeer.errors import DataError, JobFailed, PatientUnusable
from splitpeer.federation.files import counted, look, note
from splitpeer.federation.seats import joined
from splitpeer.federation.terms import Room, window_of
from splitpeer.privacy.ledger import Ledger
from splitpeer.settings.bounds import Bounds
from splitpeer.site.announced import Announced, Images
from splitpeer.site.answers import answers_of, check_windows
from splitpeer.site.arriving import by_seat_arrived
from splitpeer.site.averaging import SiteAveraging
from splitpeer.site.budgets import Budgets, BudgetSpent
from splitpeer.site.encoders import Encoders
from splitpeer.site.inference.answering import Answering, Owns, Terms
from splitpeer.site.labelling import Labelling, MaskAnswers
from splitpeer.site.late_files import LateFiles
from splitpeer.site.named import Named
from splitpeer.site.people import People
from splitpeer.site.released import Released
from splitpeer.site.run_folders import accepted_terms, check_room
from splitpeer.site.shown import Showing, Shown, shown_in
from splitpeer.site.summing import Summing
from splitpeer.site.tiling import Rule, Triple
from splitpeer.storage import checkpoint
from splitpeer.timeline.spans import UNRECORDED, Spans
from splitpeer.training.forms import activations_form, gradients_form
from splitproto import holder
from splitproto.causes import CONSENT, MISSING, OF_A_PATIENT, SHOWN
from splitproto.errors import (
    PolicyRefused,
    SchemaMismatch,
    SiteFailed,
    StepMismatch,
    TensorError,
    UnexpectedMessage,
)
from splitproto.messages import (
    Activations,
    Average,
    Averaged,
    Forward,
    Gradients,
    JobOffer,
    Locate,
    Located,
    Share,
    Shared,
    Withdraw,
    Withdrawn,
)
from splitproto.records import Patient, Unusable

MOST_UNUSABLE = 1024
"""SP-11.13-9: a site that cannot use more files than this has failed."""
LABEL = b"splitproto weights v1"
IN_ORDER = ("release", "infer")
"""SP-11.17-7, SP-11.19-9: modes in which each batch has its answer, also after a `withdraw`."""


@dataclass(frozen=True)
class Means:
    """What a site brings to one run: `opening.open_job` finds and makes it."""

    state: Path
    """[peer] state."""
    folder: Path
    """The site's folder of the run."""
    bounds: Bounds
    checkpoint_octets: int
    """Bytes of one checkpoint."""
    room: Room
    """What one batch may take."""
    channels: Channels
    consent: Consent
    named: Named
    salt: bytes
    """The patients' salt."""
    people: People
    encoders: Encoders
    weights: Mapping[str, str]
    """By seat, the digest of the file that its encoder started from."""
    defences: tuple[str, ...]
    """Defences of images and activations, as they are announced."""
    private: bool
    """Whether nobody else knows the initial weights, and no noise is drawn twice."""
    budgets: Budgets
    labelling: Labelling | None
    """Where the labels are this site's."""
    ledger: Ledger | None
    secret: bytes
    """Secret key of this site's place in the run."""
    summing: Summing | None
    """Where only a sum over sites leaves."""
    report: h.Reporter
    """Told by the thread that computes."""
    look_again: Callable[[], Mapping[str, Found]] = dict
    """The site's images as they are now, by modality."""
    inference: Terms = field(default_factory=Terms)
    spans: Spans = field(default_factory=Spans)
    """Where the time of a step goes."""


class SiteJob:
    """The state that outlives a link. Its compute methods belong to one thread.

    Args:
        offer: the job and the seats, which were judged.
        means: see there.
        unusable: patients whose files were found bad already, and why.
    """

    def __init__(self, offer: JobOffer, means: Means, unusable: Mapping[bytes, str]) -> None:
        if (offer.job.fusion is None) != (means.summing is None):
            # SP-11.18-2: values may not leave as they are because something was not made.
            raise ValueError("a job with secure fusion at a site without, or the reverse")
        self.run, self.job, self.seats = offer.run, offer.job, offer.seats
        self.terms = accepted_terms(offer).decode()
        """Their digest, without the deadline."""
        self.window = window_of(offer.job)
        # SP-11-3: it identifies this process's memory, so a rollback keeps it.
        self.incarnation = secrets.token_bytes(16)
        self._means = means
        self.folder, self.channels, self.encoders = means.folder, means.channels, means.encoders
        self.budgets, self.ledger, self.defences = means.budgets, means.ledger, means.defences
        self.summing, self.spans = means.summing, means.spans
        self.began = 0.0
        """When the batch of the step under way was due (`time.monotonic`)."""
        self.answering = Answering(means.inference, means.bounds, means.state)
        self._averaging = SiteAveraging(self.job, self.seats, self.encoders.halves, self.budgets)
        self.unusable = dict(unusable)
        """SP-11.13-3: patients whose files this process cannot use, and why: not read again, even if repaired."""
        labelling, heed = means.labelling, self._heed_consent
        self._labels = MaskAnswers(labelling, self.unusable, heed, means.report) if labelling else None
        self._release_to(Released())
        self._shown: Shown | None = None
        """Whom other runs have shown, where that matters."""
        self._late = LateFiles(
            means.channels, means.consent, means.named, means.salt, means.look_again, means.report
        )
        self._revoked: set[bytes] = set()
        """Of whom the coordinator was told on this link that they have withdrawn consent."""
        self._bad_for_now: set[bytes] = set()
        """Patients found unusable by inference alone: their files are looked at again."""
        self._withdrew = False  # announced batches do not count until the coordinator says where to continue
        self._pending: Activations | None = None
        self._computed = 0
        self.advanced = 0
        """Steps that were made without this site, as far as this process knows."""
        self.lost = False
        """Its weights belong to no step of this run until the coordinator says to which to roll back."""

    @property
    def weights(self) -> dict[str, str]:
        """By seat, the digest of the file of pretrained weights that the run started from; {}: of none."""
        return dict(self._means.weights)

    def begin(self) -> None:
        """From weights of step 0: those of the run if it holds them; otherwise it writes fresh ones down.

        Raises:
            PolicyRefused: nobody is left whom the run may show.
            DataError: they cannot be read or written.
        """
        held = self.checkpoints()
        if not held:
            self.save(0)
        elif 0 in held:
            # Private weights are drawn by every process for itself; those of this run were drawn once.
            self._load(0)
        else:
            self.lost = True
        self._remember()

    def prove(self, offer: JobOffer, binding: bytes) -> dict[str, bytes]:
        """SP-11.14-2: the fields of `job-accept` that show who holds this site's part in the run."""
        if offer.challenge is None:
            return {}
        proof = holder.prove(self._means.secret, self.run, offer.challenge, binding)
        return {"holder": holder.public(self._means.secret), "proof": proof}

    def label(self) -> bytes | None:
        """SP-11.17-6: in a frozen job, what shows that the weights are those of before; keyed, as a digest could be
        compared with those of weights that somebody guesses."""
        if not self.job.frozen:
            return None
        return hmac.digest(self._means.secret, LABEL + self.encoders.digest(), hashlib.sha256)

    @property
    def applied(self) -> int:
        """Steps whose gradients have been applied."""
        return self.encoders.steps_done

    @property
    def waiting_for_gradients(self) -> bool:
        """A step's activations are out, its gradients are not back."""
        return self._pending is not None

    @property
    def step_under_way(self) -> bool:
        """What this site sent for a step has not come to its end: gradients, or the count of a step that its masks
        were used for."""
        return self.waiting_for_gradients or (
            self._labels is not None and self._labels.answered > self.applied
        )

    def checkpoints(self) -> tuple[int, ...]:
        """Steps that are safe on disk."""
        return tuple(checkpoint.available(self.folder))

    def inventory(self) -> tuple[list[Patient], list[Unusable]]:
        """Every patient by key, with the grid of its volume; and those whose files cannot be used.

        Raises:
            PolicyRefused: more would leave than can be written down.
            DataError: none can be used, or too many cannot.
        """
        self._heed_consent()
        self._heed_shown()
        grids = look(self.channels, self.unusable, self._means.report)
        if self.job.frozen:
            shapes = [grid.shape for grid in grids.values()]
            check_windows(shapes, self.window, self._means.bounds.max_record_mib)
        bad = [cause for cause in self.unusable.values() if cause != SHOWN]
        if len(bad) > MOST_UNUSABLE:
            # SP-11.13-9.
            told = f"the files of too many patients cannot be used: {counted(bad)}"
            raise DataError(f"{told}; see the lines above", "data", told)
        # SP-11.13-2: whom the coordinator was never told of, it is not told of now.
        unusable = {k: c for k, c in self.unusable.items() if c != CONSENT or k in self._means.named}
        # SP-11.17-12: those of this run first; a patient who is on no list takes no part either.
        listed = sorted(unusable, key=lambda key: unusable[key] == SHOWN and key not in self._means.named)
        unusable = {key: unusable[key] for key in listed[:MOST_UNUSABLE]}
        self._means.named.add(
            (key, self._person(key)) for key in {*grids, *unusable} - {*self._means.named.people}
        )
        patients = [self._listed(key) for key in grids]
        self._revoked = {key for key, cause in unusable.items() if cause == CONSENT}
        if not self.job.frozen:
            self._late.keys -= grids.keys()
        return patients, [Unusable(key, cause) for key, cause in unusable.items()]

    def _listed(self, key: bytes) -> Patient:
        """SP-11.20-3: of a patient with a mask, whose scan it is as well."""
        listed = self.channels.listed(key)
        person = self._person(key) if listed.mask else key
        return listed if person == key else replace(listed, person=person)

    def filled(self, patients: Collection[Patient]) -> dict[str, int]:
        """How many of `patients` fill each seat, by its name and, where that says less, its channels."""
        found = {}
        for number, seat in enumerate(self.seats):
            alone = seat.modalities == (seat.name,)
            shown = seat.name if alone else f"{seat.name} ({', '.join(seat.modalities)})"
            found[shown] = sum(patient.seats is None or number in patient.seats for patient in patients)
        return found

    # --- inference -------------------------------------------------------------------------------------

    def holds(self, key: bytes) -> bool:
        """Whether there is an image of the patient now (compute thread). Raises DataError."""
        self._late.look()
        return bool(self.channels.fills(key))

    def locate(self, asked: Locate, owns: Owns) -> Located:
        """SP-11.19-4: whether the patient of a request can be used here (compute thread).

        Raises:
            DataError: it cannot be counted, or the list of those who have withdrawn consent cannot be read.
        """
        key, request = asked.key, asked.request
        if not self.answering.admit(asked, owns):
            return Located(request, cause="refused")
        self._late.look()
        # A file that was being written when it was asked for before may be whole by now.
        if key in self._bad_for_now:
            self._bad_for_now.discard(key)
            self.unusable.pop(key, None)
        # After that: who has withdrawn consent stays out.
        self._heed_consent()
        # SP-11.13-2: whom the coordinator was never told of, it is not told of now.
        untold = self.unusable.get(key) == CONSENT and key not in self._means.named
        if untold or not self.channels.fills(key):
            return Located(request, cause="absent")
        if (cause := self.unusable.get(key)) is None and self._shown is not None:
            cause = SHOWN if self._shown.bars(self._person_shown(key)) else None
        if cause is not None:
            return Located(request, cause=cause)
        try:
            patient = self.channels.listed(key)
        except PatientUnusable as error:
            return Located(request, cause=error.cause)
        if key not in self._means.named.people:
            self._means.named.add([(key, self._person(key))])
        self.answering.open(key)
        return Located(request, patient)

    # --- batches ---------------------------------------------------------------------------------------

    def announce(self, forward: Forward) -> None:
        """A batch that will be due soon: check it and start reading.

        Raises:
            Misaligned: the commitment does not fit the samples.
            PolicyRefused: the batch is larger than this site allows.
            SchemaMismatch: a training batch larger than the job's, or places that cannot be.
        """
        if self.summing is not None and forward.places is not None:
            # SP-11.18-13: "all sites have all samples"
            raise PolicyRefused("a part of a batch was asked for, where only a sum of all sites may be read")
        late = {sample.key for sample in forward.samples} & self._late.keys
        if forward.mode in ("train", "evaluate") and late:
            # SP-11-4: a patient takes part in the run once the coordinator was told of the patient and the grid.
            raise PolicyRefused(f"a batch to {forward.mode} has a patient who came later and was not listed")
        if self.job.frozen and self.answering.unlocated(late):
            # SP-11.19-14.
            raise PolicyRefused(
                "a release was asked for of a patient who came later and was not located on this link"
            )
        self._announced.check(forward, self.unusable)
        if self._shown is not None and not self.job.frozen:
            self._shown.check(self._people(forward, self.unusable))
        if not self._withdrew:
            self._announced.add(forward)

    def spans_of(self, forward: Forward) -> Spans:
        """Where the time of a batch is recorded: of training only."""
        return self.spans if forward.mode == "train" else UNRECORDED

    def due(self) -> Forward | None:
        """The next announced batch, if this site's weights are those it is meant for."""
        return self._announced.due(self.applied)

    def forward(self, forward: Forward) -> Activations | Withdraw:
        """Run the encoder on the batch that `due` returned (compute thread); or withdraw patients in it.

        Raises:
            StepMismatch: an evaluation between an average and its step.
            PolicyRefused: the privacy budget does not bear it, or the range of a sum does not suit it.
            SiteFailed: what was answered before cannot be computed again.
            DataError: all files are out of reach, or the list of those who have withdrawn consent is.
        """
        if forward.mode in ("evaluate", "infer") and self.encoders.averaged:
            # SP-11.16-1, SP-11.19-10: weights that the coordinator wrote would answer, as often as it likes.
            raise StepMismatch(
                f"a batch to {forward.mode} between the average after step {self.applied} and its step"
            )
        self._heed_consent()
        gone = any(self.unusable.get(sample.key) == CONSENT for sample in forward.samples)
        if gone and forward.mode not in IN_ORDER:
            # Activations computed before are not sent a second time either.
            return self._withdraw(forward)
        # SP-11.17-7: batches that were announced still count, so what was read ahead is taken in turn.
        known, began, training = set(self.unusable), time.monotonic(), forward.mode == "train"
        spans = self.spans_of(forward)
        with spans.of("images"):
            images = self._usable_batch(forward)
        if forward.mode == "infer":
            self._bad_for_now |= self.unusable.keys() - known
        again = self._pending
        if forward.mode == "train" and again is not None and again.digest == forward.digest:
            # SP-11-16: ordered again after a lost link: the same octets, and the graph that waits for its gradients.
            return again
        if images is None or gone:
            return self._withdraw(forward)
        if forward.mode == "release":
            # Once more: those that were announced together do not know of each other.
            self.released.check(forward)
        self.budgets.computed(forward)
        # SP-11.17-5: the same octets again cost nothing.
        if not self.released.knows(forward):
            self._pay(forward)
        compute = self.encoders.forward if training else self.encoders.evaluate
        with spans.of("encoder"):
            computed = compute(images, self._releases(forward))
        with spans.of("encode"):
            arrays, said = self._leaving(forward, computed)
        sent = Activations(forward.mode, forward.step, forward.batch, forward.digest, arrays)
        if training:
            self._pending, self.began = sent, began
        if forward.mode == "release":
            try:
                self.released.note(forward, said)
            except SiteFailed as error:
                return self._changed(forward, error)
        elif self._shown is not None:
            self._shown.note(self._people(forward))
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
        form = gradients_form(self.job)
        arrived = by_seat_arrived(gradients, self._pending, self.seats, form, summed=self.summing is not None)
        if any(len(levels) < len(self.job.levels) for levels in arrived.values()):
            # SP-11-10: a seat sits out as a whole.
            raise SchemaMismatch(f"the gradients of step {gradients.step} leave out a level of a seat")
        # SP-11-11: once, as nothing is pending after it.
        batch, self._pending = self._pending.digest, None
        with self.spans.of("decode"):
            parts = {seat: form.from_wire(levels) for seat, levels in arrived.items()}
        try:
            with self.spans.of("backward"):
                self.encoders.backward(parts)
        except PolicyRefused as error:
            # SP-11.15-8: a coordinator must not be able to switch this site off.
            raise BudgetSpent(error.reason) from None
        if self.summing is not None:
            self.summing.follow(gradients.step, batch, gradients.tensors)

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
        if self.summing is not None and step > self.applied:
            # SP-11.18-13: a step made without this site would have been a sum without it.
            raise PolicyRefused(
                "a step was made without this site, where only a sum of all sites may be read"
            )
        self._forget_announced()
        self.advanced += step - self.applied
        self.encoders.advance(step)
        self._pending = None

    def forget_batches(self) -> None:
        """The link is new: everything announced will be announced again."""
        self.answering.close()
        if self._labels is not None:
            self._labels.answered = 0
        self._forget_announced()

    def _forget_announced(self) -> None:
        self._withdrew = False
        self._announced.clear()

    # --- labels ----------------------------------------------------------------------------------------

    @property
    def labels(self) -> MaskAnswers:
        """Raises UnexpectedMessage: this site was not asked for masks."""
        if self._labels is None:
            raise UnexpectedMessage("a word about labels at a site that was not asked for masks")
        return self._labels

    # --- averages --------------------------------------------------------------------------------------

    def share(self, asked: Share) -> Shared:
        """SP-11.16-2: the weights of one encoder (compute thread). Raises what `SiteAveraging.share` raises."""
        return self._averaging.share(asked, pending=self.waiting_for_gradients)

    def take_average(self, average: Average) -> Averaged:
        """SP-11.16-5: the next step is made from it (compute thread). Raises what `SiteAveraging.take` raises."""
        return self._averaging.take(average, pending=self.waiting_for_gradients)

    # --- checkpoints -----------------------------------------------------------------------------------

    def save(self, step: int, keep: Collection[int] | None = None) -> bytes:
        """Write this half durably; returns its digest.

        Args:
            step: the last applied.
            keep: steps whose checkpoints also stay; None: the newest few.

        Raises:
            StepMismatch: not the last step applied.
            DataError: it cannot be written; earlier checkpoints are unchanged.
        """
        if step != self.applied:
            raise StepMismatch(f"asked to save step {step} after step {self.applied} was applied")
        tensors, meta = self.encoders.state()
        if self.summing is not None:
            meta = self.summing.saved(meta)
        kept = checkpoint.KEEP if keep is None else keep
        check_room(self._means.state, self._means.bounds, self._means.checkpoint_octets)
        return bytes.fromhex(checkpoint.save(self.folder, step, tensors, meta, kept))

    def rollback(self, step: int) -> None:
        """SP-11-14: go back to the checkpoint of `step`. Raises DataError if it is not there or not whole."""
        self.budgets.rollback()
        self.forget_batches()
        self._load(step)
        checkpoint.discard_after(self.folder, step)
        self._pending, self.lost = None, False

    def close(self) -> None:
        """Stop reading ahead, and settle the privacy ledger."""
        self.forget_batches()
        self.budgets.flush()
        if self.ledger is not None:
            self.ledger.close()

    # --- inside ----------------------------------------------------------------------------------------

    def _load(self, step: int) -> None:
        tensors, meta, _ = checkpoint.load(self.folder, step)
        self.encoders.load(tensors, meta)
        if self.summing is not None:
            self.summing.restore(meta)

    def _leaving(
        self, forward: Forward, computed: dict[str, dict[str, np.ndarray]]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What an encoder's levels, by seat, become on the wire; and what of it stays the same when it is asked again,
        which masks of another epoch are not (SP-11.17-5). Raises what `Summing.check_range` and `Summing.answer`
        raise, and JobFailed: NaN or infinity in values to be coded."""
        if self.summing is not None:
            if forward.mode == "release" and not self.released.windows:
                # SP-11.18-3: before anything is noted, as a patient may be shown in few runs.
                self.summing.check_range(computed)
            words = self.summing.rounded(forward, computed)
            return self.summing.answer(forward, words), words
        try:
            arrays = activations_form(self.job).to_wire(joined(computed, self.seats))
        except TensorError:
            # SP-11.21-2: no coding has a form for it; uncoded, the coordinator would find it.
            raise JobFailed(
                f"the activations of step {forward.step} are not finite numbers: check this site's images, or have "
                "the learning rate lowered"
            ) from None
        return arrays, arrays

    def _remember(self) -> None:
        """What has left in this run, and whom others have shown.

        Raises:
            PolicyRefused: everybody.
            DataError: it cannot be read.
        """
        means, bounds, once = self._means, self._means.bounds, self._means.bounds.releases == "once"
        if not self.job.frozen and bounds.max_runs_per_patient is None:
            return
        showing = Showing(self.run, self.terms, self.encoders.identities(), once, bounds.max_runs_per_patient)
        self._shown = shown_in(means.state, showing, bounds.max_record_mib)
        self._shown.check_some([self._person_shown(key) for key in self.channels.keys()])  # noqa: SIM118 (not a dict)
        if self.job.frozen:
            answers = answers_of(self.folder, bounds.max_record_mib)
            rule = Rule(self.window, self._size, bounds.max_overlap) if once else None
            self._release_to(Released(answers, self._shown, self._person_shown, rule))

    def _release_to(self, released: Released) -> None:
        self.released = released
        """What has left in a frozen job."""
        inference = self.answering.check if self.answering.serves else None
        self._announced = Announced(
            self.job, self.channels, self._means.room, self._read, released, inference
        )

    def _account(self, key: bytes) -> bytes:
        """Of the person behind a patient's key, at this site. Raises DataError: see `People`."""
        return self._means.people.account(self.channels.case(key).patient)

    def _person_shown(self, key: bytes) -> str:
        """The same for a record; of a key that this site lacks, and refuses, the key."""
        return (self._account(key) if self.channels.fills(key) else key).hex()

    def _people(self, forward: Forward, without: Collection[bytes] = ()) -> set[str]:
        return {self._person_shown(sample.key) for sample in forward.samples if sample.key not in without}

    def _size(self, key: bytes) -> Triple | None:
        """Of a patient's volume, in voxels."""
        return self.channels.geometry(key).shape if self.channels.fills(key) else None

    def _person(self, key: bytes) -> bytes:
        """The key of the person behind a patient's."""
        return pseudonym(self._means.salt, subject(self.channels.case(key).patient))

    def _heed_consent(self) -> None:
        """Patients who have withdrawn consent are not read again. Raises DataError: the list cannot be read."""
        withdrawn = self._means.consent.withdrawn()
        for key in sorted(withdrawn):
            if self.channels.holds(key) or key in self._means.named:
                note(self._means.consent.refusal(key), self.unusable, self._means.report)
                self.unusable[key] = CONSENT
        if self._labels is not None:
            self._labels.forget(withdrawn, everywhere=True)

    def newly_revoked(self) -> list[bytes]:
        """SP-11.13-12: who has withdrawn consent without the coordinator being told on this link (compute thread).
        Raises DataError: the list cannot be read, or withdraws too many."""
        self._heed_consent()
        gone = {key for key, cause in self.unusable.items() if cause == CONSENT and key in self._means.named}
        return sorted(gone - self._revoked)

    def note_revoked(self, keys: Collection[bytes]) -> None:
        """The coordinator has been told of these; it is not told again on this link."""
        self._revoked = self._revoked.union(keys)

    def hear_withdrawn(self, told: Withdrawn) -> None:
        """Who is out of the run, at whichever site (compute thread). Raises as `MaskAnswers.forget`."""
        if self._labels is not None:
            gone = [patient.key for patient in told.patients if patient.cause == CONSENT]
            self._labels.forget(gone, everywhere=False)

    def _heed_shown(self) -> None:
        """SP-11.17-12: the run does without whom other runs have shown, as a question about them would end it."""
        if self._shown is None:
            return
        barred = [key for key in self.channels.keys() if self._shown.bars(self._person_shown(key))]  # noqa: SIM118
        if new := [key for key in barred if key not in self.unusable]:
            self.unusable.update(dict.fromkeys(new, SHOWN))
            self._means.report(
                h.DataWarning(f"this run does without {counted([SHOWN] * len(new))} of the patients")
            )

    def _releases(self, forward: Forward) -> dict[str, Release]:
        """What is about to leave, by seat."""
        # If runs must repeat, so must the noise; otherwise even a batch that is asked for again gets other noise.
        self._computed += 1
        # SP-11.18-13, SP-11.17-5: an answer in a sum is given twice or not at all, noise included; so is a release.
        again = self._means.private and self.summing is None and forward.mode != "release"
        nonce = self.incarnation + self._computed.to_bytes(8, "big") if again else b""
        samples = forward.samples
        return {
            seat: Release(
                self.run,
                forward.mode,
                forward.step,
                forward.batch,
                tuple(samples[row] for row in rows),
                nonce=nonce,
            )
            for seat, rows in self.channels.rows(samples).items()
        }

    def _pay(self, forward: Forward) -> None:
        """Pay for what is about to be sent, before it is computed, so that a crash pays too much and not too
        little."""
        mechanism = self.encoders.mechanism
        if self.ledger is None or mechanism is None:
            return
        # A patient who leaves at two seats leaves twice.
        rows = self.channels.rows(forward.samples).values()
        self.ledger.pay(
            self.run,
            [self._account(forward.samples[row].key) for of_seat in rows for row in of_seat],
            mechanism.noise,
            learning=not mechanism.frozen,
            training=forward.mode == "train",
            own=mechanism.own_noise,
        )

    def _usable_batch(self, forward: Forward) -> Images | None:
        """The batch; None if patients in it cannot be used, which `unusable` then holds."""
        try:
            return self._announced.images()
        except PatientUnusable:
            pass
        try:
            # SP-11.13-1: once more, since a network drive may have faltered.
            return self._read(forward)
        except PatientUnusable as error:
            note(error, self.unusable, self._means.report)
        for sample in forward.samples:
            try:
                if sample.key not in self.unusable:
                    self.channels.read(sample.key)
            except PatientUnusable as error:
                note(error, self.unusable, self._means.report)
        return None

    def _withdraw(self, forward: Forward) -> Withdraw:
        """SP-11.13-1: sent instead of activations. Announced batches, but for those of `IN_ORDER`, do not count until
        the coordinator says where to continue."""
        if forward.mode not in IN_ORDER:
            self._forget_announced()
            self._withdrew = True
        keys = dict.fromkeys(sample.key for sample in forward.samples if sample.key in self.unusable)
        patients = tuple(Unusable(key, self.unusable[key]) for key in keys)
        return Withdraw(forward.mode, forward.step, forward.batch, forward.digest, patients)

    def _changed(self, forward: Forward, error: SiteFailed) -> Withdraw:
        """SP-11.19-14: what was released of the patient of a request cannot be computed again. Raises `error`: it is a
        patient of the run, which cannot do without."""
        keys = {sample.key for sample in forward.samples}
        if self.answering.unlocated(keys):
            raise error
        why = (
            "other activations would leave than before, and show more: image, network or machine have changed"
        )
        for key in keys:
            note(PatientUnusable(key, MISSING, why), self.unusable, self._means.report)
        self._bad_for_now |= keys
        return self._withdraw(forward)

    def _read(self, forward: Forward) -> Images:
        """The images of a batch; called by the thread that reads ahead, too."""
        withdrawn = self._means.consent.withdrawn()
        for sample in forward.samples:
            if sample.key in withdrawn:
                raise self._means.consent.refusal(sample.key)
            if (cause := self.unusable.get(sample.key)) is not None:
                raise PatientUnusable(sample.key, cause, OF_A_PATIENT[cause])
        with self.spans_of(forward).of("read"):
            return self.channels.windows(forward, self.window)
