"""A site's audit of a job with secure fusion whose encoders learn: the coordinator reads the sum, and all are sent one
gradient of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from splitpeer.attacks.base import Progress, Target, View
from splitpeer.audit.cohort import cut
from splitpeer.audit.experiment import Experiment, Order, Strangers, site_knowledge
from splitpeer.audit.further import NO_STRANGERS, ONE_RELEASE, Further
from splitpeer.audit.invited import STAND_IN
from splitpeer.audit.judge import Judge
from splitpeer.audit.rehearsal import Protection
from splitpeer.audit.release_audit import Audited, ReleaseAudit
from splitpeer.audit.released import FrozenSeat, sum_of
from splitpeer.audit.run_folder import MALICIOUS, OTHERS, RunFolder, network_of
from splitpeer.audit.site_audit import ALL_RELEASES, FIRST_RELEASE
from splitpeer.audit.sum_training import SumTraining
from splitpeer.audit.wider import membership_order
from splitpeer.defences.activation.dp import DPGaussian
from splitpeer.defences.image.stack import ImageStack
from splitpeer.errors import ConfigError
from splitpeer.federation.terms import window_of
from splitpeer.models.registry import backbone_of
from splitpeer.report.model import Source
from splitproto.fusion import dtype_of

LEARNING = (
    "Encoders learn in this job: a window is summed again each time it is trained on, in other poses and under other "
    "weights. These figures are of one sum of each window, made by the encoders of the last step."
)
MANY = "What the sums of one window in many training steps show together."
BACK = "of the sum"
"""What hospitals are sent, behind an attack's name."""


@dataclass(frozen=True)
class SumAudit(ReleaseAudit):
    """`splitpeer audit` of such a job: all parties are played, with stand-ins for the partners."""

    not_tested = (*MALICIOUS, MANY, *OTHERS)

    def learn(
        self, scene: Audited, parts: Sequence[FrozenSeat], others: Sequence[FrozenSeat],
        stacks: dict[str, ImageStack], protection: Protection, progress: Progress,
    ) -> SumTraining:  # fmt: skip
        """Train all encoders where they are; what came back is kept.

        Raises:
            ConfigError: nobody is left to train on.
        """
        if scene.job.fusion is None or scene.partners is None:
            raise ValueError("the audit of a sum")
        if not scene.training:
            raise ConfigError(
                "no patient is left to train on who fills all seats of this site: set [data] validation in job.toml to "
                "fewer"
            )
        course = SumTraining(
            self.job, scene.job, scene.job.fusion, scene.cohort, scene.partners, parts, others, stacks,
            protection.gradients, self.seed, self.device,
        )  # fmt: skip
        course.play(scene.training, progress)
        return course

    def ask_for_members(self, scene: Audited, further: Further) -> None:
        """All encoders learned from the patients who are trained on; the adversary reads the sum, or this site's part.

        It has masks of its own patients, and they are none of these.
        """
        if self.shadow is None:
            further.leave_out(NO_STRANGERS)
        else:
            further.members(scene.training, scene.held_out, window_of(scene.job), membership_order(self.job))

    def attack_labels(
        self, scene: Audited, course: SumTraining | None, protection: Protection, images: RunFolder
    ) -> list[Path]:
        """What this site reads off the first gradient of each sample and off all of them; needs masks."""
        if course is None or self.labels is None:
            return []
        folders = []
        for part in course.own:
            strangers = Strangers.met(part.seat, scene.others, self.device)
            for name, targets, wanted in (
                ("labels", course.first(), FIRST_RELEASE),
                ("labels-all-steps", course.followed(), ALL_RELEASES),
            ):
                one = self.named(self._labels_of(scene, part, targets, strangers, protection))
                below = name if len(course.own) == 1 else f"{name}-{part.seat.name}"
                folder = one.open_below(images, below)
                for _ in one.run([Order(attack) for attack in wanted], folder):
                    pass
                folders.append(folder.folder)
        return folders

    # --- inside ----------------------------------------------------------------------------------------------

    def _labels_of(
        self, scene: Audited, part: FrozenSeat, targets: tuple[Target, ...], strangers: Strangers,
        protection: Protection,
    ) -> Experiment:  # fmt: skip
        job = scene.job
        if job.fusion is None:
            raise ValueError("the audit of a sum")
        view = View(
            role="client", site=part.site, seat=part.seat, seats=(part.seat,), backbone=backbone_of(job),
            window=tuple(job.window), targets=targets, gradient_defences=protection.gradients, fusion="secure-sum",
            reads=BACK, summed=sum_of(job.fusion.parties),
        )  # fmt: skip
        truth = cut(
            scene.cohort.at(part.seat.modalities), [target.sample for target in targets], window_of(job)
        )
        source = Source(
            role="client", site=part.site, job=job.name, rehearsal=True, steps=job.steps, samples=len(targets),
            summed=job.fusion.parties,
        )  # fmt: skip
        network = network_of(view, self.hospitals(), dtype_of(job.fusion), back=job.precision)
        known = site_knowledge(view, truth, strangers.samples)
        return Experiment(
            view, known, Judge(truth, own=strangers.own), source, network, self.seed, self.device
        )

    def release_notes(self, scene: Audited) -> list[str]:
        """What the report says of every attack."""
        stand_in = [STAND_IN] if self.labels is None else []
        wider = [ONE_RELEASE] if self.wider else []
        return [LEARNING, *stand_in, *self.notes(), *wider, *scene.gaps, *self.partner_notes(scene)]

    def counted(self, scene: Audited, mechanism: DPGaussian | None) -> int:
        """How many records count for a patient: while the encoder learns, every one carries what the weights have
        seen of each."""
        drawn = scene.job.steps * scene.job.batch
        frozen = mechanism is not None and mechanism.frozen
        return -(-drawn // len(scene.training)) if frozen else drawn
