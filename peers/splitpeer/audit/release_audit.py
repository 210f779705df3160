"""A site's audit of a job with frozen encoders, before it joins: what the coordinator would read of each window, once.

With secure fusion that is a sum, and the partners are stand-ins. What they hide of this site's values depends on them,
so there is a second adversary, who knows all their parts: nothing of this site's values can show more than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from splitpeer.attacks.base import Progress, silent
from splitpeer.audit.cohort import Cohort, Samples, cut, most_tumour, shadow
from splitpeer.audit.experiment import parse_order
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
from splitpeer.training.windows import window_origins
from splitproto.messages import Job, Seat

if TYPE_CHECKING:
    from splitpeer.audit.sum_training import SumTraining

RANDOM = (
    "No [model] weights are set: the encoder here is random, as one that the site draws for a run. Weights from "
    "splitpeer pretrain show more or less than these."
)
SUM = "sum"
"""Folder of the adversary who reads it."""
ONCE = "Each window leaves once, with one encoder. Another run with another encoder would show the patients again."
ADDED = (
    "Partners who hold images of the same patients add what those show of them; that is not in these figures."
)


@dataclass(frozen=True)
class ReleaseAudit(Invited):
    """`splitpeer audit` of such a job.

    Args:
        partners: folder of the partners' stand-ins; None: phantom patients.
    """

    partners: Path | None = None
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
            shown = scene.own(parts, stacks)
            defences = announced(stacks, Encoders({p.seat.name: p.half for p in parts}).defences)
            for below, summed, together in self._adversaries(scene, parts, others):
                folder = self.out / name / below
                adversary = Onlooker(
                    job, tuple(together), site, defences, summed, self.hospitals(), self.device, self.seed
                )
                wanted = of_a_sum(attacks) if below == SUM else attacks
                opened = self._attack(adversary, scene, shown, folder, wanted, commands, progress)
                folders.append(folder)
                if below == SUM:
                    folders += self.attack_labels(scene, course, protection, opened)
        return folders

    def learn(
        self, scene: Audited, parts: Sequence[FrozenSeat], others: Sequence[FrozenSeat],
        stacks: dict[str, ImageStack], protection: Protection, progress: Progress,
    ) -> SumTraining | None:  # fmt: skip
        """Train the encoders; frozen ones stay as they are."""
        return None

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
        own = next(iter(cohort.images.values()))
        if self.shadow is not None:
            whole = Seat(site, tuple(m for seat in seats for m in seat.modalities))
            others, volumes = self.strangers(self.shadow, whole, window)
        else:
            others, volumes = shadow(known, window, self.shadow_images, self.seed, training), own
        partners = None
        if job.fusion is not None:
            partners = StandIns.find(self.job, self.config, site, self.partners, self.out / "partners")
            others = replace(
                others, images={**others.images, **partners.images(others.samples, volumes, window)}
            )
        modalities = [modality for seat in seats for modality in seat.modalities]
        return Audited(
            job,
            cohort,
            targets,
            others,
            partners,
            make_judge(modalities, targets, others),
            tuple(gaps),
            tuple(training),
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
        return [("others-known", known_partners(sites), parts), (SUM, sum_of(sites), [*parts, *others])]

    def _attack(
        self, adversary: Onlooker, scene: Audited, shown: dict[str, np.ndarray], folder: Path,
        attacks: Sequence[str], commands: tuple[str, ...], progress: Progress,
    ) -> RunFolder:  # fmt: skip
        source = Source(role="coordinator", rehearsal=True)
        levels = read(
            sent(adversary.parts, scene.targets.samples, scene.images(adversary.parts, shown)),
            scene.job.fusion,
        )
        one = self.named(
            adversary.experiment(scene.targets.samples, levels, scene.judge, scene.others, source)
        )
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
        for _ in one.run([parse_order(written) for written in attacks], opened, progress=progress):
            pass
        return opened

    def release_notes(self, scene: Audited) -> list[str]:
        """What the report says of every attack."""
        random = self.config.model is None or self.config.model.weights is None
        return [ONCE, *([RANDOM] if random else []), *self.notes(), *scene.gaps, *self.partner_notes(scene)]

    def partner_notes(self, scene: Audited) -> list[str]:
        """Who stood in for the others of a sum."""
        if scene.partners is None:
            return []
        who = "other people" if scene.partners.strangers else "the same patients"
        return [
            f"The partners are stand-ins ({scene.partners.source}; {who}): what the sum hides depends on them. "
            f'"Others known" assumes nothing of them. {ADDED}'
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
    partners: StandIns | None
    judge: Judge
    gaps: tuple[str, ...]
    training: tuple[bytes, ...] = ()
    """Who is not held out."""

    @property
    def own_volumes(self) -> Volumes:
        """Of the first of the site's modalities: they know how large each patient's are."""
        return next(iter(self.cohort.images.values()))

    def own(self, parts: Sequence[FrozenSeat], stacks: dict[str, ImageStack]) -> dict[str, np.ndarray]:
        """By seat, the images under attack as the site's encoder sees them: float32 [N, channels, *spatial]."""
        channels = Channels(self.cohort.images, {p.seat.name: p.seat.modalities for p in parts}, stacks)
        window = window_of(self.job)
        return {p.seat.name: channels.batch(p.seat.name, self.targets.samples, window, None) for p in parts}

    def images(self, parts: Sequence[FrozenSeat], shown: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same of all `parts`."""
        missing = [part.seat for part in parts if part.seat.name not in shown]
        if not missing or self.partners is None:
            return shown
        theirs = self.partners.images(self.targets.samples, self.own_volumes, window_of(self.job))
        return shown | {
            seat.name: np.concatenate([theirs[m] for m in seat.modalities], 1) for seat in missing
        }
