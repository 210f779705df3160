"""A site's audit before it joins: both parts played on its own data, under its policy and, for comparison,
undefended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from splitpeer.attacks.base import Progress, Target, View, silent
from splitpeer.attacks.catalogue import reads_traffic
from splitpeer.attacks.image.kept_noise import applies
from splitpeer.audit.cohort import Cohort, Samples, cut, most_tumour, shadow
from splitpeer.audit.experiment import (
    Order,
    Strangers,
    image_experiment,
    label_experiment,
    parse_order,
    posed_experiment,
)
from splitpeer.audit.further import NO_STRANGERS, ONE_RELEASE, Further
from splitpeer.audit.invited import STAND_IN, Invited
from splitpeer.audit.judge import Judge, Outcome, make_judge
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal, Rehearsed
from splitpeer.audit.released import FrozenSeat, Onlooker, quiet, read, sent
from splitpeer.audit.run_folder import RunFolder, applied
from splitpeer.audit.stand_in_partners import StandIns
from splitpeer.audit.together import Allies
from splitpeer.audit.wider import membership_order, shadow_beside, wider_orders
from splitpeer.defences.key import from_seed
from splitpeer.errors import AttackImpossible, ConfigError
from splitpeer.federation.halves import image_stacks
from splitpeer.federation.seats import seats_of
from splitpeer.models import Decoder
from splitpeer.report.model import Privacy, Source, configuration
from splitpeer.settings.job import JobConfig
from splitpeer.training.split_step import Arrays
from splitproto.records import Sample, Seat

SITE_MIB = 1024
"""Of the steps that the site records of its own rehearsal."""
TRAFFIC_STEPS = 100
"""Of the end of a rehearsal, recorded where an attack learns from all that was sent."""
FIRST_RELEASE = ("gradient-norm",)
ALL_RELEASES = ("gradient-norm", "gradient-field", "gradient-projector")
"""What a site reads off one release of each sample, and off all of them."""
ONE_SITE = "The rehearsal has this site alone; with more sites the encoder is trained a little differently."


@dataclass(frozen=True)
class SiteAudit(Invited):
    """`splitpeer audit` of a job whose encoders are trained.

    Args:
        steps: training steps to rehearse; None: the job's.
    """

    steps: int | None = None
    views: int = 20
    poses: int = 4
    """In how many the samples are asked for, where a site answers the same every time."""

    def run(
        self, attacks: Sequence[str], protections: Sequence[Protection], commands: tuple[str, ...] = (),
        progress: Progress = silent,
    ) -> list[Path]:  # fmt: skip
        """Rehearse and attack each; returns the run folders.

        Raises:
            PeerError: settings or images that cannot be used.
        """
        site = self.site()
        job = self._alone(site)
        seats = seats_of(job).of(site)
        cohort, gaps = self.cohort(seats)
        # All are made before the first is played: a misspelt defence must not cost an hour.
        rehearsals = [
            Rehearsal(
                job,
                cohort,
                p,
                self.out / f"{number}-{'defended' if p != Protection() else 'undefended'}",
                seed=self.seed,
                device=self.device,
            )
            for number, p in enumerate(protections)
        ]
        partners = None
        if self.wider and len(self.job.sites) > 1:
            partners = StandIns.find(self.job, self.config, site, self.partners, self.out / "partners")
        folders = []
        for rehearsal in rehearsals:
            targets = {seat: self._targets(rehearsal, seat) for seat in seats}
            asked = tuple(dict.fromkeys(sample for of in targets.values() for sample in of.samples))
            recording = Recording(
                first=2,
                last=TRAFFIC_STEPS if reads_traffic(attacks) else 2,
                site_mib=SITE_MIB,
                targets=asked,
                views=self.views,
                poses=self.poses if rehearsal.protection != Protection() else 0,
            )
            played = rehearsal.play(recording, progress)
            for seat in seats:
                others, similar = self._others(rehearsal, seat)
                made = make_judge(seat.modalities, targets[seat], others)
                one = _Attacked(rehearsal, played, seat, made, others, similar)
                notes = [ONE_SITE, *([STAND_IN] if self.labels is None else []), *self.notes(), *gaps]
                folder = rehearsal.folder / seat.name if len(seats) > 1 else rehearsal.folder
                opened, done = self._attack(one, folder, attacks, notes, commands, progress)
                if self.wider:
                    self._attack_further(one, partners, opened, done, progress)
            folders += [path.parent for path in sorted(rehearsal.folder.glob("**/attack.json"))]
        return folders

    # --- inside ----------------------------------------------------------------------------------------------

    def _alone(self, site: str) -> JobConfig:
        """The job with this site alone."""
        job = self.job
        seats = seats_of(job)
        stacked = {name: of for name, of in job.seats.items() if name in seats.filled[site]}
        training = job.training.model_copy(update={"steps": self.steps or job.training.steps})
        # What a patient lacks here, another site may fill: any patient with a filled seat may be asked for.
        data = job.data.model_copy(update={"min_seats": 1, "complete_first": 0})
        alone = {"sites": {site: self.held(site)}, "seats": stacked, "training": training, "data": data}
        return job.model_copy(update=alone)

    def _targets(self, rehearsal: Rehearsal, seat: Seat) -> Samples:
        """What is attacked at a seat: held-out patients who fill it.

        Raises:
            ConfigError: there is none, or nobody else to learn from.
        """
        held_out = rehearsal.filling(rehearsal.validation, seat)
        if not held_out:
            raise ConfigError(
                f"no patient is held out who fills {seat.name}: set [data] validation in job.toml to more"
            )
        if self.shadow is None and not rehearsal.filling(rehearsal.training, seat):
            raise ConfigError(
                f"no patient is left to train on who fills {seat.name}: set [data] validation in job.toml to fewer"
            )
        chosen = most_tumour(rehearsal.cohort, held_out[: self.samples], rehearsal.window)
        return cut(self.known(rehearsal.cohort).at(seat.modalities), chosen, rehearsal.window)

    def _others(self, rehearsal: Rehearsal, seat: Seat) -> tuple[Samples, Cohort]:
        """The adversary's own windows, and the people they are of."""
        if self.shadow is None:
            known = self.known(rehearsal.cohort)
            # Attacks through the coordinator's decoder need all images of the same people.
            whole = [key for key in rehearsal.training if key in rehearsal.seating.complete]
            own = known if whole else known.at(seat.modalities)
            keys = whole or rehearsal.filling(rehearsal.training, seat)
            return shadow(own, rehearsal.window, self.shadow_images, self.seed, keys), own
        return self.strangers(self.shadow, seat, rehearsal.window)

    def _attack(
        self, one: _Attacked, out: Path, attacks: Sequence[str], notes: Sequence[str], commands: tuple[str, ...],
        progress: Progress,
    ) -> tuple[RunFolder, list[Outcome]]:  # fmt: skip
        """The run folder, and what was found on the samples alone."""
        rehearsal, played, seat = one.rehearsal, one.played, one.seat.name
        images = self.named(image_experiment(rehearsal, played, seat, one.judge, one.others, self.device))
        view = images.view
        learned = self.labels is not None
        reached = {configuration(applied(view), view.gradient_defences): played} if learned else {}
        folder = images.open_folder(
            out,
            commands=commands,
            notes=notes,
            reached=reached,
            privacy=self._privacy(rehearsal),
        )
        orders = [parse_order(written) for written in attacks]
        done = list(images.run(orders, folder, progress=progress))
        if posed := posed_experiment(images, rehearsal, played, seat):
            extra = [Order("kept-noise")] if applies(posed.view) else []
            for _ in posed.run([*extra, *orders], folder, naive=False, progress=progress):
                pass
        if learned:
            self._attack_labels(one, view, folder)
        return folder, done

    def _attack_labels(self, one: _Attacked, view: View, folder: RunFolder) -> None:
        """What the site itself could read off the gradients it is sent: the first, and all together."""
        strangers = Strangers.met(one.seat, one.others, self.device)
        for name, every, wanted in (
            ("labels", False, FIRST_RELEASE),
            ("labels-all-steps", True, ALL_RELEASES),
        ):
            try:
                labels = self.named(
                    label_experiment(
                        one.rehearsal,
                        one.played,
                        one.seat.name,
                        strangers=strangers,
                        device=self.device,
                        every=every,
                    )
                )
            except AttackImpossible as error:
                folder.could_not(wanted[0], view, str(error))
                return
            for _ in labels.run([Order(attack) for attack in wanted], labels.open_below(folder, name)):
                pass

    def _attack_further(
        self, one: _Attacked, partners: StandIns | None, opened: RunFolder, done: Sequence[Outcome],
        progress: Progress,
    ) -> None:  # fmt: skip
        """What is read with slices around the samples, with other hospitals' help, and of who was trained on."""
        rehearsal, alone = one.rehearsal, self._onlooker(one)

        def released(samples: Sequence[Sample]) -> tuple[Target, ...]:
            return alone.targets(samples, one.read(alone, samples))

        samples = one.targets.samples
        source = Source(role="coordinator", rehearsal=True)
        experiment = self.named(
            alone.experiment(samples, one.read(alone, samples), one.judge, one.others, source)
        )
        further = Further(
            experiment, released, rehearsal.cohort, wider_orders(self.wider, done), opened, progress
        )
        opened.notes = (*opened.notes, ONE_RELEASE)
        further.neighbours(lambda: shadow_beside(one.similar, one.others.samples, rehearsal.window, one.seat))
        training, held_out = (
            rehearsal.filling(keys, one.seat) for keys in (rehearsal.training, rehearsal.validation)
        )
        if self.labels is None or self.shadow is None:
            further.leave_out(NO_STRANGERS)
        else:
            half = rehearsal.half.network if len(rehearsal.seats) == 1 else None
            further.members(
                training, held_out, rehearsal.window, membership_order(rehearsal.config),
                half if isinstance(half, Decoder) else None,
            )  # fmt: skip
        if partners is not None:
            stacks = image_stacks(
                rehearsal.protection.image, from_seed(self.seed, alone.site), self.held(alone.site)
            )
            further.together(Allies(alone, partners, stacks=stacks), training, self.shadow_images)

    def _onlooker(self, one: _Attacked) -> Onlooker:
        """A coordinator that asks the encoder as it is after the last step."""
        (site,) = one.rehearsal.sites
        part = FrozenSeat(site.name, one.seat, quiet(site.job.encoders.halves[one.seat.name]))
        hospitals = {site.name: ", ".join(m for seat in site.seats for m in seat.modalities)}
        return Onlooker(
            one.rehearsal.job, (part,), site.name, site.job.defences, "", hospitals, self.device, self.seed
        )

    def _privacy(self, rehearsal: Rehearsal) -> Privacy | None:
        """What the configuration's differential privacy comes to over the whole job; None where it claims none."""
        mechanism = rehearsal.sites[0].job.encoders.mechanism
        drawn = rehearsal.job.steps * rehearsal.job.batch
        # While the encoder learns, every record carries what the weights have seen of each patient.
        frozen = mechanism is not None and mechanism.frozen
        return self.privacy(mechanism, -(-drawn // len(rehearsal.training)) if frozen else drawn)


@dataclass(frozen=True)
class _Attacked:
    """A seat of a rehearsal that was played."""

    rehearsal: Rehearsal
    played: Rehearsed
    seat: Seat
    judge: Judge
    others: Samples
    """The adversary's own windows."""
    similar: Cohort
    """Whose they are."""

    @property
    def targets(self) -> Samples:
        if self.judge.truth is None:
            raise ValueError("an audit knows the truth")
        return self.judge.truth

    def read(self, alone: Onlooker, samples: Sequence[Sample]) -> Arrays:
        """What is sent of these windows, once: float32 [N, C, *spatial] by level."""
        (site,) = self.rehearsal.sites
        name = self.seat.name
        images = {name: site.job.channels.batch(name, samples, self.rehearsal.window, None)}
        return read(sent(alone.parts, samples, images), alone.job)
