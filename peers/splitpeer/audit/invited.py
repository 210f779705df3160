"""What a site that is invited to a job brings to its audit: images, masks, policy, and its place in the job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from splitpeer.attacks.budget import FIXED, Budget
from splitpeer.audit.cohort import Cohort, Samples, shadow
from splitpeer.audit.experiment import Experiment
from splitpeer.audit.rehearsal import Protection
from splitpeer.audit.stand_in_task import StandInTask
from splitpeer.audit.wider import WIDER
from splitpeer.daemon import happenings as h
from splitpeer.data.channels import Channels
from splitpeer.data.geometry import Triple, spacing_of
from splitpeer.data.layouts import find_labels
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.volumes import Volumes
from splitpeer.defences.activation.dp import DPGaussian
from splitpeer.errors import ConfigError, DataError
from splitpeer.federation.files import check_seats
from splitpeer.federation.images import find_cases, open_consent, open_volumes
from splitpeer.federation.seats import seats_of
from splitpeer.privacy.accounting import FPR, detected, epsilon, mu
from splitpeer.report.model import Privacy
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig, Policy
from splitpeer.site.invitation import objections
from splitproto.records import Seat

DELTA = 1e-5
"""Delta, if the policy names none."""
STAND_IN = (
    "The network was trained on a stand-in task (bands of brightness), because no masks were given: its Dice says "
    "nothing about the job's task, and label leakage was not measured."
)
OWN_PATIENTS = (
    "The adversary's similar images are this site's own other patients: closer to the patients under attack than "
    "anything an outsider has."
)


@dataclass(frozen=True)
class Invited:
    """What `splitpeer audit` is asked.

    Args:
        config: the site's `peer.toml`: its images and the policy under audit.
        job: the job that the site is invited to.
        labels: folder of masks, if the site has any.
        convention: of the masks.
        shadow: the adversary's own similar images; None: this site's training patients.
        partners: folder of images that stand in for the other sites'; None: phantom patients.
        wider: attacks on neighbouring slices, and with sites that help; none: nor is membership attacked.
    """

    config: PeerConfig
    job: JobConfig
    out: Path
    labels: Path | None = None
    convention: str | None = None
    shadow: Path | None = None
    partners: Path | None = None
    wider: tuple[str, ...] = WIDER
    samples: int = 12
    shadow_images: int = 600
    seed: int = 0
    device: str = "cpu"
    budget: Budget = FIXED

    def protections(self, extra: Sequence[Protection] = ()) -> list[Protection]:
        """What is compared: nothing, the policy, and what was asked for."""
        policy = self.config.policy
        own = _of_policy(policy) if policy else Protection()
        return list(dict.fromkeys([Protection(), own, *extra]))

    def site(self) -> str:
        """The site's name in the job.

        Raises:
            ConfigError: nothing in it is for this site, or its policy would decline it.
        """
        config, job = self.config, self.job
        if not config.peer.modalities:
            raise ConfigError("an audit is a site's: peer.toml must be a client's")
        fitting = [site for site in job.sites if self.offered(site) <= set(config.peer.modalities)]
        if not fitting:
            raise ConfigError(f"{job.source}: no site of this job holds {config.peer.held}")
        site = config.peer.site if config.peer.site in fitting else fitting[0]
        if config.policy is not None:
            self._refuse_what_would_be_declined(site)
        return site

    def offered(self, site: str) -> set[str]:
        """The modalities that the job asks of a site; one that fills no seat by itself is not asked for."""
        return {modality for seat in seats_of(self.job).of(site) for modality in seat.modalities}

    def held(self, site: str) -> tuple[str, ...]:
        """The same in the order of peer.toml, which the keys of its defences follow."""
        return tuple(modality for modality in self.config.peer.modalities if modality in self.offered(site))

    def cohort(self, seats: Sequence[Seat]) -> tuple[Cohort, list[str]]:
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

    def known(self, cohort: Cohort) -> Cohort:
        """The same with real masks only."""
        return cohort if self.labels is not None else Cohort(cohort.images)

    def strangers(self, folder: Path, seat: Seat, window: Triple) -> tuple[Samples, Cohort]:
        """The similar images that the user gave, and all that they are from."""
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
        return shadow(cohort, window, self.shadow_images, self.seed), cohort

    def notes(self) -> list[str]:
        """What the report says of every attack."""
        return [OWN_PATIENTS] if self.shadow is None else []

    def named(self, experiment: Experiment) -> Experiment:
        """The rehearsal takes the place of this site's federation; attacks have the audit's budget."""
        federation = {"federation": self.config.peer.federation}
        source = experiment.source.model_copy(update=federation)
        return replace(experiment, source=source, budget=self.budget)

    def privacy(self, mechanism: DPGaussian | None, records: int) -> Privacy | None:
        """What a mechanism comes to over the whole job; None where there is none.

        Args:
            records: that count for a patient.
        """
        if mechanism is None:
            return None
        policy = self.config.policy
        delta = policy.delta if policy is not None and policy.delta is not None else DELTA
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
            statement="Training records of this job alone; evaluations and further jobs add to it."
            + _collusion(mechanism, records, delta),
        )

    # --- inside ----------------------------------------------------------------------------------------------

    def _refuse_what_would_be_declined(self, site: str) -> None:
        """Raises ConfigError."""
        # A frozen job's weights are judged where they are read.
        if found := objections(self.job, self.config, site, weights=False):
            raise ConfigError(
                f"{self.job.source}: the job would be declined ({found[0]}): ask the coordinator for another, or audit "
                "what you would allow"
            )


def _of_policy(policy: Policy) -> Protection:
    return Protection(
        tuple(spec.written for spec in policy.defences), tuple(spec.written for spec in policy.image_defences)
    )


def _collusion(mechanism: DPGaussian, records: int, delta: float) -> str:
    """What noise that sites share assumes, and what is left of it; empty where it is not shared."""
    sites, honest = int(mechanism.values["shared"]), int(mechanism.values["honest"])
    if sites == 1:
        return ""
    whole = float(mechanism.values["noise"])
    alone, all_of_them = (epsilon({noise: records}, delta) for noise in (mechanism.own_noise, whole))
    return (
        f" {sites} sites of a sum share the noise, of which {honest} are counted on not to tell theirs. If none tells, "
        f"epsilon is {all_of_them:.3g}; if all others work with the coordinator, {alone:.3g}."
    )
