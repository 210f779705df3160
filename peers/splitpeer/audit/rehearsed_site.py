"""A site in a rehearsal: the real one (`SiteJob`) on the patients of a cohort, with nothing between it and the
coordinator."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from splitpeer.audit.cohort import Cohort
from splitpeer.daemon import happenings as h
from splitpeer.data.channels import Channels
from splitpeer.data.consent import Consent
from splitpeer.defences.key import from_seed, key_of
from splitpeer.errors import DataError
from splitpeer.federation.halves import announced, client_half, image_stacks
from splitpeer.federation.terms import Room
from splitpeer.models.registry import backbone_of
from splitpeer.settings.bounds import Bounds
from splitpeer.site.budgets import Budgets
from splitpeer.site.encoders import Encoders
from splitpeer.site.job import Means, SiteJob
from splitpeer.site.named import Named
from splitpeer.site.people import People
from splitproto.messages import Activations, Forward, JobOffer

MOST = 1 << 40
UNBOUNDED = Bounds(
    max_voxels=MOST, max_parameters=MOST, max_memory_mib=MOST, max_state_mib=MOST, max_step_repeats=MOST,
    max_window_evaluations=MOST,
)  # fmt: skip
"""A rehearsal asks as often as an adversary may; what a policy allows is checked before (`SiteAudit`)."""


class RehearsedSite:
    """One site of a rehearsal.

    Args:
        offer: the job and the seats that it fills.
        held: its modalities, in the order of its settings.
        cohort: all patients.
        folder: of the rehearsal; its checkpoints go below.
        seed: of weights and defences.
        defences: of activations.
        image: defences of images.

    Raises:
        ConfigError: a defence that cannot be.
    """

    def __init__(
        self,
        name: str,
        offer: JobOffer,
        held: Sequence[str],
        cohort: Cohort,
        folder: Path,
        *,
        seed: int,
        device: str,
        defences: Sequence[str],
        image: Sequence[str],
    ) -> None:
        self.name, self.seats = name, offer.seats
        self.label = "+".join(seat.name for seat in offer.seats)
        """For file names."""
        self._trouble = ""
        job, backbone, key = offer.job, backbone_of(offer.job), from_seed(seed, name)
        images = image_stacks(image, key, held)
        encoders = Encoders(
            {
                seat.name: client_half(
                    job, backbone, seat, defences, key=key_of(key, seat.modalities, held), seed=seed, device=device
                )
                for seat in offer.seats
            }
        )  # fmt: skip
        kept = folder / f"weights-{self.label}"
        means = Means(
            state=folder,
            folder=kept,
            bounds=UNBOUNDED,
            checkpoint_octets=0,
            room=Room(job, backbone, offer.seats, UNBOUNDED, MOST, 0),
            channels=Channels(cohort.images, {seat.name: seat.modalities for seat in offer.seats}, images),
            # A cohort has no patients who have withdrawn it.
            consent=Consent(None, {}),
            named=Named(kept),
            salt=b"",
            people=People(folder),
            encoders=encoders,
            weights={},
            defences=announced(images, encoders.defences),
            private=False,
            budgets=Budgets(None, UNBOUNDED),
            ledger=None,
            labelling=None,
            secret=b"",
            summing=None,
            report=h.Reporter(self._hear),
        )
        # Nobody waits for it, so a slow disk is no failure.
        self.job = SiteJob(replace(offer, job=replace(job, seconds_per_step=86_400.0)), means, {})

    @cached_property
    def lists(self) -> dict[bytes, list[str]]:
        """Its patients, and which of its seats each fills."""
        channels = self.job.channels
        return {key: [self.seats[number].name for number in channels.fills(key)] for key in channels.keys()}  # noqa: SIM118

    def fills(self, seats: Collection[str]) -> bool:
        """Whether it fills any of these."""
        return any(seat.name in seats for seat in self.seats)

    def answer(self, forward: Forward) -> Activations:
        """What it sends for a batch that is due now.

        Raises:
            DataError: a patient's file cannot be used: a rehearsal withdraws nobody.
        """
        self.job.announce(forward)
        due = self.job.due()
        answer = self.job.forward(due) if due is not None else None
        if not isinstance(answer, Activations):
            raise DataError(self._trouble or f"site {self.name} has no answer to step {forward.step}")
        return answer

    def _hear(self, happening: h.Happening) -> None:
        if isinstance(happening, h.PatientFileBad):
            self._trouble = happening.cause
