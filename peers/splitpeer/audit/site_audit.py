"""A site's audit before it joins: both parts played on its own data, under its policy and, for comparison,
undefended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from splitpeer.attacks.base import Progress, silent
from splitpeer.attacks.catalogue import reads_traffic
from splitpeer.attacks.image.kept_noise import applies
from splitpeer.audit.cohort import Samples, cut, most_tumour, shadow
from splitpeer.audit.experiment import (
    Order,
    Strangers,
    image_experiment,
    label_experiment,
    parse_order,
    posed_experiment,
)
from splitpeer.audit.invited import STAND_IN, Invited
from splitpeer.audit.judge import Judge, make_judge
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal, Rehearsed
from splitpeer.audit.run_folder import applied
from splitpeer.errors import AttackImpossible, ConfigError
from splitpeer.federation.seats import seats_of
from splitpeer.report.model import Privacy, configuration
from splitpeer.settings.job import JobConfig
from splitproto.messages import Seat

SITE_MIB = 1024
"""Of the steps that the site records of its own rehearsal."""
TRAFFIC_STEPS = 100
"""Of the end of a rehearsal, recorded where an attack learns from all that was sent."""
ONE_RELEASE = ("gradient-norm",)
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
                folder = rehearsal.folder / seat.name if len(seats) > 1 else rehearsal.folder
                others = self._others(rehearsal, seat)
                made = make_judge(seat.modalities, targets[seat], others)
                notes = [ONE_SITE, *([STAND_IN] if self.labels is None else []), *self.notes(), *gaps]
                self._attack(rehearsal, played, seat, made, others, folder, attacks, notes, commands,
                             progress)  # fmt: skip
            folders += [path.parent for path in sorted(rehearsal.folder.glob("**/attack.json"))]
        return folders

    # --- inside ----------------------------------------------------------------------------------------------

    def _alone(self, site: str) -> JobConfig:
        """The job with this site alone."""
        job = self.job
        seats = seats_of(job)
        stacked = {name: of for name, of in job.seats.items() if name in seats.filled[site]}
        training = job.training.model_copy(update={"steps": self.steps or job.training.steps})
        # What a patient lacks here, another site may fill: whoever fills a seat may be asked for.
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

    def _others(self, rehearsal: Rehearsal, seat: Seat) -> Samples:
        if self.shadow is None:
            known = self.known(rehearsal.cohort)
            # Attacks through the coordinator's decoder need all images of the same people.
            whole = [key for key in rehearsal.training if key in rehearsal.seating.complete]
            own = known if whole else known.at(seat.modalities)
            keys = whole or rehearsal.filling(rehearsal.training, seat)
            return shadow(own, rehearsal.window, self.shadow_images, self.seed, keys)
        return self.strangers(self.shadow, seat, rehearsal.window)[0]

    def _attack(
        self, rehearsal: Rehearsal, played: Rehearsed, seat: Seat, judge: Judge, others: Samples, out: Path,
        attacks: Sequence[str], notes: Sequence[str], commands: tuple[str, ...], progress: Progress,
    ) -> None:  # fmt: skip
        images = self.named(image_experiment(rehearsal, played, seat.name, judge, others, self.device))
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
        for _ in images.run(orders, folder, progress=progress):
            pass
        if posed := posed_experiment(images, rehearsal, played, seat.name):
            extra = [Order("kept-noise")] if applies(posed.view) else []
            for _ in posed.run([*extra, *orders], folder, naive=False, progress=progress):
                pass
        if not learned:
            return
        # What the site itself could read off the gradients it is sent: the first, and all together.
        strangers = Strangers.met(seat, others, self.device)
        for name, every, wanted in (("labels", False, ONE_RELEASE), ("labels-all-steps", True, ALL_RELEASES)):
            try:
                labels = self.named(
                    label_experiment(
                        rehearsal, played, seat.name, strangers=strangers, device=self.device, every=every
                    )
                )
            except AttackImpossible as error:
                folder.could_not(wanted[0], view, str(error))
                return
            for _ in labels.run([Order(attack) for attack in wanted], labels.open_below(folder, name)):
                pass

    def _privacy(self, rehearsal: Rehearsal) -> Privacy | None:
        """What the configuration's differential privacy comes to over the whole job; None where it claims none."""
        mechanism = rehearsal.sites[0].job.encoders.mechanism
        drawn = rehearsal.job.steps * rehearsal.job.batch
        # While the encoder learns, every record carries what the weights have seen of each patient.
        frozen = mechanism is not None and mechanism.frozen
        return self.privacy(mechanism, -(-drawn // len(rehearsal.training)) if frozen else drawn)
