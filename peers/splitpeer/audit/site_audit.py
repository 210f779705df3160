"""A site's audit before it joins: both parts played on its own data, under its policy and, for comparison,
undefended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from splitpeer.attacks.base import Progress, silent
from splitpeer.audit.cohort import Cohort, Samples, cut, most_tumour, shadow
from splitpeer.audit.experiment import Experiment, Order, image_experiment, label_experiment, parse_order
from splitpeer.audit.judge import make_judge
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal, Rehearsed
from splitpeer.audit.run_folder import applied
from splitpeer.audit.stand_in_task import StandInTask
from splitpeer.data.consent import Consent
from splitpeer.data.geometry import spacing_of
from splitpeer.data.layouts import find_all, find_labels
from splitpeer.data.pseudonym import keyed, load_salt, pseudonym
from splitpeer.data.volumes import Volumes
from splitpeer.errors import ConfigError, DataError
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import job_on_wire, judge, seat_descriptors
from splitpeer.privacy.accounting import epsilon
from splitpeer.report.model import Privacy, configuration
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig, Policy
from splitproto.errors import PolicyRefused, SchemaMismatch
from splitproto.messages import JobOffer, Seat
from splitproto.tensors import schema_digest

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
    seed: int = 0
    device: str = "cpu"

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
        cohort, stand_in = self._cohort([modality for seat in seats for modality in seat.modalities])
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
            targets = self._targets(rehearsal, stand_in)
            played = rehearsal.play(
                Recording(first=2, last=2, targets=targets.samples, views=self.views), progress
            )
            for seat in seats:
                folder = rehearsal.folder if seat == seats[0] else rehearsal.folder / seat.name
                self._attack(rehearsal, played, targets, attacks, seat, folder, stand_in, commands, progress)
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
        return job.model_copy(update={"sites": {site: held}, "seats": stacked, "training": training}), site

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

    def _cohort(self, modalities: Sequence[str]) -> tuple[Cohort, bool]:
        data = self.config.data
        if data.images is None or data.salt is None:
            raise ConfigError("an audit needs [data] images and salt")
        salt = load_salt(data.salt)
        found = find_all(data.images, data.layout, modalities)
        # Who has withdrawn consent is not read here either.
        without = Consent(
            data.withdrawn,
            {key: case for held in found.values() for key, case in keyed(salt, held.cases).items()},
        ).withdrawn()
        images = {
            modality: Volumes(
                [case for case in held.cases if pseudonym(salt, case.patient) not in without],
                salt=salt,
                spacing=spacing_of(self.job.data.spacing),
                normalisation=self.job.task.rule(modality),
                cache_mib=data.cache_mib,
                rules=data.rules(),
            )
            for modality, held in found.items()
        }
        if not Cohort(images).keys():
            raise DataError(
                f"no patient has all of {', '.join(images)}, which a rehearsal needs: complete some, or write ids alike"
            )
        if self.labels is None:
            return Cohort(images, StandInTask(next(iter(images.values())))), True
        masks = Volumes(
            find_labels(self.labels, data.layout),
            salt=salt,
            spacing=spacing_of(self.job.data.spacing),
            labels=self.job.task.task(self.convention),
            rules=data.rules(),
        )
        return Cohort(images, masks), False

    def _targets(self, rehearsal: Rehearsal, stand_in: bool) -> Samples:
        keys = rehearsal.validation[: self.samples]
        if not keys:
            raise ConfigError("no patient is held out: set [data] validation in job.toml to one or more")
        cohort = rehearsal.cohort
        chosen = most_tumour(cohort, keys, rehearsal.window)
        known = Cohort(cohort.images, None) if stand_in else cohort
        return cut(known, chosen, rehearsal.window)

    def _others(self, rehearsal: Rehearsal, seat: Seat, stand_in: bool) -> Samples:
        if self.shadow is None:
            cohort = rehearsal.cohort
            known = Cohort(cohort.images, None) if stand_in else cohort
            return shadow(known, rehearsal.window, self.shadow_images, self.seed, rehearsal.training)
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

    def _attack(
        self, rehearsal: Rehearsal, played: Rehearsed, targets: Samples, attacks: Sequence[str], seat: Seat,
        out: Path, stand_in: bool, commands: tuple[str, ...], progress: Progress,
    ) -> None:  # fmt: skip
        others = self._others(rehearsal, seat, stand_in)
        made = make_judge(seat.modalities, targets, others)
        images = self._named(image_experiment(rehearsal, played, seat.name, made, others, self.device))
        view = images.view
        notes = [ONE_SITE]
        notes += [STAND_IN] if stand_in else []
        notes += [OWN_PATIENTS] if self.shadow is None else []
        notes += _gaps(rehearsal.cohort)
        reached = {} if stand_in else {configuration(applied(view), view.gradient_defences): played}
        folder = images.open_folder(
            out,
            commands=commands,
            notes=notes,
            reached=reached,
            privacy=_privacy(rehearsal, self.config),
        )
        for _ in images.run([parse_order(written) for written in attacks], folder, progress=progress):
            pass
        if not stand_in:
            # What the site itself could read off the first gradients it is sent.
            labels = self._named(label_experiment(rehearsal, played, seat.name, 1, self.device))
            for _ in labels.run([Order("gradient-norm")], labels.open_below(folder, "labels")):
                pass

    def _named(self, experiment: Experiment) -> Experiment:
        """The rehearsal takes the place of this site's federation."""
        federation = {"federation": self.config.peer.federation}
        return replace(experiment, source=experiment.source.model_copy(update=federation))


def _of_policy(policy: Policy) -> Protection:
    return Protection(
        tuple(spec.written for spec in policy.defences), tuple(spec.written for spec in policy.image_defences)
    )


def _gaps(cohort: Cohort) -> list[str]:
    """The note on patients that the job would take at some seats and a rehearsal does not, if there are any."""
    everybody = {key for volumes in cohort.images.values() for key in volumes.keys()}  # noqa: SIM118 (not a dict)
    without = len(everybody) - len(Cohort(cohort.images).keys())
    if not without:
        return []
    return [
        f"{without} of {len(everybody)} patients lack one of {', '.join(cohort.images)} and were not rehearsed."
    ]


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
    return Privacy(
        guarantee=True,
        epsilon=epsilon({mechanism.noise: records}, delta),
        delta=delta,
        limit=policy.epsilon if policy is not None else None,
        releases=records,
        mechanism=str(mechanism.spec),
        accountant="Gaussian differential privacy, exact; replacement of one patient's images",
        statement="Training records of this job alone; evaluations and further jobs add to it.",
    )
