"""A site's audit before it joins: both parts played on its own data, under its policy and, for comparison,
undefended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from splitpeer.attacks.base import Progress, silent
from splitpeer.attacks.budget import FIXED, Budget
from splitpeer.attacks.image.kept_noise import applies
from splitpeer.audit.cohort import Cohort, Samples, cut, most_tumour, shadow
from splitpeer.audit.experiment import (
    Experiment,
    Order,
    Strangers,
    image_experiment,
    label_experiment,
    parse_order,
    posed_experiment,
)
from splitpeer.audit.judge import Judge, make_judge
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal, Rehearsed
from splitpeer.audit.run_folder import applied
from splitpeer.audit.stand_in_task import StandInTask
from splitpeer.daemon import happenings as h
from splitpeer.data.channels import Channels
from splitpeer.data.geometry import spacing_of
from splitpeer.data.layouts import find_labels
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.volumes import Volumes
from splitpeer.errors import AttackImpossible, ConfigError, DataError
from splitpeer.federation.files import check_seats
from splitpeer.federation.images import find_cases, open_consent, open_volumes
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import job_on_wire, judge, seat_descriptors
from splitpeer.privacy.accounting import FPR, detected, epsilon, mu
from splitpeer.report.model import Privacy, configuration
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig, Policy
from splitproto.errors import PolicyRefused, SchemaMismatch
from splitproto.messages import JobOffer, Seat
from splitproto.tensors import schema_digest

SITE_MIB = 1024
"""Of the steps that the site records of its own rehearsal."""
ONE_RELEASE = ("gradient-norm",)
ALL_RELEASES = ("gradient-norm", "gradient-field", "gradient-projector")
"""What a site reads off one release of each sample, and off all of them."""
DELTA = 1e-5
"""Delta, if the policy names none."""
STAND_IN = (
    "The network was trained on a stand-in task (bands of brightness), because no masks were given: its Dice says "
    "nothing about the job's task, and label leakage was not measured."
)
ONE_SITE = "The rehearsal has this site alone; with more sites the encoder is trained a little differently."
OWN_PATIENTS = (
    "The adversary's similar images are this site's own other patients: closer to the patients under attack than "
    "anything an outsider has."
)


@dataclass(frozen=True)
class SiteAudit:
    """What `splitpeer audit` is asked.

    Args:
        config: the site's `peer.toml`: its images and the policy under audit.
        job: the job that the site is invited to.
        labels: folder of masks, if the site has any.
        convention: of the masks.
        shadow: the adversary's own similar images; None: this site's training patients.
        steps: training steps to rehearse; None: the job's.
    """

    config: PeerConfig
    job: JobConfig
    out: Path
    labels: Path | None = None
    convention: str | None = None
    shadow: Path | None = None
    steps: int | None = None
    samples: int = 12
    shadow_images: int = 600
    views: int = 20
    poses: int = 4
    """In how many the samples are asked for, where a site answers the same every time."""
    seed: int = 0
    device: str = "cpu"
    budget: Budget = FIXED

    def protections(self, extra: Sequence[Protection] = ()) -> list[Protection]:
        """What is compared: nothing, the policy, and what was asked for."""
        policy = self.config.policy
        own = _of_policy(policy) if policy else Protection()
        return list(dict.fromkeys([Protection(), own, *extra]))

    def run(
        self, attacks: Sequence[str], protections: Sequence[Protection], commands: tuple[str, ...] = (),
        progress: Progress = silent,
    ) -> list[Path]:  # fmt: skip
        """Rehearse and attack each; returns the run folders.

        Raises:
            PeerError: settings or images that cannot be used.
        """
        if not self.config.peer.modalities:
            raise ConfigError("an audit is a site's: peer.toml must be a client's")
        job, site = self._job()
        seats = seats_of(job).of(site)
        cohort, gaps = self._cohort(seats)
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
                last=2,
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
                self._attack(rehearsal, played, seat, made, others, folder, attacks, self._notes(gaps), commands,
                             progress)  # fmt: skip
            folders += [path.parent for path in sorted(rehearsal.folder.glob("**/attack.json"))]
        return folders

    # --- inside ----------------------------------------------------------------------------------------------

    def _job(self) -> tuple[JobConfig, str]:
        """The job with this site alone, and the site's name in it.

        Raises:
            ConfigError: nothing in it is for this site, or its policy would decline it.
        """
        config, job = self.config, self.job
        seats, own = seats_of(job), config.peer.modalities
        # A modality that fills no seat by itself is not asked for, and so becomes no seat here either.
        offered = {
            site: {modality for seat in seats.of(site) for modality in seat.modalities} for site in job.sites
        }
        fitting = [site for site, asked in offered.items() if asked <= set(own)]
        if not fitting:
            raise ConfigError(f"{job.source}: no site of this job holds {config.peer.held}")
        site = config.peer.site if config.peer.site in fitting else fitting[0]
        if config.policy is not None:
            self._judged(job, site)
        stacked = {name: of for name, of in job.seats.items() if name in seats.filled[site]}
        # In the order of peer.toml, which the keys of its defences follow.
        held = tuple(modality for modality in own if modality in offered[site])
        training = job.training.model_copy(update={"steps": self.steps or job.training.steps})
        # What a patient lacks here, another site may fill: whoever fills a seat may be asked for.
        data = job.data.model_copy(update={"min_seats": 1, "complete_first": 0})
        alone = {"sites": {site: held}, "seats": stacked, "training": training, "data": data}
        return job.model_copy(update=alone), site

    def _judged(self, job: JobConfig, site: str) -> None:
        """As the site itself would, were it offered the job by a coordinator that does not record."""
        on_wire, seats = job_on_wire(job), seats_of(job).of(site)
        schema = schema_digest(seat_descriptors(on_wire, seats))
        try:
            judge(JobOffer(bytes(16), seats, on_wire, schema, recorded=False), self.config)
        except (PolicyRefused, SchemaMismatch) as error:
            raise ConfigError(
                f"{job.source}: the job would be declined ({error.reason}): ask the coordinator for another, or audit "
                "what you would allow"
            ) from None

    def _cohort(self, seats: Sequence[Seat]) -> tuple[Cohort, list[str]]:
        """The patients who fill a seat, and notes on those who do not fill all.

        Raises:
            ConfigError, DataError: images, masks or the list of withdrawn patients cannot be used, or there is nobody.
        """
        data, spacing, task = self.config.data, self.job.data.spacing, self.job.task
        if data.images is None or data.salt is None:
            raise ConfigError("an audit needs [data] images and salt")
        found = find_cases(self.config)
        wanted = {modality: found[modality] for seat in seats for modality in seat.modalities}
        # Who has withdrawn consent is not read here either.
        without = open_consent(self.config, found, note=False).withdrawn()
        images = open_volumes(self.config, wanted, spacing or (), task.rule, without)
        channels = Channels(images, {seat.name: seat.modalities for seat in seats})
        told: list[h.Happening] = []
        check_seats(channels, h.Reporter(told.append))
        notes = [f"{one.cause}." for one in told if isinstance(one, h.DataWarning)]
        names, keys = ", ".join(channels.seats), channels.keys()
        if not keys:
            raise DataError(f"no patient is left who fills {names}: all have withdrawn consent")
        if some := sum(len(channels.fills(key)) < len(seats) for key in keys):
            notes.append(f"{some} of {len(keys)} patients fill only some of {names}.")
        if self.labels is None:
            return Cohort(images, StandInTask(images.values())), notes
        masks = Volumes(
            find_labels(self.labels, data.layout),
            salt=load_salt(data.salt),
            spacing=spacing_of(spacing),
            labels=task.task(self.convention),
            rules=data.rules(),
        )
        if not set(keys).intersection(masks.keys()):
            raise DataError(f"{self.labels}: no mask of a patient who fills {names}: write ids alike")
        return Cohort(images, masks), notes

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
        return cut(self._known(rehearsal).at(seat.modalities), chosen, rehearsal.window)

    def _known(self, rehearsal: Rehearsal) -> Cohort:
        """The cohort with real masks only."""
        return rehearsal.cohort if self.labels is not None else Cohort(rehearsal.cohort.images)

    def _others(self, rehearsal: Rehearsal, seat: Seat) -> Samples:
        if self.shadow is None:
            known = self._known(rehearsal)
            # Attacks through the coordinator's decoder need all images of the same people.
            whole = [key for key in rehearsal.training if key in rehearsal.seating.complete]
            own = known if whole else known.at(seat.modalities)
            keys = whole or rehearsal.filling(rehearsal.training, seat)
            return shadow(own, rehearsal.window, self.shadow_images, self.seed, keys)
        folder = self.shadow
        task = self.job.task
        masks = task.task(self.convention) if self.convention and (folder / "labels").is_dir() else None
        cohort = Cohort.read(
            folder,
            seat.modalities,
            salt=bytes(32),
            layout=self.config.data.layout,
            convention=masks,
            spacing=spacing_of(self.job.data.spacing),
            rule=task.rule,
        )
        return shadow(cohort, rehearsal.window, self.shadow_images, self.seed)

    def _notes(self, notes: Sequence[str]) -> list[str]:
        """What the report says of every attack."""
        stand_in = [STAND_IN] if self.labels is None else []
        return [ONE_SITE, *stand_in, *([OWN_PATIENTS] if self.shadow is None else []), *notes]

    def _attack(
        self, rehearsal: Rehearsal, played: Rehearsed, seat: Seat, judge: Judge, others: Samples, out: Path,
        attacks: Sequence[str], notes: Sequence[str], commands: tuple[str, ...], progress: Progress,
    ) -> None:  # fmt: skip
        images = self._named(image_experiment(rehearsal, played, seat.name, judge, others, self.device))
        view = images.view
        learned = self.labels is not None
        reached = {configuration(applied(view), view.gradient_defences): played} if learned else {}
        folder = images.open_folder(
            out,
            commands=commands,
            notes=notes,
            reached=reached,
            privacy=_privacy(rehearsal, self.config),
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
                labels = self._named(
                    label_experiment(
                        rehearsal, played, seat.name, strangers=strangers, device=self.device, every=every
                    )
                )
            except AttackImpossible as error:
                folder.could_not(wanted[0], view, str(error))
                return
            for _ in labels.run([Order(attack) for attack in wanted], labels.open_below(folder, name)):
                pass

    def _named(self, experiment: Experiment) -> Experiment:
        """The rehearsal takes the place of this site's federation; attacks have the audit's budget."""
        federation = {"federation": self.config.peer.federation}
        source = experiment.source.model_copy(update=federation)
        return replace(experiment, source=source, budget=self.budget)


def _of_policy(policy: Policy) -> Protection:
    return Protection(
        tuple(spec.written for spec in policy.defences), tuple(spec.written for spec in policy.image_defences)
    )


def _privacy(rehearsal: Rehearsal, config: PeerConfig) -> Privacy | None:
    """What the configuration's differential privacy comes to over the whole job; None where it claims none."""
    mechanism = rehearsal.sites[0].job.encoders.mechanism
    if mechanism is None:
        return None
    policy = config.policy
    delta = policy.delta if policy is not None and policy.delta is not None else DELTA
    job = rehearsal.job
    drawn = job.steps * job.batch
    # While the encoder learns, every record carries what the weights have seen of each patient.
    records = -(-drawn // len(rehearsal.training)) if mechanism.frozen else drawn
    counts = {mechanism.noise: records}
    return Privacy(
        guarantee=True,
        epsilon=epsilon(counts, delta),
        finds=detected(mu(counts)),
        alarms=FPR,
        delta=delta,
        limit=policy.epsilon if policy is not None else None,
        releases=records,
        mechanism=str(mechanism.spec),
        accountant="Gaussian differential privacy, exact; replacement of one patient's images",
        statement="Training records of this job alone; evaluations and further jobs add to it.",
    )
