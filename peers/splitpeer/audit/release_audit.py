"""A site's audit of a job with frozen encoders, before it joins: what the coordinator would read of each window, once.

With secure fusion that is a sum, and the partners are stand-ins. What they hide of this site's values depends on them,
so there is a second adversary, who knows all their parts: nothing of this site's values can show more than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from splitpeer.attacks.base import Progress, Target, silent
from splitpeer.attacks.neighbours import offsets
from splitpeer.audit.cohort import Cohort, Samples, cut, most_tumour, shadow
from splitpeer.audit.experiment import parse_order
from splitpeer.audit.further import ONE_RELEASE, Further
from splitpeer.audit.invited import Invited
from splitpeer.audit.judge import Judge, make_judge
from splitpeer.audit.rehearsal import Protection
from splitpeer.audit.released import (
    FrozenSeat,
    Onlooker,
    known_partners,
    of_a_sum,
    promises,
    quiet,
    read,
    sent,
    sum_of,
)
from splitpeer.audit.run_folder import OTHERS, RunFolder
from splitpeer.audit.stand_in_partners import StandIns
from splitpeer.audit.together import Allies
from splitpeer.audit.wider import REACH, moved, wider_orders
from splitpeer.data.channels import Channels
from splitpeer.data.sampling import split_patients
from splitpeer.data.volumes import Volumes
from splitpeer.defences.activation.dp import DPGaussian
from splitpeer.defences.image.stack import ImageStack
from splitpeer.defences.key import from_seed, key_of
from splitpeer.errors import ConfigError
from splitpeer.federation.halves import announced, client_half, image_stacks
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import backbone_for, job_on_wire, window_of
from splitpeer.report.model import Source
from splitpeer.site import first_weights
from splitpeer.site.encoders import Encoders
from splitpeer.training.split_step import Arrays
from splitpeer.training.windows import window_origins
from splitproto.records import Job, Sample, Seat

if TYPE_CHECKING:
    from splitpeer.audit.sum_training import SumTraining

RANDOM = (
    "No [model] weights are set: the encoder here is random, as one that the site draws for a run. Weights from "
    "splitpeer pretrain show more or less than these."
)
SUM = "sum"
"""Folder of the adversary who reads it."""
ONCE = "Each window leaves once, with one encoder. Another run with another encoder would show the patients again."
KNOWN = "others-known"
"""Folder of the adversary who knows all parts but this site's."""


@dataclass(frozen=True)
class ReleaseAudit(Invited):
    """`splitpeer audit` of such a job."""

    not_tested: ClassVar[tuple[str, ...]] = OTHERS

    def run(
        self, attacks: Sequence[str], protections: Sequence[Protection], commands: tuple[str, ...] = (),
        progress: Progress = silent,
    ) -> list[Path]:  # fmt: skip
        """Compute what would leave, read it as the coordinator would, and attack it; returns the run folders.

        Raises:
            PeerError: settings or images that cannot be used.
        """
        site, job = self.site(), job_on_wire(self.job)
        seats = seats_of(self.job).of(site)
        scene = self._scene(site, seats, job)
        # All are made before the first is attacked: a misspelt defence must not cost an hour.
        made = [self._own_parts(site, seats, job, protection) for protection in protections]
        folders = []
        for number, (protection, (parts, stacks)) in enumerate(zip(protections, made, strict=True)):
            name = f"{number}-{'defended' if protection != Protection() else 'undefended'}"
            partners = scene.partners
            others = partners.parts(protection.defences, self.seed, self.device) if partners else []
            course = self.learn(scene, parts, others, stacks, protection, progress)
            for part in (*parts, *others):
                quiet(part.half)
            defences = announced(stacks, Encoders({p.seat.name: p.half for p in parts}).defences)
            for below, summed, together in self._adversaries(scene, parts, others):
                adversary = Onlooker(
                    job, tuple(together), site, defences, summed, self.hospitals(), self.device, self.seed
                )
                wanted = of_a_sum(attacks) if below == SUM else attacks
                further = self._attack(
                    adversary, scene, stacks, self.out / name / below, wanted, commands, progress
                )
                folders.append(further.folder.folder)
                if below != SUM and self.wider and scene.partners is not None:
                    allies = Allies(adversary, scene.partners, others, stacks)
                    folders += further.together(allies, scene.training, self.shadow_images)
                if below == SUM:
                    folders += self.attack_labels(scene, course, protection, further.folder)
        return folders

    def learn(
        self, scene: Audited, parts: Sequence[FrozenSeat], others: Sequence[FrozenSeat],
        stacks: dict[str, ImageStack], protection: Protection, progress: Progress,
    ) -> SumTraining | None:  # fmt: skip
        """Train the encoders; frozen ones stay as they are."""
        return None

    def ask_for_members(self, scene: Audited, further: Further) -> None:
        """Attack membership; nothing that was sent of frozen encoders tells whom the run trained on."""

    def attack_labels(
        self, scene: Audited, course: SumTraining | None, protection: Protection, images: RunFolder
    ) -> list[Path]:
        """Attack what comes back to hospitals; returns the run folders. To frozen encoders nothing does."""
        return []

    # --- inside ----------------------------------------------------------------------------------------------

    def _scene(self, site: str, seats: Sequence[Seat], job: Job) -> Audited:
        cohort, gaps = self.cohort(seats)
        window, known = window_of(job), self.known(cohort)
        if cohort.labels is None:
            raise ValueError("a site's cohort has masks or stand-ins for them")
        keys = cohort.keys()
        training, held_out = split_patients(
            keys, self.job.data.validation, self.job.job.seed, cohort.labels.subjects()
        )
        if not held_out or not (training or self.shadow):
            more = "more" if not held_out else "fewer"
            raise ConfigError(
                f"{len(keys)} patients fill all seats of this site, and "
                f"{len(held_out)} of them are held out: set [data] validation in job.toml to {more}"
            )
        targets = cut(known, most_tumour(cohort, held_out[: self.samples], window), window)
        whole = Seat(site, tuple(m for seat in seats for m in seat.modalities))
        if self.shadow is not None:
            others, similar = self.strangers(self.shadow, whole, window)
        else:
            others, similar = shadow(known, window, self.shadow_images, self.seed, training), known
        partners = None
        if job.fusion is not None or (self.wider and len(self.job.sites) > 1):
            partners = StandIns.find(self.job, self.config, site, self.partners, self.out / "partners")
        if partners is not None and job.fusion is not None:
            volumes = next(iter(similar.images.values()))
            drawn = partners.images(others.samples, volumes, window)
            others = replace(others, images={**others.images, **drawn})
        return Audited(
            job,
            cohort,
            targets,
            others,
            similar,
            partners,
            make_judge(whole.modalities, targets, others),
            tuple(gaps),
            tuple(training),
            tuple(held_out),
        )

    def _own_parts(
        self, site: str, seats: Sequence[Seat], job: Job, protection: Protection
    ) -> tuple[list[FrozenSeat], dict[str, ImageStack]]:
        """This site's encoders under a protection, with the weights that its settings name, and image defences."""
        held, key = self.held(site), from_seed(self.seed, site)
        backbone = backbone_for(job, self.config)
        halves = {
            seat.name: client_half(
                job, backbone, seat, protection.defences, key=key_of(key, seat.modalities, held), seed=self.seed,
                device=self.device,
            )
            for seat in seats
        }  # fmt: skip
        first_weights.load(Encoders(halves), self.config, job, backbone, seats)
        parts = [FrozenSeat(site, seat, halves[seat.name]) for seat in seats]
        return parts, image_stacks(protection.image, key, held)

    def _adversaries(
        self, scene: Audited, parts: list[FrozenSeat], others: list[FrozenSeat]
    ) -> list[tuple[str, str, list[FrozenSeat]]]:
        """Name of a folder, what is read in words, and whose values."""
        if scene.partners is None or scene.job.fusion is None:
            return [("", "", parts)]
        sites = scene.job.fusion.parties
        return [(KNOWN, known_partners(sites), parts), (SUM, sum_of(sites), [*parts, *others])]

    def _attack(
        self, adversary: Onlooker, scene: Audited, stacks: dict[str, ImageStack], folder: Path,
        attacks: Sequence[str], commands: tuple[str, ...], progress: Progress,
    ) -> Further:  # fmt: skip
        def released(samples: Sequence[Sample]) -> tuple[Target, ...]:
            return adversary.targets(samples, scene.read(adversary, samples, stacks))

        samples, source = scene.targets.samples, Source(role="coordinator", rehearsal=True)
        levels = scene.read(adversary, samples, stacks)
        one = self.named(adversary.experiment(samples, levels, scene.judge, scene.others, source))
        mechanism = Encoders(
            {p.seat.name: p.half for p in adversary.parts if p.site == adversary.site}
        ).mechanism
        opened = one.open_folder(
            folder,
            commands=commands,
            notes=self.release_notes(scene),
            privacy=self.privacy(mechanism, self.counted(scene, mechanism)),
        )
        opened.not_tested = self.not_tested
        opened.promises = promises(scene.job.fusion.parties) if scene.job.fusion is not None else {}
        done = list(one.run([parse_order(written) for written in attacks], opened, progress=progress))
        further = Further(one, released, scene.cohort, wider_orders(self.wider, done), opened, progress)
        if self.wider:
            further.neighbours(partial(scene.beside, one.view.seat))
            self.ask_for_members(scene, further)
        return further

    def release_notes(self, scene: Audited) -> list[str]:
        """What the report says of every attack."""
        random = self.config.model is None or self.config.model.weights is None
        wider = [ONE_RELEASE] if self.wider else []
        return [
            ONCE,
            *([RANDOM] if random else []),
            *self.notes(),
            *wider,
            *scene.gaps,
            *self.partner_notes(scene),
        ]

    def partner_notes(self, scene: Audited) -> list[str]:
        """Who stood in for the others of a sum."""
        if scene.partners is None or scene.job.fusion is None:
            return []
        who = "other people" if scene.partners.strangers else "the same patients"
        return [
            f"The partners are stand-ins ({scene.partners.source}; {who}): what the sum hides depends on them. "
            '"Others known" assumes nothing of them.'
        ]

    def counted(self, scene: Audited, mechanism: DPGaussian | None) -> int:
        """How many records count for a patient: the windows that leave, at most."""
        window, overlap = window_of(scene.job), self.job.evaluation.overlap
        shapes = {scene.own_volumes.geometry(key).shape for key in scene.cohort.keys()}  # noqa: SIM118
        return max(len(window_origins(shape, window, overlap)) for shape in shapes)

    def hospitals(self) -> dict[str, str]:
        """All sites of the job, and what each holds."""
        seats = seats_of(self.job)
        return {
            site: ", ".join(m for seat in seats.of(site) for m in seat.modalities) for site in seats.filled
        }


@dataclass(frozen=True)
class Audited:
    """What all adversaries of one audit share."""

    job: Job
    cohort: Cohort
    targets: Samples
    others: Samples
    similar: Cohort
    """Of whom the adversary has `others`, in this site's modalities."""
    partners: StandIns | None
    judge: Judge
    gaps: tuple[str, ...]
    training: tuple[bytes, ...] = ()
    """Patients who are not held out."""
    held_out: tuple[bytes, ...] = ()

    @property
    def own_volumes(self) -> Volumes:
        """Of the first of the site's modalities: they know how large each patient's are."""
        return next(iter(self.cohort.images.values()))

    def read(self, adversary: Onlooker, samples: Sequence[Sample], stacks: dict[str, ImageStack]) -> Arrays:
        """What an adversary reads of these windows of the site's patients: float32 [N, C, *spatial] by level.

        Args:
            stacks: defences of the site's images, by modality.
        """
        window = window_of(self.job)
        own = {
            part.seat.name: part.seat.modalities for part in adversary.parts if part.site == adversary.site
        }
        channels = Channels(self.cohort.images, own, stacks)
        images = {name: channels.batch(name, samples, window, None) for name in own}
        missing = [part.seat for part in adversary.parts if part.seat.name not in own]
        if missing and self.partners is not None:
            theirs = self.partners.images(samples, self.own_volumes, window)
            images |= {seat.name: np.concatenate([theirs[m] for m in seat.modalities], 1) for seat in missing}
        return read(sent(adversary.parts, samples, images), self.job)

    def beside(self, seat: Seat) -> dict[int, np.ndarray]:
        """The adversary's own images at each distance from its windows, as `shadow_beside`; of partners those of their
        stand-ins."""
        window, volumes, found = window_of(self.job), next(iter(self.similar.images.values())), {}
        for by in offsets(REACH):
            samples = moved(self.others.samples, by, volumes)
            images = dict(cut(Cohort(self.similar.images), samples, window).images)
            if self.partners is not None and self.job.fusion is not None:
                images |= self.partners.images(samples, volumes, window)
            found[by] = np.concatenate([images[m] for m in seat.modalities], 1)
        return found
