"""A site's audit before it joins: both parts played on its own data, as its policy stands and undefended beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from splitpeer.attacks.base import Knowledge, Progress, silent
from splitpeer.attacks.view import coordinator_view, site_view
from splitpeer.audit.book import Book, applied, network_of
from splitpeer.audit.bound import gaussian_bound
from splitpeer.audit.campaign import Judge, make_judge, parse_order, run
from splitpeer.audit.cohort import Cohort, Samples, cut, most_tumour, shadow
from splitpeer.audit.knowledge import with_decoder, with_model, with_shadow
from splitpeer.audit.rehearsal import COORDINATOR, Protection, Recording, Rehearsal, Rehearsed
from splitpeer.audit.standin import StandIn
from splitpeer.captures.reader import open_capture
from splitpeer.data.layouts import find_images, find_labels
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.volumes import Volumes
from splitpeer.defences import Defended
from splitpeer.defences.dp import mechanism
from splitpeer.errors import AttackImpossible, ConfigError
from splitpeer.privacy.accounting import epsilon
from splitpeer.report.model import Privacy, Source, configuration
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig

DELTA = 1e-5
"""Where the policy names none."""
STAND_IN = (
    "The network was trained on a stand-in task (bands of brightness), because no masks were given: its Dice says "
    "nothing about tumours, and label leakage was not measured."
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
        own = Protection(policy.defences, policy.image_defences) if policy else Protection()
        return list(dict.fromkeys([Protection(), own, *extra]))

    def run(
        self, attacks: Sequence[str], protections: Sequence[Protection], commands: tuple[str, ...] = (),
        progress: Progress = silent,
    ) -> list[Path]:  # fmt: skip
        """Rehearse and attack each; returns the run folders.

        Raises:
            PeerError: settings or images that cannot be used.
        """
        modality = self.config.peer.modality
        if modality is None:
            raise ConfigError("an audit is a site's: peer.toml must be a client's")
        job = self._job(modality)
        cohort, stand_in = self._cohort(modality)
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
            self._attack(rehearsal, played, targets, attacks, modality, stand_in, commands, progress)
            folders += [path.parent for path in sorted(rehearsal.folder.glob("**/attack.json"))]
        return folders

    # --- inside ----------------------------------------------------------------------------------------------

    def _job(self, modality: str) -> JobConfig:
        policy, job = self.config.policy, self.job
        if modality not in job.sites.values():
            raise ConfigError(f"{job.source}: no site of this job holds {modality}")
        levels = job.model.levels
        if policy is not None and set(levels) - set(policy.levels):
            raise ConfigError(
                f"{job.source} asks for levels {list(levels)}, the policy allows {list(policy.levels)}: "
                "the job would be declined; ask the coordinator for another, or audit what you would allow"
            )
        alone = {site: held for site, held in job.sites.items() if held == modality}
        training = job.training.model_copy(update={"steps": self.steps or job.training.steps})
        return job.model_copy(update={"sites": alone, "training": training})

    def _cohort(self, modality: str) -> tuple[Cohort, bool]:
        data = self.config.data
        if data.images is None or data.salt is None:
            raise ConfigError("an audit needs [data] images and salt")
        salt = load_salt(data.salt)
        spacing = self.job.data.spacing
        images = Volumes(
            find_images(data.images, data.layout, modality),
            salt=salt,
            spacing=spacing,
            cache_mib=data.cache_mib,
            rules=data.rules(),
        )
        if self.labels is None:
            return Cohort({modality: images}, StandIn(images)), True
        masks = Volumes(
            find_labels(self.labels, data.layout),
            salt=salt,
            spacing=spacing,
            labels=self.convention,
            rules=data.rules(),
        )
        return Cohort({modality: images}, masks), False

    def _targets(self, rehearsal: Rehearsal, stand_in: bool) -> Samples:
        keys = rehearsal.validation[: self.samples]
        if not keys:
            raise ConfigError("no patient is held out: set [data] validation in job.toml to one or more")
        cohort = rehearsal.cohort
        chosen = most_tumour(cohort, keys, rehearsal.window)
        known = Cohort(cohort.images, None) if stand_in else cohort
        return cut(known, chosen, rehearsal.window)

    def _others(self, rehearsal: Rehearsal, modality: str, stand_in: bool) -> Samples:
        if self.shadow is None:
            cohort = rehearsal.cohort
            known = Cohort(cohort.images, None) if stand_in else cohort
            return shadow(known, rehearsal.window, self.shadow_images, self.seed, rehearsal.training)
        folder = self.shadow
        masks = self.convention if (folder / "labels").is_dir() else None
        cohort = Cohort.read(
            folder, [modality], salt=bytes(32), layout=self.config.data.layout, convention=masks
        )
        return shadow(cohort, rehearsal.window, self.shadow_images, self.seed)

    def _attack(
        self, rehearsal: Rehearsal, played: Rehearsed, targets: Samples, attacks: Sequence[str], modality: str,
        stand_in: bool, commands: tuple[str, ...], progress: Progress,
    ) -> None:  # fmt: skip
        others = self._others(rehearsal, modality, stand_in)
        judge = make_judge(modality, targets, others)
        capture = open_capture(played.capture)
        verdict = capture.verify()
        view = coordinator_view(capture, modality, mode="evaluate", choose=lambda _: targets.samples)
        source = Source(
            file=played.capture.name, digest=verdict.last_chain.hex(), role="coordinator", site="hub",
            federation=self.config.peer.federation, run=rehearsal.run.hex(), job=rehearsal.job.name,
            records=verdict.records, rehearsal=True, steps=rehearsal.job.steps, samples=len(view.targets),
        )  # fmt: skip
        notes = [ONE_SITE]
        notes += [STAND_IN] if stand_in else []
        notes += [OWN_PATIENTS] if self.shadow is None else []
        dice = {} if stand_in else {configuration(applied(view), view.gradient_defences): played.dice}
        sites = {self.config.peer.site: modality}
        book = Book(
            played.folder, source, network_of(view, sites, rehearsal.job.precision), commands=commands,
            notes=tuple(notes), dice=dice, privacy=_privacy(rehearsal, self.config),
        )  # fmt: skip
        book.truth(judge)
        knowledge = with_shadow(Knowledge(), others)
        knowledge = with_model(knowledge, view, played.weights(modality))
        knowledge = with_decoder(knowledge, view, played.weights(COORDINATOR))
        if (bound := gaussian_bound(view, knowledge, targets.images[modality])) is not None:
            book.notes = (*book.notes, bound)
        for written in attacks:
            order = parse_order(written)
            try:
                for outcome in run(view, knowledge, [order], judge, seed=self.seed, device=self.device,
                                   progress=progress):  # fmt: skip
                    book.enter(outcome)
            except AttackImpossible as error:
                book.could_not(order.attack, view, str(error))
        if not stand_in:
            self._labels(played, rehearsal, modality, book)

    def _labels(self, played: Rehearsed, rehearsal: Rehearsal, modality: str, images: Book) -> None:
        """What the site itself could read off the first gradients it is sent; a run folder of its own below."""
        view = site_view(open_capture(played.site_capture(modality)), steps=(1,))
        truth = cut(rehearsal.cohort, [t.sample for t in view.targets], rehearsal.window)
        judge = Judge(truth, modality)
        source = images.source.model_copy(update={"role": "client", "site": view.site, "steps": 1})
        book = replace(images, folder=played.folder / "labels", source=source, entries=[], arrays={})
        book.truth(judge)
        for outcome in run(view, Knowledge(), [parse_order("gradient-norm")], judge, seed=self.seed):
            book.enter(outcome)


def _privacy(rehearsal: Rehearsal, config: PeerConfig) -> Privacy | None:
    """What the configuration's differential privacy comes to over the whole job; None where it claims none."""
    network = rehearsal.sites[0].half.network
    mechanism_ = mechanism(network.stack) if isinstance(network, Defended) else None
    if mechanism_ is None:
        return None
    policy = config.policy
    delta = policy.delta if policy is not None and policy.delta is not None else DELTA
    job = rehearsal.job
    drawn = job.steps * job.batch
    # While the encoder learns, every record carries what the weights have seen of each patient.
    records = -(-drawn // len(rehearsal.training)) if mechanism_.frozen else drawn
    return Privacy(
        guarantee=True,
        epsilon=epsilon({mechanism_.noise: records}, delta),
        delta=delta,
        limit=policy.epsilon if policy is not None else None,
        releases=records,
        mechanism=mechanism_.spec,
        accountant="Gaussian differential privacy, exact; replacement of one patient's images",
        statement="Training records of this job alone; evaluations and further jobs add to it.",
    )
